"""Opening a run: the device and the precision that words stand for."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.model.experiment import load_experiment
from lmplay.run.opening import (
    make_accelerator,
    open_run,
    resolve_device,
    resolve_precision,
    stream_seed,
    told_of_compiling,
)

CPU, SECOND_GPU = torch.device("cpu"), torch.device("cuda", 1)


def test_a_second_run_of_a_process_gets_its_own_device_and_precision(monkeypatch):
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    made = [
        (accelerator.device, accelerator.mixed_precision)
        for accelerator in (
            make_accelerator(device, precision)
            for device, precision in ((CPU, "fp32"), (SECOND_GPU, "bf16"), (CPU, "fp32"))
        )
    ]

    assert made == [(CPU, "no"), (SECOND_GPU, "bf16"), (CPU, "no")]
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ


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


def test_streams_of_randomness_differ_by_seed_and_purpose():
    seeds = {stream_seed(seed, purpose) for seed in range(9) for purpose in ("weights", "dropout")}

    assert len(seeds) == 18


def test_processes_begin_with_the_same_weights_and_drop_out_different_ones():
    experiment = load_experiment(resolve("gpt2ish"))
    config = experiment.config(**experiment.tiny)
    plan = SimpleNamespace(freeze=[])
    weights, draws = [], []
    for rank in (0, 1):
        accelerator = SimpleNamespace(
            device=CPU, process_index=rank, prepare_model=lambda m, **_: m
        )
        run = open_run(None, plan, experiment, 0, config, accelerator, 1)
        weights.append(run.model.state_dict())
        draws.append(torch.rand(3).tolist())

    assert_close(*weights, rtol=0, atol=0)
    assert draws[0] != draws[1]


@pytest.mark.skipif(sys.platform != "linux", reason="it is about glibc")
def test_memory_that_was_freed_is_used_again():
    code = """
import resource, torch
from lmplay.run.opening import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(1 << 24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh = faults()
keep_memory()
faults()
print(fresh, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fresh, kept = map(int, done.stdout.split())
    if fresh < 1000:
        pytest.skip("this C library keeps it by itself")
    assert kept < fresh / 10


@pytest.mark.parametrize(
    ("graphs", "breaks", "said"),
    [(1, 0, "1 graph, no break"), (0, 1, "no graph, 1 break"), (3, 2, "3 graphs, 2 breaks")],
)
def test_graphs_and_breaks_are_told(graphs, breaks, said):
    made = {"graphs": graphs, "breaks": breaks, "seconds": 4.4}

    assert told_of_compiling(made) == f"compiled: {said}, in 4 s"
