"""Averages of the weights that a run passes through, judged, sampled and exported beside them.

Training never sees them, and goes on to the bit as it would without. They follow the clock: the
weights after a step stand for the step's share of the run, also after a step that changed nothing.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmplay.errors import UserError
from lmplay.model.roles import looked_up
from lmplay.optim.joint import JointOptimizer
from lmplay.plan import Averages
from lmplay.run.fsdp import scatter_tensor
from lmplay.run.run import Run

SNAPSHOTS = 5  # of `lawa`
TAIL = 3  # spans before the end, `tail_ema` begins
BLEND = 0.65  # of `tail_ema`, the share of the average


class _Ema:
    """Exponential average: the weights of a step count by its tokens over those of the span.

    Until a span is over, it is the plain mean of all so far, so that the start weighs no more.
    """

    copies = 1  # in a checkpoint, at most

    def __init__(self, span: float):
        self.span = span
        self.sets: list[list[Tensor]] = []

    def take(self, weights: list[Tensor], before: float, after: float) -> None:
        if not self.sets:
            self.sets = [_copies(weights)]
        weight = min(1.0, (after - before) / min(self.span, after))
        torch._foreach_lerp_(self.sets[0], weights, weight)

    def read(self, weights: list[Tensor], progress: float) -> list[Tensor]:
        return self.sets[0] if self.sets else weights


class _Lawa:
    """Mean of the newest SNAPSHOTS weights, which are taken at even distances back from the end.

    Source: Kaddour 2022, arXiv:2209.14981, section 2; Sanyal et al. 2023, arXiv:2306.03241.
    """

    copies = SNAPSHOTS + 1  # and the mean

    def __init__(self, span: float):
        self.gap = span / SNAPSHOTS
        self.sets: list[list[Tensor]] = []

    def take(self, weights: list[Tensor], before: float, after: float) -> None:
        if self._left(before) == self._left(after):
            return
        oldest = self.sets.pop(0) if len(self.sets) == SNAPSHOTS else _copies(weights)
        torch._foreach_copy_(oldest, weights)
        self.sets.append(oldest)

    def _left(self, progress: float) -> int:
        """Snapshots from here to the end."""
        return math.ceil(round((1 - progress) / self.gap, 6))

    def read(self, weights: list[Tensor], progress: float) -> list[Tensor]:
        mean = _copies(self.sets[0] if self.sets else weights)
        for number, one in enumerate(self.sets[1:], start=2):
            torch._foreach_lerp_(mean, one, 1 / number)  # of equal numbers exactly that number
        return mean


class _TailEma:
    """Exponential average over the end of a run, blended with the weights, at their rows' lengths.

    A copy of the weights would begin it too early on their path: on a straight one the average lags
    a span. So it begins half a span behind them, by the velocity of the step then; and since an
    average is shorter than what it averages, rows of matrices get the lengths that they have now.

    Source: Keller Jordan's modded-nanogpt, pull requests 325, 328 and 338.
    """

    copies = 2

    def __init__(self, span: float):
        self.span = span
        self.start = 1 - TAIL * span
        self.sets: list[list[Tensor]] = []  # until the start, the weights of the step before it

    def take(self, weights: list[Tensor], before: float, after: float) -> None:
        if after <= self.start:
            if 2 * after - before > self.start:
                self.sets = [_copies(weights)]
        elif before <= self.start or not self.sets:
            self._begin(weights, min(1.0, (after - before) / self.span))
        else:
            torch._foreach_lerp_(self.sets[0], weights, min(1.0, (after - before) / self.span))

    def _begin(self, weights: list[Tensor], weight: float) -> None:
        earlier = self.sets[0] if self.sets else weights
        back = -1 / (2 * weight)  # half a span, in steps
        begun = torch._foreach_add(weights, torch._foreach_sub(weights, earlier), alpha=back)
        self.sets = [_with_lengths(begun, weights)]

    def read(self, weights: list[Tensor], progress: float) -> list[Tensor]:
        if progress <= self.start or not self.sets:
            return weights
        return _with_lengths(torch._foreach_lerp(weights, self.sets[0], BLEND), weights)


KINDS = {"ema": _Ema, "lawa": _Lawa, "tail_ema": _TailEma}


class WeightAverages:
    """The averages that a plan wants of a model's trained parameters, a tied one once.

    Args:
        tables: names of parameters of which rows are looked up: a row moves in few steps, so
            `tail_ema` leaves them as they are.
    """

    def __init__(self, wanted: Averages, model: nn.Module, tables: set[str] = frozenset()):
        spans = {name: span for name, span in wanted.model_dump().items() if span is not None}
        self._kinds = {name: KINDS[name](span) for name, span in spans.items()}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rest = {name: p for name, p in trained.items() if name not in tables}
        self._weights = {name: rest if name == "tail_ema" else trained for name in self._kinds}
        self.device = next(iter(model.parameters())).device
        self.progress = 0.0

    @property
    def names(self) -> list[str]:
        """Of the averages."""
        return list(self._kinds)

    @property
    def most_bytes(self) -> int:
        """What a checkpoint takes for them in the end."""
        sizes = {name: sum(p.nbytes for p in of.values()) for name, of in self._weights.items()}
        return sum(kind.copies * sizes[name] for name, kind in self._kinds.items())

    @torch.no_grad()
    def take(self, after: float) -> None:
        """A step has ended.

        Args:
            after: the share of the run's tokens that was trained on by now, 0 to 1.
        """
        for name, kind in self._kinds.items():
            kind.take(self._local(name), self.progress, after)
        self.progress = after

    @torch.no_grad()
    def read(self, name: str) -> dict[str, Tensor]:
        """An average by the names of its parameters; those that it lacks are as they are."""
        values = self._kinds[name].read(self._local(name), self.progress)
        return dict(zip(self._weights[name], self._spread(name, values), strict=True))

    @contextmanager
    def applied(self, name: str) -> Iterator[None]:
        """While entered, the model has an average; afterwards, to the bit, what it had."""
        weights = self._local(name)
        with torch.no_grad():
            average = self._kinds[name].read(weights, self.progress)
            kept = _copies(weights)
            torch._foreach_copy_(weights, average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Each average as "name/parameter", and what it goes on from as "name.number/parameter"."""
        state = {}
        for name, kind in self._kinds.items():
            state |= {f"{name}/{key}": value for key, value in self.read(name).items()}
            for number, values in enumerate(kind.sets):
                named = zip(self._weights[name], self._spread(name, values), strict=True)
                state |= {f"{name}.{number}/{key}": value for key, value in named}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], progress: float) -> None:
        """Go on from what `state_dict` gave at this progress, in whole tensors."""
        self.progress = progress
        for name, kind in self._kinds.items():
            kind.sets, weights = [], self._weights[name]
            while f"{name}.{len(kind.sets)}/{next(iter(weights), '')}" in state:
                found = {key: state[f"{name}.{len(kind.sets)}/{key}"] for key in weights}
                mine = [_local(scatter_tensor(found[key], p)) for key, p in weights.items()]
                kind.sets.append([one.to(self.device) for one in mine])

    def _local(self, name: str) -> list[Tensor]:
        return [_local(p) for p in self._weights[name].values()]

    def _spread(self, name: str, values: list[Tensor]) -> list[Tensor]:
        """This process's slices as what the parameters are."""
        parameters = self._weights[name].values()
        return [_like(value, p) for value, p in zip(values, parameters, strict=True)]


def averages_of(run: Run, optimizer: JointOptimizer) -> WeightAverages:
    """The averages of a run's plan over its model.

    Raises:
        UserError: the optimizer is judged by an average of its own.
    """
    made = WeightAverages(run.plan.averages, run.model, looked_up(run.experiment, run.config))
    own = [member for member in optimizer.members if hasattr(member, "eval")]
    if made.names and own:
        name = own[0].param_groups[0]["optimizer"]
        problem = f"averages: {name} is judged by an average of its own"
        raise UserError(problem, hint="leave out one of the two")
    return made


def _copies(weights: list[Tensor]) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights]


def _with_lengths(changed: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The rows of matrices at the lengths that they have in `weights`."""
    made = []
    for one, weight in zip(changed, weights, strict=True):
        if weight.dim() > 1:
            wanted, has = (_row_lengths(each) for each in (weight, one))
            one = one * torch.where(has > 0, wanted / has, 1.0)
        made.append(one)
    return made


def _row_lengths(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))


def _local(tensor: Tensor) -> Tensor:
    """This process's slice, which shares its storage; rows are whole in it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A slice as the spread tensor that the parameter is."""
    if not hasattr(parameter, "to_local"):
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements,
        shape=parameter.shape, stride=parameter.stride(), run_check=False,
    )  # fmt: skip
