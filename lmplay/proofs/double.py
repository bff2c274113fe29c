"""A model in fp64, whatever type it names: a leak of a millionth is no rounding there."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = (Tensor.float, Tensor.bfloat16, Tensor.half)


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
