"""All benchmarks, one after another, and one table of them.

    make bench

writes results.json (everything that was measured) and results.md (the table) into --out-dir.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from measure import chosen
from typer import Option

from lmplay.console import note, run_app
from lmplay.errors import UserError

HERE = Path(__file__).parent
FULL = {
    "train": ["--sides", "lmplay,loop", "--seconds", "20"],
    "step": ["--sizes", "small", "--precisions", "bf16"],
    "generate": ["--sides", "lmplay,lmplay+compile,static", "--seconds", "8"],
    "scaling": ["--seconds", "5"],
    "prepare": ["--seconds", "15"],
    "startup": ["--rounds", "3"],
}
SHORT = {
    "train": [
        "--sizes",
        "tiny",
        "--precisions",
        "bf16",
        "--sides",
        "lmplay,loop",
        "--seconds",
        "0",
    ],
    "step": ["--sizes", "tiny", "--precisions", "bf16"],
    "generate": [
        "--size",
        "tiny",
        "--seconds",
        "0",
        "--cases",
        "2:bf16",
        "--num-tokens",
        "4",
        "--sides",
        "lmplay,static",
    ],
    "scaling": ["--short", "--axes", "width", "--seconds", "0"],
    "prepare": ["--megabytes", "0.2", "--seconds", "0", "--batches", "3"],
    "startup": ["--only", "list,plot", "--rounds", "1", "--runs", "2", "--steps", "9"],
}

app = typer.Typer(pretty_exceptions_enable=False)


def run(name: str, options: list[str]) -> dict:
    """What a benchmark prints, with the seconds that it took.

    Raises:
        UserError: it failed; its own words are on stderr.
    """
    began = time.perf_counter()
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{name} ended with code {done.returncode}")
    return json.loads(done.stdout) | {"seconds": time.perf_counter() - began}


def markdown(reports: list[dict]) -> str:
    """The table, under a line about the machine."""
    machine = reports[0]["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['device_name']}, {machine['threads']} threads, device {machine['device']}, "
        f"{machine['platform']}; {versions}; commit {machine['git_commit']}.",
        "",
        "| what | ours | theirs | ratio | in the rounds | wanted |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [_line(row) for report in reports for row in report["rows"]]
    return "\n".join(lines) + "\n"


def _line(row: dict) -> str:
    is_least = row["wanted"] is not None and row["wanted"] >= 1
    spread = row["spread"]
    cells = [
        row["what"],
        _number(row["ours"], row["unit"]),
        _number(row["theirs"], row["unit"]),
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "" if spread is None else f"{spread[0]:.2f} to {spread[1]:.2f}",
        "" if row["wanted"] is None else f"{'>=' if is_least else '<='} {row['wanted']}",
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}".rstrip()


@app.command()
def main(
    short: Annotated[bool, Option("--short", metavar="", help="Tiny sizes: do they run?")] = False,
    only: Annotated[
        str, Option(help=f"Of {', '.join(FULL)}; several with commas.", metavar="NAMES")
    ] = ",".join(FULL),
    data: Annotated[
        Path | None, Option(help="Text for prepare, as its own --data.", metavar="PATH")
    ] = None,
    out_dir: Annotated[Path, Option(help="Folder of the results.", metavar="PATH")] = Path("bench"),
) -> None:
    """Run the benchmarks and write one table.

    Example: python benchmarks/run.py --only train
    """
    reports = []
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in chosen("--only", only, FULL):
        note(f"benchmark {name}")
        options = (SHORT if short else FULL)[name]
        if name == "prepare" and data is not None:
            options = [*options, "--data", str(data)]
        reports.append(run(name, options))
        everything = {"schema_version": 1, "reports": reports}
        text = json.dumps(everything, indent=1) + "\n"
        (out_dir / "results.json").write_text(text, encoding="utf-8")
        (out_dir / "results.md").write_text(markdown(reports), encoding="utf-8")
        note(f"{name} took {reports[-1]['seconds']:.0f} s")
    sys.stdout.write(markdown(reports))


if __name__ == "__main__":
    run_app(app)
