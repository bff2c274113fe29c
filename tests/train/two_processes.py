"""One of the processes of the tests of two: trains what the options after the script's name say."""

import sys
from pathlib import Path

from lmplay.catalog import resolve
from lmplay.plan import read_plan
from lmplay.runner import leave_processes
from lmplay.train.session import Request, run_experiment


class Silent:
    def note(self, *_):
        pass

    preparing = start = row = example = note


out_dir, exp, *options = sys.argv[1:]
plain = {"embed_dropout": 0.0, "ff_dropout": 0.0}
run_experiment(
    Request(
        entry=resolve(exp),
        plan=read_plan("words"),
        changes=plain,
        config=plain,
        mini_batch_size=1,
        device="cpu",
        precision="bf16" if "bf16" in options else None,
        sharded="shard" in options,
        out_dir=Path(out_dir),
    ),
    Silent(),
)
leave_processes()
