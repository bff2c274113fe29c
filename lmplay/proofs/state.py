"""Proofs that a pass leaves nothing behind: in the model, its module, or the tokens."""

import array
import collections
import contextvars
import copy
import dataclasses
import functools
import hashlib
import random
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmplay.model.abilities import has_after_step, reader, takes_cache
from lmplay.model.cache import Cache
from lmplay.model.objective import Objective
from lmplay.proofs.proof import EXACT, Refuted, how_far
from lmplay.proofs.specimen import Specimen
from lmplay.proofs.weights import refuse_shared_numbers

# B rows, T positions

_DEPTH = 6  # of containers in containers


def keeps_nothing(specimen: Specimen) -> str:
    """In eval mode nothing at all; in training mode buffers may change, by after_step weights too.

    `Model.at` gives what follows from progress alone.
    """
    model = specimen.randomised()
    module = specimen.experiment.module
    tokens_BT = specimen.tokens(B=3)
    others_BT = specimen.others(tokens_BT)
    before = marks_of(model, module)
    answer = specimen.outputs(model, tokens_BT)
    given_BT = tokens_BT.clone()
    specimen.outputs(model, others_BT)
    again = specimen.outputs(model, tokens_BT)
    if takes_cache(model) and not specimen.scores_itself:
        cache = Cache()
        for t in range(2):
            with torch.no_grad():
                reader(model)(tokens_BT[:, t : t + 1], cache=cache)
            cache.advance(1)
    refuse_changes(before, marks_of(model, module), "in eval mode")
    if not how_far(again, answer) <= EXACT:
        moved = how_far(again, answer)
        raise Refuted(f"the same tokens give another answer after others, by {moved:.1e}")
    before = marks_of(model.train(), module, with_state=False)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for tokens in (tokens_BT, others_BT):
        targets_BT = tokens.roll(-1, 1)
        kept_BT = targets_BT.clone()
        Objective(model)(tokens, targets_BT).objective.backward()
        if not torch.equal(targets_BT, kept_BT):
            raise Refuted("it writes to the targets that it is given")
    refuse_changes(before, marks_of(model, module, with_state=False), "in training mode")
    for name, weight in model.named_parameters():
        if not torch.equal(weight, weights[name]):
            raise Refuted(f"{name} is written to in a pass in training mode, not in after_step")
    if has_after_step(model):
        drawn = torch.get_rng_state()
        for _ in range(4):
            model.after_step()
        if not torch.equal(drawn, torch.get_rng_state()):
            raise Refuted("after_step draws random numbers, of which every process draws others")
        refuse_changes(before, marks_of(model, module, with_state=False), "and after_step")
        refuse_shared_numbers(model)
    if not torch.equal(tokens_BT, given_BT):
        raise Refuted("it writes to the tokens that it is given")
    _refuse_remembered_calls(specimen)
    _refuse_remembered_weights(specimen)
    if specimen.follows_progress:
        _refuse_more_than_progress(specimen)
    return f"{len(before)} attributes and globals, and the state dict, stay the same"


def refuse_changes(before: dict[str, object], after: dict[str, object], where: str) -> None:
    """Raise Refuted where one of the marks is not the same any more."""
    for name in [*before, *after]:
        if before.get(name) != after.get(name):
            raise Refuted(f"{name} is not the same after a pass {where}")


def _refuse_more_than_progress(specimen: Specimen) -> None:
    """`Model.at` makes the same of one progress, whatever it was told before, of any weights."""
    model, module = specimen.randomised(), specimen.experiment.module
    before, drawn = marks_of(model, module), torch.get_rng_state()
    model.at(0.5)
    after, told = marks_of(model, module), marks_of(model, module, with_state=False)
    if not torch.equal(drawn, torch.get_rng_state()):
        raise Refuted("at(0.5) draws random numbers")
    for name in model.state_dict():
        if after.get(name) != before.get(name):
            raise Refuted(f"at(0.5) changes {name}: it sets Python numbers only")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    for progress in (0.0, 1.0, 1.0, 0.5):
        model.at(progress)
    for name, mark in marks_of(model, module, with_state=False).items():
        if told.get(name) != mark:
            raise Refuted(f"at(0.5) gives another {name} later: it follows not progress alone")


def _refuse_remembered_calls(specimen: Specimen) -> None:
    """A function whose results are remembered must not have looked at a token."""
    model, tokens_BT = specimen.randomised(), specimen.tokens(B=3)
    remembering = _remembering(specimen, model)
    for training in (False, True) if remembering else ():
        model.train(training)
        answers = []
        for first_BT in (tokens_BT, specimen.others(tokens_BT)):
            for function in remembering:
                function.cache_clear()
            specimen.outputs(model, first_BT)
            answers.append(specimen.outputs(model, tokens_BT))
        if not how_far(*answers) <= EXACT:
            names = ", ".join(getattr(f, "__name__", "a cache") for f in remembering)
            raise Refuted(f"{names} remembers what depends on tokens")


def _refuse_remembered_weights(specimen: Specimen) -> None:
    """Weights that have changed are those that a pass takes."""
    model, tokens_BT = specimen.randomised(), specimen.tokens(B=2)
    specimen.outputs(model, tokens_BT)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    answer = specimen.outputs(model, tokens_BT)
    for function in _remembering(specimen, model):
        function.cache_clear()
    moved = how_far(specimen.outputs(copy.deepcopy(model), tokens_BT), answer)
    if not moved <= EXACT:
        raise Refuted(f"a pass remembers weights that have changed since, by {moved:.1e}")


def _remembering(specimen: Specimen, model: nn.Module) -> list:
    """Functions whose results are remembered, of the module and of the model's parts."""
    own = [v for part in model.modules() for v in vars(part).values()]
    found = [*_all_of(specimen.experiment.module), *own]
    return [v for v in found if isinstance(v, functools._lru_cache_wrapper)]


def _all_of(module: types.ModuleType) -> list[object]:
    """What a module defines, and what its classes do."""
    own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
    return own + [v for cls in own if isinstance(cls, type) for v in vars(cls).values()]


def marks_of(
    model: nn.Module, module: types.ModuleType, with_state: bool = True
) -> dict[str, object]:
    """What is equal where nothing changed: for each attribute, global and tensor of the state."""
    hidden = {"_parameters", "_buffers", "_modules"}
    marks: dict[str, object] = {}
    for name, part in model.named_modules():
        for key, value in vars(part).items():
            if key not in hidden:
                where = f"{name}.{key}" if name else f"Model.{key}"
                marks[where] = _mark(value, module.__name__)
    for key, value in vars(module).items():
        if not key.startswith("__"):
            marks[key] = _mark(value, module.__name__)
    for name, weight in model.named_parameters():
        how = (_Same(weight), weight.requires_grad, weight.dtype, tuple(weight.shape))
        marks[f"the Parameter {name}"] = how
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        marks[f"what is stored beside {name}"] = _mark(vars(tensor), module.__name__)
    if with_state:
        marks |= {key: _mark(tensor, "") for key, tensor in model.state_dict().items()}
    return marks


class _Same:
    """Equal where it is of the same object, which it holds: nothing new can have its place."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _mark(value: object, module: str, depth: int = _DEPTH) -> object:
    """What is equal for equal values: by content where that is data, else by identity."""

    def inner(part: object) -> object:
        return _mark(part, module, depth - 1)

    if isinstance(value, nn.Parameter):
        return _Same(value)  # training may change it; the state dict has it where it may not
    if isinstance(value, Tensor):
        if value.is_meta:
            return tuple(value.shape)
        data = value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
        return tuple(value.shape), str(value.dtype), hashlib.sha256(data).digest()
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().tolist())
    if depth == 0 or isinstance(value, nn.Module):
        return _Same(value)
    if isinstance(value, contextvars.ContextVar):
        return inner(value.get(None))
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, functools.partial):
        return [inner(part) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, types.GeneratorType):
        return value.gi_frame and (value.gi_frame.f_lasti, inner(value.gi_frame.f_locals))
    if isinstance(value, bytearray | array.array):
        return bytes(value)
    if isinstance(value, collections.deque):
        return [inner(part) for part in value]
    if isinstance(value, int | float | str | bytes | bool | None | complex):
        return type(value), repr(value)
    if isinstance(value, dict):
        return [(inner(k), inner(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [inner(part) for part in value]
    if isinstance(value, set | frozenset):
        return type(value), {repr(part) for part in value}
    if getattr(value, "__module__", None) != module and type(value).__module__ != module:
        return _mark_of_a_librarys(value, inner)
    if isinstance(value, types.MethodType):
        return inner(value.__self__), inner(value.__func__)
    if isinstance(value, types.FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        kept = [value.__defaults__, value.__kwdefaults__, cells, value.__dict__]
        return _Same(value), [inner(part) for part in kept]
    slots = [key for cls in type(value).__mro__ for key in getattr(cls, "__slots__", ())]
    kept = {key: getattr(value, key, None) for key in slots}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept |= {
            field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)
        }
        return inner(kept | getattr(value, "__dict__", {}))
    kept |= {k: v for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("__")}
    return _Same(value), inner(kept)


def _mark_of_a_librarys(value: object, inner: Callable[[object], object]) -> object:
    """By what it holds where that is its user's, as in a namespace or a weak dictionary."""
    home = type(value).__module__.partition(".")[0]
    if home == "itertools":
        return repr(value)
    if hasattr(value, "__length_hint__"):  # an iterator
        return value.__length_hint__()
    if isinstance(value, types.BuiltinFunctionType):
        return _Same(value), inner(value.__self__)
    if isinstance(value, map | filter | zip | enumerate):
        return [inner(part) for part in value.__reduce__()[1]]
    is_box = home in ("types", "_thread", "weakref", "collections", "threading", "queue")
    if is_box and not isinstance(value, types.ModuleType | type | types.FunctionType):
        return _Same(value), inner(getattr(value, "__dict__", {}))
    return _Same(value)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
