"""A model in fp64, whatever type it names: a leak of a millionth is no rounding there."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmplay.model.abilities import reader, scores_itself
from lmplay.proofs.proof import how_far
from lmplay.proofs.specimen import unchanged

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = (Tensor.float, Tensor.bfloat16, Tensor.half)


MOST_PARAMETERS = 100_000_000  # of a model that is copied to tell its rounding


@torch.no_grad()
def rounding_of(model: nn.Module, tokens_BT: Tensor) -> float:
    """How far an answer in fp32 is from that in fp64, in eval mode; 0 where that cannot be told."""
    if scores_itself(model):
        return 0.0
    with suppress(Exception), unchanged(model):  # which a proof will tell of
        model.eval()
        answer = reader(model)(tokens_BT).double()
        if not answer.isfinite().all():
            return math.inf
        if sum(weight.numel() for weight in model.parameters()) <= MOST_PARAMETERS:
            with in_double(model) as exact:
                return how_far(answer, reader(exact)(tokens_BT))
    return 0.0


@contextmanager
def in_double(model: nn.Module) -> Iterator[nn.Module]:
    """A copy whose every number is fp64, in eval mode where the model is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield copy.deepcopy(model).double()
    finally:
        torch.set_default_dtype(before)


class _Wide(TorchFunctionMode):
    """Gives fp64 wherever less is asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _CASTS:
            func = Tensor.double
        args = tuple(_wide(value) for value in args)
        return func(*args, **{key: _wide(value) for key, value in kwargs.items()})


def _wide(value: object) -> object:
    is_narrow = isinstance(value, torch.dtype) and value in _NARROW
    return torch.float64 if is_narrow else value
