"""How often a verdict errs, and what it finds, through the whole path from run.json to the word.

    python benchmarks/calibration.py             # losses drawn from a normal distribution
    python benchmarks/calibration.py --runs 60   # losses drawn from as many runs trained here
    python benchmarks/calibration.py --controls  # where nothing can be better, and where much is

Tables of runs are made up as a grid would leave them: every run declares its design, has a loss of
its own, and pairs with the baseline's run of its seed. They are judged as those of a folder are:
looks, screen, Holm, rates, margins. Where no idea differs every "better" and "worse" is false; of
ideas that differ it is counted how many are found. The runs to draw from are gpt2ish at tiny size
on the text that comes with Python, one seed each, at the plan's rate times 0.5, 1 and 2.

The controls are trained and judged as any grid. Negative: the same text with its bytes shuffled
within each document, where no idea about what stands where can help. Positive: on the text itself a
rate of a tenth must be worse.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from typer import Option

from lmplay.console import note, print_json, run_app, show, table
from lmplay.data.sources import documents
from lmplay.plan import Dataset
from lmplay.plan_file import read_plan
from lmplay.run.design import Design, Rate, design_of
from lmplay.run.facts import DataFacts, Facts
from lmplay.run.folder import find_runs
from lmplay.stats.compare import RecordedRun, pair_runs, read_run
from lmplay.stats.judge import judge, verdicts_of
from lmplay.stats.table import print_verdicts

PLAN = Path(__file__).with_suffix(".json")
RATES = (0.5, 1.0, 2.0)
WRONG = ("better", "worse")
IDEAS = ("apos", "focus", "lra", "value_norm")  # about what stands where

app = typer.Typer(pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Case:
    """A kind of table.

    `real` ideas of `ideas` differ from the baseline by `effect` standard deviations of the paired
    differences, for the better; with a margin the ideas differ by just that.
    """

    name: str
    seeds: str
    ideas: int = 1
    real: int = 0
    effect: float = 0.0
    rates: tuple[float, ...] = (1.0,)
    margin: float | None = None

    @property
    def design(self) -> Design:
        return design_of(self.seeds, 0, list(self.rates))


CASES = (
    Case("one look at 5 seeds", "5"),
    Case("looks at 3, 5, 8, 12", "3..12"),
    Case("5 seeds, 16 ideas", "5", 16),
    Case("3..12, 16 ideas", "3..12", 16),
    Case("screen on 3, confirm on 8, 16 ideas", "3+8", 16),
    Case("5 seeds at three rates", "5", rates=RATES),
    Case("equal at the edge of the margin, 8 seeds", "8", margin=1.5),
    Case("equal at the edge, 3..12", "3..12", margin=1.5),
    Case("5 seeds, 4 of 16 differ by 2 sd", "5", 16, 4, 2.0),
    Case("3..12, one differs by 1 sd", "3..12", 1, 1, 1.0),
    Case("3..12, one differs by 2 sd", "3..12", 1, 1, 2.0),
    Case("3+8, 4 of 16 differ by 1 sd", "3+8", 16, 4, 1.0),
    Case("3+8, 4 of 16 differ by 2 sd", "3+8", 16, 4, 2.0),
)


@dataclass(frozen=True)
class DrawnRun(RecordedRun):
    """A run that nobody trained: all it has is a loss at its end."""

    loss: float = 0.0

    @cached_property
    def final(self):
        return {"loss": self.loss, "bits_per_byte": 1.0, "accuracy": 0.5, "tokens": 1.0,
                "seconds": 1.0, "step": 1.0}  # fmt: skip

    @cached_property
    def train(self):
        return {name: np.empty(0) for name in ("step", "tokens", "loss", "memory", "seconds")}

    @cached_property
    def validation(self):
        at = np.array([0.0, 1.0])
        return {"step": at, "tokens": at, "seconds": at, "loss": np.array([20.0, self.loss])}


def made_up(case: Case, pool_NR: np.ndarray, draw: np.random.Generator) -> list[DrawnRun]:
    """The runs of one table; its ideas are drawn as the baseline is, and then moved.

    Args:
        pool_NR: losses to draw from, a row for each seed, a column for each of RATES.
    """
    design, runs = case.design, []
    columns = [RATES.index(rate) for rate in design.rates]
    unit = np.sqrt(2) * pool_NR[:, RATES.index(1.0)].std(ddof=1)  # pairs that share nothing
    for idea in range(case.ideas + 1):
        label = "gpt2ish" if idea == 0 else f"idea{idea}"
        moved = -case.effect * unit if 0 < idea <= case.real else 0.0
        moved += unit * case.margin if idea and case.margin else 0.0
        for seed in design.seeds:
            losses = pool_NR[draw.integers(len(pool_NR)), columns] + moved
            for rate, loss in zip(design.rates, losses, strict=True):
                name = label if rate == 1 else f"{label},lr={rate:g}"
                facts = _facts(name, seed, design, Rate(factor=rate, of=label))
                runs.append(DrawnRun(Path(f"{name}/{seed}"), facts, float(loss)))
    return runs


def measured(case: Case, pool_NR: np.ndarray, tables: int) -> dict:
    """How many of the tables hold a false word, and how many of the ideas that differ are found."""
    draw = np.random.default_rng(0)
    margin = case.margin and case.margin * np.sqrt(2) * pool_NR[:, RATES.index(1.0)].std(ddof=1)
    wrong = found = seeds = 0
    for _ in range(tables):
        rows = judge(pair_runs(made_up(case, pool_NR, draw), "gpt2ish"), margin)
        words = {row["experiment"]: row["verdict"] for row in rows if row["baseline"]}
        real = {f"idea{number}" for number in range(1, case.real + 1)}
        found += sum(words[name] == "better" for name in real)
        if case.margin:
            wrong += any(word and word.startswith("equal") for word in words.values())
        else:
            wrong += any(words[n] in WRONG for n in words.keys() - real - {"gpt2ish"})
            wrong += any(words[name] == "worse" for name in real)
        seeds += sum(row["seeds"] for row in rows if row["experiment"] != "gpt2ish") / case.ideas
    return {
        "case": case.name,
        "tables": tables,
        "false": wrong / tables,
        "error": float(np.sqrt(max(wrong, 1)) / tables),
        "found": found / (tables * case.real) if case.real else None,
        "seeds": seeds / tables,
    }


def trained(out_dir: Path, runs: int) -> np.ndarray:
    """The final validation losses of `runs` seeds at the three rates, training what is missing."""
    rates = ",".join(f"{rate:g}" for rate in RATES)
    train(["--exp", "gpt2ish", "--seeds", str(runs), "--rates", rates], out_dir)
    losses = np.full((runs, len(RATES)), np.nan)
    for run in map(read_run, find_runs([out_dir / PLAN.stem])):
        if run.facts.rate and run.seed < runs and run.final:
            losses[run.seed, RATES.index(run.facts.rate.factor)] = run.final["loss"]
    return losses[np.isfinite(losses).all(axis=1)]


def controls(out_dir: Path, seeds: str) -> list[dict]:
    """The verdicts of both controls."""
    lines = out_dir / "shuffled.jsonl"
    out_dir.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    with lines.open("w", encoding="utf-8") as file:
        for document in documents(Dataset(builtin="python-stdlib"), "train", 0.0):
            letters = draw.permutation(list(document.text.encode("ascii", "replace")))
            file.write(json.dumps({"text": bytes(letters.tolist()).decode()}) + "\n")
    lr = read_plan(str(PLAN)).optimizer.lr
    negative = ["--exp", ",".join(("gpt2ish", *IDEAS)), "--data", str(lines)]
    positive = ["--exp", "gpt2ish"], ["--exp", "gpt2ish", "--set", f"optimizer.lr={lr / 10:g}"]
    for arguments in (negative, *positive):
        train([*arguments, "--seeds", seeds], out_dir)
    return verdicts_of(find_runs([out_dir]))


def train(arguments: list[str], out_dir: Path) -> None:
    """What is missing of a grid on the tiny plan."""
    command = [sys.executable, "-m", "lmplay.train", "--plan", str(PLAN), *arguments]
    command += ["--out-dir", str(out_dir), "--device", "cpu", "--json"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # a model this small is slower on two
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=one_thread)


def normal(runs: int = 100_000) -> np.ndarray:
    """Losses of seeds whose best rate is near the plan's."""
    level_N1 = np.random.default_rng(1).normal(4, 0.05, (runs, 1))
    return level_N1 + np.array([[0.06, 0.0, 0.05]])


@app.command()
def main(
    runs: Annotated[int, Option(help="Seeds to train and draw from; 0 trains none.")] = 0,
    tables: Annotated[int, Option(help="Tables of each kind.", min=100, metavar="N")] = 2000,
    out_dir: Annotated[Path, Option(help="Folder of the runs.", metavar="PATH")] = Path("runs"),
    with_controls: Annotated[
        bool, Option("--controls", metavar="", help="Train the two controls instead.")
    ] = False,
    seeds: Annotated[str, Option(help="Of the controls, as lmp-trainer's --seeds.")] = "5",
    as_json: Annotated[bool, Option("--json", metavar="", help="Print one JSON document.")] = False,
) -> None:
    """Measure how often verdicts are wrong, and how often they find what is there.

    Example: python benchmarks/calibration.py --runs 60 --out-dir runs
    """
    if with_controls:
        rows = controls(out_dir / "controls", seeds)
        return print_json({"schema_version": 1, "rows": rows}) if as_json else print_verdicts(rows)
    pool_NR = trained(out_dir, runs) if runs else normal()
    rows = []
    for case in CASES:
        rows.append(measured(case, pool_NR, tables))
        note(f"{case.name}: {rows[-1]['false']:.1%}")
    if as_json:
        return print_json({"schema_version": 1, "runs": runs, "cases": rows})
    shown = [
        [
            row["case"],
            f"{row['false']:.1%} ± {1.96 * row['error']:.1%}",
            "" if row["found"] is None else f"{row['found']:.0%}",
            f"{row['seeds']:.1f}",
        ]
        for row in rows
    ]
    columns = ["tables of", "with a false word", "found", "seeds"]
    show(table(f"{tables:,} tables of each kind", columns, shown, right=columns[1:]))


def _facts(label: str, seed: int, design: Design, rate: Rate) -> Facts:
    return replace(_TEMPLATE, label=label, seed=seed, design=design, rate=rate)


_TEMPLATE = Facts(
    experiment="gpt2ish", file="gpt2ish", stack=[], docstring_summary="", plan_name="calibration",
    seed=0, changes={}, label="", plan={"schedule": {"name": "linear"}}, config={},
    scale_differs={}, bound=False, flops_per_token=1.0, parameters={"trained": 1}, num_steps=1,
    num_tokens=1,
    tokens_per_step=1, device="cpu", device_name="", threads=1, platform="", versions={},
    git_commit=None, precision="fp32", world_size=1, mini_batch_size=1, compiled=False, fsdp=False,
    command=[], started="", status="finished",
    data=DataFacts(
        content="", fingerprint="", validation_fingerprint="", tokenizer="byte", vocab_size=257,
        validation_tokens=1, validation_bytes=1,
    ),
)  # fmt: skip


if __name__ == "__main__":
    run_app(app)
