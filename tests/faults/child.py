"""What a forked process does: one command, with a fault armed and its rows written down.

Run by path, with these names set by whoever forks it: COMMAND, ARGS, CWD, ENV, LOG, FAULT, LEDGER,
SETUP.
"""

import hashlib
import importlib
import json
import os
import sys

os.chdir(CWD)  # noqa: F821
os.environ.update(ENV)  # noqa: F821
log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)  # noqa: F821
os.dup2(log, 1)
os.dup2(log, 2)
sys.argv = [COMMAND, *ARGS]  # noqa: F821

from lmplay import fault_points  # noqa: E402
from lmplay.train import loop, reporter  # noqa: E402


def keep_ledger(path: str) -> None:
    """Append to `path`, for each step that was taken, the rows that this process trained on."""
    score, take_step = loop.score, loop.take_step
    rows = []

    def scored(run, part):
        for tokens_T, targets_T in zip(part.tokens_BT, part.targets_BT, strict=True):
            if (targets_T >= 0).any():  # else it fills up a process's share
                octets = tokens_T.numpy().tobytes() + targets_T.numpy().tobytes()
                rows.append(hashlib.sha256(octets).hexdigest()[:16])
        return score(run, part)

    def taken(session, batch, *more):
        rows.clear()
        result = take_step(session, batch, *more)
        if result is not None:
            rank = session.run.accelerator.process_index
            line = {"step": session.run.step + 1, "rank": rank, "rows": rows}
            os.write(ledger, json.dumps(line).encode() + b"\n")
        return result

    ledger = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    loop.score, loop.take_step = scored, taken


reporter.matmul_rate = lambda *_: 1e9  # half a second's measurement of what a display shows
keep_ledger(LEDGER)  # noqa: F821
exec(SETUP)  # noqa: F821
fault_points.arm(FAULT)  # noqa: F821
importlib.import_module(f"lmplay.{COMMAND}.cli").run()  # noqa: F821
