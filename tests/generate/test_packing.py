"""Packed weights: the same sums, from the layers that are plain."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch import nn

from lmplay.catalog.entries import resolve
from lmplay.generate import packing
from lmplay.generate.packing import is_supported, pack
from lmplay.model.decoding import generate
from lmplay.model.experiment import load_experiment
from lmplay.model.sampler import GREEDY

pytestmark = pytest.mark.skipif(not is_supported("fp32"), reason="this torch has no oneDNN")

needs_bf16 = pytest.mark.skipif(not is_supported("bf16"), reason="oneDNN has no bf16 here")
precisions = pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
names = pytest.mark.parametrize("name", ["gpt2ish", "gpt2", "value_norm", "nnm1"])
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(autouse=True)
def every_layer_counts_as_large(monkeypatch):
    monkeypatch.setattr(packing, "LARGE", 0)


def tiny(name):
    experiment = load_experiment(resolve(name))
    model = experiment.model(experiment.config(**experiment.tiny), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():  # biases and the last layer of a branch begin at zero
            weight += 0.1 * torch.randn(weight.shape)
    return model.eval()


def step_logits(model):
    """Those of each step of generation, and the tokens that were chosen."""
    logits = []

    def choose(logits_BV, rows):
        logits.append(logits_BV.clone())
        return GREEDY(logits_BV, rows)

    steps = list(generate(model, [PROMPT], 8, choose, 16))
    return torch.cat(logits), [token for (token,) in steps]


@torch.no_grad()
def plain_logits(model, tokens, precision="fp32"):
    text = torch.tensor([PROMPT + tokens[:-1]])
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
        return model(text)[0, len(PROMPT) - 1 :].float()


@names
def test_steps_in_fp32_are_those_of_the_plain_model(name):
    model, plain = tiny(name), tiny(name)
    assert pack(model, "fp32", num_rows=1)

    logits_TV, tokens = step_logits(model)

    torch.testing.assert_close(logits_TV, plain_logits(plain, tokens), atol=1e-5, rtol=1e-5)


@needs_bf16
@names
def test_steps_in_bf16_are_as_near_to_fp32_as_under_autocast(name):
    model, plain = tiny(name), tiny(name)
    assert pack(model, "bf16", num_rows=1)

    logits_TV, tokens = step_logits(model)

    exact_TV, rounded_TV = (plain_logits(plain, tokens, p) for p in ("fp32", "bf16"))
    packed_error, rounded_error = (logits_TV - exact_TV).std(), (rounded_TV - exact_TV).std()
    assert 0 < packed_error < 1.2 * rounded_error
    assert rounded_error < 0.01 * exact_TV.std()


@precisions
@pytest.mark.parametrize("num_rows", [1, 8, 300])
def test_a_layer_computes_any_number_of_rows(precision, num_rows):
    plain, x = nn.Linear(70, 131), torch.randn(num_rows, 3, 70)
    layer = deepcopy(plain)
    assert pack(layer, precision, num_rows=4)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            expected = plain(x)
        made = layer(x)

    assert made.dtype == torch.float32
    torch.testing.assert_close(made, expected.float(), atol=1e-5, rtol=1e-5)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_another_class_or_hand_made_are_not_packed():
    patched = nn.Linear(4, 4)
    patched.forward = torch.neg
    others = [Scaled(4, 4), patched, nn.Linear(4, 4, dtype=torch.float64)]

    assert not pack(nn.Sequential(*others), "fp32", 2)
    assert pack(nn.Sequential(*others, nn.Linear(4, 4)), "fp32", 2)
    assert patched.forward is torch.neg
    assert not any("forward" in vars(layer) for layer in (others[0], others[2]))


def test_small_layers_are_left_alone_in_fp32_and_more_of_them_where_one_row_is_written(monkeypatch):
    monkeypatch.setattr(packing, "LARGE", 800)

    def packed(num_rows):
        layers = nn.Sequential(*(nn.Linear(10, size) for size in (9, 10, 79, 80)))
        pack(layers, "fp32", num_rows)
        return [layer.out_features for layer in layers if "forward" in vars(layer)]

    assert (packed(1), packed(2)) == ([80], [10, 79, 80])


def test_fp16_is_not_packed():
    assert not pack(nn.Linear(4, 4), "fp16", 1)
