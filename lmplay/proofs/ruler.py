"""Proofs that what is reported is measured by lmplay's ruler, and that a likelihood is one."""

import ast
import builtins
import importlib
import inspect
import math
import pkgutil
import types
from collections.abc import Iterator

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import lmplay.model
from lmplay.model.objective import IGNORE, Objective
from lmplay.proofs.proof import Exempt, Refuted
from lmplay.proofs.specimen import Specimen

# B rows, T positions, N positions in a line, V vocabulary

_EXPERIMENT = "lmplay_experiment"
FAR = 1e-4  # how far nats in fp32 may be from those in fp64, against these


def _namespaces() -> Iterator[tuple[str, object]]:
    """What an experiment might reach into: torch's functions and modules, and lmplay's model/."""
    modules = [torch, torch.nn.functional, torch.nn.init, torch.autograd, torch.random, math]
    modules += [torch.nn.utils, torch.special, torch.linalg, torch.fft, torch.amp, torch.optim]
    modules += [torch.utils.checkpoint, builtins]
    yield from ((module.__name__, module) for module in modules)
    yield "torch.Tensor", Tensor
    for name, value in [*vars(nn).items(), *vars(torch.optim).items()]:
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
        or (where.startswith("lmplay") and type(value) in (int, float, str, tuple))
    }


_CLASSES = [(w, owner, set(vars(owner))) for w, owner in _namespaces() if isinstance(owner, type)]
_NAMES = {where: set(vars(owner)) for where, owner in _namespaces()}
_DATA = int | float | str | list | dict | set | Tensor  # which nothing of torch's adds later
_TRUE = _callables()  # before an experiment is loaded
_TRUE_IDS = {id(value) for _, value in _TRUE.values()}


def _is_a_librarys(value: object, true: object = None) -> bool:
    """Whether a package has put it there, as torch's compiler and transformers do when loaded.

    Args:
        true: what was there, which it may wrap, as an optimizer of torch's does with its step.
    """
    inner = inspect.unwrap(value) if callable(value) else value
    homes = [getattr(v, "__globals__", {}).get("__name__", _EXPERIMENT) for v in (value, inner)]
    if any(home.startswith(_EXPERIMENT) for home in homes):
        return False
    wraps_it = inner is (inspect.unwrap(true) if callable(true) else true)  # that may wrap too
    return id(value) not in _TRUE_IDS and (wraps_it or id(inner) not in _TRUE_IDS)


_HOOKS = {key: d for key, d in vars(nn.modules.module).items()
          if key.startswith("_global_") and isinstance(d, dict)}  # fmt: skip


def _settings() -> dict[str, object]:
    """What torch computes by, besides its functions."""
    found = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "whether torch makes gradients": torch.is_grad_enabled(),
        "the precision of fp32 products": torch.get_float32_matmul_precision(),
        "autocast's cache": torch.is_autocast_cache_enabled(),
        "how torch rounds in cuDNN": torch.backends.cudnn.allow_tf32,
        "whether torch looks for nan": torch.is_anomaly_enabled(),
    }
    for device in ("cpu", "cuda"):
        found[f"autocast on {device}"] = torch.is_autocast_enabled(device)
    return found | {f"torch's {key}": len(hooks) for key, hooks in _HOOKS.items()}


_SETTINGS = _settings()


def refuse_other_functions() -> None:
    """Raise Refuted where a function of torch or lmplay was replaced; all are put back first."""
    put_back = []
    for (where, name), (owner, value) in _TRUE.items():
        now = vars(owner).get(name)
        if now is not value and not _is_a_librarys(now, value):
            setattr(owner, name, value)
            put_back.append(f"{where}.{name}")
    for where, owner, names in _CLASSES:
        for name in vars(owner).keys() - names:
            value = vars(owner)[name]
            inherited = getattr(super(owner, owner), name, None)
            if isinstance(value, types.FunctionType) and not _is_a_librarys(value, inherited):
                delattr(owner, name)
                put_back.append(f"{where}.{name}")
    for where, owner in _namespaces():
        for name in vars(owner).keys() - _NAMES.get(where, vars(owner).keys()):
            is_ours = name.startswith("__") or owner is builtins
            if not is_ours and isinstance(vars(owner)[name], _DATA):
                delattr(owner, name)
                put_back.append(f"{where}.{name}")
    if put_back:
        raise Refuted(f"{put_back[0]} is no more what it was before the file was loaded")


def _refuse_settings_that_stay(source: str) -> None:
    """Threads and backends are a run's business, and the same for all that is compared."""
    for node in ast.walk(ast.parse(source)):
        told = [node.func] if isinstance(node, ast.Call) else getattr(node, "targets", [])
        for text in map(ast.unparse, told):
            if text in _STAYING or (isinstance(node, ast.Assign) and "torch.backends." in text):
                raise Refuted(f"line {node.lineno} sets {text} for all that runs")


_STAYING = {"torch.set_num_threads", "torch.set_num_interop_threads", "torch.set_flush_denormal"}
_STAYING |= {"torch.use_deterministic_algorithms"}


def _refuse_other_settings() -> None:
    changed = [name for name, value in _settings().items() if value != _SETTINGS[name]]
    _put_settings_back()
    if changed:
        raise Refuted(f"{changed[0]} is no more what it was before the file was loaded")


def _put_settings_back() -> None:
    torch.set_default_dtype(_SETTINGS["torch's default dtype"])
    if str(torch.get_default_device()) != _SETTINGS["torch's default device"]:
        torch.set_default_device(None)
    torch.set_grad_enabled(_SETTINGS["whether torch makes gradients"])
    torch.set_float32_matmul_precision(_SETTINGS["the precision of fp32 products"])
    torch.set_autocast_cache_enabled(_SETTINGS["autocast's cache"])
    for key, hooks in _HOOKS.items():
        while len(hooks) > _SETTINGS[f"torch's {key}"]:
            hooks.popitem()


def is_the_rulers(specimen: Specimen) -> str:
    """No function was put in the place of another; and nats in fp64 from forward are the same."""
    refuse_other_functions()
    _refuse_other_settings()
    _refuse_settings_that_stay(specimen.experiment.source)
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
    found += f"; {likelihood.beyond:+.3f} nats beyond the entropy of drawn tokens"
    if not likelihood.is_one:
        raise Refuted(
            f"probabilities sum to more than 1, or targets are seen: {found}", unless=("repeat",)
        )
    return f"probabilities sum to at most 1: {found}"
