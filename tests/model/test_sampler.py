import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, lists, sampled_from

from lmplay.errors import UserError
from lmplay.model.sampler import GREEDY, Sampler, penalise

INF = float("inf")


def draws(sampler, logits, num_draws=20_000):
    """How often each token is drawn."""
    logits_1TV = torch.tensor(logits).expand(1, num_draws, -1)
    return torch.bincount(sampler(logits_1TV, [0]).flatten(), minlength=len(logits)) / num_draws


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    logits = [1.0, -2.0, 0.5, 3.0, -INF, 2.0]
    expected_V = (torch.tensor(logits) / temperature).softmax(-1)

    drawn_V = draws(Sampler(0, temperature), logits)

    torch.testing.assert_close(drawn_V, expected_V, atol=0.015, rtol=0)
    assert drawn_V[4] == 0


some_logits = lists(floats(-8, 8, width=32), min_size=1, max_size=40, unique=True)


@given(logits=some_logits, top_p=floats(0.01, 1), seed=integers(0, 99))
def test_top_p_draws_from_the_smallest_set_that_holds_the_mass(logits, top_p, seed):
    drawn = draws(Sampler(seed, top_p=top_p), logits, 200).nonzero().flatten().tolist()

    p_V = torch.tensor(logits).double().softmax(-1)
    for token in drawn:
        assert p_V[p_V > p_V[token] + 1e-6].sum() < top_p + 1e-6


@pytest.mark.parametrize("slope", [0.0, 0.001, 0.01], ids=str)
def test_top_p_holds_in_a_large_vocabulary(slope):
    logits = [-slope * token for token in range(5000)]
    drawn = draws(Sampler(0, top_p=0.8), logits, 500).nonzero().flatten()
    mass_V = torch.tensor(logits).double().softmax(-1).cumsum(-1)

    assert drawn.numel() > 100
    if slope:  # else every set of 4000 tokens will do
        assert 0.75 < mass_V[drawn[-1]] < 0.801


def test_top_p_keeps_the_shares_of_what_it_keeps():
    drawn_V = draws(Sampler(0, top_p=0.75), [0.5, 0.3, 0.15, 0.05])
    expected_V = torch.tensor([0.5, 0.3, 0.15]).softmax(-1)  # 0.31, 0.26, 0.22, of 0.2 for the last

    torch.testing.assert_close(drawn_V[:3], expected_V, atol=0.015, rtol=0)
    assert drawn_V[3] == 0


@given(logits=some_logits, top_k=integers(1, 50), seed=integers(0, 99))
def test_top_k_draws_from_the_likeliest(logits, top_k, seed):
    drawn = draws(Sampler(seed, top_k=top_k), logits, 200).nonzero().flatten().tolist()

    best = sorted(logits, reverse=True)[:top_k]
    assert {logits[token] for token in drawn} <= set(best)


def test_top_p_counts_the_mass_that_top_k_left():
    drawn_V = draws(Sampler(0, top_k=2, top_p=0.5), [2.0, 1.9, 1.8, 1.7])

    assert drawn_V.tolist() == [1, 0, 0, 0]


@given(logits=some_logits, choice=sampled_from([{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}]))
def test_zero_temperature_one_candidate_or_no_mass_is_greedy(logits, choice):
    best = max(range(len(logits)), key=logits.__getitem__)

    assert Sampler(0, **choice)(torch.tensor([logits]), [0]).tolist() == [best]


@given(num_tokens=integers(1, 300), levels=integers(1, 300), seed=integers(0, 9))
def test_greedy_takes_the_first_of_the_likeliest(num_tokens, levels, seed):
    draw = torch.Generator().manual_seed(seed)
    logits_BTV = torch.randint(levels, (2, 3, num_tokens), generator=draw).float()

    assert torch.equal(GREEDY(logits_BTV, [0, 1]), logits_BTV.argmax(-1))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": INF},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
    ],
    ids=str,
)
def test_nonsense_is_refused(bad):
    with pytest.raises(UserError):
        Sampler(0, **bad)


def test_a_penalty_divides_what_is_positive_and_multiplies_what_is_negative():
    logits_BV = torch.tensor([[2.0, 2.0, -2.0, -2.0]])
    seen_BV = torch.tensor([[True, False, True, False]])

    assert penalise(logits_BV, seen_BV, 2.0).tolist() == [[1.0, 2.0, -4.0, -2.0]]
