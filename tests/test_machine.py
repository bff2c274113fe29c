import os
import subprocess
import sys

import pytest
import torch

from lmplay.errors import UserError
from lmplay.machine import matmul_rate, num_cores, resolve_device, resolve_precision

CPU, SECOND_GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process")
def test_a_core_that_was_taken_away_does_not_count():
    core = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{core}}})\n"
        "from lmplay.machine import num_cores; print(num_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)

    assert int(done.stdout) == 1


def test_without_such_a_setting_every_core_counts(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)

    assert num_cores() == 7


@pytest.mark.parametrize("name", ["gpu", "cuda:97", "meta", "CPU"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match="--device"):
        resolve_device(name)


def test_automatic_precision_is_bf16_where_it_works_else_fp16(monkeypatch):
    assert resolve_precision("amp", CPU) == "bf16"
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, has=has_bf16, **__: has)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_, has=has_bf16: has)

        assert resolve_precision("amp", SECOND_GPU) == expected
        assert resolve_precision("amp", torch.device("mps")) == expected


def test_precision_is_a_known_word_and_fp16_needs_a_gpu():
    for name in ("fp8", "fp16"):
        with pytest.raises(UserError, match=name):
            resolve_precision(name, CPU)


def test_the_speed_of_a_matrix_product_is_measured_without_touching_the_random_numbers():
    before = torch.get_rng_state()
    rate = matmul_rate(CPU, "bf16")

    assert rate > 1e8
    assert torch.equal(torch.get_rng_state(), before)
