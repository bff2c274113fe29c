"""Packed weights: the same sums, and a model that is left as it was."""

import pytest
import torch
from torch import nn

from lmplay.catalog import resolve
from lmplay.experiment import load_experiment
from lmplay.generate.packing import Packed, _is_fast
from lmplay.generate.sampling import GREEDY, generate

pytestmark = pytest.mark.skipif(not _is_fast(torch.float32), reason="this torch has no oneDNN")

needs_bf16 = pytest.mark.skipif(
    not _is_fast(torch.bfloat16), reason="this processor's oneDNN has no bf16"
)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


def tiny(name="gpt2ish", seed=0):
    experiment = load_experiment(resolve(name))
    model = experiment.model(experiment.config(**experiment.tiny), seed=seed)
    with torch.no_grad():
        for weight in model.parameters():  # biases and the last layer of a branch begin at zero
            weight += 0.1 * torch.randn(weight.shape)
    return model.eval()


def step_logits(model):
    """Of each step, and the tokens: what generation chose from."""
    logits = []

    def choose(logits_BV, rows):
        logits.append(logits_BV.clone())
        return GREEDY(logits_BV, rows)

    steps = list(generate(model, PROMPTS[:1], 8, choose, 16))
    return torch.cat(logits), [token for (token,) in steps]


@torch.no_grad()
def plain_logits(model, tokens):
    text = torch.tensor([PROMPTS[0] + tokens[:-1]])
    return model(text)[0, len(PROMPTS[0]) - 1 :].float()


@pytest.mark.parametrize("name", ["gpt2ish", "gpt2", "value_norm", "nnm1"])
def test_steps_in_fp32_are_those_of_the_plain_model(name):
    model = tiny(name)

    logits_TV, tokens = step_logits(model)

    torch.testing.assert_close(logits_TV, plain_logits(model, tokens), atol=1e-5, rtol=1e-5)


@needs_bf16
@pytest.mark.parametrize("name", ["gpt2ish", "gpt2", "value_norm", "nnm1"])
def test_steps_in_bf16_are_as_near_to_fp32_as_under_autocast(name):
    model = tiny(name)
    with torch.autocast("cpu", torch.bfloat16):
        logits_TV, tokens = step_logits(model)
        rounded_TV = plain_logits(model, tokens)
    exact_TV = plain_logits(model, tokens)

    packed_error, rounded_error = (logits_TV - exact_TV).std(), (rounded_TV - exact_TV).std()
    assert 0 < packed_error < 1.2 * rounded_error
    assert rounded_error < 0.01 * exact_TV.std()


@pytest.mark.parametrize("num_rows", [1, 8, 300])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
def test_a_layer_computes_any_number_of_rows(num_rows, dtype):
    layer = nn.Linear(70, 131)
    x = torch.randn(num_rows, 3, 70)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = layer(x)
        with Packed(layer, 4).in_use():
            assert not torch.is_autocast_enabled("cpu")
            made = layer(x)

    assert made.dtype == torch.float32
    torch.testing.assert_close(made, expected.float(), atol=1e-5, rtol=1e-5)


def test_a_model_is_left_as_it_was_also_when_generation_is_not_read_to_its_end():
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        steps = generate(model, PROMPTS, 5, GREEDY, 16)
        next(steps)
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    steps.close()

    assert not torch.is_autocast_enabled("cpu")
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_another_class_or_hand_made_are_not_packed():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    patched = nn.Linear(4, 4)
    patched.forward = torch.neg
    model = nn.Sequential(Scaled(4, 4), patched, nn.Linear(4, 4, dtype=torch.float64))
    x = torch.randn(2, 4)

    with Packed(model, 2).in_use():
        assert torch.equal(model[1](x), -x)
        assert torch.equal(model[0](x), 2 * nn.functional.linear(x, model[0].weight, model[0].bias))
    assert patched.forward is torch.neg
