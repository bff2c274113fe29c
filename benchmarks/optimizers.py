"""What a step of each optimizer costs: seconds, and bytes of state for each parameter.

    python benchmarks/optimizers.py --plan quick

takes the parameters of one experiment at a plan's size and gives all of them the same random
gradient. Each optimizer steps in turn with AdamW, so that what else the machine does slows both;
"over AdamW" is the median over the rounds of their ratio in the same round. "of a step" is what it
takes more than AdamW, as a share of a whole training step with AdamW at the plan's batch, of which
some rows go forward and backward here; with further passes of its own, where it needs them.
"""

import statistics
import time
from typing import Annotated

import torch
import typer
from measure import chosen, synchronize
from typer import Option

from lmplay.catalog.entries import resolve
from lmplay.console import Device, note, print_json, run_app, show, table
from lmplay.data.tokenizers import vocabulary_of
from lmplay.errors import UserError
from lmplay.machine import dtype_of, resolve_device, resolve_precision
from lmplay.model.experiment import Experiment, load_experiment
from lmplay.model.objective import Objective
from lmplay.model.roles import roles_of
from lmplay.model.scale import scale
from lmplay.optim.joint import JointOptimizer, make_optimizer
from lmplay.optim.known import KNOWN, replaced
from lmplay.plan import Optimizer, Plan
from lmplay.plan_file import read_plan

BASE = "AdamW"

app = typer.Typer(pretty_exceptions_enable=False)


def seconds_of_a_step(optimizer: JointOptimizer, gradients: dict, device: torch.device) -> float:
    """One step from the same gradients as ever: some optimizers write into theirs."""
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.clone()
    if optimizer.needs_curvature:
        optimizer.take_curvature({p: g.square() for p, g in gradients.items()})
    synchronize(device)
    began = time.perf_counter()
    optimizer.step()
    synchronize(device)
    return time.perf_counter() - began


def further_passes(optimizer: JointOptimizer) -> float:
    """Forward and backward passes of a batch, in each step, besides those that all need."""
    periods = [getattr(member, "update_period", None) for member in optimizer.members]
    return sum(1 / period for period in periods if period)


def state_bytes(optimizer: JointOptimizer) -> int:
    """All tensors that it keeps, lists of them too."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return sum(one.nbytes for one in flat if isinstance(one, torch.Tensor) and one.dim())


def seconds_of_passes(
    experiment: Experiment, config, plan: Plan, rows: int, device: torch.device
) -> float:
    """Forward and backward of one batch of the plan, at its precision, from these rows of it."""
    precision = resolve_precision(plan.precision, device)
    objective = Objective(experiment.model(config, seed=0, device=device))
    draw = torch.Generator(device).manual_seed(0)
    shape = (rows, plan.max_len)
    tokens_BT = torch.randint(0, config.vocab_size, shape, generator=draw, device=device)
    found = []
    for _ in range(3):
        synchronize(device)
        began = time.perf_counter()
        with torch.autocast(device.type, dtype_of(precision), precision != "fp32"):
            scored = objective(tokens_BT, tokens_BT)
        scored.objective.backward()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found) * max(size for _, size in plan.batch_sizes) / rows


@app.command()
def main(
    exp: Annotated[str, Option(help="Experiment whose parameters are trained.")] = "gpt2ish",
    plan: Annotated[str, Option(help="Plan that says its size.")] = "quick",
    only: Annotated[str | None, Option(help="Optimizers, with commas; all without it.")] = None,
    rounds: Annotated[int, Option(help="Steps of each that are timed.", min=1)] = 5,
    rows: Annotated[int, Option(help="Rows that go forward and backward.", min=1)] = 4,
    device: Device = "auto",
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
):
    """Time the step of every optimizer.

    Example: python benchmarks/optimizers.py --plan quick --only Muon,SOAP
    """
    names = list(KNOWN) if only is None else chosen("--only", only, KNOWN)
    experiment, read, where = load_experiment(resolve(exp)), read_plan(plan), resolve_device(device)
    config = scale(experiment, read, *vocabulary_of(read.tokenizer), {}).config
    roles = roles_of(experiment, config)
    base = Optimizer(name=BASE, lr=1e-4, weight_decay=0.1)

    def made(name: str) -> tuple[JointOptimizer, dict]:
        model = experiment.model(config, seed=0, device=where)
        draw = torch.Generator(where).manual_seed(0)
        gradients = {
            p: 1e-3 * torch.randn(p.shape, generator=draw, device=where) for p in model.parameters()
        }
        return make_optimizer(Optimizer(**replaced(base, name)), model, roles, 1000), gradients

    passes = seconds_of_passes(experiment, config, read, rows, where)
    theirs, found = made(BASE), []
    for name in names:
        try:
            mine = made(name)
        except UserError as error:  # its package is not installed
            note(error.problem)
            continue
        pairs = [
            [seconds_of_a_step(*side, where) for side in (mine, theirs)] for _ in range(rounds + 2)
        ][2:]
        size = sum(p.numel() for p in mine[1])
        own, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        more = statistics.median(one - two for one, two in pairs) + passes * further_passes(mine[0])
        found.append(
            {
                "optimizer": name,
                "seconds": own,
                "over_adamw": statistics.median(one / two for one, two in pairs),
                "of_a_step": more / (passes + other),
                "bytes_per_parameter": state_bytes(mine[0]) / size,
            }
        )
    if as_json:
        facts = {"device": str(where), "threads": torch.get_num_threads(), "passes": passes}
        return print_json({"schema_version": 1, **facts, "optimizers": found})
    cells = [
        [row["optimizer"], f"{1000 * row['seconds']:.1f}", f"{row['over_adamw']:.2f}",
         f"{100 * row['of_a_step']:+.1f} %", f"{row['bytes_per_parameter']:.1f}"]
        for row in found
    ]  # fmt: skip
    columns = ["optimizer", "ms", "over AdamW", "of a step", "bytes"]
    title = f"{exp} on {plan}, {torch.get_num_threads()} threads, passes of {passes:.2f} s"
    show(table(title, columns, cells, right=set(columns[1:])))


if __name__ == "__main__":
    run_app(app)
