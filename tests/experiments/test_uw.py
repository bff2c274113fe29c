"""Unified weights: sizes, exact folding after training, and what each file says of itself."""

import re

import pytest
import torch
from models import experiment, moved, num_parameters, on_meta, random_tokens, tiny, trained
from torch import Tensor, nn

from lmplay.model.objective import Objective

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "uw1": 120_652_012,
    "uw1_0": 120_652_012,
    "uw1_1": 120_694_289,
    "uw1_2": 120_828_332,
    "uw2": 191_627_089,
    "uw2_0": 191_627_089,
    "uw2_1": 191_718_892,
    "uw2_4": 196_046_572,
    "uw2_5": 157_392_793,
    "uw2_6": 200_765_932,
    "uw2_2": 218_610_864,
    "uw2_3": 151_291_180,
    "uw3": 450_988_780,
    "uw3_0": 450_988_780,
    "uw3_1": 203_489_644,
    "uw3_2": 780_987_628,
    "uw3_3": 710_849_260,
    "uw4": 450_988_780,
    "uw4_0": 450_988_780,
    "uw5": 744_740_554,
    "uw5_0": 744_740_554,
    "uw4_1": 710_891_537,
    "uw4_2": 674_292_682,
    "uw5_1": 489_069_666,
    "uw5_2": 489_069_666,
    "uw6": 217_752_932,
    "uw6_0": 217_752_932,
    "uw6_1": 169_239_908,
    "uw6_2": 169_137_853,
    "uw6_3": 216_826_688,
    "uw6_4": 387_622_244,
    "uw6_5": 406_470_161,
    "uw6_6": 406_468_625,
    "ue_unified": 396_068_699,  # not counted there: ue8x + 2 (in + out + 2) + 1 for each layer
    "ue1_4": 121_747_547,
}
TARGETS = {  # what a file folds to
    "uw1": "gpt2ish",
    "uw2": "gpt2ish",
    "uw2_2": "gpt2ish",
    "uw2_3": "gpt2ish",
    "uw3": "gpt2ish",
    "uw4": "gpt2ish",
    "uw5": "gpt2ish",
    "uw5_1": "no_block_norms",
    "uw6": "no_block_norms",
    "ue_unified": "gpt2ish",
}
CONTROLS = {
    "no_block_norms": 120_541_777,
    "no_block_norms_unbiased": 120_500_305,
    "no_norms": 120_540_241,
}

SHARED = ("block_bias", "final_norm")  # what a model and the one it folds to both have as values


def target_of(name: str) -> tuple[str, dict[str, object]]:
    """What this name folds to, and the values of its Config that are not the defaults."""
    entry = experiment(name).entry
    values = {key: value for key, value in entry.variant.items() if key in SHARED}
    return TARGETS[entry.file], values


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["uw1_0", "uw1_1", "uw1_2"])
def test_with_one_seed_the_start_is_exactly_the_baselines(name):
    tokens_BT = random_tokens(B=3, T=16)

    assert torch.equal(tiny(name, seed=3)(tokens_BT), tiny("gpt2ish", seed=3)(tokens_BT))


def test_uw1_adjusts_rows_first_then_columns():
    torch.manual_seed(0)
    layer = tiny("uw1_2").blocks[0].mlp.up
    for weight in layer.parameters():
        nn.init.normal_(weight)
    weight_OI, bias_O = layer.effective()
    m_O, a_O, n_I, c_I = (
        adjuster.vector + adjuster.scalar
        for adjuster in (layer.row_scale, layer.row_shift, layer.column_scale, layer.column_shift)
    )

    for i, j in ((0, 0), (63, 15), (7, 2)):
        expected = (layer.weight[i, j] * m_O[i] + a_O[i]) * n_I[j] + c_I[j]
        torch.testing.assert_close(weight_OI[i, j], expected)
    assert torch.equal(bias_O, layer.bias + layer.bias_shift)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("uw1_0", {"row_scale"}),
        ("uw1_1", {"row_scale", "column_scale"}),
        ("uw1_2", {"row_scale", "column_scale", "row_shift", "column_shift"}),
    ],
)
def test_each_layer_of_uw1_has_its_variants_adjusters(name, parts):
    model = tiny(name)
    layers = [module for module in model.modules() if hasattr(module, "effective")]

    assert len(layers) == 6 * len(model.blocks) + 1
    for layer in layers:
        assert {part for part, _ in layer.named_children()} == parts


def test_what_moves_all_logits_or_all_channels_alike_changes_no_loss():
    model, tokens_BT = tiny("uw1_2").eval(), random_tokens(B=3, T=16)
    before = Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).loss
    layers = [model.head]
    for block in model.blocks:
        layers += [block.attention.output, block.mlp.down]
    with torch.no_grad():
        for layer in layers:
            layer.bias_shift += 1.0
            layer.column_shift.vector += torch.randn(layer.in_features)
            layer.column_shift.scalar += 1.0

    torch.testing.assert_close(Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).loss, before)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_has_the_size_of_what_it_controls(name):
    assert num_parameters(on_meta(name)) == CONTROLS[name]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    tokens_BT = random_tokens(B=4, T=16)
    Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "nets"),
    [
        ("uw2_0", {"bias_net"}),
        ("uw2_5", {"bias_net"}),
        ("uw2_6", {"bias_net", "head_bias_net"}),
    ],
)
def test_uw2_keeps_each_network_once(name, nets):
    model = tiny(name)
    once = [f"{net}.layer.{part}" for net in sorted(nets) for part in ("bias", "weight")]

    assert sorted(key for key in model.state_dict() if "net" in key) == once


@pytest.mark.parametrize(
    ("name", "by_head", "by_blocks"),
    [("uw2_4", "bias_net", "bias_net"), ("uw2_6", "head_bias_net", "bias_net")],
)
def test_every_layer_trains_the_network_that_predicts_its_bias(name, by_head, by_blocks):
    model = tiny(name)
    users = {"head": model.head, "up": model.blocks[0].mlp.up, "key": model.blocks[1].attention.key}

    for user, layer in users.items():
        model.zero_grad()
        layer.effective()[1].sum().backward()
        trained_nets = {
            net
            for net in ("bias_net", "head_bias_net")
            if hasattr(model, net) and getattr(model, net).layer.weight.grad is not None
        }

        assert trained_nets == {by_head if user == "head" else by_blocks}


def predicted_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "column_scale")]


@pytest.mark.parametrize("name", ["uw6_0", "uw6_3", "uw6_4", "uw6_5", "uw6_6"])
def test_uw6_starts_as_no_block_norms_with_its_weights_and_biases(name):
    _, values = target_of(name)
    model = tiny(name, seed=3).eval()
    plain = tiny("no_block_norms", seed=9, **values).eval()
    same = {key: value for key, value in model.state_dict().items() if key in shapes(plain)}
    plain.load_state_dict(same, strict=False)
    for key, layer in model.named_modules():
        if getattr(layer, "shift", None) is not None:
            plain.get_submodule(key).bias.data = layer.shift().detach()
    tokens_BT = random_tokens(B=3, T=16)

    assert moved(plain(tokens_BT), model(tokens_BT)) < 1e-5


@pytest.mark.parametrize("name", ["uw6_0", "uw6_4", "uw6_5"])
def test_uw6_vectors_start_at_their_values_and_every_part_of_them_is_trained(name):
    model = tiny(name)
    starts = {
        key: vector().detach() for key, vector in model.named_modules() if hasattr(vector, "offset")
    }
    sizes = {key: grad.abs().max() for key, grad in gradients(model.double()).items()}
    cancelled = {"head.bias_shift", "head.shift.scalar"}  # the softmax takes no notice of them
    cancelled |= {f"head.{n}_shift.{p}" for n in ("row", "column") for p in ("vector", "scalar")}
    for index, block in enumerate(model.blocks):
        shift = block.attention.key.shift
        net = next(key for key, net in model.nets.items() if net is shift.nets[0])
        cancelled.add(f"nets.{net}.inputs.{shift.place}")
        cancelled.add(f"blocks.{index}.mlp.down.shift.scalar")  # by the final norm
        cancelled |= {f"blocks.{index}.attention.key.shift.{p}" for p in ("offset", "scalar")}

    assert len(starts) == 3 * 6 * 2 + (3 if name == "uw6_5" else 0)
    for key, start_N in starts.items():
        if key.endswith("scale"):
            torch.testing.assert_close(start_N, torch.ones_like(start_N), rtol=0, atol=1e-6)
        else:
            assert 0.001 < start_N.abs().max() < 0.0101
    assert {key for key, size in sizes.items() if size < 1e-12} <= cancelled


@pytest.mark.parametrize(
    ("name", "users"),
    [
        ("uw6_0", {"size_16": 30, "size_64": 6}),
        (
            "uw6_4",
            {
                **{f"{role}_16": 6 for role in ("query", "key", "value", "output")},
                **{"up_16": 2, "up_64": 4, "down_64": 2, "down_16": 4},
            },
        ),
        (
            "uw6_5",
            {
                **{f"{role}_16": 6 for role in ("query", "key", "value", "output")},
                **{"up_16": 2, "up_64": 4, "down_64": 2, "down_16": 4, "head_16": 1},
            },
        ),
    ],
)
def test_uw6_shares_a_net_between_vectors_of_one_size_or_of_one_role_and_size(name, users):
    nets = tiny(name).nets

    assert {key: len(net.inputs) for key, net in nets.items()} == users
    assert sum(key.startswith("nets.") for key in tiny(name).state_dict()) == len(users) + sum(
        users.values()
    )


def test_predicting_all_vectors_at_once_is_predicting_each_alone():
    ours, alone = tiny("uw6_0").double(), tiny("uw6_0").double()
    for net in alone.nets.values():
        net.open = lambda: None  # so that every vector asks for its own
    theirs = gradients(alone)

    for key, grad in gradients(ours).items():
        torch.testing.assert_close(grad, theirs[key])


def test_no_prediction_outlives_its_pass():
    model = trained(tiny("uw6_0"))

    assert all(net.rows is None for net in model.nets.values())


def test_ue1_4_starts_as_ue1x():
    tokens_BT = random_tokens(B=3, T=16)

    assert torch.equal(tiny("ue1_4", seed=3)(tokens_BT), tiny("ue1x", seed=3)(tokens_BT))


@pytest.mark.parametrize("name", ["uw4", "uw5", "uw5_1"])
def test_predicted_multipliers_start_near_one_and_near_zero_as_in_the_original(name):
    def scales(start: float) -> Tensor:
        layer = tiny(name, scale_start=start, width=64).blocks[0].mlp.up
        return layer.effective()[0].norm() / layer.weight.norm()

    assert scales(1.0).item() == pytest.approx(1.0, abs=0.2)
    assert scales(0.0).item() < 0.2


@pytest.mark.parametrize(
    ("name", "predicted"),
    [
        ("uw5_0", {"column_scale", "shift"}),
        ("uw4_1", {"shift"}),
        ("uw4_2", {"column_scale"}),
        ("uw5_1", {"column_scale", "row_scale", "shift"}),
    ],
)
def test_each_layer_predicts_what_its_name_says(name, predicted):
    model = tiny(name)
    layers = [module for module in model.modules() if hasattr(module, "trunk")]

    assert len(layers) == 6 * len(model.blocks) + 1
    for layer in layers:
        parts = {part for part, child in layer.named_children() if hasattr(child, "to_vector")}
        assert parts == predicted
        assert isinstance(layer.trunk, nn.Linear)
        assert (type(layer.trunk) is nn.Linear) == (name in ("uw4_1", "uw5_1"))


def test_uw5_1_adjusts_columns_first_then_rows():
    torch.manual_seed(0)
    layer = tiny("uw5_1").blocks[0].mlp.up
    for weight in layer.parameters():
        nn.init.normal_(weight)
    h_M = nn.functional.gelu(layer.trunk(layer.vector))
    n_I, m_O, b_O = layer.column_scale(h_M), layer.row_scale(h_M), layer.shift(h_M)
    weight_OI, bias_O = layer.effective()

    for i, j in ((0, 0), (63, 15), (7, 2)):
        inner = layer.weight[i, j] * n_I[j] + layer.column_shift[j]
        torch.testing.assert_close(weight_OI[i, j], inner * m_O[i] + layer.row_shift[i])
    assert torch.equal(bias_O, b_O)


def test_the_hidden_width_of_uw2_3_is_the_catalogues():
    layer = on_meta("uw2_3").blocks[0].mlp.down

    assert layer.front.weight.shape == (96, 8 * 768)


def test_the_vector_of_uw2_3_is_kept_once_and_trained_by_every_layer():
    model = tiny("uw2_3")
    users = [module for module in model.modules() if hasattr(module, "shared")]

    assert [key for key in model.state_dict() if key.endswith("vector")][-1] == "bias_data.vector"
    assert sum(key.startswith("bias_data") for key in model.state_dict()) == 1
    for layer in users:
        (grad,) = torch.autograd.grad(layer.effective()[1].square().sum(), model.bias_data.vector)
        assert grad.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("uw2", {"input_mul": 0}, "input_mul=0"),
        ("uw2", {"head_net": "mine"}, "head_net='mine'"),
        ("uw2_2", {"vector_mul": 0}, "vector_mul=0"),
        ("uw2_3", {"data_mul": 0}, "data_mul=0"),
        ("uw3", {"mid_mul": 0.0}, "mid_mul=0.0"),
        ("uw4", {"input_mul": 0}, "input_mul=0"),
        ("uw5", {"mid_mul": 0.0}, "mid_mul=0.0"),
        ("uw5", {"predict_columns": False, "predict_bias": False}, "nothing to predict"),
        ("uw5_1", {"input_mul": 0}, "input_mul=0"),
        ("uw6", {"input_mul": 0}, "input_mul=0"),
        ("uw6", {"head_kind": "best"}, "head_kind='best'"),
    ],
)
def test_config_refuses_nonsense_and_says_the_value(name, values, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        experiment(name).module.Config(vocab_size=61, **values)
