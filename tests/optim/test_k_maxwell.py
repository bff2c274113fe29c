"""K-Maxwell: what its mixture remembers, when it begins, and that nothing jumps."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.k_maxwell import KMaxwell, shares, spaced_ages
from lmplay.optim.muon import Muon

F64 = torch.float64
STEPS = 12


def path_of(kind=KMaxwell, num_steps=STEPS, **options):
    """A weight after each step."""
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6, generator=draw, dtype=F64))
    optimizer = kind([weight], lr=0.02, **options)
    path = []
    for step in range(num_steps):
        weight.grad = torch.randn(4, 6, generator=draw, dtype=F64)
        optimizer.param_groups[0]["progress"] = step / num_steps
        optimizer.step()
        path.append(weight.detach().clone())
    return path, optimizer.state[weight]


def test_the_published_weights():
    ages = spaced_ages(6, 3, 64)

    assert ages[0] == pytest.approx(3) and ages[-1] == 64
    old = [0.0210, 0.0420, 0.0630, 0.0840, 0.1050, 0.6849]
    young = [0.0630, 0.1260, 0.1890, 0.2520, 0.3151, 0.0548]
    assert shares(50, ages) == pytest.approx(old, abs=6e-5)
    assert shares(22, ages) == pytest.approx(young, abs=6e-5)


@pytest.mark.parametrize("age", [20.0, 35.0, 64.0])
def test_a_mixture_has_the_age_that_was_asked_for(age):
    ages = spaced_ages(6, 3, 64)
    weights = shares(age, ages)
    past = torch.arange(5000, dtype=F64)
    response = sum(
        share / (own + 1) * (own / (own + 1)) ** past
        for share, own in zip(weights, ages, strict=True)
    )

    assert sum(weights) == pytest.approx(1)
    assert (response * past).sum().item() == pytest.approx(age, rel=1e-6)


def test_one_buffer_is_muon_bit_for_bit():
    own, _ = path_of(buffers=1, longest=19.0, ages=(19.0, 19.0), begin=0.3)

    assert_close(own, path_of(Muon)[0], rtol=0, atol=0)


def test_until_it_begins_and_in_that_very_step_it_is_muon_bit_for_bit():
    own, state = path_of(begin=0.5)
    muon, _ = path_of(Muon)

    assert_close(own[:7], muon[:7], rtol=0, atol=0)
    assert not torch.equal(own[7], muon[7])
    assert state["momenta"].shape == (6, 4, 6) and set(state) == {"momenta"}


def test_a_mixture_is_that_of_averages_written_out():
    path, _ = path_of(begin=0.0, ages=(40.0, 25.0))
    ages = spaced_ages(6, 3, 64)
    draw = torch.Generator().manual_seed(0)
    reference = nn.Parameter(torch.randn(4, 6, generator=draw, dtype=F64))
    muon = Muon([reference], lr=0.02, momentum=0.0, nesterov=False)
    for step in range(STEPS):
        g = torch.randn(4, 6, generator=draw, dtype=F64)
        if step == 0:
            momenta = [0.05 * g for _ in ages]
            mean = momenta[0]
        else:
            factors = [age / (age + 1) for age in ages]
            momenta = [b * m + (1 - b) * g for b, m in zip(factors, momenta, strict=True)]
            done = step / STEPS
            both = zip(shares(40, ages), shares(25, ages), momenta, strict=True)
            mean = sum(((1 - done) * a + done * b) * m for a, b, m in both)
        reference.grad = 0.05 * g + 0.95 * mean
        muon.step()
        assert_close(path[step], reference.detach())


@pytest.mark.parametrize("wrong", [{"ages": (70, 22)}, {"ages": (50, 10)}, {"buffers": 0},
                                   {"begin": 1.0}])  # fmt: skip
def test_what_no_mixture_has_is_refused(wrong):
    with pytest.raises(ValueError):
        path_of(**wrong)
