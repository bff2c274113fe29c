"""sac2 with learned adds: sizes before and after folding, and what is sac2's and what is lra's."""

import re

import pytest
import torch
from models import experiment, num_parameters, on_meta, random_tokens, tiny
from torch import nn

from lmplay.catalog.entry import definitions
from lmplay.model.folding import folded

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "all1": 521_591_406,  # not counted there: sac2 and the gates of lra
    "all1_0": 1_319_249_710,
    "all1_1": 1_347_552_022,
    "all1_2": 1_347_552_022,
    "all1_3": 1_348_611_474,
    "all1_4": 1_076_772_494,
}
KEPT = {
    "all1": 148_871_761,
    "all1_0": 120_578_665,
    "all1_1": 148_880_977,
    "all1_2": 148_880_977,
    "all1_3": 148_880_977,
    "all1_4": 148_880_977,
}


@pytest.mark.parametrize("name", KEPT)
def test_folding_keeps_the_gates_and_gives_the_catalogues_size(name):
    assert num_parameters(folded(on_meta(name))) == KEPT[name]


def test_at_its_own_sizes_it_is_sac2_and_the_gates_of_lra():
    gates = num_parameters(on_meta("lra")) - num_parameters(on_meta("gpt2ish"))

    assert COUNTS["all1"] == num_parameters(on_meta("sac2")) + gates
    assert (
        definitions(experiment("all1").source)["LearnedAdd"]
        == definitions(experiment("lra").source)["LearnedAdd"]
    )


def test_with_gates_of_one_it_answers_as_sac2():
    ours = tiny("all1", gate="constant").eval()
    theirs = tiny("sac2", seed=3, input_mul=1).eval()
    left = ours.load_state_dict(theirs.state_dict(), strict=False)
    for key in left.missing_keys:
        nn.init.constant_(ours.get_parameter(key), torch.logit(torch.tensor(0.6 / 1.1)).item())
    tokens_BT = random_tokens(B=3, T=16)

    assert all(key.endswith("_add.raw") for key in left.missing_keys) and not left.unexpected_keys
    torch.testing.assert_close(ours(tokens_BT), theirs(tokens_BT))


@pytest.mark.parametrize("name", ["all1_1", "all1_2"])
def test_gates_stay_within_their_bounds(name):
    add, floor = tiny(name).blocks[0].mlp_add, {"all1_1": 0.7, "all1_2": 0.6}[name]
    raw_2E = torch.stack([torch.full((32,), -50.0), torch.full((32,), 50.0)])

    for weights_2C in add.bounded(raw_2E):
        torch.testing.assert_close(weights_2C, torch.tensor([[floor], [1.4]]).expand(2, 16))


def adjusters(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_children()} - {"inputs"}


ALL = {"row_scale", "row_shift", "column_scale", "column_shift"}


@pytest.mark.parametrize(
    ("name", "head", "nets"),
    [
        ("all1", ALL, set()),
        ("all1_0", {"row_scale"}, set()),
        ("all1_2", {"row_scale"}, set()),
        ("all1_3", ALL, ALL),
        ("all1_4", ALL, ALL),
    ],
)
def test_head_and_nets_have_the_adjusters_of_the_name(name, head, nets):
    model = tiny(name)

    assert adjusters(model.head) == head
    assert all(adjusters(net) == nets for net in model.nets.values())


def test_unified_nets_start_as_plain_ones_and_predict_by_their_adjusted_weight():
    tokens_BT = random_tokens(B=3, T=16)
    plain, unified = tiny("all1_2", adjusters="all"), tiny("all1_3")
    starts = plain(tokens_BT), unified(tokens_BT)
    net = unified.nets["query_16"]
    for weight in net.parameters():
        nn.init.normal_(weight)
    rows_NI = (net.weight * net.row_scale()[:, None] + net.row_shift()[:, None]) * (
        net.column_scale()
    ) + net.column_shift()

    torch.testing.assert_close(*starts)
    torch.testing.assert_close(net.row(1), rows_NI @ net.inputs[1])


def test_folding_predicts_the_vectors_as_a_pass_does():
    model = tiny("all1_3")
    layer = folded(model).blocks[1].mlp.up
    for net in model.nets.values():
        net.open()
    weight_OI, bias_O = model.blocks[1].mlp.up.effective()

    assert torch.equal(layer.weight, weight_OI) and torch.equal(layer.bias, bias_O)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"gate": "none"}, "gate='none'"),
        ({"floor": 1.5}, "floor=1.5"),
        ({"adjusters": "columns"}, "adjusters='columns'"),
    ],
)
def test_config_refuses_nonsense_and_says_the_value(values, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        experiment("all1").module.Config(vocab_size=61, **values)
