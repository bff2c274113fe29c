"""gpt2: the sizes that were published, and one matrix that is read and multiplied."""

import torch

from lmplay.catalog.entries import resolve
from lmplay.model.counts import count
from lmplay.model.experiment import load_experiment
from lmplay.model.objective import Objective

COUNTS = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
}


def test_the_tied_table_counts_as_a_matrix_and_once():
    experiment = load_experiment(resolve("gpt2"))
    counts = count(experiment, experiment.config(vocab_size=50257))

    assert counts.lookup == 1024 * 768
    assert counts.trained == counts.folded == COUNTS["gpt2"]
    assert counts.matmul > 50257 * 768


def test_the_head_gives_its_gradient_to_the_table():
    experiment = load_experiment(resolve("gpt2"))
    tokens_BT = torch.randint(30, (2, 16), generator=torch.Generator().manual_seed(0))
    model = experiment.model(experiment.config(**experiment.tiny), seed=0)
    Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()

    gradient_V = model.token_table.weight.grad.norm(dim=-1)
    assert model.head.weight is model.token_table.weight
    assert gradient_V[30:].min() > 0  # tokens that were never read, but scored
