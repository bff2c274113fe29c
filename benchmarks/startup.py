"""How long a user waits: for help, lists, the first step of training, and figures.

    python benchmarks/startup.py

Every command is a process of its own, timed from its start to its end; training from its start
until its first step stands in train.csv, on data that an earlier run has prepared.

* help, list, plans: lmp-trainer --help, --exp list and --plan list.
* step: lmp-trainer --exp gpt2ish --plan quick.
* plot: lmp-plotstats, on runs of random numbers: two experiments, some seeds each.

The limits are wall time on a machine that does nothing else.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from measure import chosen, report, row
from typer import Option

from lmplay.catalog import entries as catalog
from lmplay.console import note, print_json, run_app, show, table
from lmplay.errors import UserError
from lmplay.roots import bundled_root
from lmplay.run.facts import DataFacts, Facts
from lmplay.run.folder import RunFolder
from lmplay.run.records import TRAIN_COLUMNS, VALIDATION_COLUMNS

BUDGETS = {"help": 0.25, "list": 0.25, "plans": 0.25, "step": 6.0, "plot": 2.0}  # seconds
TRAINER = ("-m", "lmplay.train")
QUICK = (*TRAINER, "--exp", "gpt2ish", "--plan", "quick", "--device", "cpu")
PATIENCE = 600  # seconds for a first step
VALIDATE_EVERY = 1000  # steps

app = typer.Typer(pretty_exceptions_enable=False)


def finish(folder: Path, *args: str) -> float:
    """The seconds that a command needs; its compiled modules are kept, as pip leaves them.

    Raises:
        UserError: it failed.
    """
    began = time.perf_counter()
    command = [sys.executable, *args]
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise UserError(f"{' '.join(args)} ended with code {done.returncode}", done.stderr[-300:])
    return seconds


def first_step(folder: Path) -> float:
    """The seconds until a new run has taken its first step; then it is ended.

    Raises:
        UserError: it ended before.
    """
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        record = Path(runs) / "quick" / "gpt2ish" / "seed-0" / "train.csv"
        began = time.perf_counter()
        command = [sys.executable, *QUICK, "--out-dir", runs]
        process = subprocess.Popen(
            command, cwd=folder, env=_environment(), stderr=subprocess.DEVNULL
        )
        try:
            while not (record.exists() and record.read_bytes().count(b"\n") > 1):
                waited = time.perf_counter() - began
                if process.poll() is not None or waited > PATIENCE:
                    raise UserError(f"no step within {waited:.0f} s", hint="try the plan quick")
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def write_experiments(folder: Path, number: int) -> None:
    """Copies of value_norm under other names, until `--exp list` has this number of files."""
    source = (bundled_root() / "experiments" / "value_norm.py").read_text(encoding="utf-8")
    missing = number - len({entry.path for entry in catalog.entries().values()})
    (folder / "experiments").mkdir()
    for i in range(missing):
        mine = re.sub(r'^    "(\w+)": ', rf'    "copy_{i}_\1": ', source, flags=re.MULTILINE)
        (folder / "experiments" / f"copy_{i}.py").write_text(mine, encoding="utf-8")


def write_runs(folder: Path, num_runs: int, num_steps: int) -> None:
    """Finished runs whose loss falls with noise: half of them of the baseline."""
    step = np.arange(1, num_steps + 1)
    for i in range(num_runs):
        label, seed = ("gpt2ish", "value_norm")[i % 2], i // 2
        run = RunFolder(folder / "runs" / "quick" / label / f"seed-{seed}")
        run.write(_facts(label, seed, num_steps))
        draw = np.random.default_rng(i)
        loss = 3 + 2 * np.exp(-10 * step / num_steps) + 0.1 * draw.standard_normal(num_steps)
        values = {
            "step": step.tolist(),
            "tokens": (step * 512).tolist(),
            "loss": loss.tolist(),
            "objective": loss.tolist(),
            "accuracy": (1 / loss).tolist(),
            "learning_rate": [0.001] * num_steps,
            "grad_norm": (0.5 + loss / 9).tolist(),
            "tokens_per_second": (50_000 + loss).tolist(),
            "memory": [123_456_789] * num_steps,
            "seconds": (step * 0.01).tolist(),
            "bits_per_byte": (loss / 2).tolist(),
        }
        values |= {
            column: [None] * num_steps for column in VALIDATION_COLUMNS if column not in values
        }
        for path, columns, every in (
            (run.train_csv, TRAIN_COLUMNS, 1),
            (run.validation_csv, VALIDATION_COLUMNS, min(VALIDATE_EVERY, num_steps)),
        ):
            kept = zip(*(values[column][every - 1 :: every] for column in columns), strict=True)
            cells = (["" if cell is None else repr(cell) for cell in row] for row in kept)
            lines = [",".join(columns), *map(",".join, cells)]
            path.write_text("\n".join(lines) + "\n", encoding="ascii")


def _facts(label: str, seed: int, num_steps: int) -> Facts:
    return Facts(
        experiment=label,
        file=label,
        stack=[],
        docstring_summary="",
        plan_name="quick",
        seed=seed,
        changes={},
        label=label,
        plan={"optimizer": {"lr": 0.001}, "schedule": {"name": "constant"}},
        config={},
        scale_differs={},
        bound=False,
        data=DataFacts(
            content="c",
            fingerprint="a",
            validation_fingerprint="b",
            tokenizer="byte",
            vocab_size=257,
            validation_tokens=1,
            validation_bytes=1,
        ),
        flops_per_token=1e6,
        parameters={"trained": 3_000_000, "matmul": 2_000_000, "lookup": 1_000_000},
        num_steps=num_steps,
        num_tokens=num_steps * 512,
        tokens_per_step=512,
        device="cpu",
        device_name="a CPU",
        threads=1,
        platform="",
        versions={},
        git_commit=None,
        precision="fp32",
        world_size=1,
        mini_batch_size=1,
        compiled=False,
        fsdp=False,
        command=[],
        started="",
        status="finished",
    )


@app.command()
def main(
    only: Annotated[
        str, Option(help=f"Of {', '.join(BUDGETS)}; several with commas.", metavar="NAMES")
    ] = ",".join(BUDGETS),
    rounds: Annotated[int, Option(help="Timed ones, behind one that is not.", min=1)] = 5,
    experiments: Annotated[int, Option(help="Files that --exp list finds.", min=1)] = 100,
    runs: Annotated[int, Option(help="Runs that are plotted.", min=2)] = 10,
    steps: Annotated[int, Option(help="Of each of these runs.", min=1)] = 100_000,
    as_json: Annotated[bool, Option("--json", metavar="", help="Print one JSON document.")] = False,
) -> None:
    """Measure what a user waits for, against the time that it may take.

    Example: python benchmarks/startup.py --only help,list
    """
    names = chosen("--only", only, BUDGETS)
    what = {
        "help": "lmp-trainer --help",
        "list": f"--exp list, {experiments} files",
        "plans": "--plan list",
        "step": "first step of quick",
        "plot": f"plot {runs} runs of {steps:,} steps",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_experiments(folder, experiments)
        if "plot" in names:
            write_runs(folder, runs, steps)
        timed: dict[str, Callable[[], float]] = {
            "help": lambda: finish(folder, *TRAINER, "--help"),
            "list": lambda: finish(folder, *TRAINER, "--exp", "list"),
            "plans": lambda: finish(folder, *TRAINER, "--plan", "list"),
            "step": lambda: first_step(folder),
            "plot": lambda: finish(folder, "-m", "lmplay.stats"),
        }
        for command in names:
            note(f"first, not timed: {what[command]}")
            timed[command]()
        measured: dict[str, list[float]] = {command: [] for command in names}
        for _ in range(rounds):
            for command in names:
                measured[command].append(timed[command]())
    rows = [row_of(what[command], BUDGETS[command], measured[command]) for command in names]
    if as_json:
        cases = [{"command": what[command], "seconds": measured[command]} for command in names]
        print_json(report("startup", torch.device("cpu"), torch.get_num_threads(), cases, rows))
    else:
        cells = [
            [r["what"].partition(" / ")[0], f"{r['ours']:.2f}", f"{r['theirs']:g}"] for r in rows
        ]
        show(table(None, ["", "seconds", "limit"], cells, right=["seconds", "limit"]))


def row_of(what: str, budget: float, seconds: list[float]) -> dict:
    """A command for the common table: how many times it fits into its limit."""
    middle = statistics.median(seconds)
    spread = [budget / max(seconds), budget / min(seconds)]
    return row(f"{what} / its limit", "s", middle, budget, budget / middle, 1, spread)


if __name__ == "__main__":
    run_app(app)
