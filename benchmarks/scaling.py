"""How a training step's time and memory grow, against what the formula says.

    python benchmarks/scaling.py --plot scaling.png

trains gpt2ish at one size and changes one thing at a time: width, depth, context, vocabulary, rows.

The formula is the work of a step as it follows from the sizes: products of the blocks, attention,
head, what is read and written beside them, an update of every weight, and something fixed. What a
unit of each costs on this machine is fitted to all points at once (least squares of the relative
error, no cost below zero). The exponent of a growth is its slope on log paper between the two
largest values; where the measured one is above the formula's by more than 0.1, something grows
faster than it should, and is marked. Memory is the peak of the process, with that of a tiny model
taken off, and its formula likewise: weights, activations, a chunk of logits.
"""

import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from measure import Side, chosen, interleave, report, row, serve
from sizes import Size
from train import lmplay, side_settings, write_data
from typer import Option

from lmplay.console import Device, note, print_json, run_app, show, table
from lmplay.machine import num_cores, resolve_device
from lmplay.model.chunked_cross_entropy import CHUNK

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
PRODUCTS = ("products of the blocks", "attention", "head")

# L blocks, C model width, T positions, N positions in all rows, V vocabulary

app = typer.Typer(pretty_exceptions_enable=False)


def time_work(size: Size) -> dict[str, float]:
    """Units of work in a step: FLOPs of products, numbers otherwise."""
    L, C, T, N = size.num_blocks, size.width, size.max_len, size.tokens
    return {
        "products of the blocks": 6 * 12 * L * N * C * C,
        "attention": 3 * 4 * L * N * C * (T + 1) / 2,
        "head": 6 * N * C * size.vocab_size,
        "read and written": L * N * C,
        "update": _weights(size),
        "fixed": 1,
    }


def memory_work(size: Size) -> dict[str, float]:
    """Numbers that are held at the same time."""
    return {
        "weights": _weights(size),
        "activations": size.num_blocks * size.tokens * size.width,
        "logits": min(size.tokens, CHUNK) * size.vocab_size,
        "fixed": 1,
    }


def _weights(size: Size) -> float:
    C, V = size.width, size.vocab_size
    return 12 * size.num_blocks * C * C + (2 * V + size.max_len) * C


def fit(work: list[dict[str, float]], measured: list[float]) -> dict[str, float]:
    """The cost of a unit of each kind of work, none below zero."""
    from scipy.optimize import nnls

    names = list(work[0])
    units = np.array([[one[name] for name in names] for one in work])
    largest = units.max(0)
    costs, _ = nnls(units / largest / np.array(measured)[:, None], np.ones(len(work)))
    return dict(zip(names, (costs / largest).tolist(), strict=True))


def sizes_of(axis: str, base: Size, short: bool) -> dict[int, Size]:
    """The sizes along an axis, each with as many heads as its width needs."""
    least = getattr(base, axis)
    values = (least, 2 * least) if short else AXES[axis]
    made = {value: replace(base, **{axis: value}) for value in values}
    return {
        value: replace(size, num_heads=max(1, size.width // HEAD_WIDTH))
        for value, size in made.items()
    }


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
            measured = interleave(running, seconds)
        finally:
            for side in running:
                side.close()
    points = []
    for value, size in sizes.items():
        timed = measured[str(value)][1:]
        each = statistics.median(turn["seconds"] for turn in timed) / common["steps"]
        points.append(
            {
                "value": value,
                "seconds": each,
                "memory": max(turn["memory"] for turn in timed),
                "size": vars(size),
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
        "threads": threads or num_cores(),
        "exp": exp,
        "precision": precision,
        "compiled": False,
        "steps": 1 if where.type == "cpu" else 10,
        "waking": 1 if where.type == "cpu" else 0,
    }
    torch.set_num_threads(common["threads"])
    floor = measure("rows", {1: TINY}, 0, common)[0]["memory"]
    cases = []
    for axis in chosen("--axes", axes, AXES):
        sizes = sizes_of(axis, TINY if short else BASE, short)
        note(f"measuring {axis}: {', '.join(map(str, sizes))}")
        cases.append({"axis": axis, "points": measure(axis, sizes, seconds, common)})
    points = [point for case in cases for point in case["points"]]
    for point in points:
        point["memory"] = max(point["memory"] - floor, 1)
    costs = {}
    for key, work_of in (("seconds", time_work), ("memory", memory_work)):
        work = [work_of(Size(**point["size"])) for point in points]
        costs[key] = fit(work, [point[key] for point in points])
        for point, units in zip(points, work, strict=True):
            point[f"{key}_by_formula"] = sum(costs[key][name] * units[name] for name in units)
    for case in cases:
        for key in ("seconds", "memory"):
            for name in (key, f"{key}_by_formula"):
                case[f"{name}_exponent"] = slope(case["points"], name)
    if plot is not None:
        draw(cases, plot)
        note(f"drawn: {plot}")
    if as_json:
        rows = [row_of(case) for case in cases]
        print_json(report("scaling", where, common["threads"], [*cases, {"costs": costs}], rows))
    else:
        print_cases(cases)
        told = {
            name: 1 / costs["seconds"][name] / 1e9 for name in PRODUCTS if costs["seconds"][name]
        }
        note("fitted: " + ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in told.items()))


def row_of(case: dict) -> dict:
    """An axis for the common table: the exponents of time, measured and of the formula."""
    mine, formula = case["seconds_exponent"], case["seconds_by_formula_exponent"]
    return row(f"scaling: time over {case['axis']}, by the formula", "exponent", mine, formula)


def print_cases(cases: list[dict]) -> None:
    """One row for each axis."""
    columns = ["axis", "values", "time", "formula", "memory", "formula", ""]
    kinds = ("seconds", "seconds_by_formula", "memory", "memory_by_formula")
    rows = []
    for case in cases:
        time, by_time, memory, by_memory = (case[f"{kind}_exponent"] for kind in kinds)
        fast = [
            word
            for word, excess in (("time", time - by_time), ("memory", memory - by_memory))
            if excess > MARGIN
        ]
        rows.append(
            [
                case["axis"],
                ", ".join(str(point["value"]) for point in case["points"]),
                *(f"{exponent:.2f}" for exponent in (time, by_time, memory, by_memory)),
                f"{' and '.join(fast)} above the formula" if fast else "",
            ]
        )
    show(table("exponents between the two largest values", columns, rows, right=columns[2:6]))


def draw(cases: list[dict], path: Path) -> None:
    """Time above, memory below; the dashes are the formula."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(cases), 5.5), layout="constrained")
    grid = figure.subplots(2, len(cases), squeeze=False)
    for column, case in zip(grid.T, cases, strict=True):
        values = [point["value"] for point in case["points"]]
        kinds = (("seconds", 1, ".2f"), ("memory", 2**20, ",.0f"))
        for axes, (key, unit, digits) in zip(column, kinds, strict=True):
            for name, style in ((key, "o-"), (f"{key}_by_formula", "k--")):
                axes.loglog(
                    values,
                    [point[name] / unit for point in case["points"]],
                    style,
                    label="formula" if style == "k--" else "measured",
                )
            seen = [point[key] / unit for point in case["points"]]
            axes.set_xticks(values, map(str, values), fontsize=7)
            axes.set_yticks(seen, [format(value, digits) for value in seen], fontsize=7)
            axes.minorticks_off()
            axes.grid(True, alpha=0.3)
        column[0].set_title(f"{case['axis']}: time ^{case['seconds_exponent']:.2f}")
        column[1].set_title(f"memory ^{case['memory_exponent']:.2f}")
    grid[0][0].set_ylabel("seconds a step")
    grid[1][0].set_ylabel("MiB")
    grid[0][0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__" and not serve({"lmplay": lmplay}):
    run_app(app)
