"""How a training step's time and memory grow, against what the formula says.

    python benchmarks/scaling.py --plot scaling.png

trains gpt2ish at one size and changes one thing at a time: width, depth, context, vocabulary, rows.
The exponent of a growth is its slope on log paper between the two largest values, where fixed costs
weigh least. Time is held against the FLOPs that lmplay counts for the same sizes: an exponent above
that of the FLOPs by more than 0.1 is marked, for then something costs more than its arithmetic.
Memory is the peak of the process, with that of a tiny model taken off.
"""

import math
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import Side, interleave, report, row, serve
from sizes import Size
from train import lmplay, side_settings, write_data
from typer import Option

from lmplay.catalog import resolve
from lmplay.console import Device, note, print_json, run_app, show, table
from lmplay.experiment import count, load_experiment
from lmplay.runner import resolve_device

BASE = Size(4, 256, 4, 256, 8, vocab_size=8192)
AXES = {
    "width": (128, 256, 512, 1024),
    "num_blocks": (2, 4, 8, 16),
    "max_len": (128, 512, 1024, 2048),
    "vocab_size": (2048, 8192, 32768, 65536),
    "rows": (2, 8, 16, 32),
}
TINY = Size(2, 32, 1, 32, 2, vocab_size=256)
MARGIN = 0.1
HEAD_WIDTH = 64

app = typer.Typer(pretty_exceptions_enable=False)


def sizes_of(axis: str, base: Size, short: bool) -> dict[int, Size]:
    """The sizes along an axis, each with as many heads as its width needs."""
    least = getattr(base, axis)
    values = (least, 2 * least) if short else AXES[axis]
    made = {value: replace(base, **{axis: value}) for value in values}
    return {
        value: replace(size, num_heads=max(1, size.width // HEAD_WIDTH))
        for value, size in made.items()
    }


def flops_of(size: Size, exp: str) -> float:
    """Of a step."""
    experiment = load_experiment(resolve(exp))
    return count(experiment, size.config(experiment)).flops_per_token * size.tokens


def measure(axis: str, sizes: dict[int, Size], seconds: float, common: dict) -> list[dict]:
    """A point for each size, all of them in turn."""
    running: list[Side] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for value, size in sizes.items():
                inside = Path(folder, str(value))
                inside.mkdir()
                write_data(inside, size)
                settings = side_settings(size, inside, common, "lmplay")
                running.append(Side(__file__, "lmplay", settings, str(value)))
            measured = interleave(running, seconds, warm_up=2)
        finally:
            for side in running:
                side.close()
    points = []
    for value, size in sizes.items():
        timed = measured[str(value)][2:]
        each = statistics.median(turn["seconds"] for turn in timed) / common["steps"]
        points.append(
            {
                "value": value,
                "seconds": each,
                "memory": max(turn["memory"] for turn in timed),
                "flops": flops_of(size, common["exp"]),
            }
        )
    return points


def slope(points: list[dict], key: str) -> float:
    """The exponent with which `key` grows between the two largest values."""
    first, last = points[-2:]
    return math.log(last[key] / first[key]) / math.log(last["value"] / first["value"])


@app.command()
def main(
    short: Annotated[bool, Option("--short", metavar="", help="Tiny sizes, two of each.")] = False,
    axes: Annotated[str, Option(help="Several with commas.", metavar="NAMES")] = ",".join(AXES),
    precision: Annotated[str, Option(help="fp32 or bf16.", metavar="NAME")] = "bf16",
    seconds: Annotated[
        float, Option(help="Of timed steps on each axis; two rounds at least.")
    ] = 15,
    exp: Annotated[str, Option(help="The experiment.", metavar="NAME")] = "gpt2ish",
    plot: Annotated[Path | None, Option(help="Draw the picture here.", metavar="PATH")] = None,
    device: Device = "auto",
    threads: Annotated[int | None, Option(help="Without it, one a core.")] = None,
    as_json: Annotated[bool, Option("--json", metavar="", help="Print one JSON document.")] = False,
) -> None:
    """Measure how time and memory of a training step grow.

    Example: python benchmarks/scaling.py --plot scaling.png
    """
    where = resolve_device(device)
    common = {
        "device": str(where),
        "threads": threads or os.cpu_count(),
        "exp": exp,
        "precision": precision,
        "compiled": False,
        "steps": 1 if where.type == "cpu" else 10,
    }
    torch.set_num_threads(common["threads"])
    floor = measure("rows", {1: TINY}, 0, common)[0]["memory"]
    cases = []
    for axis in axes.split(","):
        sizes = sizes_of(axis, TINY if short else BASE, short)
        note(f"measuring {axis}: {', '.join(map(str, sizes))}")
        points = measure(axis, sizes, seconds, common)
        for point in points:
            point["memory"] = max(point["memory"] - floor, 1)
        time, flops = slope(points, "seconds"), slope(points, "flops")
        cases.append(
            {
                "axis": axis,
                "points": points,
                "time_exponent": time,
                "flops_exponent": flops,
                "memory_exponent": slope(points, "memory"),
                "within": time <= flops + MARGIN,
            }
        )
    if plot is not None:
        draw(cases, plot)
        note(f"drawn: {plot}")
    if as_json:
        rows = [row_of(case) for case in cases]
        print_json(report("scaling", where, common["threads"], cases, rows))
    else:
        print_cases(cases)


def row_of(case: dict) -> dict:
    """An axis for the common table: the exponents of time and of the FLOPs."""
    what = f"scaling: time over {case['axis']}, against the FLOPs"
    return row(what, "exponent", case["time_exponent"], case["flops_exponent"])


def print_cases(cases: list[dict]) -> None:
    """One row for each axis."""
    columns = ["axis", "values", "time", "FLOPs", "memory", ""]
    rows = [
        [
            case["axis"],
            ", ".join(str(point["value"]) for point in case["points"]),
            f"{case['time_exponent']:.2f}",
            f"{case['flops_exponent']:.2f}",
            f"{case['memory_exponent']:.2f}",
            "" if case["within"] else "faster than the formula",
        ]
        for case in cases
    ]
    show(table("exponents between the two largest values", columns, rows, right=columns[2:5]))


def draw(cases: list[dict], path: Path) -> None:
    """Time above, memory below; the line is the formula, through the largest value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(cases), 5.5), layout="constrained")
    grid = figure.subplots(2, len(cases), squeeze=False)
    for column, case in zip(grid.T, cases, strict=True):
        points = case["points"]
        values = [point["value"] for point in points]
        scale = points[-1]["seconds"] / points[-1]["flops"]
        formula = [point["flops"] * scale for point in points]
        column[0].loglog(values, [point["seconds"] for point in points], "o-", label="measured")
        column[0].loglog(values, formula, "k--", label="FLOPs")
        column[1].loglog(values, [point["memory"] / 2**20 for point in points], "o-")
        column[0].set_title(f"{case['axis']}: time ^{case['time_exponent']:.2f}")
        column[1].set_title(f"memory ^{case['memory_exponent']:.2f}")
        for axes in column:
            axes.grid(True, which="both", alpha=0.3)
    grid[0][0].set_ylabel("seconds a step")
    grid[1][0].set_ylabel("MiB")
    grid[0][0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__" and not serve({"lmplay": lmplay}):
    run_app(app)
