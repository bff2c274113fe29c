"""Where the time of one training step goes.

    python benchmarks/step.py

profiles a step of lmplay and one of the plain loop, both of benchmarks/train.py, operator by
operator: on a CPU by the time of the operators themselves, on a GPU by that of their kernels.
An operator with the vocabulary among its shapes belongs to the head and the loss, whatever it does;
the optimizer and the clipping are told by their names.
"""

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import PRECISIONS, chosen, has_peer, report, row, synchronize, without_peer
from sizes import SIZES, Precisions, Size, Sizes
from torch.profiler import profile
from train import lmplay, loop, side_settings, write_data
from typer import Option

from lmplay.catalog.entries import resolve
from lmplay.console import Device, note, print_json, run_app, show, table
from lmplay.machine import matmul_rate, resolve_device
from lmplay.model.counts import count
from lmplay.model.experiment import load_experiment

SIDES = {"loop": loop, "lmplay": lmplay}  # in this order: lmplay sets malloc for its process
WARM_UP = 2  # steps
PARTS = {  # the first one whose word is in an operator's name
    "optimizer, clipping": ("adamw", "foreach", "vector_norm", "Optimizer"),
    "attention": ("scaled_dot_product", "flash"),
    "layer norm": ("layer_norm",),
    "GELU": ("gelu", "tanh", "pow"),
    "products of the blocks": ("aten::mm", "aten::addmm", "aten::bmm", "linear"),
    "embedding": ("embedding", "index"),
    "copies, casts, zeros": ("copy", "clone", "cat", "zero", "fill", "empty", "contiguous"),
}
HEAD, REST, BETWEEN = "head and loss", "other operators", "between operators"

app = typer.Typer(pretty_exceptions_enable=False)


class Enough(BaseException):
    """The step has been profiled."""


class OneStep:
    """Turns of a side, the last of them under the profiler; `seconds` of it, and its `parts`."""

    def __init__(self, size: Size, device: torch.device):
        self.size, self.device = size, device
        self._profile = profile(record_shapes=True)
        self._left = WARM_UP
        self.seconds, self.parts = 0.0, Counter()

    def wait(self) -> None:
        if self._left == 0:
            synchronize(self.device)
            self._profile.start()
            self.seconds = -time.perf_counter()

    def done(self, **_) -> None:
        if self._left > 0:
            self._left -= 1
            return
        synchronize(self.device)
        self.seconds += time.perf_counter()
        self._profile.stop()
        for event in self._profile.key_averages(group_by_input_shape=True):
            if self.device.type == "cpu":
                spent = event.self_cpu_time_total
            else:
                spent = event.self_device_time_total
            self.parts[self._part(event)] += spent / 1e6
        self.parts[BETWEEN] = max(0.0, self.seconds - self.parts.total())
        raise Enough

    def _part(self, event) -> str:
        first, *others = PARTS
        if any(word in event.key for word in PARTS[first]):
            return first
        vocabulary = range(self.size.vocab_size, self.size.vocab_size + 128)  # rows may be padded
        dims = [dim for shape in event.input_shapes for dim in _flat(shape)]
        if any(dim in vocabulary for dim in dims) and "embedding" not in event.key:
            return HEAD
        named = (part for part in others if any(word in event.key for word in PARTS[part]))
        return next(named, REST)


def _flat(shape) -> list[int]:
    if isinstance(shape, int):
        return [shape]
    return [dim for part in shape for dim in _flat(part)]


def measure(name: str, precision: str, sides: list[str], device: torch.device) -> dict:
    """One size in one precision: a step of each side."""
    size = SIZES[name]
    experiment = load_experiment(resolve("gpt2"))
    flops = count(experiment, size.config(experiment)).flops_per_token * size.tokens
    common = {"device": str(device), "exp": "gpt2", "precision": precision, "steps": 1, "waking": 0}
    found = {}
    for side in sides:
        step = OneStep(size, device)
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), size)
            try:
                SIDES[side](step, side_settings(size, Path(folder), common, side))
            except Enough:
                found[side] = {"seconds": step.seconds, "parts": dict(step.parts)}
    best = flops / matmul_rate(device, precision)
    return {"size": name, "precision": precision, "at_peak": best, "sides": found}


@app.command()
def main(
    sizes: Sizes = "small,base",
    precisions: Precisions = "bf16,fp32",
    sides: Annotated[str, Option(help=f"Of {', '.join(SIDES)}.", metavar="NAMES")] = ",".join(
        SIDES
    ),
    device: Device = "auto",
    as_json: Annotated[bool, Option("--json", metavar="", help="Print one JSON document.")] = False,
) -> None:
    """Profile a training step.

    Example: python benchmarks/step.py --sizes small --precisions bf16
    """
    where, wanted = resolve_device(device), chosen("--sides", sides, SIDES)
    if not has_peer():
        without_peer(note)
        wanted = ["lmplay"]
    cases = []
    for name in chosen("--sizes", sizes, SIZES):
        for precision in chosen("--precisions", precisions, PRECISIONS):
            note(f"profiling {name} in {precision}: {', '.join(wanted)}")
            cases.append(measure(name, precision, wanted, where))
            if not as_json:
                print_case(cases[-1])
    if as_json:
        rows = [line for case in cases for line in rows_of(case)]
        print_json(report("step", where, torch.get_num_threads(), cases, rows))


def rows_of(case: dict) -> list[dict]:
    """The parts of each side's step, for the common table."""
    return [
        row(f"step {case['size']} {case['precision']}, {name}: {part}", "s", seconds)
        for name, side in case["sides"].items()
        for part, seconds in side["parts"].items()
    ]


def print_case(case: dict) -> None:
    """One row for each part, the longest first."""
    sides = case["sides"]
    totals = Counter()
    for side in sides.values():
        totals.update(side["parts"])
    rows = [
        [part, *(f"{side['parts'].get(part, 0) * 1e3:,.1f}" for side in sides.values())]
        for part, _ in totals.most_common()
    ]
    rows.append(["the step", *(f"{side['seconds'] * 1e3:,.1f}" for side in sides.values())])
    title = (
        f"{case['size']} in {case['precision']}, ms; its FLOPs at the rate of a large product: "
        f"{case['at_peak'] * 1e3:,.0f}"
    )
    columns = ["part", *sides]
    show(table(title, columns, rows, right=columns[1:]))


if __name__ == "__main__":
    run_app(app)
