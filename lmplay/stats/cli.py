"""lmp-plotstats: verdicts, boards and figures of runs."""

import csv
import gc
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from lmplay.console import Margin, Version, note, print_json, run_app
from lmplay.errors import UserError
from lmplay.run.folder import RUNS, RunFolder, find_runs, resolve_run
from lmplay.stats.board import split_board, write_board
from lmplay.stats.table import (
    by_plan,
    flat,
    markdown,
    plain,
    print_ladder,
    print_verdicts,
)

if TYPE_CHECKING:
    from lmplay.stats.compare import RecordedRun

app = typer.Typer(
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)

_POWERS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


class X(StrEnum):
    TOKENS = "tokens"
    STEPS = "steps"
    SECONDS = "seconds"
    FLOPS = "flops"


class Split(StrEnum):
    BOTH = "both"
    TRAIN = "train"
    VALIDATION = "validation"


class FigureFormat(StrEnum):
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
    like_for_like: Annotated[
        bool,
        Option(
            "--like-for-like",
            metavar="",
            help="Hold each run against the baseline with the same changes: ue,lr=0.001 against "
            "gpt2ish,lr=0.001.",
        ),
    ] = False,
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
        FigureFormat, Option(help="png, svg or pdf: the format of the figures.", metavar="NAME")
    ] = FigureFormat.PNG,
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
    as_markdown: Annotated[
        bool,
        Option("--markdown", metavar="", help="Print the table in GitHub's Markdown."),
    ] = False,
    board: Annotated[
        Path | None,
        Option(
            help="Markdown file to write the verdicts into, with what repeats them: made if it is "
            "not there, else only what stands between its two marker lines changes.",
            metavar="FILE.md",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        Option(
            help="One self-contained page to write: the verdicts to sort, figures, and for each "
            "experiment its diff and what repeats it.",
            metavar="FILE.html",
        ),
    ] = None,
    margin: Margin = None,
    version: Version = None,
) -> None:
    """Say which experiments are better than a baseline, and draw their curves.

    Prints a verdict on every experiment over its seeds, and writes six figures
    (loss, accuracy, loss_difference, accuracy_difference, verdicts, compute).
    Two runs are subtracted where seed, data, validation text, tokenizer and
    budget agree; for any other the table says what differs.

    Example: lmp-plotstats runs/quick --baseline gpt2ish
    """
    forms = {"--json": as_json, "--csv": as_csv, "--markdown": as_markdown}
    chosen = [name for name, is_chosen in forms.items() if is_chosen]
    if len(chosen) > 1:
        raise UserError(f"{chosen[0]} and {chosen[1]} both want stdout", hint="choose one of them")
    half_life, share = _smoothing(smooth)
    folders = _folders(run or [], runs)
    if board is not None:
        split_board(board)  # a file without a place for it is told before the work
    from lmplay.stats.compare import final_rows, pair_runs  # here: matplotlib
    from lmplay.stats.judge import judge
    from lmplay.stats.ladder import ladder_rows
    from lmplay.stats.plots import View, draw

    gc.freeze()  # as in run_app: a tenth of the time
    found = _readable(folders, {Path(text) for text in run or []})
    pairs = pair_runs(found, _baseline(baseline, found, runs), like_for_like)
    rows, ladder = judge(pairs, margin), ladder_rows(pairs)
    view = View(str(x), str(split), half_life, share, log, str(format))
    files = draw(pairs, rows, view, _made(out_dir))
    if board is not None:
        write_board(board, rows, {str(run.path): run.facts for run in found})
        note(f"wrote {board}")
    if html is not None:
        from lmplay.stats.page import write_page

        write_page(html, rows, pairs)
        note(f"wrote {html}")
    if as_json:
        labels = {pair.baseline.label for pair in pairs if pair.baseline is not None}
        print_json(
            {
                "schema_version": 1,
                "baseline": labels.pop() if len(labels) == 1 else None,  # null: not one for all
                "verdicts": rows,
                "runs": final_rows(pairs),
                "ladder": ladder,
                "x": view.x,
                "split": view.split,
                "files": [str(file) for file in files],
            }
        )
    elif as_csv:
        print_csv(rows)
    elif as_markdown:
        _print_markdown(rows)
    else:
        print_verdicts(rows)
        print_ladder(ladder)
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


def _readable(folders: list[RunFolder], named: set[Path]) -> list["RecordedRun"]:
    """The runs in these folders; one that is damaged is told and left out, unless it was named.

    Raises:
        UserError: what was named is damaged, or all of them are.
    """
    from lmplay.stats.compare import read_run

    found, damaged = [], None
    for folder in folders:
        try:
            run = read_run(folder)
            _ = run.train, run.validation  # read now, so that what is damaged is told here
        except UserError as error:
            if folder.path in named:
                raise
            note(f"left out: {error.problem}")
            damaged = error
        else:
            found.append(run)
    if not found:
        raise damaged
    return found


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


def print_csv(rows: list[dict]) -> None:
    """The verdict rows on stdout."""
    cells = [flat(row) for row in rows]
    writer = csv.DictWriter(sys.stdout, cells[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)


def _print_markdown(rows: list[dict]) -> None:
    plans = by_plan(rows)
    heading = "**Plan {}**\n\n" if len(plans) > 1 else ""
    tables = [heading.format(plain(plan)) + markdown(rows) for plan, rows in plans.items()]
    sys.stdout.write("\n".join(tables))


def run() -> None:
    """The console script."""
    run_app(app)
