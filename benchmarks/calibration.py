"""How often a verdict errs: false alarms between equal arms, and power against planted differences.

    python benchmarks/calibration.py

trains gpt2ish at tiny size on the text that comes with Python: 60 seeds as they are, and 60 each
with the learning rate times 0.9 and times 0.7. Then it compares, without training any more:

* A/A: the arms are disjoint draws from the first 60 runs, paired at random, as if one experiment
  had two names. Every "better" or "worse" is false.
* Power: the arms are the same seeds with and without the planted change, as in every real
  comparison. It counts how often the verdict has the sign of the mean over all 60 seeds.

The intervals come from drawing the runs anew with replacement, not the comparisons: 60 runs are all
that is known, however many comparisons are made of them.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from typer import Option

from lmplay.console import note, print_json, run_app, show, table
from lmplay.run.folder import RunFolder, run_path
from lmplay.stats.compare import read_run
from lmplay.stats.verdict import paired

PLAN = Path(__file__).with_suffix(".json")
LR = 4e-3  # quick's
FACTORS = (0.9, 0.7)  # of the learning rate
SEEDS_IN_AN_ARM = (2, 3, 5, 8, 12)
LEVEL = 0.05
RESAMPLES = 200

app = typer.Typer(pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Sample:
    """Runs to draw from; a resampled one has some of them several times and others not at all."""

    copies_N: np.ndarray
    draw: np.random.Generator

    def distinct(self, number: int) -> np.ndarray:
        """Indices of runs, none of them twice, each as likely first as it has copies."""
        least_N = 1 - (1 - self.draw.random(len(self.copies_N))) ** (
            1 / np.maximum(self.copies_N, 1)
        )
        least_N[self.copies_N == 0] = np.inf  # the smallest key among a run's copies
        return np.argsort(least_N)[:number]

    def again(self) -> "Sample":
        """As many runs, drawn from these with replacement."""
        size = len(self.copies_N)
        drawn_N = self.draw.integers(0, size, size)
        return Sample(np.bincount(drawn_N, minlength=size), self.draw)


def false_alarms(losses_N: np.ndarray, sample: Sample, num_seeds: int, comparisons: int) -> float:
    """The share of A/A comparisons that find a difference; the arms never share a run."""
    found = 0
    for _ in range(comparisons):
        picks = sample.distinct(2 * num_seeds)
        differences = losses_N[picks[:num_seeds]] - losses_N[picks[num_seeds:]]
        found += paired(differences).p < LEVEL
    return found / comparisons


def power(differences_N: np.ndarray, sample: Sample, num_seeds: int, comparisons: int) -> float:
    """The share of comparisons that find the difference, with the sign that all runs have."""
    sign, found = np.sign(differences_N.mean()), 0
    for _ in range(comparisons):
        result = paired(differences_N[sample.distinct(num_seeds)])
        found += result.p < LEVEL and np.sign(result.mean) == sign
    return found / comparisons


def rates(measure, values_N: np.ndarray, comparisons: int) -> list[dict]:
    """A measure for every number of seeds, with the 95 % interval over resampled runs."""
    whole = Sample(np.ones(len(values_N), dtype=int), np.random.default_rng(0))
    rows = []
    for num_seeds in SEEDS_IN_AN_ARM:
        again = [
            measure(values_N, whole.again(), num_seeds, max(200, comparisons // 10))
            for _ in range(RESAMPLES)
        ]
        rows.append(
            {
                "seeds": num_seeds,
                "comparisons": comparisons,
                "rate": measure(values_N, whole, num_seeds, comparisons),
                "interval": np.percentile(again, [2.5, 97.5]).tolist(),
            }
        )
    return rows


def train(out_dir: Path, runs: int, factor: float) -> np.ndarray:
    """The final validation losses of `runs` seeds, training those that are missing.

    Args:
        factor: of the plan's learning rate.
    """
    changes = {} if factor == 1 else {"optimizer.lr": round(LR * factor, 6)}
    command = [sys.executable, "-m", "lmplay.train", "--exp", "gpt2ish", "--plan", str(PLAN)]
    command += [word for key, value in changes.items() for word in ("--set", f"{key}={value!r}")]
    command += ["--seeds", str(runs), "--out-dir", str(out_dir), "--device", "cpu", "--json"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # a model this small is slower on two
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=one_thread)
    found = []
    for seed in range(runs):
        folder = RunFolder(run_path(out_dir, PLAN.stem, "gpt2ish", changes, seed))
        found.append(read_run(folder).validation["loss"].iloc[-1])
    return np.array(found)


@app.command()
def main(
    runs: Annotated[int, Option(help="Seeds of each kind.", min=30, metavar="N")] = 60,
    comparisons: Annotated[
        int, Option(help="Comparisons for each number of seeds.", min=200, metavar="N")
    ] = 10_000,
    out_dir: Annotated[Path, Option(help="Folder of the runs.", metavar="PATH")] = Path("runs"),
    as_json: Annotated[bool, Option("--json", metavar="", help="Print one JSON document.")] = False,
) -> None:
    """Measure how often verdicts are wrong, and how often they find what is there.

    Example: python benchmarks/calibration.py --out-dir runs
    """
    base_N = train(out_dir, runs, 1)
    report = {
        "schema_version": 1,
        "runs": runs,
        "loss": {"mean": base_N.mean(), "sd": base_N.std(ddof=1)},
        "false_alarms": rates(false_alarms, base_N, comparisons),
        "power": [],
    }
    for factor in FACTORS:
        differences_N = train(out_dir, runs, factor) - base_N
        note(f"comparing: learning rate times {factor}")
        report["power"].append(
            {
                "factor": factor,
                "difference": {"mean": differences_N.mean(), "sd": differences_N.std(ddof=1)},
                "rates": rates(power, differences_N, comparisons),
            }
        )
    print_json(report) if as_json else print_report(report)


def print_report(report: dict) -> None:
    """One row for each number of seeds."""
    columns = ["seeds", "false alarms (A/A)"]
    columns += [f"found: learning rate x {kind['factor']}" for kind in report["power"]]
    parts = [report["false_alarms"], *(kind["rates"] for kind in report["power"])]
    rows = [[str(row[0]["seeds"]), *map(_shown, row)] for row in zip(*parts, strict=True)]
    loss = report["loss"]
    title = f"{report['runs']} runs of each kind: loss {loss['mean']:.4f}, sd {loss['sd']:.4f}"
    show(table(title, columns, rows, right=columns))
    for kind in report["power"]:
        difference = kind["difference"]
        note(
            f"learning rate x {kind['factor']}: {difference['mean']:+.4f} nats in the mean, "
            f"sd of the paired differences {difference['sd']:.4f}"
        )


def _shown(row: dict) -> str:
    low, high = row["interval"]
    return f"{row['rate']:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    run_app(app)
