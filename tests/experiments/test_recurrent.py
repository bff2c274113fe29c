"""The recurrent reference: one token at a time is the baseline, in answers and in gradients."""

import torch
from models import experiment, moved, random_tokens, tiny
from torch import Tensor, nn

from lmplay.model.objective import Objective

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "recurrent": 120_560_209,
    "rgpt2ish": 120_560_209,
    "rtest_runner": 6_848_721,
}


def pair() -> tuple[nn.Module, nn.Module]:
    return tiny("rgpt2ish", seed=3), tiny("gpt2ish", seed=3)


def gradients(model: nn.Module, tokens_BT: Tensor) -> dict[str, Tensor]:
    Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def test_token_by_token_answers_as_the_baseline():
    ours, baseline = pair()
    tokens_BT = random_tokens(B=3, T=16)

    assert moved(ours(tokens_BT), baseline(tokens_BT)) < 1e-5


def test_gradients_flow_through_the_state_as_through_the_baseline():
    ours, baseline = pair()
    tokens_BT = random_tokens(B=3, T=16)
    theirs = gradients(baseline.double(), tokens_BT)

    for name, grad in gradients(ours.double(), tokens_BT).items():
        torch.testing.assert_close(grad, theirs[name])


def test_a_state_carried_on_answers_as_one_pass():
    model, tokens_BT = tiny("rgpt2ish").eval(), random_tokens(B=3, T=16)
    state = experiment("recurrent").module.State()
    steps = [model.head(model.step(token_BT, state)) for token_BT in tokens_BT.split(1, dim=1)]

    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens_BT))
    assert state.length == 16


def test_no_state_outlives_its_pass():
    model, tokens_BT = tiny("rgpt2ish").eval(), random_tokens(B=3, T=16)

    assert torch.equal(model(tokens_BT), model(tokens_BT))
