"""Memory of this process and of its GPU: kept for the next step, and its peak."""

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path
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


def reset_peak_memory(device: "torch.device") -> None:
    """Begin to measure anew what `peak_memory` gives: what was freed before does not count.

    The peak of a process can be set back on Linux alone. Elsewhere it stays that of the whole
    process, with what it took to prepare the text.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)  # what was freed goes back to the system
        with suppress(OSError):  # a kernel may be built without it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: "torch.device") -> int:
    """Bytes, since `reset_peak_memory`: the most allocated on the GPU, or the process's most.

    On MPS, which keeps no peak, what is allocated now.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        import torch

        return torch.mps.driver_allocated_memory()
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # cannot be set back
    return peak if sys.platform == "darwin" else peak * 1024
