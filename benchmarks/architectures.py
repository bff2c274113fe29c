"""What architectures and ideas cost: time and memory of training, and memory of generating.

    python benchmarks/architectures.py --plan quick
    python benchmarks/architectures.py --only list:attention,z_loss

An architecture stands beside llama, at the width at which it has about as many parameters as llama
on that plan; any other idea beside what it was copied from, at the plan's own width. A round is a
forward and a backward pass of each, in turn with the other's on the same tokens, so that what else
the machine does slows both; "speed" is the median over the rounds of the other's time over its own
in the same round. "MiB" is the most that tensors take during such a pass, weights and gradients
left out, and "memory" that over the other's. What a row keeps while generating is counted after
half of the plan's row, all of it, and twice as much.
"""

import dataclasses
import statistics
import time
from itertools import accumulate
from typing import Annotated

import torch
import typer
from measure import PRECISIONS, synchronize
from typer import Option

from lmplay.catalog.entries import entries, listed, parent_of, resolve
from lmplay.console import Device, note, print_json, run_app, show, table
from lmplay.data.tokenizers import vocabulary_of
from lmplay.errors import UserError
from lmplay.machine import resolve_device
from lmplay.model.counts import cache_bytes
from lmplay.model.experiment import Experiment, load_experiment
from lmplay.model.objective import Objective
from lmplay.model.scale import scale
from lmplay.plan import Plan
from lmplay.plan_file import read_plan

BASE = "llama"
NAMES = (
    *("avey", "ftp", "ftp_blockwise", "hourglass", "hymba", "kimi_delta", "lfm2", "megabyte"),
    *("rene", "rwkv7", "tokenformer", "zamba2", "llada", "spacebyte", "aunet", "hnet"),
)
STEP = 24  # of the widths that are tried: whole heads, their pairs, patches and scans

app = typer.Typer(pretty_exceptions_enable=False)


def size_of(experiment: Experiment, config) -> int:
    return sum(p.numel() for p in experiment.model(config, device="meta").parameters())


def as_large(experiment: Experiment, config, wanted: int):
    """The config with the width at which the model's size is nearest to `wanted`."""
    found = []
    for width in range(STEP, 2 * config.width + STEP, STEP):
        try:
            config_there = dataclasses.replace(config, width=width)
            found.append((abs(size_of(experiment, config_there) - wanted), width))
        except ValueError:  # such as a scan's heads, which do not divide it
            continue
    return dataclasses.replace(config, width=min(found)[1])


class Trained:
    """A model and the rows that it is timed on."""

    def __init__(self, experiment: Experiment, config, plan: Plan, device, precision: str):
        self.objective = Objective(experiment.model(config, seed=0, device=device)).train()
        self.device, self.precision = device, precision
        draw = torch.Generator().manual_seed(0)
        shape = (plan.batch_sizes[0][1], config.max_len + 1)
        rows_BS = torch.randint(config.vocab_size, shape, generator=draw).to(device)
        self.tokens_BT, self.targets_BT = rows_BS[:, :-1], rows_BS[:, 1:]

    def step(self) -> None:
        """One forward and one backward pass."""
        with torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16"):
            sums = self.objective(self.tokens_BT, self.targets_BT)
        (sums.objective / self.targets_BT.numel()).backward()

    def seconds(self) -> float:
        """Of one step."""
        self.objective.zero_grad()
        synchronize(self.device)
        began = time.perf_counter()
        self.step()
        synchronize(self.device)
        return time.perf_counter() - began

    def peak_bytes(self) -> int:
        """The most that tensors take during a step, but for weights and their gradients."""
        if self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self.device)
            before = torch.accelerator.memory_allocated(self.device)
            self.step()
            return torch.accelerator.max_memory_allocated(self.device) - before
        with torch.profiler.profile(profile_memory=True) as profile:
            self.step()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sums = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
        return max(sums)


def chosen(only: str | None) -> list[str]:
    """The names that the option lists, those of a family where it says list:FAMILY."""
    known, names = entries(), []
    for word in only.split(",") if only else NAMES:
        family = word.removeprefix("list:")
        names += [word] if family == word else listed(family, known)
    return names


@app.command()
def main(
    plan: Annotated[str, Option(help="Plan that says rows, depth and width.")] = "quick",
    only: Annotated[
        str | None,
        Option(help="Experiments or list:FAMILY, with commas; architectures without it."),
    ] = None,
    rounds: Annotated[int, Option(help="Passes of each that are timed.", min=1)] = 5,
    precision: Annotated[str, Option(help=f"One of {', '.join(PRECISIONS)}.")] = "fp32",
    device: Device = "auto",
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
):
    """Time training of architectures beside llama, and of ideas beside what they change.

    Example: python benchmarks/architectures.py --plan quick --only rwkv7,rene
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision: there is no {precision!r}", f"try {PRECISIONS[0]}")
    read, where = read_plan(plan), resolve_device(device)
    vocabulary = vocabulary_of(read.tokenizer)

    def made(name: str) -> tuple[Experiment, object]:
        experiment = load_experiment(resolve(name))
        return experiment, scale(experiment, read, *vocabulary, {}).config

    def timed(name: str) -> Trained:
        return Trained(*made(name), read, where, precision)

    beside: dict[str, Trained] = {}  # what others stand beside, by name
    rows = []
    for name in chosen(only):
        experiment, config = made(name)
        is_architecture = experiment.entry.file in NAMES
        other = BASE if is_architecture else (parent_of(experiment.entry) or experiment.entry).file
        theirs = beside[other] = beside.get(other) or timed(other)
        wanted = sum(p.numel() for p in theirs.objective.parameters())
        if is_architecture:
            config = as_large(experiment, config, wanted)
        mine = Trained(experiment, config, read, where, precision)
        note(f"timing {name}")
        pairs = [[side.seconds() for side in (mine, theirs)] for _ in range(rounds + 2)][2:]
        lengths = [config.max_len * share // 2 for share in (1, 2, 4)]
        longest = dataclasses.replace(config, max_len=lengths[-1])
        peaks = [side.peak_bytes() for side in (mine, theirs)]
        rows.append(
            {
                "experiment": name,
                "beside": other,
                "width": config.width,
                "parameters": size_of(experiment, config) / wanted,
                "tokens_per_second": mine.tokens_BT.numel()
                / statistics.median(own for own, _ in pairs),
                "speed": statistics.median(base / own for own, base in pairs),
                "peak_bytes": peaks[0],
                "memory": peaks[0] / peaks[1],
                "cache_bytes": {T: cache_bytes(experiment, longest, T) for T in lengths},
            }
        )
    if as_json:
        return print_json({"schema_version": 1, "device": str(where), "architectures": rows})
    cells = [
        [row["experiment"], row["beside"], str(row["width"]), f"{row['parameters']:.2f}",
         f"{row['tokens_per_second']:,.0f}", f"{row['speed']:.2f}",
         f"{row['peak_bytes'] / 2**20:,.0f}", f"{row['memory']:.2f}",
         *("" if size is None else f"{size / 1024:,.0f}" for size in row["cache_bytes"].values())]
        for row in rows
    ]  # fmt: skip
    kept = [f"KiB at {T:,}" for T in rows[0]["cache_bytes"]]
    columns = ["experiment", "beside", "width", "size", "tokens/s", "speed", "MiB", "memory", *kept]
    title = f"{plan}: size, speed and memory over those of what it stands beside"
    show(table(title, columns, cells, right=set(columns[2:])))


if __name__ == "__main__":
    run_app(app)
