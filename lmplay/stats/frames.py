"""Runs in a notebook: what the table and the figures are made from, as tidy pandas DataFrames."""

from os import PathLike
from pathlib import Path

import pandas as pd

from lmplay.run.folder import find_runs
from lmplay.stats.compare import read_run
from lmplay.stats.judge import verdicts_of
from lmplay.stats.table import flat

_COLUMNS = ("step", "tokens", "loss", "loss_error", "bits_per_byte", "accuracy", "seconds")


def verdicts(
    *paths: str | PathLike, baseline: str | None = None, margin: float | str | None = None
) -> pd.DataFrame:
    """A row for each experiment of each plan, as `lmp-plotstats --csv` has it.

    Args:
        paths: runs' folders, or folders above them.
        baseline: the label that the others are held against; without it, gpt2ish if it is there.
        margin: within which a difference counts as none, nats per token or a share of the compute
            ("5%"); without it, the plan's.
    Raises:
        UserError: there is no run, or none of this label.
    """
    rows = verdicts_of(find_runs([Path(path) for path in paths]), baseline, margin)
    return pd.DataFrame([flat(row) for row in rows])


def curves(*paths: str | PathLike) -> pd.DataFrame:
    """A row for each step of each run, as train.csv and validation.csv have it.

    Besides their columns it has `plan`, `experiment`, `seed` and `split`: "train" or "validation".

    Args:
        paths: runs' folders, or folders above them.
    Raises:
        UserError: there is no run.
    """
    parts = []
    for run in (read_run(folder) for folder in find_runs([Path(path) for path in paths])):
        whose = {"plan": run.plan, "experiment": run.label, "seed": run.seed}
        for split, columns in (("train", run.train), ("validation", run.validation)):
            shown = {name: columns[name] for name in _COLUMNS if name in columns}
            parts.append(pd.DataFrame(shown).assign(**whose, split=split))
    made = pd.concat(parts, ignore_index=True)
    return made[[*("plan", "experiment", "seed", "split"), *_COLUMNS]]
