"""Parameters that are kept from being trained, by patterns over their names."""

import pytest
import torch

from lmplay.catalog.entries import resolve
from lmplay.model.experiment import load_experiment
from lmplay.model.freezing import freeze


def test_patterns_freeze_the_parameters_of_these_names():
    experiment = load_experiment(resolve("gpt2ish"))
    model = experiment.model(experiment.config(**experiment.tiny))
    frozen = freeze(model, ["blocks.0.mlp.*", "head.bia?", "blocks.0.*.bias"])

    expected = [
        name for name, _ in model.named_parameters()
        if name.startswith("blocks.0.") and (".mlp." in name or name.endswith("bias"))
    ] + ["head.bias"]  # fmt: skip
    assert frozen == expected
    assert freeze(experiment.model(experiment.config(**experiment.tiny)), []) == []


@pytest.mark.parametrize("name", ["table.weight", "head.weight"])
def test_a_tied_parameter_is_frozen_by_either_of_its_names(name):
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5)})
    model["head"].weight = model["table"].weight

    assert freeze(model, [name]) == ["table.weight"]
    assert not model["head"].weight.requires_grad and model["head"].bias.requires_grad
