"""Relatives of ue: sizes, exact folding after training, and what each file says of itself."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lmplay.catalog import read_file
from lmplay.experiment import Experiment, folded, load_experiment
from lmplay.objective import Objective

FOLDER = Path(__file__).parent.parent.parent / "experiments"

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "ue_value_norm": 396_052_561,
    "ue1_9": 560_637_265,
    "ue1_10": 560_637_137,
    "ue_normed": 396_053_329,
    "ue1_2": 396_053_329,
    "ue2_0": 130_005_841,
    "ue_linear": 395_461_201,
    "ue1_4_old": 395_461_201,
}


def experiment(name: str) -> Experiment:
    entries = [
        e
        for file in ("gpt2ish", "ue", "value_norm", "ue_value_norm", "ue_normed", "ue_linear")
        for e in read_file(FOLDER / f"{file}.py")
    ]
    return load_experiment(next(entry for entry in entries if entry.name == name))


def tiny(name: str, seed: int = 0, **values) -> nn.Module:
    """The model at the size of TINY, without dropout."""
    made = experiment(name)
    config = made.config(**{**made.tiny, "embed_dropout": 0.0, "ff_dropout": 0.0, **values})
    return made.model(config, seed=seed)


def on_meta(name: str) -> nn.Module:
    """The model at full size, without numbers."""
    made = experiment(name)
    return made.model(made.config(vocab_size=50257), device="meta")


def num_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def random_tokens(B: int, T: int, V: int = 61) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, num_steps: int = 5) -> nn.Module:
    tokens_BT = random_tokens(B=4, T=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(num_steps):
        optimizer.zero_grad()
        Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
        optimizer.step()
    return model.eval()


def moved(changed: Tensor, answer: Tensor) -> float:
    """The largest difference, against the largest answer."""
    return ((changed - answer).abs().max() / answer.abs().max()).item()


@pytest.mark.parametrize("name", COUNTS)
def test_the_parameter_count_is_the_catalogues(name):
    assert num_parameters(on_meta(name)) == COUNTS[name]


def plain_of(name: str, seed: int = 9) -> nn.Module:
    """What this name folds to, at the size of TINY."""
    made = experiment(name)
    if made.entry.file != "ue_value_norm":
        return tiny("gpt2ish", seed)
    return tiny("value_norm", seed, start_block=made.variant.get("start_block", 0))


@pytest.mark.parametrize("name", COUNTS)
def test_a_trained_model_answers_as_the_one_that_it_folds_to(name):
    model = trained(tiny(name))
    plain = plain_of(name).eval()
    plain.load_state_dict(folded(model).state_dict())
    tokens_BT = random_tokens(B=3, T=16)

    assert moved(plain(tokens_BT), model(tokens_BT)) < 1e-5


@pytest.mark.parametrize(
    ("name", "deployed"),
    [
        ("ue1_9", 120_560_977),
        ("ue1_10", 120_560_849),
        ("ue1_2", 120_560_209),
        ("ue2_0", 120_560_209),
        ("ue1_4_old", 120_560_209),
    ],
)
def test_folding_gives_the_catalogues_size(name, deployed):
    assert num_parameters(folded(on_meta(name))) == deployed


@pytest.mark.parametrize(("name", "normed"), [("ue1_9", [True, True]), ("ue1_10", [False, True])])
def test_values_are_normed_from_the_start_block_on(name, normed):
    blocks = tiny(name).blocks

    assert [isinstance(b.attention.value_norm, nn.LayerNorm) for b in blocks] == normed


@pytest.mark.parametrize("name", ["ue1_9", "ue1_10"])
def test_with_one_seed_it_starts_with_the_weights_of_ue(name):
    ours, theirs = tiny(name, seed=3).state_dict(), tiny("ue", seed=3, mid_mul=32).state_dict()

    assert {key for key in ours if key not in theirs} == {
        key for key in ours if "value_norm" in key
    }
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["ue1_2", "ue2_0"])
def test_normed_vectors_start_as_long_as_the_baselines(name):
    table = tiny(name, vocab_size=500, width=192, num_heads=3).token_table

    torch.testing.assert_close(
        table.fold().weight.square().mean(1), torch.ones(500), rtol=0.01, atol=0
    )


def test_the_linear_kind_is_a_product_of_two_matrices():
    table = tiny("ue1_4_old").token_table
    expected = table.wide_table.weight @ table.front.weight.T + table.front.bias

    torch.testing.assert_close(table.fold().weight, expected)


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("ue_value_norm", {"start_block": 6}, "start_block=6"),
        ("ue_value_norm", {"start_block": -1}, "start_block=-1"),
        ("ue_linear", {"front_mul": 0}, "front_mul=0"),
    ],
)
def test_config_refuses_nonsense_and_says_the_value(name, values, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        experiment(name).module.Config(vocab_size=61, **values)
