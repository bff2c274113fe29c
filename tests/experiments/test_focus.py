"""Focus: sizes, the divisors and where they start, and the one kind that folds."""

import re

import pytest
import torch
from models import experiment, moved, num_parameters, on_meta, random_tokens, tiny
from torch import nn

from lmplay.model.folding import folded

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "focus": 120_615_577,
    "foc1_0": 120_615_577,
    "foc1_1": 120_560_215,
}


def shared_with_the_baseline(model: nn.Module) -> nn.Module:
    baseline = tiny("gpt2ish", seed=9)
    theirs = baseline.state_dict().keys()
    baseline.load_state_dict({k: v for k, v in model.state_dict().items() if k in theirs})
    return baseline.eval()


def test_one_divisor_starts_as_the_baselines():
    model, tokens_BT = tiny("foc1_1").eval(), random_tokens(B=3, T=16)

    assert torch.equal(model(tokens_BT), shared_with_the_baseline(model)(tokens_BT))


def test_predicted_divisors_of_one_are_the_baselines():
    model, tokens_BT = tiny("foc1_0").eval(), random_tokens(B=3, T=16)
    for block in model.blocks:
        for weight in block.attention.query.divisor.parameters():
            nn.init.zeros_(weight)

    assert moved(model(tokens_BT), shared_with_the_baseline(model)(tokens_BT)) < 1e-6


def test_each_query_and_head_is_divided_by_twice_a_sigmoid():
    query = tiny("foc1_0").blocks[0].attention.query
    x_BTC = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    plain_BTHD = nn.functional.linear(x_BTC, query.weight, query.bias).view(3, 7, 2, 8)
    share_BTH = torch.sigmoid(query.divisor(x_BTC))

    torch.testing.assert_close(query(x_BTC), (plain_BTHD / (2 * share_BTH[..., None])).flatten(2))
    assert (share_BTH - 0.5).abs().max() < 0.4


@pytest.mark.parametrize("log_divisor", [-2.0, 2.0])
def test_foc1_1_folds_with_a_large_or_small_divisor(log_divisor):
    model = tiny("foc1_1").eval()
    for block in model.blocks:
        nn.init.constant_(block.attention.query.log_divisor, log_divisor)
    baseline = tiny("gpt2ish", seed=9).eval()
    baseline.load_state_dict(folded(model).state_dict())
    tokens_BT = random_tokens(B=3, T=16)

    assert moved(baseline(tokens_BT), model(tokens_BT)) < 1e-5


def test_only_foc1_1_folds():
    assert num_parameters(folded(on_meta("foc1_1"))) == num_parameters(on_meta("gpt2ish"))
    assert num_parameters(folded(on_meta("foc1_0"))) == COUNTS["foc1_0"]


def test_config_refuses_nonsense_and_says_the_value():
    with pytest.raises(ValueError, match=re.escape("focus='full'")):
        experiment("focus").module.Config(vocab_size=61, focus="full")
