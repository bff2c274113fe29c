"""Opening a run: the processes, and the weights that it begins with."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from lmplay.catalog.entries import resolve
from lmplay.model.experiment import load_experiment
from lmplay.run.opening import (
    make_accelerator,
    open_run,
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


@pytest.mark.parametrize(
    ("graphs", "breaks", "said"),
    [(1, 0, "1 graph, no break"), (0, 1, "no graph, 1 break"), (3, 2, "3 graphs, 2 breaks")],
)
def test_graphs_and_breaks_are_told(graphs, breaks, said):
    made = {"graphs": graphs, "breaks": breaks, "seconds": 4.4}

    assert told_of_compiling(made) == f"compiled: {said}, in 4 s"
