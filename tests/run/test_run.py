from types import SimpleNamespace

import torch
from torch.testing import assert_close

from lmplay.catalog.entries import resolve
from lmplay.model.experiment import load_experiment
from lmplay.run.run import open_run


def test_processes_begin_with_the_same_weights_and_drop_out_different_ones():
    experiment = load_experiment(resolve("gpt2ish"))
    config = experiment.config(**experiment.tiny)
    plan = SimpleNamespace(freeze=[])
    weights, draws = [], []
    for rank in (0, 1):
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), process_index=rank, prepare_model=lambda m, **_: m
        )
        run = open_run(None, plan, experiment, 0, config, accelerator, 1)
        weights.append(run.model.state_dict())
        draws.append(torch.rand(3).tolist())

    assert_close(*weights, rtol=0, atol=0)
    assert draws[0] != draws[1]
