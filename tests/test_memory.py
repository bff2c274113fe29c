"""Memory that a process keeps, and how much of it."""

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="it is about glibc")
def test_memory_that_was_freed_is_used_again():
    code = """
import resource, torch
from lmplay.memory import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(1 << 24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh = faults()
keep_memory()
for _ in range(3):  # until its blocks lie where they stay
    faults()
print(fresh, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fresh, kept = map(int, done.stdout.split())
    if fresh < 1000:
        pytest.skip("this C library keeps it by itself")
    assert kept < fresh / 10


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak cannot be set back")
def test_the_peak_is_that_since_it_was_set_back():
    code = """
import torch
from lmplay.memory import peak_memory, reset_peak_memory
cpu, peaks = torch.device("cpu"), []
begin = peak_memory(cpu)
for size in (256, 64):
    torch.ones(size << 18)  # MiB
    peaks.append((peak_memory(cpu) - begin) >> 20)
    reset_peak_memory(cpu)
print(*peaks)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())

    assert 250 < first < 300 and 60 < second < 100
