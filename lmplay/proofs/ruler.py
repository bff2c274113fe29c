"""Proofs that what is reported is measured by lmplay's ruler, and that a likelihood is one."""

import importlib
import math
import pkgutil
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import lmplay.model
from lmplay.model.objective import IGNORE, Objective
from lmplay.proofs.proof import Exempt, Refuted
from lmplay.proofs.specimen import Specimen

# B rows, T positions, N positions in a line, V vocabulary

FAR = 1e-4  # how far nats in fp32 may be from those in fp64, against these


def _namespaces() -> Iterator[tuple[str, object]]:
    """What an experiment might reach into: torch's functions and modules, and lmplay's model/."""
    modules = [torch, torch.nn.functional, torch.nn.init, torch.autograd, torch.random, math]
    yield from ((module.__name__, module) for module in modules)
    yield "torch.Tensor", Tensor
    for name, value in vars(nn).items():
        if isinstance(value, type):
            yield f"{value.__module__}.{name}", value
    for found in pkgutil.iter_modules(lmplay.model.__path__):
        module = importlib.import_module(f"lmplay.model.{found.name}")
        yield module.__name__, module
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield f"{module.__name__}.{name}", value


def _callables() -> dict[tuple[str, str], tuple[object, object]]:
    kinds = (types.FunctionType, types.BuiltinFunctionType, type, staticmethod, classmethod)
    kinds += (types.MethodDescriptorType, types.WrapperDescriptorType, property)
    return {
        (where, name): (owner, value)
        for where, owner in _namespaces()
        for name, value in vars(owner).items()
        if isinstance(value, kinds)
    }


_CLASSES = [(w, owner, set(vars(owner))) for w, owner in _namespaces() if isinstance(owner, type)]
_TRUE = _callables()  # before an experiment is loaded
_TRUE_IDS = {id(value) for _, value in _TRUE.values()}


def _is_a_librarys(value: object) -> bool:
    """Whether a package has put it there, as torch's compiler and transformers do when loaded."""
    where = getattr(value, "__globals__", {}).get("__name__", "lmplay_experiment")
    return not where.startswith("lmplay_experiment") and id(value) not in _TRUE_IDS


def is_the_rulers(specimen: Specimen) -> str:
    """No function was put in the place of another; and nats in fp64 from forward are the same."""
    put_back = []
    for (where, name), (owner, value) in _TRUE.items():
        now = vars(owner).get(name)
        if now is not value and not _is_a_librarys(now):
            setattr(owner, name, value)
            put_back.append(f"{where}.{name}")
    for where, owner, names in _CLASSES:
        for name in vars(owner).keys() - names:
            value = vars(owner)[name]
            if isinstance(value, types.FunctionType) and not _is_a_librarys(value):
                delattr(owner, name)
                put_back.append(f"{where}.{name}")
    if put_back:
        raise Refuted(f"{put_back[0]} is no more what it was before the file was loaded")
    if specimen.scores_itself:
        return f"{len(_TRUE):,} functions of torch and lmplay are what they were"
    model = specimen.randomised()
    tokens_BT = specimen.tokens(B=3)
    targets_BT = tokens_BT.roll(-1, 1).masked_fill(torch.rand(tokens_BT.shape) < 0.3, IGNORE)
    torch.manual_seed(1)
    said = Objective(model).eval()(tokens_BT, targets_BT)
    nats, hits = _recomputed(specimen.outputs(model, tokens_BT), targets_BT)
    if not abs(said.loss.item() - nats) <= FAR * max(1.0, nats):
        raise Refuted(
            f"the objective says {said.loss.item():.4f} nats, forward in fp64 {nats:.4f}",
            unless=("repeat", "any shape", "head"),
        )
    if said.hits is not None and said.hits.item() != hits:
        raise Refuted(f"the objective says {said.hits.item():.0f} hits, forward {hits}")
    return f"{nats:.4f} nats in fp64 are what the objective says"


def _recomputed(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[float, int]:
    scored_BT = targets_BT != IGNORE
    logits_NV, targets_N = logits_BTV[scored_BT].double(), targets_BT[scored_BT]
    log_sum_N = (logits_NV - logits_NV.amax(1, True)).exp().sum(1).log() + logits_NV.amax(1)
    chosen_N = logits_NV[torch.arange(len(targets_N)), targets_N]
    hits = (logits_BTV[scored_BT].argmax(1) == targets_N).sum().item()
    return (log_sum_N - chosen_N).sum().item(), hits


def sums_to_one(specimen: Specimen) -> str:
    if not specimen.scores_itself:
        raise Exempt("it has no log_likelihood")
    likelihood = specimen.likelihood
    found = "; ".join(
        f"texts of {length}: {total:.3f}" for length, total in likelihood.sums.items()
    )
    if not likelihood.is_one:
        raise Refuted(f"probabilities sum to more than 1: {found}", unless=("repeat",))
    return f"probabilities sum to at most 1: {found}"
