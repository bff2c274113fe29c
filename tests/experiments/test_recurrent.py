"""The recurrent reference: one token at a time is the baseline, in answers and in gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lmplay.catalog.entry import read_file
from lmplay.model.experiment import Experiment, load_experiment
from lmplay.model.objective import Objective

FOLDER = Path(__file__).parent.parent.parent / "experiments"

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "recurrent": 120_560_209,
    "rgpt2ish": 120_560_209,
    "rtest_runner": 6_848_721,
}


def experiment(name: str) -> Experiment:
    entries = [e for file in ("gpt2ish", "recurrent") for e in read_file(FOLDER / f"{file}.py")]
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


def moved(changed: Tensor, answer: Tensor) -> float:
    """The largest difference, against the largest answer."""
    return ((changed - answer).abs().max() / answer.abs().max()).item()


@pytest.mark.parametrize("name", COUNTS)
def test_the_parameter_count_is_the_catalogues(name):
    assert num_parameters(on_meta(name)) == COUNTS[name]


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
