"""Memory of this process and of its GPU: kept for the next step, and its peak."""

import ctypes
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_memory() -> None:
    """Have this process keep the memory that it frees: the next step needs as much again.

    By itself glibc maps every block above 32 MiB anew and gives it back at once, and the system
    clears it page by page: a fifth of a step on the CPU, half where the vocabulary is most of it.
    Other C libraries are left alone.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def peak_memory(device: "torch.device") -> int:
    """Bytes: the most that was allocated on the GPU, or the largest size of the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        import torch

        return torch.mps.driver_allocated_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
