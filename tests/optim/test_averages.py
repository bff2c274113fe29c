"""Averages of weights against their formulas; what is constant, and what training sees of them."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, sampled_from
from torch import nn
from torch.testing import assert_close

from lmplay.optim import averages as tested
from lmplay.optim.averages import WeightAverages
from lmplay.plan import Averages

ALL = Averages(ema=0.1, lawa=0.25, tail_ema=0.05)
NAMES = ["ema", "lawa", "tail_ema"]


def model(fill=None):
    made = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4)).double()
    if fill is not None:
        move(made, fill)
    return made


@torch.no_grad()
def move(made, to):
    """Every weight becomes this number, so that an average is one number."""
    for weight in made.parameters():
        weight.fill_(to)


def along(path, wanted=ALL, made=None, before=lambda step, averages: None):
    """The averages after a path of numbers, a step each; `before` is told of every step."""
    made = model() if made is None else made
    averages = WeightAverages(wanted, made)
    for step, place in enumerate(path):
        before(step, averages)
        move(made, place)
        averages.take((step + 1) / len(path))
    return averages


def number(averages, name):
    return averages.read(name)["1.bias"][0].item()


@given(sampled_from(NAMES), integers(1, 50), floats(0.01, 0.3), floats(-3, 3))
def test_the_average_of_what_does_not_change_is_that_to_the_bit(name, num_steps, span, place):
    averages = along([place] * num_steps, Averages(**{name: span}))

    for key, value in averages.read(name).items():
        assert torch.equal(value, torch.full_like(value, place)), key


def test_before_a_step_and_after_the_first_averages_are_the_weights():
    made = model(2.0)
    averages = WeightAverages(ALL, made)
    assert [number(averages, name) for name in NAMES] == [2.0] * 3

    move(made, 3.0)
    averages.take(0.001)

    assert [number(averages, name) for name in NAMES] == [3.0] * 3


def test_ema_is_the_mean_so_far_and_then_halves_as_its_span_says():
    path = torch.rand(200).double().tolist()
    expected = 0.0
    for step, place in enumerate(path, start=1):
        expected += (place - expected) / min(step, 20)

    assert number(along(path), "ema") == pytest.approx(expected, rel=1e-9)
    assert number(along(path[:15] + [0.0] * 185), "ema") < 1e-3


def test_ema_counts_tokens_not_steps():
    """A batch of twice the size counts as two steps at its weights."""
    averages = WeightAverages(Averages(ema=0.5), made := model())
    for place, after in ((1.0, 0.4), (0.0, 0.6)):
        move(made, place)
        averages.take(after)

    assert number(averages, "ema") == pytest.approx(1 - 0.2 / 0.5)


def test_lawa_is_the_mean_of_snapshots_at_even_distances_from_the_end():
    path = [float(step) for step in range(100)]

    assert number(along(path), "lawa") == pytest.approx(sum([99, 94, 89, 84, 79]) / 5)


def test_lawa_of_one_snapshot_is_the_weights_at_the_end(monkeypatch):
    monkeypatch.setattr(tested, "SNAPSHOTS", 1)

    assert number(along([1.0, 2.0, 7.0]), "lawa") == 7.0


def test_the_tail_begins_half_a_span_behind_on_a_straight_path(monkeypatch):
    monkeypatch.setattr(tested, "BLEND", 1.0)
    monkeypatch.setattr(tested, "_with_lengths", lambda changed, _: changed)
    span = 40  # steps of 1000, so it begins after 880
    lags = {}

    def look(step, averages):
        lags[step] = step - 1 - number(averages, "tail_ema")

    along([float(step) for step in range(1000)], Averages(tail_ema=span / 1000), before=look)

    assert lags[880] == 0 and lags[881] == pytest.approx(span / 2)
    expected = span / 2
    for step in range(882, 1000):
        expected = (expected + 1) * (1 - 1 / span)
        assert lags[step] == pytest.approx(expected)


def test_a_tail_of_one_step_is_the_weights(monkeypatch):
    monkeypatch.setattr(tested, "BLEND", 1.0)
    averages = along([1.0, 5.0, 2.0, 8.0, 4.0] * 20, Averages(tail_ema=0.01))

    assert number(averages, "tail_ema") == 4.0


def test_rows_of_the_tail_have_the_lengths_of_the_weights_and_tables_are_left():
    made = model()
    averages = WeightAverages(Averages(tail_ema=0.1), made, tables={"0.weight"})
    for step in range(60):
        with torch.no_grad():
            for weight in made.parameters():
                weight += torch.randn_like(weight)
        averages.take((step + 1) / 60)
    read = averages.read("tail_ema")

    assert set(read) == {"1.weight", "1.bias"}
    assert not torch.allclose(read["1.weight"], made[1].weight)
    assert_close(read["1.weight"].norm(dim=1), made[1].weight.norm(dim=1))
    assert not torch.allclose(read["1.bias"], made[1].bias)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_it_while_it_is_applied_and_then_its_own_to_the_bit(name):
    made = model()
    averages = along(torch.randn(40).tolist(), made=made)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), averages.applied(name):
        assert not torch.equal(made[1].bias, before["1.bias"])
        average = made[1].bias.detach().clone()
        raise KeyboardInterrupt

    assert torch.equal(averages.read(name)["1.bias"], average)
    for key, value in made.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("at", [0, 1, 20, 33, 34, 35, 39])
def test_it_goes_on_from_its_state_to_the_bit(at):
    path = torch.randn(40).tolist()
    made = model()

    def interrupt(step, averages):
        if step == at:
            state = {key: value.clone() for key, value in averages.state_dict().items()}
            averages.__init__(ALL, made)
            averages.load_state_dict(state, step / 40)

    cut, whole = along(path, made=made, before=interrupt), along(path)

    for name in NAMES:
        for key, value in whole.read(name).items():
            assert torch.equal(cut.read(name)[key], value)


def test_a_frozen_parameter_has_no_average():
    made = model()
    made[0].weight.requires_grad_(False)

    assert "0.weight" not in WeightAverages(ALL, made).read("ema")
