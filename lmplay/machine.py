"""What this machine has: cores, devices, precisions, and how fast it multiplies in them."""

import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lmplay.disk import make_folder, write_json
from lmplay.errors import UserError
from lmplay.roots import cache_root

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")  # and cuda:N
PRECISIONS = ("fp32", "bf16", "fp16", "amp")
WORTH = 1.3  # times as fast as fp32: hardware that has bf16 reaches 1.9 to 2.2, else 0.02 to 1.1
_OF_KERNELS = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_")  # settings that choose the instruction set


def num_cores() -> int:
    """Cores that this process may use, which a cluster's scheduler may have made fewer."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """What Linux says of the first core; nothing elsewhere, or where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


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
    """fp32, bf16 or fp16: anything but `amp` is checked, and `amp` is what is fast on this device.

    That is bf16 where the device has it in hardware; else fp16 on a GPU, and fp32 on a CPU, whose
    own products tell what it has: bf16 must be WORTH times as fast, since casts take time too.

    Raises:
        UserError: no such word, or fp16 on the CPU.
    """
    import torch

    if known_precision(name) == "amp":
        if device.type == "cpu":
            return "bf16" if bf16_gain() > WORTH else "fp32"
        has_bf16 = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "mps": lambda: torch.backends.mps.is_macos_or_newer(14, 0),
        }
        return "bf16" if has_bf16[device.type]() else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU", hint="amp is what is fast on the CPU")
    return name


def slowness(precision: str, device: "torch.device") -> str:
    """One line where a precision is slower than fp32 on this device; else nothing."""
    if device.type != "cpu" or precision != "bf16" or (gain := bf16_gain()) >= 1:
        return ""
    times = f"{1 / gain:.1f} times as long as in fp32"
    return f"a matrix product in bf16 takes {times} on this processor; --precision amp is fp32 here"


def dtype_of(precision: str) -> "torch.dtype":
    """What matrix products are made in: of fp32, bf16 or fp16."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def bf16_gain() -> float:
    """How many times as fast as in fp32 this CPU makes a linear layer's products in bf16.

    Measured in a fifth of a second and remembered, in the user's cache, for this processor, this
    torch and what the environment says of instruction sets: another answer tomorrow would be
    another precision. On one thread: two that wait for each other measure what else is running.
    """
    path = _path_of("bf16_gain")
    if (known := _read(path)) is not None:
        return known
    gain = _measured_gain()
    _write(path, gain)
    return gain


def matmul_rate(device: "torch.device", precision: str) -> float:
    """FLOP/s of the fastest large product of a linear layer: the most that this device can do.

    The best that was ever measured here, this time included, which takes 0.1 s: a peak that was
    taken while something else was running would make a later MFU of more than 100 %. The share of
    it that a model's FLOPs reach is the MFU that training shows: like that of Chowdhery et al.
    2022, arXiv:2204.02311, appendix B, but against a measured peak.

    Args:
        precision: fp32, bf16 or fp16. Where bf16 is the slower one, the peak is that of fp32, in
            which mixed precision makes some products too.
    """
    import torch

    if slowness(precision, device):
        precision = "fp32"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    path = _path_of(f"matmul_rate {device.type} {gpu} {precision} {torch.get_num_threads()}")
    rate = _read(path) or 0.0
    # on a busy CPU only a small product is ever left alone, and a small one cannot use many cores
    for size in (256, 1024) if device.type == "cpu" else (8192,):
        seconds = _best_seconds(device, _products(device, dtype_of(precision), size), 0.05)
        rate = max(rate, 2 * size**3 / min(seconds))
    _write(path, rate)
    return rate


def _measured_gain() -> float:
    import torch

    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fp32, bf16 = (_products(cpu, dtype_of(name), 256) for name in ("fp32", "bf16"))
        seconds = _best_seconds(cpu, [*fp32, *bf16], 0.2)
    finally:
        torch.set_num_threads(threads)
    return sum(seconds[: len(fp32)]) / sum(seconds[len(fp32) :])


def _products(device: "torch.device", dtype: "torch.dtype", size: int) -> list[Callable]:
    """What training makes of a linear layer: the output, and the gradients of input and weight.

    They are different kernels: a CPU without bf16 takes 40 times as long for the second.
    """
    import torch
    import torch.nn.functional as F

    draw = torch.Generator(device).manual_seed(0)  # of its own: training's numbers stay the same
    x, weight, dy = (
        torch.rand(size, size, generator=draw, device=device).to(dtype) for _ in range(3)
    )
    return [lambda: F.linear(x, weight, weight[0]), lambda: dy @ weight, lambda: dy.T @ x]


def _best_seconds(device: "torch.device", makers: list[Callable], seconds: float) -> list[float]:
    """The least time of each maker: they take turns for `seconds`, and three times at least."""
    best = [math.inf] * len(makers)
    ends, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < ends:
        for i, make in enumerate(makers):
            _wait_for(device)
            began = time.perf_counter()
            make()
            _wait_for(device)
            best[i] = min(best[i], time.perf_counter() - began)
        rounds += 1
    return best


def _wait_for(device: "torch.device") -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _path_of(what: str) -> Path:
    """Where the cache keeps a number of this processor."""
    import torch

    settings = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(_OF_KERNELS))
    of = "\0".join([what, processor(), _cpuinfo("flags"), torch.__version__, *settings])
    return cache_root() / "machine" / f"{hashlib.sha256(of.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> float | None:
    with suppress(OSError, ValueError, TypeError):
        return float(json.loads(path.read_bytes()))
    return None


def _write(path: Path, value: float) -> None:
    with suppress(OSError):  # a cache that cannot be written costs a moment next time
        make_folder(path.parent)
        write_json(path, value)
