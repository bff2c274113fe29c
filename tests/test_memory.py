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
