"""Proofs about weights: nothing else is kept, and a seed or a state dict gives all of them."""

import copy
import functools
import math
import random
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmplay.model.abilities import has_after_step
from lmplay.model.objective import Objective
from lmplay.proofs.proof import EXACT, Refuted, how_far
from lmplay.proofs.specimen import Specimen

# B rows, T positions

_FIXED = ("parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules")
_FIXED += ("children", "state_dict", "load_state_dict", "zero_grad", "eval", "__call__")
_DAY = 86_400  # seconds
_CLOCKS = ("time", "monotonic", "perf_counter")


def holds_only_weights(specimen: Specimen) -> str:
    model, shapes = specimen.model(), specimen.experiment.model(specimen.config, device="meta")
    own = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    listed = set(model.modules())
    for name, module in model.named_modules():
        where = name or "Model"
        for key in _FIXED:
            if _is_own(getattr(type(module), key), specimen.experiment.module):
                raise Refuted(f"{where}.{key} is written anew: optimizer and checkpoint rely on it")
        for key in module._non_persistent_buffers_set:
            raise Refuted(f"{where}.{key} is a buffer that no checkpoint keeps")
        for key, value in vars(module).items():
            if hides := _hidden_module(value, listed):
                raise Refuted(f"{where}.{key} holds a {hides} unseen: make it a ModuleList")
            if key not in ("_parameters", "_buffers", "_modules") and _holds_tensor(value, own):
                raise Refuted(f"{where}.{key} is a tensor but neither parameter nor buffer")
    refuse_wrong_weights(model)
    for name, tensor in shapes.state_dict().items():
        if tensor.device.type != "meta":
            raise Refuted(f"{name} is made on {tensor.device} when it is asked for on another")
        if tensor.shape != model.state_dict()[name].shape:
            raise Refuted(f"{name} has another shape on the meta device")
    return f"{sum(p.numel() for p in model.parameters()):,} parameters here"


def refuse_wrong_weights(model: nn.Module) -> None:
    """Raise Refuted where they share numbers, or have too few digits to be trained."""
    refuse_shared_numbers(model)
    for name, weight in model.named_parameters():
        if weight.dtype in (torch.bfloat16, torch.float16):
            raise Refuted(f"{name} is {weight.dtype}, in which an optimizer's small steps are lost")


def refuse_shared_numbers(model: nn.Module) -> None:
    """Raise Refuted where two parameters or buffers lie in one storage."""
    storages: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (other := storages.setdefault(tensor.untyped_storage().data_ptr(), name)) != name:
            raise Refuted(f"{name} and {other} share their numbers: make them one Parameter")


def repeats_by_seed(specimen: Specimen) -> str:
    """Building, training and testing are the same for one seed, a day later in another process."""
    tokens_BT = specimen.tokens(B=2)
    losses, states = [], []
    for days in (0, 1):
        with _elsewhere(specimen.experiment.module, days):
            model = specimen.model(seed=5, dropout=0.3).train()
            states.append(copy.deepcopy(model.state_dict()))
            torch.manual_seed(6)
            loss = Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.item()
            losses.append((loss, specimen.outputs(model.eval(), tokens_BT).double().sum().item()))
    for name, tensor in states[0].items():
        if not torch.equal(tensor, states[1][name]):
            raise Refuted(f"{name} starts with other numbers for the same seed")
    for what, *found in zip(("training loss", "sum of all outputs"), *losses, strict=True):
        if found[0] != found[1] and not math.isnan(found[0]):
            raise Refuted(
                f"the {what} is {found[0]:.6g}, then {found[1]:.6g} for the same seed, a day later "
                "in another process"
            )
    _refuse_alike(states[0], specimen.model(seed=6).state_dict())
    _refuse_a_start_of_its_own(specimen)
    _refuse_a_seed_of_its_own(specimen, tokens_BT)
    return f"{len(states[0])} tensors and the training loss; another seed gives others"


@contextmanager
def _elsewhere(module: types.ModuleType, days: int) -> Iterator[None]:
    """As in another process, where the clock reads more and text has another hash."""
    clocks = {name: getattr(time, name) for name in _CLOCKS}
    kept = dict(vars(module))
    vars(module).setdefault("hash", lambda of: hash((days, of) if isinstance(of, str) else of))
    try:
        for name, true in clocks.items():
            later = functools.partial(_later, true, days)
            setattr(time, name, later)
            vars(module).update({key: later for key, value in kept.items() if value is true})
        yield
    finally:
        for name, true in clocks.items():
            setattr(time, name, true)
        if "hash" not in kept:
            del module.hash
        own = {k: v for k, v in kept.items() if any(v is clock for clock in clocks.values())}
        vars(module).update(own)


def _later(clock: Callable[[], float], days: int) -> float:
    return clock() + days * _DAY


def _refuse_alike(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Most of what is drawn differs; constants, and tables that are computed, need not."""
    drawn = {k: t for k, t in first.items() if t.is_floating_point() and t.unique().numel() > 1}
    alike = [name for name, tensor in drawn.items() if torch.equal(tensor, second[name])]
    if 2 * sum(drawn[name].numel() for name in alike) > sum(t.numel() for t in drawn.values()):
        raise Refuted(f"{alike[0]} starts with the same numbers for another seed")


def _refuse_a_start_of_its_own(specimen: Specimen) -> None:
    """What is trained starts from numbers of the run's seed, not of a generator that has its own.

    A buffer may be drawn so: a hash, or fixed features.
    """
    with _OwnDraws() as own:
        first = dict(specimen.model(seed=5).named_parameters())
    if not own.num_draws:
        return
    for name, weight in specimen.model(seed=6).named_parameters():
        if weight.unique().numel() > 1 and torch.equal(weight, first[name]):
            raise Refuted(f"{name} starts with the same numbers for another seed")


class _OwnDraws(TorchDispatchMode):
    """Counts the operations that draw from another generator than torch's."""

    def __init__(self):
        super().__init__()
        self.num_draws = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_draws += (kwargs or {}).get("generator") is not None
        return func(*args, **(kwargs or {}))


def _refuse_a_seed_of_its_own(specimen: Specimen, tokens_BT: Tensor) -> None:
    """Building and running leave torch's generator where drawing leads it."""
    config = specimen.config_with_dropout(0.3)
    model = specimen.model(dropout=0.3)
    objective = Objective(model)

    def run(training: bool) -> None:
        objective.train(training)
        sums = objective(tokens_BT, tokens_BT.roll(-1, 1))
        if training and has_after_step(model):
            sums.objective.backward()
            model.after_step()

    passes = {
        "building the model": lambda: specimen.experiment.module.Model(config),
        "a pass in training mode": lambda: run(True),
        "a pass in eval mode": lambda: run(False),
    }
    own = {}
    for name, do in passes.items():
        with _OwnDraws() as draws, _watching_seeds(name):
            do()
        own[name] = draws.num_draws
        pythons = random.getstate()
        ends = []
        for num_drawn in (0, 1):
            torch.manual_seed(5)
            torch.rand(num_drawn)
            do()
            ends.append(torch.get_rng_state())
            if torch.initial_seed() != 5:
                raise Refuted(f"{name} sets torch's seed, to {torch.initial_seed()}")
        if torch.equal(*ends):
            raise Refuted(f"{name} sets the state of torch's generator")
        if random.getstate() != pythons:
            raise Refuted(f"{name} draws from Python's random, which no seed of a run reaches")
    if own["a pass in training mode"] > own["a pass in eval mode"]:
        raise Refuted("each pass in training mode draws the same, from a generator of its own")


@contextmanager
def _watching_seeds(name: str) -> Iterator[None]:
    """Raise Refuted where torch is given a seed, even if its state is put back afterwards."""
    true, told = torch.manual_seed, []
    torch.manual_seed = lambda seed: told.append(seed) or true(seed)
    try:
        yield
    finally:
        torch.manual_seed = true
    if told:
        raise Refuted(f"{name} sets torch's seed, to {told[0]}")


def is_its_state(specimen: Specimen) -> str:
    model = specimen.randomised()
    other = specimen.model(seed=7).eval()
    other.load_state_dict(model.state_dict())
    tokens_BT = specimen.tokens(B=2)
    moved = how_far(specimen.outputs(other, tokens_BT), specimen.outputs(model, tokens_BT))
    if not moved <= EXACT:
        raise Refuted(
            f"a model with the same state dict answers otherwise, by {moved:.1e}",
            unless=("repeat", "any shape"),
        )
    return f"another model with it answers the same ({moved:.0e})"


def _holds_tensor(value: object, own: set[int]) -> bool:
    """Whether there is one besides the parameters and buffers, which a module may list again."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds_tensor(part, own) for part in value)
    return isinstance(value, Tensor) and id(value) not in own


def _hidden_module(value: object, listed: set[nn.Module]) -> str | None:
    """The kind of a module with weights that is not among the model's own."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return next(filter(None, (_hidden_module(part, listed) for part in value)), None)
    is_hidden = (
        isinstance(value, nn.Module)
        and value not in listed
        and next(value.parameters(), None) is not None
    )
    return type(value).__name__ if is_hidden else None


def _is_own(value: object, module: types.ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__
