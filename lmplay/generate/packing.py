"""The weights of linear layers in the order that the processor's matrix kernels read them."""

import platform

import torch
from torch import Tensor, nn

LARGE = 1 << 20  # weights; in fp32, a smaller layer reads one row's faster as they lie


def pack(model: nn.Module, precision: str, num_rows: int) -> bool:
    """Let each plain `nn.Linear` on a CPU compute from a packed copy of its weights, for good.

    A step of generation has few positions, so it is bound by reading the weights, and in their
    usual order oneDNN must rearrange them at each call. In bf16 these layers alone compute in it
    and the rest in fp32: with one position a row, attention in bf16 takes a CPU six times as long.
    In fp32 the sums are made in another order; in bf16 less is rounded than under autocast. A call
    takes 12 microseconds more than a plain one: in fp32 small layers stay as they are.

    Args:
        model: not to be trained or loaded into any more: the copies stay as they are.
        precision: fp32 or bf16.
        num_rows: of a step; the packing is chosen for it, and any number may be computed.
    Returns:
        Whether this was done; then autocast must stay off. It is not on other devices, in other
        precisions, where no layer is plain and large enough, and where `is_supported` says no.
    """
    least = 0 if precision == "bf16" else LARGE if num_rows == 1 else LARGE // 8
    layers = [layer for layer in model.modules() if _can_pack(layer, least)]
    if not is_supported(precision) or not layers:
        return False
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for layer in layers:
        layer.forward = _forward(layer, dtype, num_rows)
    return True


def is_supported(precision: str) -> bool:
    """Whether this torch and this processor can multiply by packed weights; x86 alone was tried."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not is_x86 or not torch.backends.mkldnn.is_available():
        return False
    is_bf16 = precision == "bf16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return is_bf16 or precision == "fp32"


def _can_pack(layer: nn.Module, least: int) -> bool:
    if type(layer) is not nn.Linear or "forward" in vars(layer):  # it was given another
        return False
    is_plain = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
    return is_plain and layer.weight.numel() >= least


def _forward(layer: nn.Linear, dtype: torch.dtype, num_rows: int):
    order, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    weight = order(layer.weight.detach().to(dtype), num_rows)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:
        return multiply(x.to(dtype), weight, bias, "none", [], "").to(x.dtype)

    return forward
