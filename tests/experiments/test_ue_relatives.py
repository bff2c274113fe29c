"""Relatives of ue: sizes, exact folding after training, and what each file says of itself."""

import re

import pytest
import torch
from models import experiment, random_tokens, tiny
from torch import nn

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
    "ue1_3": 396_068_699,  # not counted there: ue8x + 2 (in + out + 2) + 1 for each layer
    "ue_mapped": 396_051_793,
    "ue8x1": 396_051_793,
}


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


def unfolded(name: str, seed: int = 0, **values) -> tuple[nn.Module, nn.Module]:
    """A model whose token table has become that of another, and that other, an ordinary one."""
    model, plain = tiny(name, **values), tiny("gpt2ish", seed=7, **values)
    torch.manual_seed(seed)
    model.token_table.unfold(plain.token_table)
    return model.eval(), plain.eval()


@pytest.mark.parametrize(
    ("name", "width", "bound"),  # measured: 0.039, 0.0023, 0.0054, 0.025, 0.13, 0.00002
    [
        ("ue8x", 128, 0.08),
        ("ue1x", 128, 0.006),
        ("ue_unified", 64, 0.02),
        ("ue8x1", 128, 0.06),
        ("ue_normed", 64, 0.25),
        ("ue_linear", 64, 0.0001),
    ],
)
def test_an_unfolded_table_gives_a_few_rows_to_within_its_bound(name, width, bound):
    model, plain = unfolded(name, vocab_size=16, width=width)
    rows_VC, wanted_VC = model.token_table.fold().weight, plain.token_table.weight
    rest = {k: v for k, v in plain.state_dict().items() if not k.startswith("token_table.")}
    model.load_state_dict(rest, strict=False)
    tokens_BT = random_tokens(B=4, T=16, V=16)
    answer_BTV = plain(tokens_BT)

    assert (rows_VC - wanted_VC).norm() < bound * wanted_VC.norm()
    assert (model(tokens_BT) - answer_BTV).norm() < bound * answer_BTV.norm()


@pytest.mark.parametrize("name", ["ue", "ue_mapped"])
def test_one_seed_unfolds_to_the_same_numbers(name):
    states = [unfolded(name, seed)[0].token_table.state_dict() for seed in (1, 1, 2)]

    for key, weight in states[0].items():
        assert torch.equal(weight, states[1][key])
    assert not torch.equal(states[0]["wide_table.weight"], states[2]["wide_table.weight"])


@pytest.mark.parametrize("name", ["ue", "ue_mapped"])
def test_unfolding_takes_every_row_in_each_epoch(name):
    values = {"vocab_size": 8200, "width": 2, "num_heads": 1}
    model, plain = tiny(name, **values), tiny("gpt2ish", seed=7, **values)
    table, met = model.token_table, []
    before = table.wide_table.weight.detach().clone()
    network = table.network
    table.network = lambda wide_NW: met.append(len(wide_NW)) or network(wide_NW)
    table.unfold(plain.token_table)
    moved_N = (table.wide_table.weight - before)[:, 2:].abs().amax(1)

    epoch = [8192, 8] * 2 if name == "ue_mapped" else [1172] * 6 + [1168]
    assert met == epoch * 50
    assert (moved_N > 0).all()


@pytest.mark.parametrize("name", ["ue", "ue_mapped", "sac1_1"])
def test_unfolding_leaves_no_gradients_and_nothing_unfrozen_and_the_rest_alone(name):
    model = tiny(name)
    model.token_table.front.requires_grad_(False)
    before = {key: (w.detach().clone(), w.requires_grad) for key, w in model.named_parameters()}
    model.token_table.unfold(tiny("gpt2ish", seed=7).token_table)

    for key, weight in model.named_parameters():
        assert weight.grad is None and weight.requires_grad == before[key][1], key
        assert torch.equal(weight, before[key][0]) != key.startswith("token_table."), key


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
