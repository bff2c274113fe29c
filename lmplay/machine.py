"""What this machine has: cores, devices, precisions, and how fast it multiplies in them."""

import math
import os
import platform
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lmplay.errors import UserError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")  # and cuda:N
PRECISIONS = ("fp32", "bf16", "fp16", "amp")


def num_cores() -> int:
    """Cores that this process may use, which a cluster's scheduler may have made fewer."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def known_device(name: str) -> str:
    """The name, if it is one of a device, whether or not this machine has it.

    Raises:
        UserError: no such word.
    """
    if name not in DEVICES and not re.fullmatch("cuda:[0-9]+", name):
        raise UserError(f"--device {name}: no such device", "auto, cpu, cuda, cuda:N and mps exist")
    return name


def known_precision(name: str) -> str:
    """The name, if it is one of a precision, whether or not a device has it.

    Raises:
        UserError: no such word.
    """
    if name not in PRECISIONS:
        raise UserError(f"--precision {name}: no such precision", "fp32, bf16, fp16 and amp exist")
    return name


def resolve_device(name: str) -> "torch.device":
    """The device that `auto`, `cpu`, `cuda`, `cuda:N` or `mps` means on this machine.

    Raises:
        UserError: no such word, or the machine has no such device.
    """
    import torch

    if known_device(name) == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here",
            hint="--device auto takes what is there",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: there is none here", "--device auto takes what is there")
    return device


def resolve_precision(name: str, device: "torch.device") -> str:
    """fp32, bf16 or fp16: what `amp` means on this device; anything else is checked.

    Raises:
        UserError: no such word, or fp16 on the CPU.
    """
    import torch

    if known_precision(name) == "amp":
        has_bf16 = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "mps": lambda: torch.backends.mps.is_macos_or_newer(14, 0),
            "cpu": lambda: True,
        }
        return "bf16" if has_bf16[device.type]() else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU", hint="bf16 works on the CPU")
    return name


def dtype_of(precision: str) -> "torch.dtype":
    """What matrix products are made in: of fp32, bf16 or fp16."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def matmul_rate(device: "torch.device", precision: str) -> float:
    """FLOP/s of a large matrix product: the most that this device can do, measured now.

    The best of a few products, in about 0.1 s. The share of it that a model's FLOPs reach is the
    MFU that training shows: like that of Chowdhery et al. 2022, arXiv:2204.02311, appendix B, but
    against a measured peak.

    Args:
        precision: fp32, bf16 or fp16.
    """
    import torch

    size = 1024 if device.type == "cpu" else 8192
    draw = torch.Generator(device).manual_seed(0)  # of its own: training's numbers stay the same
    a, b = (
        torch.rand(size, size, generator=draw, device=device).to(dtype_of(precision))
        for _ in range(2)
    )
    best = math.inf
    for _ in range(5):
        _wait_for(device)
        began = time.perf_counter()
        torch.mm(a, b)
        _wait_for(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait_for(device: "torch.device") -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
