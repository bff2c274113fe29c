"""One of the processes of test_two_processes_train_as_one."""

from pathlib import Path

from lmplay.catalog import resolve
from lmplay.plan import read_plan
from lmplay.runner import leave_processes
from lmplay.train.session import Request, run_experiment


class Silent:
    def note(self, *_):
        pass

    preparing = start = row = example = note


plain = {"embed_dropout": 0.0, "ff_dropout": 0.0}
run_experiment(
    Request(
        entry=resolve("gpt2ish"),
        plan=read_plan("words"),
        changes=plain,
        config=plain,
        mini_batch_size=1,
        device="cpu",
        out_dir=Path("two"),
    ),
    Silent(),
)
leave_processes()
