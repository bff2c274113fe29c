"""Neural memory: sizes, folds, what is shared, what cells add and when they add nothing."""

import re

import pytest
import torch
import torch.nn.functional as F
from models import experiment, moved, on_meta, random_tokens, tiny
from torch import Tensor, nn

from lmplay.model.objective import Objective

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "nnm1": 173_887_057,
    "nnm1_0": 173_887_057,
    "nnm1_1": 179_792_977,
    "nnm1_2": 298_756_177,
    "nnm1_3": 173_887_057,
    "nnm1_4": 202_240_081,
    "nnm1_5": 188_394_577,
    "nnm1_6": 173_887_057,
    "nnm1_7": 173_887_057,
    "nnm1_8": 172_314_193,
    "nnm1_9": 195_907_153,
    "nnm1_10": 151_373_905,
    "nnm1_11": 160_319_569,
    "nnm1_12": 314_142_289,
    "nnm2": 165_614_161,
    "nnm2_0": 165_614_161,
    "nnm2_1": 208_122_961,
    "nnm3": 233_349_973,
    "nnm3_0": 233_349_973,
    "nnm3_1": 240_291_025,
    "nnm3_2": 211_531_261,
    "nnm3_3": 136_924_243,
    "nnm4": 200_893_009,
    "nnm4_0": 200_893_009,
    "nnm4_1": 200_874_577,
    "nnm4_2": 218_607_697,
    "nnm4_3": 200_893_009,
    "nnm4_4": 200_893_009,
    "nnm4_5": 200_893_009,
}
# what nnm1 and nnm2 fold to: two numbers for each cell and channel instead of a network of two
# layers, the rows before it and the two layers behind it
CONTROLS = {
    "nnm1_direct": 150_291_025,
    "nnm2_direct": 142_018_129,
}


def random_stream(B: int = 3, T: int = 7, C: int = 16) -> Tensor:
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(2))


def test_keys_and_values_come_from_the_rows_through_the_network():
    memory = tiny("nnm1").memories[0]
    cells_NE = memory.back(F.gelu(memory.front(memory.rows)))
    k_NC, v_NC = memory()

    assert memory.rows.shape == (8, 32 * 16)
    torch.testing.assert_close(k_NC, memory.key(cells_NE))
    torch.testing.assert_close(v_NC, memory.value(cells_NE))


def test_plain_rows_are_the_cells():
    memory = tiny("nnm1_11").memories[0]
    k_NC, v_NC = memory()

    assert memory.rows.shape == (8, 8 * 16)
    torch.testing.assert_close(k_NC, memory.key(memory.rows))
    torch.testing.assert_close(v_NC, memory.value(memory.rows))


@pytest.mark.parametrize(
    ("name", "memories", "recalls", "memory_blocks"),
    [
        ("nnm1_0", 1, 1, 6),
        ("nnm1_1", 1, 6, 6),
        ("nnm1_2", 6, 6, 6),
        ("nnm1_4", 1, 1, 12),
        ("nnm1_5", 3, 3, 3),
        ("nnm1_12", 12, 12, 12),
    ],
)
def test_nnm1_shares_what_its_variant_says(name, memories, recalls, memory_blocks):
    model = on_meta(name)

    assert len(model.memories) == memories
    assert len(model.recalls) == recalls
    assert len(model.memory_blocks) == memory_blocks


@pytest.mark.parametrize("silent", [None, 0, 1])
def test_a_shared_memory_learns_from_each_memory_block(silent):
    model, tokens_BT = tiny("nnm1_1"), random_tokens(B=2, T=16)
    for place, recall in enumerate(model.recalls):
        if place == silent:
            nn.init.zeros_(recall.output.weight)
    Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()

    assert model.memories[0].rows.grad.abs().max() > 1e-4
    assert sum(".rows" in key for key in model.state_dict()) == 1


def all_of(recall: nn.Module, kept: tuple[Tensor, Tensor], x_BTI: Tensor) -> Tensor:
    """Attention to a memory as two layers with a softmax for each head between them."""
    size = kept[0].shape[1] // recall.num_heads
    answer_BTO = recall.output.bias
    heads = zip(*(part.split(size, 1) for part in kept), strict=True)
    for head, (k_NJ, v_NJ) in enumerate(heads):
        channels = slice(head * size, (head + 1) * size)
        first_NI = k_NJ @ recall.query.weight[channels] / size**0.5
        bias_N = k_NJ @ recall.query.bias[channels] / size**0.5
        second_NO = v_NJ @ recall.output.weight[:, channels].T
        shares_BTN = (x_BTI @ first_NI.T + bias_N).softmax(-1)
        answer_BTO = answer_BTO + shares_BTN @ second_NO
    return answer_BTO


def test_attention_to_a_memory_is_two_layers_with_softmaxes_between():
    model, x_BTC = tiny("nnm1"), random_stream()
    kept = model.memories[0]()

    assert moved(model.recalls[0](x_BTC, kept), all_of(model.recalls[0], kept, x_BTC)) < 1e-5


@pytest.mark.parametrize("name", ["nnm2_0", "nnm2_1"])
def test_a_memory_layer_is_attention_to_the_memory_and_its_shadow(name):
    model, x_BTC = tiny(name), random_stream()
    layer, kept = model.blocks[0].mlp.up, model.memory()
    expected_BTF = all_of(layer, kept, x_BTC)
    if name == "nnm2_1":
        expected_BTF = expected_BTF + layer.shadow(x_BTC)

    assert moved(layer(x_BTC, kept), expected_BTF) < 1e-5


@pytest.mark.parametrize("name", ["nnm1_0", "nnm1_6"])
def test_a_memory_block_recalls_and_then_has_an_mlp(name):
    model, x_BTC = tiny(name), random_stream()
    block, recall, kept = model.memory_blocks[0], model.recalls[0], model.memories[0]()
    y_BTC = recall(F.layer_norm(x_BTC, (16,)), kept)
    if name == "nnm1_0":
        r_BTC = x_BTC + y_BTC
        expected_BTC = r_BTC + block.mlp(F.layer_norm(r_BTC, (16,)))
    else:
        expected_BTC = x_BTC + block.mlp(F.layer_norm(y_BTC, (16,)))

    torch.testing.assert_close(block(x_BTC, recall, kept), expected_BTC)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("nnm1_0", "blocks.0 memory_blocks.0 blocks.1 memory_blocks.1"),
        ("nnm1_3", "memory_blocks.0 blocks.0 memory_blocks.1 blocks.1"),
        (
            "nnm1_4",
            "blocks.0 memory_blocks.0 memory_blocks.1 blocks.1 memory_blocks.2 memory_blocks.3",
        ),
    ],
)
def test_memory_blocks_stand_behind_the_blocks_or_before_them(name, order):
    model, seen = tiny(name), []
    for part, module in model.named_modules():
        if re.fullmatch(r"(memory_)?blocks\.\d+", part):
            module.register_forward_pre_hook(lambda *_, part=part: seen.append(part))
    model(random_tokens(B=1, T=4))

    assert seen == order.split()


@pytest.mark.parametrize("name", ["nnm1_0", "nnm1_2", "nnm1_3", "nnm1_4", "nnm1_6"])
def test_memory_blocks_that_give_nothing_leave_the_baseline(name):
    model, baseline, tokens_BT = tiny(name, seed=3), tiny("gpt2ish", seed=3), random_tokens(3, 16)
    for part in [*model.recalls, *(block.mlp for block in model.memory_blocks)]:
        for weight in (part.output if hasattr(part, "output") else part.down).parameters():
            nn.init.zeros_(weight)

    assert torch.equal(model(tokens_BT), baseline(tokens_BT))


def test_memory_layers_that_give_nothing_leave_their_shadows_a_baseline():
    model, baseline, tokens_BT = tiny("nnm2_1").eval(), tiny("gpt2ish").eval(), random_tokens(3, 16)
    for name, weight in model.named_parameters():
        if re.search(r"\.(query|key|value|output|up|down)\.output\.", name):
            nn.init.zeros_(weight)
    state = {key.replace(".shadow.", "."): w for key, w in model.state_dict().items()}
    baseline.load_state_dict({key: state[key] for key in baseline.state_dict()})

    assert torch.equal(model(tokens_BT), baseline(tokens_BT))


@pytest.mark.parametrize("name", ["nnm1", "nnm2"])
def test_a_memory_is_made_once_in_each_pass(name):
    model, made = tiny(name, num_blocks=4), []
    for part, module in model.named_modules():
        if part in ("memories.0", "memory"):
            module.register_forward_pre_hook(lambda *_: made.append(1))
    model(random_tokens(B=1, T=4))

    assert len(made) == 1


def looked_up(lookup: nn.Module, x_BTC: Tensor) -> Tensor:
    """The cells' mean, one head after the other."""
    z_BTF = lookup.down(F.gelu(lookup.up(x_BTC)))
    heads = zip(z_BTF.chunk(lookup.num_heads, -1), lookup.cells, strict=True)
    means = [z_BTN.softmax(-1) @ cells_NJ for z_BTN, cells_NJ in heads]
    return lookup.output(torch.cat(means, -1))


@pytest.mark.parametrize("name", ["up", "down"])
def test_a_lookup_adds_each_heads_mean_of_its_own_cells(name):
    layer = getattr(tiny("nnm3").blocks[0].mlp, name)
    x_BTI = random_stream(C=layer.in_features)

    torch.testing.assert_close(
        layer(x_BTI), F.linear(x_BTI, layer.weight, layer.bias) + looked_up(layer.lookup, x_BTI)
    )


def test_lookups_that_give_nothing_leave_the_baseline():
    model, baseline, tokens_BT = tiny("nnm3").eval(), tiny("gpt2ish").eval(), random_tokens(3, 16)
    for name, weight in model.named_parameters():
        if ".lookup.output." in name:
            nn.init.zeros_(weight)
    shared = baseline.state_dict().keys()
    baseline.load_state_dict({k: v for k, v in model.state_dict().items() if k in shared})

    assert torch.equal(model(tokens_BT), baseline(tokens_BT))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("nnm3_0", {"query", "key", "value", "output", "up", "down"}),
        ("nnm3_2", {"up", "down"}),
        ("nnm3_3", {"query", "key", "value"}),
    ],
)
def test_nnm3_has_cells_at_the_layers_that_it_names(name, layers):
    for block in tiny(name).blocks:
        named = [*block.attention.named_children(), *block.mlp.named_children()]

        assert {part for part, layer in named if hasattr(layer, "lookup")} == layers


@pytest.mark.parametrize(
    ("name", "values", "order"),
    [
        ("nnm4_0", {}, "BNN BNN BNN BNN BNN BNN"),
        ("nnm4_4", {}, "BN BN BNN BNN BNNN BNNN"),
        ("nnm4_5", {}, "BN BNN BNNN BNNN BNN BN"),
        ("nnm4", {"block_pattern": "NBN-B"}, "NBN B NBN B NBN B"),
        ("nnm4", {"block_pattern": "BN-NB-BN", "num_blocks": 2}, "BN NB"),
    ],
)
def test_nnm4_runs_its_blocks_in_the_order_of_its_pattern(name, values, order):
    model, seen = tiny(name, **{"num_blocks": 6, **values}), []
    for block in model.modules():
        if hasattr(block, "mlp_norm"):
            letter = "N" if hasattr(block, "lookup") else "B"
            block.register_forward_pre_hook(lambda *_, letter=letter: seen.append(letter))
    model(random_tokens(B=1, T=4))

    assert "".join(seen) == order.replace(" ", "")


def test_lookup_blocks_that_give_nothing_leave_the_baseline():
    model, baseline, tokens_BT = (
        tiny("nnm4", seed=4),
        tiny("gpt2ish", seed=4),
        random_tokens(B=3, T=16),
    )
    for name, weight in model.named_parameters():
        if re.match(r"(before|behind)\..*\.(lookup\.output|mlp\.down)\.", name):
            nn.init.zeros_(weight)

    assert torch.equal(model(tokens_BT), baseline(tokens_BT))


def test_a_lookup_block_adds_a_lookup_and_then_an_mlp():
    block = tiny("nnm4").behind[0][0]
    x_BTC = random_stream()
    r_BTC = x_BTC + looked_up(block.lookup, F.layer_norm(x_BTC, (16,)))

    torch.testing.assert_close(block(x_BTC), r_BTC + block.mlp(F.layer_norm(r_BTC, (16,))))


def test_nnm4_1_looks_up_without_a_norm():
    block = tiny("nnm4_1").behind[0][0]
    x_BTC = random_stream()
    r_BTC = x_BTC + looked_up(block.lookup, x_BTC)

    torch.testing.assert_close(block(x_BTC), r_BTC + block.mlp(F.layer_norm(r_BTC, (16,))))


def test_without_softmax_a_lookup_is_a_two_layer_mlp():
    lookup = tiny("nnm4_3").behind[0][0].lookup
    x_BTC = random_stream()
    G, N, J = lookup.cells.shape
    down_GNF = lookup.down.weight.view(G, N, -1)
    output_CGJ = lookup.output.weight.view(-1, G, J)
    weight_CF = torch.einsum("cgj,gnj,gnf->cf", output_CGJ, lookup.cells, down_GNF)
    bias_C = torch.einsum("cgj,gnj,gn->c", output_CGJ, lookup.cells, lookup.down.bias.view(G, N))
    plain_BTC = F.linear(F.gelu(lookup.up(x_BTC)), weight_CF, bias_C + lookup.output.bias)

    assert moved(lookup(x_BTC), plain_BTC) < 1e-5


def test_ff_dropout_reaches_lookup_blocks():
    block = tiny("nnm4", ff_dropout=0.5).behind[0][0].train()
    x_BTC = random_stream()

    assert not torch.equal(block(x_BTC), block(x_BTC))


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("nnm1", {"num_cells": 0}, "num_cells=0"),
        ("nnm1", {"memory_heads": 5}, "memory_heads=5"),
        ("nnm1", {"memory_heads": 0}, "memory_heads=0"),
        ("nnm1", {"memory_blocks": 0}, "memory_blocks=0"),
        ("nnm1", {"share": "some"}, "share='some'"),
        ("nnm1", {"row_mul": -1}, "row_mul=-1"),
        ("nnm1", {"cell_mul": 0}, "cell_mul=0"),
        ("nnm2", {"num_cells": 0}, "num_cells=0"),
        ("nnm2", {"memory_heads": 5}, "memory_heads=5"),
        ("nnm2", {"row_mul": -1}, "row_mul=-1"),
        ("nnm2", {"cell_mul": 0}, "cell_mul=0"),
        ("nnm3", {"num_layer_cells": 0}, "num_layer_cells=0"),
        ("nnm3", {"layer_cell_heads": 5}, "layer_cell_heads=5"),
        ("nnm3", {"layer_cell_heads": 0}, "layer_cell_heads=0"),
        ("nnm3", {"cell_layers": ""}, "cell_layers=''"),
        ("nnm3", {"cell_layers": "query head"}, "cell_layers='query head'"),
        ("nnm4", {"num_block_cells": 0}, "num_block_cells=0"),
        ("nnm4", {"block_cell_heads": 5}, "block_cell_heads=5"),
        ("nnm4", {"block_pattern": ""}, "block_pattern=''"),
        ("nnm4", {"block_pattern": "BN-"}, "block_pattern='BN-'"),
        ("nnm4", {"block_pattern": "BX"}, "block_pattern='BX'"),
        ("nnm4", {"block_pattern": "N"}, "block_pattern='N'"),
        ("nnm4", {"block_pattern": "B"}, "block_pattern='B'"),
        ("nnm4", {"block_pattern": "BBN"}, "block_pattern='BBN'"),
    ],
)
def test_config_refuses_nonsense_and_says_the_value(name, values, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        experiment(name).module.Config(vocab_size=61, **values)
