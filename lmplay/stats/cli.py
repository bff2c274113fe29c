"""lmp-plotstats: figures and a table of what runs reached."""

import csv
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from typer import Argument, Option

from lmplay.console import Version, fits, note, print_json, run_app, show, table
from lmplay.errors import UserError
from lmplay.run_folder import RUNS, RunFolder, find_runs, resolve_run

app = typer.Typer(
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)

_POWERS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_CSV_COLUMNS = (
    "plan", "experiment", "seed", "status", "tokens", "validated_tokens", "loss", "difference",
    "bits_per_byte", "accuracy", "tokens_per_second", "trained", "matmul", "lookup", "run",
    "baseline", "marks",
)  # fmt: skip

_TITLES = {
    "bits_per_byte": "bits/byte",
    "tokens_per_second": "tokens/s",
    "lookup": "look-up",
    "marks": "",
}
_LEAVE_FIRST = (
    "lookup", "matmul", "trained", "tokens_per_second", "accuracy", "bits_per_byte",
)  # fmt: skip


class X(StrEnum):
    TOKENS = "tokens"
    STEPS = "steps"
    SECONDS = "seconds"
    FLOPS = "flops"


class Split(StrEnum):
    BOTH = "both"
    TRAIN = "train"
    VALIDATION = "validation"


class Format(StrEnum):
    PNG = "png"
    SVG = "svg"
    PDF = "pdf"


@app.command()
def main(
    run: Annotated[
        list[str] | None,
        Argument(
            metavar="RUN",
            help="Runs: folders, folders above them, or plan/experiment/seed-n under --runs. "
            "Without one, every run under --runs.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        Option(
            help="What the others are held against: an experiment as the table names it, looked "
            "for on each plan, or one run. Without it, gpt2ish if it is there, else the longest "
            "run.",
            metavar="NAME|RUN",
        ),
    ] = None,
    x: Annotated[
        X,
        Option(
            help="tokens, steps, seconds or flops: the axis along which runs are drawn and "
            "subtracted. Seconds are of training alone, flops are tokens times the model's FLOPs "
            "per token.",
            metavar="AXIS",
        ),
    ] = X.TOKENS,
    split: Annotated[
        Split,
        Option(
            help="train, validation or both: training as lines, since it is dense, and "
            "validation as markers, since the table compares that.",
            metavar="NAME",
        ),
    ] = Split.BOTH,
    smooth: Annotated[
        str,
        Option(
            help="Half-life of the two-sided mean over training batches: a share of the axis (2%), "
            "or an amount in units of --x (500k); 0 draws every step. Validation is never "
            "smoothed; differences are taken first.",
            metavar="SHARE%|AMOUNT",
        ),
    ] = "2%",
    log: Annotated[
        bool,
        Option("--log/--linear", metavar="", help="Logarithmic axes: x, and y where it is a loss."),
    ] = False,
    format: Annotated[
        Format, Option(help="png, svg or pdf: the format of the figures.", metavar="NAME")
    ] = Format.PNG,
    out_dir: Annotated[Path, Option(help="Folder that the figures go to.", metavar="PATH")] = Path(
        "plots"
    ),
    runs: Annotated[Path, Option(help="Folder of all runs.", metavar="PATH")] = Path(RUNS),
    as_json: Annotated[
        bool, Option("--json", metavar="", help="Print one JSON document instead of the table.")
    ] = False,
    as_csv: Annotated[
        bool, Option("--csv", metavar="", help="Print CSV instead of the table.")
    ] = False,
    version: Version = None,
) -> None:
    """Draw the loss and the accuracy of runs, and how far each is from a baseline's.

    Writes four figures (loss, accuracy, loss_difference, accuracy_difference)
    and prints what every run reached on the validation text. Two runs are
    subtracted where seed, data, validation text, tokenizer and budget agree;
    for any other the table says what differs.

    Example: lmp-plotstats runs/quick --baseline gpt2ish
    """
    if as_json and as_csv:
        raise UserError("--json and --csv both want stdout", hint="choose one of them")
    half_life, share = _smoothing(smooth)
    folders = _folders(run or [], runs)
    from lmplay.stats.compare import final_rows, pair_runs, read_run  # here: pandas, matplotlib
    from lmplay.stats.plots import View, draw

    found = [read_run(folder) for folder in folders]
    pairs = pair_runs(found, _baseline(baseline, found, runs))
    rows = final_rows(pairs)
    view = View(str(x), str(split), half_life, share, log, str(format))
    files = draw(pairs, view, _made(out_dir))
    if as_json:
        labels = {pair.baseline.label for pair in pairs if pair.baseline is not None}
        print_json(
            {
                "schema_version": 1,
                "baseline": labels.pop() if len(labels) == 1 else None,  # null: not one for all
                "runs": rows,
                "x": view.x,
                "split": view.split,
                "files": [str(file) for file in files],
            }
        )
    elif as_csv:
        _print_csv(rows)
    else:
        _print_table(rows)
    note(f"drew {', '.join(str(file) for file in files)}")


def _smoothing(text: str) -> tuple[float | None, float]:
    """The half-life in units of x, or None and its share of the axis."""
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?) *(%|[kMBGT]?)", text.strip())
    try:
        value = float(match[1])
    except (TypeError, ValueError):
        hint = "2% of the axis, or 500k in units of --x; 0 for none"
        raise UserError(f"--smooth {text!r} is no half-life", hint=hint) from None
    if match[2] != "%":
        return value * _POWERS[match[2]], 0.0
    if value > 100:
        raise UserError(f"--smooth {text} is more than the axis", hint="2% shows the trend")
    return None, value / 100


def _folders(texts: list[str], runs: Path) -> list[RunFolder]:
    if not texts:
        if not runs.is_dir():
            hint = "train one: lmp-trainer --exp gpt2ish --plan quick; or name a folder of runs"
            raise UserError(f"there is no folder {runs}", hint=hint)
        return find_runs([runs])
    below = {text: runs / text for text in texts if not Path(text).exists()}
    return find_runs([below[t] if t in below and below[t].exists() else Path(t) for t in texts])


def _baseline(text: str | None, found: list, runs: Path):
    """The label as it is, or the run that `text` names; one that is not drawn yet is added."""
    if text is None or text in {run.label for run in found}:
        return text
    if "/" not in text and not (Path(text) / "run.json").is_file():
        return text
    from lmplay.stats.compare import read_run

    folder, _ = resolve_run(text, runs)
    for run in found:
        if run.path.resolve() == folder.path.resolve():
            return run
    found.append(read_run(folder))
    return found[-1]


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "choose another place with --out-dir"
        raise UserError(f"cannot make {folder}: {error.strerror}", hint=hint) from None
    return folder


def _print_csv(rows: list[dict]) -> None:
    writer = csv.DictWriter(sys.stdout, _CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "marks": "; ".join(row["marks"])} for row in rows)


def _print_table(rows: list[dict]) -> None:
    forms = {
        "plan": str,
        "experiment": str,
        "seed": str,
        "tokens": _short,
        "loss": "{:.4f}".format,
        "difference": "{:+.4f}".format,
        "bits_per_byte": "{:.4f}".format,
        "accuracy": "{:.2%}".format,
        "tokens_per_second": "{:,.0f}".format,
        "trained": _short,
        "matmul": _short,
        "lookup": _short,
    }
    cells = {
        key: ["" if row[key] is None else escape(form(row[key])) for row in rows]
        for key, form in forms.items()
    }
    others = [[mark for mark in row["marks"] if mark != "baseline"] for row in rows]
    for i, row in enumerate(rows):
        if "baseline" in row["marks"]:
            cells["difference"][i] = "baseline"
    cells["marks"] = [escape("; ".join(marks)) for marks in others]
    notes, left_out = [], []
    if not fits(_table(cells)):  # the marks become notes below it
        notes = list(dict.fromkeys(mark for marks in others for mark in marks))
        cells["marks"] = [" ".join(str(notes.index(m) + 1) for m in marks) for marks in others]
        only_plan = ["plan"] if len(set(cells["plan"])) == 1 else []
        for key in [*only_plan, *_LEAVE_FIRST]:
            if not fits(_table(cells)):
                del cells[key]
                left_out.append(_TITLES.get(key, key))
    show(_table(cells))
    if notes:
        numbered = [[str(i), escape(text)] for i, text in enumerate(notes, start=1)]
        show(table(None, ["", ""], numbered))
    if left_out:
        note(f"no room for {', '.join(left_out)}; --csv has every column")


def _table(cells: dict[str, list[str]]) -> Table:
    columns = {_TITLES.get(key, key): column for key, column in cells.items()}
    return table(
        "validation loss in nats per token; a difference below 0 is better",
        list(columns),
        [list(row) for row in zip(*columns.values(), strict=True)],
        right=columns.keys() - {"plan", "experiment", ""},
    )


def _short(count: int) -> str:
    """1,234,567 as 1.23 M."""
    for power, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= power:
            return f"{count / power:.3g} {letter}"
    return str(count)


def run() -> None:
    """The console script."""
    run_app(app)
