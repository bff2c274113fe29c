"""The weights of linear layers in the order that the processor's matrix kernels read them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Packed:
    """A model's plain `nn.Linear` layers on a CPU, computing from packed copies of their weights.

    A step of generation has few positions, so it is bound by reading the weights, and in their
    usual order oneDNN must rearrange them at each call. The copies have the dtype that is computed
    in where this is made. Where autocast asks for bf16, these layers alone compute in it and the
    rest in fp32: with one position a row, attention in bf16 takes a CPU six times as long.

    In fp32 the sums are made in another order; in bf16 less is rounded than under autocast.
    Nothing changes on other devices, in fp16, or where torch has no oneDNN.

    Args:
        num_rows: of a step; the packing is chosen for it, and any number may be computed.
    """

    def __init__(self, model: nn.Module, num_rows: int):
        is_mixed = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_mixed else torch.float32
        layers = [layer for layer in model.modules() if _can_pack(layer)] if _is_fast(dtype) else []
        self._forwards = {layer: _forward(layer, dtype, num_rows) for layer in layers}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """For one pass, which then runs without autocast."""
        if not self._forwards:
            yield
            return
        for layer, forward in self._forwards.items():
            layer.forward = forward
        try:
            with torch.autocast("cpu", enabled=False):
                yield
        finally:
            for layer in self._forwards:
                del layer.forward


def _is_fast(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    is_bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return is_bf16 or dtype == torch.float32


def _can_pack(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or "forward" in vars(layer):  # it was given another
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32


def _forward(layer: nn.Linear, dtype: torch.dtype, num_rows: int):
    pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    weight = pack(layer.weight.detach().to(dtype), num_rows)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:
        return multiply(x.to(dtype), weight, bias, "none", [], "").to(x.dtype)

    return forward
