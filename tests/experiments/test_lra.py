"""Learned residual add: sizes, bounds, neutral start, and the one kind that folds."""

import re

import pytest
import torch
from models import experiment, moved, num_parameters, on_meta, random_tokens, tiny, trained
from torch import Tensor, nn

from lmplay.model.folding import folded

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "lra": 148_890_193,
    "lra1_0": 148_890_193,
    "lra1_1": 120_578_641,
    "lra1_2": 120_597_097,
    "lra1_3": 120_560_233,
    "lra1_4": 148_899_409,
}


def opened(model: nn.Module, raw: float) -> nn.Module:
    """The same model with every constant gate at one value."""
    for name, weight in model.named_parameters():
        if name.endswith("_add.raw"):
            nn.init.constant_(weight, raw)
    return model


@pytest.mark.parametrize("name", ["lra1_1", "lra1_3"])
def test_constant_gates_start_in_the_middle(name):
    add = tiny(name).blocks[0].attention_add
    x_BTC, y_BTC = torch.randn(2, 2, 5, 16)

    torch.testing.assert_close(add(x_BTC, y_BTC), 0.95 * x_BTC + 0.95 * y_BTC)


@pytest.mark.parametrize("name", COUNTS)
def test_alpha_is_the_first_half_of_the_gates_and_beta_the_second(name):
    add = tiny(name).blocks[1].mlp_add
    x_BTC = torch.randn(2, 5, 16)
    zeros_BTC = torch.zeros_like(x_BTC)
    last = add.raw if add.gate == "constant" else [*add.predictor.parameters()][-1]
    with torch.no_grad():
        last[: len(last) // 2] = 50.0
        last[len(last) // 2 :] = -50.0

    torch.testing.assert_close(add(x_BTC, zeros_BTC), 1.5 * x_BTC)
    torch.testing.assert_close(add(zeros_BTC, x_BTC), 0.4 * x_BTC)


@pytest.mark.parametrize("name", ["lra1_0", "lra1_2", "lra1_4"])
def test_predicted_gates_read_both_the_stream_and_what_is_added(name):
    add = tiny(name).blocks[0].attention_add
    x_BTC, y_BTC = torch.randn(2, 2, 5, 16)
    weights = torch.cat(add.bounded(add.predictor(torch.cat([x_BTC, y_BTC], -1))), -1)

    for other in ([-x_BTC, y_BTC], [x_BTC, -y_BTC]):
        others = torch.cat(add.bounded(add.predictor(torch.cat(other, -1))), -1)
        assert (weights - others).abs().max() > 0.01
    assert weights.shape[-1] == (2 if name == "lra1_2" else 32)


@pytest.mark.parametrize("name", ["lra1_1", "lra1_3"])
def test_gates_of_one_are_the_baseline(name):
    ours = opened(tiny(name, seed=3), torch.logit(torch.tensor(0.6 / 1.1)).item()).eval()
    baseline = tiny("gpt2ish", seed=3).eval()
    tokens_BT = random_tokens(B=3, T=16)

    assert moved(ours(tokens_BT), baseline(tokens_BT)) < 1e-5


def test_only_lra1_3_folds():
    sizes = {name: num_parameters(folded(on_meta(name))) for name in COUNTS}
    folds = {name for name, size in sizes.items() if size != COUNTS[name]}

    assert folds == {"lra1_3"}
    assert sizes["lra1_3"] == num_parameters(on_meta("gpt2ish"))


@pytest.mark.parametrize(("raw", "num_blocks"), [(None, 2), (None, 6), (-1.0, 2), (1.0, 4)])
def test_lra1_3_folds_to_within_its_bound(raw, num_blocks):
    model = trained(tiny("lra1_3", num_blocks=num_blocks))
    model = model if raw is None else opened(model, raw)
    baseline = tiny("gpt2ish", seed=9, num_blocks=num_blocks).eval()
    baseline.load_state_dict(folded(model).state_dict())
    tokens_BT = random_tokens(B=3, T=16)
    met: list[float] = []  # the share by which each norm may move what it gives
    scale = 1.0

    def note(norm: nn.LayerNorm, args: tuple[Tensor]) -> None:
        least = args[0].var(-1, correction=0).min().item()
        met.append(abs(1 - scale**2) * norm.eps / (2 * least))

    def advance(add: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        nonlocal scale
        scale *= add.bounded(add.raw)[0].item()

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(note)
        elif hasattr(module, "raw"):
            module.register_forward_pre_hook(advance)
    with torch.no_grad():
        error = moved(baseline(tokens_BT), model(tokens_BT))

    assert error < 1e-5 + sum(met)
    assert error < (1e-5 if raw is None else 1e-3)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"gate": "none"}, "gate='none'"),
        ({"floor": 1.5}, "floor=1.5"),
        ({"floor": 0.0}, "floor=0.0"),
    ],
)
def test_config_refuses_nonsense_and_says_the_value(values, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        experiment("lra").module.Config(vocab_size=61, **values)
