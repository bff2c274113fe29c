"""Combined models: sizes, folds after training, and what each keeps of the ideas it is made of."""

import re

import pytest
import torch
from models import experiment, num_parameters, on_meta, random_tokens, tiny, trained
from torch import Tensor, nn

from lmplay.model.folding import folded
from lmplay.model.objective import Objective

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "sac1": 396_145_136,
    "sac1_0": 396_145_136,  # with multipliers of the rows alone, as when the original was run
    "sac1_0_1": 709_642_736,  # the same
    "sac1_1": 781_890_800,
    "sac2": 493_261_422,  # not counted there: ue and uw6 at their own sizes
    "sac2_0": 903_797_358,
    "sac2_0_med": 1_774_270_574,
    "sac2_1": 1_508_057_450,
    "sac2_2": 709_828_278,
    "sac2_3": 1_357_011_479,
    "sac2_4": 1_319_264_618,
}
ALL_ADJUSTERS = {"sac1_0": 396_336_822, "sac1_0_1": 709_846_710}  # the original's, as it stands


def gradients(model: nn.Module) -> dict[str, Tensor]:
    tokens_BT = random_tokens(B=4, T=16)
    Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", ALL_ADJUSTERS)
def test_with_all_adjusters_on_the_count_is_todays_originals(name):
    values = dict.fromkeys(("scale_columns", "shift_columns", "shift_rows"), True)

    assert num_parameters(on_meta(name, **values)) == ALL_ADJUSTERS[name]


def test_sac2_0_med_deploys_the_catalogues_size():
    assert num_parameters(folded(on_meta("sac2_0_med"))) == 248_055_377


@pytest.mark.parametrize(("name", "table"), [("sac1_0", "ue8x"), ("sac1_0_1", "ue16x")])
def test_sac1_starts_with_the_answers_of_ue(name, table):
    tokens_BT = random_tokens(B=3, T=16)

    assert torch.equal(tiny(name, seed=3)(tokens_BT), tiny(table, seed=3)(tokens_BT))


@pytest.mark.parametrize(("name", "control"), [("sac1", "uw1"), ("sac1_1", "uw2_1")])
def test_what_is_not_the_table_starts_as_in_the_model_without_it(name, control):
    model, without = tiny(name, seed=3).state_dict(), tiny(control, seed=3).state_dict()
    shared = [key for key in without if not key.startswith("token_table.")]

    assert set(model) - set(shared) == {key for key in model if key.startswith("token_table.")}
    for key in shared:
        assert torch.equal(model[key], without[key]), key


def test_table_blocks_and_head_of_sac1_1_train_one_network():
    model = tiny("sac1_1")
    users = [module for module in model.modules() if hasattr(module, "nets")]

    assert [key for key in model.state_dict() if "bias_net" in key] == [
        "bias_net.layer.weight",
        "bias_net.layer.bias",
    ]
    assert len(users) == 2 + 6 * len(model.blocks) + 1
    for layer in users:
        (grad,) = torch.autograd.grad(layer.effective()[1].sum(), model.bias_net.layer.weight)
        assert grad.abs().max() > 0


def without_the_table(name: str) -> int:
    """Parameters beside those of the token table."""
    return num_parameters(on_meta(name)) - num_parameters(on_meta(name).token_table)


def test_sac2_at_its_own_sizes_is_ue_and_uw6_and_the_adjusters_of_two_layers():
    adjusters = 2 * (8 * 768 + 768 + 2) + 1 + 2 * (768 + 768 + 2) + 1
    table = num_parameters(on_meta("ue8x").token_table) + adjusters

    assert num_parameters(on_meta("sac2")) == without_the_table("uw6") + table


def test_sac2_keeps_the_start_of_uw6_beside_the_table():
    ours, without = tiny("sac2", seed=3).state_dict(), tiny("uw6", seed=3).state_dict()
    shared = [key for key in without if not key.startswith("token_table.")]

    assert set(ours) - set(shared) == {key for key in ours if key.startswith("token_table.")}
    for key in shared:
        assert torch.equal(ours[key], without[key]), key


def test_sac2_starts_with_the_table_of_ue():
    ours, unified = tiny("sac2", seed=3).token_table, tiny("ue8x", seed=5).token_table
    ours.load_state_dict(unified.state_dict(), strict=False)
    ids = torch.arange(61)

    torch.testing.assert_close(ours(ids), unified(ids))


def kinds_of(model: nn.Module) -> dict[str, set[str]]:
    """The classes of the linear layers of the table, the blocks and the head."""
    places = {"table": model.token_table, "blocks": model.blocks, "head": model.head}
    return {
        place: {type(part).__name__ for part in module.modules() if hasattr(part, "effective")}
        for place, module in places.items()
    }


U, P = {"UnifiedLinear"}, {"PredictedLinear"}


@pytest.mark.parametrize(
    ("name", "values", "kinds"),
    [
        ("sac2_0", {}, (U, P, U)),
        ("sac2_1", {}, (P, P, U)),
        ("sac2_0", {"block_kind": "unified"}, (U, U, U)),
        ("sac2_3", {}, (P, P, P)),
        ("sac2_4", {}, (P, P, U)),
    ],
)
def test_each_place_has_layers_of_its_kind(name, values, kinds):
    assert tuple(kinds_of(tiny(name, **values)).values()) == kinds


@pytest.mark.parametrize(
    ("name", "nets"),
    [
        ("sac2_0", {"size_16", "size_64"}),
        ("sac2_1", {"size_16", "size_64", "size_256"}),
        (
            "sac2_4",
            {
                *(f"{role}_16" for role in ("query", "key", "value", "output", "up", "down")),
                *("up_64", "down_64", "front_16", "back_16"),
            },
        ),
    ],
)
def test_vectors_above_four_widths_are_predicted_only_where_nothing_forbids_it(name, nets):
    assert set(tiny(name).nets) == nets


@pytest.mark.parametrize("name", ["sac2_0", "sac2_1", "sac2_3", "sac2_4"])
def test_vectors_start_at_their_values_and_train_the_nets(name):
    model = tiny(name)
    starts = {key: part() for key, part in model.named_modules() if hasattr(part, "offset")}

    for key, start_N in starts.items():
        if key.endswith("scale"):
            torch.testing.assert_close(start_N, torch.ones_like(start_N), rtol=0, atol=1e-6)
        else:
            assert 0.001 < start_N.abs().max() < 0.0101
    grads = gradients(model)
    weights = [key for key in grads if re.fullmatch(r"nets\..*weight", key)]
    assert len(weights) == len(model.nets)
    assert all(grads[key].abs().max() > 0 for key in weights)


def test_no_prediction_outlives_its_pass():
    assert all(net.rows is None for net in trained(tiny("sac2_1")).nets.values())


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("sac1", {"front_mul": 0}, "front_mul=0"),
        ("sac1", {"mid_mul": 0}, "mid_mul=0"),
        ("sac1_1", {"mid_mul": 0}, "mid_mul=0"),
        ("sac1_1", {"input_mul": 0}, "input_mul=0"),
        ("sac2", {"mid_mul": 0}, "mid_mul=0"),
        ("sac2", {"block_kind": "plain"}, "block_kind='plain'"),
        ("sac2", {"table_kind": "mine"}, "table_kind='mine'"),
        ("sac2", {"max_predicted": 0}, "max_predicted=0"),
    ],
)
def test_config_refuses_nonsense_and_says_the_value(name, values, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        experiment(name).module.Config(vocab_size=61, **values)
