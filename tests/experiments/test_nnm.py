"""Neural memory: sizes, patterns of blocks, what cells add and when they add nothing."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.catalog import read_file
from lmplay.experiment import Experiment, load_experiment

FOLDER = Path(__file__).parent.parent.parent / "experiments"
FILES = ("gpt2ish", "nnm3", "nnm4")

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
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


def experiment(name: str) -> Experiment:
    entries = [e for file in FILES for e in read_file(FOLDER / f"{file}.py")]
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


def random_stream(B: int = 3, T: int = 7, C: int = 16) -> Tensor:
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(2))


def moved(changed: Tensor, answer: Tensor) -> float:
    """The largest difference, against the largest answer."""
    return ((changed - answer).abs().max() / answer.abs().max()).item()


@pytest.mark.parametrize("name", COUNTS)
def test_the_parameter_count_is_the_catalogues(name):
    assert num_parameters(on_meta(name)) == COUNTS[name]


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
    ("name", "kinds"),
    [
        ("nnm4_0", "BNN BNN BNN BNN BNN BNN"),
        ("nnm4_4", "BN BN BNN BNN BNNN BNNN"),
        ("nnm4_5", "BN BNN BNNN BNNN BNN BN"),
    ],
)
def test_nnm4_has_blocks_in_the_order_of_its_pattern(name, kinds):
    blocks = on_meta(name).blocks
    letters = ["N" if hasattr(block, "lookup") else "B" for block in blocks]

    assert "".join(letters) == kinds.replace(" ", "")
    assert [block.index for block in blocks if hasattr(block, "index")] == [0, 1, 2, 3, 4, 5]


def test_a_short_pattern_starts_again_and_a_long_one_is_cut():
    def kinds(block_pattern: str, num_blocks: int) -> str:
        return tiny("nnm4", block_pattern=block_pattern, num_blocks=num_blocks).config.kinds

    assert kinds("BN-BBNN", 5) == "BN" + "BBNN" + "BN" + "BBNN" + "BN"
    assert kinds("BN-BBNN-N", 2) == "BN" + "BBNN"


def test_without_memory_blocks_nnm4_is_the_baseline():
    tokens_BT = random_tokens(B=3, T=16)

    assert torch.equal(
        tiny("nnm4", block_pattern="B", seed=4)(tokens_BT), tiny("gpt2ish", seed=4)(tokens_BT)
    )


def test_a_memory_block_adds_a_lookup_and_then_an_mlp():
    block = tiny("nnm4").blocks[1]
    x_BTC = random_stream()
    r_BTC = x_BTC + looked_up(block.lookup, F.layer_norm(x_BTC, (16,)))

    torch.testing.assert_close(block(x_BTC), r_BTC + block.mlp(F.layer_norm(r_BTC, (16,))))


def test_nnm4_1_looks_up_without_a_norm():
    block = tiny("nnm4_1").blocks[1]
    x_BTC = random_stream()
    r_BTC = x_BTC + looked_up(block.lookup, x_BTC)

    torch.testing.assert_close(block(x_BTC), r_BTC + block.mlp(F.layer_norm(r_BTC, (16,))))


def test_without_softmax_a_lookup_is_a_two_layer_mlp():
    lookup = tiny("nnm4_3").blocks[1].lookup
    x_BTC = random_stream()
    G, N, J = lookup.cells.shape
    down_GNF = lookup.down.weight.view(G, N, -1)
    output_CGJ = lookup.output.weight.view(-1, G, J)
    weight_CF = torch.einsum("cgj,gnj,gnf->cf", output_CGJ, lookup.cells, down_GNF)
    bias_C = torch.einsum("cgj,gnj,gn->c", output_CGJ, lookup.cells, lookup.down.bias.view(G, N))
    plain_BTC = F.linear(F.gelu(lookup.up(x_BTC)), weight_CF, bias_C + lookup.output.bias)

    assert moved(lookup(x_BTC), plain_BTC) < 1e-5


def test_ff_dropout_reaches_memory_blocks():
    block = tiny("nnm4", ff_dropout=0.5).blocks[1].train()
    x_BTC = random_stream()

    assert not torch.equal(block(x_BTC), block(x_BTC))


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("nnm3", {"num_cells": 0}, "num_cells=0"),
        ("nnm3", {"cell_heads": 5}, "cell_heads=5"),
        ("nnm3", {"cell_heads": 0}, "cell_heads=0"),
        ("nnm3", {"cell_layers": ""}, "cell_layers=''"),
        ("nnm3", {"cell_layers": "query head"}, "cell_layers='query head'"),
        ("nnm4", {"num_cells": 0}, "num_cells=0"),
        ("nnm4", {"cell_heads": 5}, "cell_heads=5"),
        ("nnm4", {"block_pattern": ""}, "block_pattern=''"),
        ("nnm4", {"block_pattern": "BN-"}, "block_pattern='BN-'"),
        ("nnm4", {"block_pattern": "BX"}, "block_pattern='BX'"),
        ("nnm4", {"block_pattern": "N"}, "block_pattern='N'"),
        ("nnm4", {"block_pattern": "N-B", "num_blocks": 1}, "block_pattern='N-B'"),
    ],
)
def test_config_refuses_nonsense_and_says_the_value(name, values, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        experiment(name).module.Config(vocab_size=61, **values)
