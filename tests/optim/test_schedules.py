"""The shapes of schedules, and what they do where steps are of several sizes."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, lists, sampled_from

from lmplay.optim.joint import make_optimizer
from lmplay.optim.schedules import decay_left, factor
from lmplay.plan import Optimizer, Schedule

NAMES = ["constant", "linear", "cosine", "wsd", "one_cycle", "inverse_sqrt"]


def factors(schedule, sizes=(1,) * 100):
    """The factor of every step, where a step has these tokens."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    spans = zip([0, *ends], ends, strict=False)
    return [factor(schedule, before, after, ends[-1]) for before, after in spans]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "one_cycle"])
def test_warm_up_rises_evenly_to_the_full_rate(name):
    values = factors(Schedule(name=name, warmup=0.1))

    assert values[:10] == pytest.approx([0.1 * step for step in range(1, 11)])


def test_constant_stays():
    assert factors(Schedule()) == [1.0] * 100


@pytest.mark.parametrize("name", ["linear", "cosine", "one_cycle"])
def test_decay_falls_from_the_full_rate_towards_the_final_one(name):
    values = factors(Schedule(name=name, final=0.1))

    assert values[0] == pytest.approx(1.0)
    assert values == sorted(values, reverse=True)
    assert 0.1 < values[-1] < 0.12


def test_wsd_stays_and_falls_over_its_last_share():
    values = factors(Schedule(name="wsd", warmup=0.05, decay=0.2))

    assert set(values[5:81]) == {1.0}
    assert values[81:] == pytest.approx([left / 20 for left in range(19, 0, -1)])


def test_one_minus_the_root_falls_fast_at_first_and_has_a_third_of_the_area():
    schedule = Schedule(name="wsd", decay=0.3, cooldown="1-sqrt", final=0.1)
    values = factors(schedule, (1,) * 10_000)

    assert set(values[:7001]) == {1.0} and values[-1] == pytest.approx(0.1, abs=1e-3)
    assert values[7750] == pytest.approx(0.1 + 0.9 * (1 - 0.25**0.5), abs=1e-3)
    assert sum(value - 0.1 for value in values[7000:]) / 3000 == pytest.approx(0.3, abs=1e-3)


def test_one_cycle_rises_and_falls_by_half_waves():
    values = factors(Schedule(name="one_cycle", warmup=0.3), (1,) * 1000)

    assert values[0] == pytest.approx(0.04, abs=1e-3) and values[299] == 1.0
    assert values[149] == pytest.approx(0.52, abs=1e-6)
    assert values[649] == pytest.approx(0.5, abs=3e-3) and values[-1] < 1e-4


def test_inverse_root_halves_at_four_times_the_warm_up():
    values = factors(Schedule(name="inverse_sqrt", warmup=0.1), (1,) * 1000)

    assert values[399] == pytest.approx(0.5) and values[899] == pytest.approx(1 / 3)


@given(sampled_from(NAMES), floats(0, 0.5), floats(0, 0.5), integers(1, 10**9), integers(1, 500))
def test_it_is_the_same_however_many_tokens_a_step_has(name, warmup, decay, size, num_steps):
    schedule = Schedule(name=name, warmup=warmup, decay=decay)

    assert factors(schedule, [size] * num_steps) == factors(schedule, [1] * num_steps)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_grows_does_not_bend_it(name):
    schedule = Schedule(name=name, warmup=0.1, decay=0.3, final=0.1)
    even, grown = factors(schedule, [2] * 1000), factors(schedule, [1] * 1000 + [4] * 250)

    assert grown[1::2][:500] == pytest.approx(even[:500], abs=0.005)
    assert grown[1000:] == pytest.approx(even[500::2], abs=0.005)


@given(sampled_from(NAMES), lists(integers(1, 64), min_size=1, max_size=60), floats(0, 0.5))
def test_every_step_trains_and_none_above_the_full_rate(name, sizes, warmup):
    values = factors(Schedule(name=name, warmup=warmup, decay=0.4), sizes)

    assert all(0 < value <= 1 and math.isfinite(value) for value in values)


FORMULAS = {  # of the share x of a run without warm-up
    "constant": (Schedule(), lambda x: 1.0),
    "linear to zero": (Schedule(name="linear"), lambda x: 1 - x),
    "cosine": (
        Schedule(name="cosine", final=0.1),
        lambda x: 0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2,
    ),
    "trapezoid": (Schedule(name="wsd", decay=0.4), lambda x: min(1.0, (1 - x) / 0.4)),
    "1-sqrt": (
        Schedule(name="wsd", decay=0.4, cooldown="1-sqrt"),
        lambda x: 1 - math.sqrt(max(0.0, x - 0.6) / 0.4),
    ),
    "one cycle": (
        Schedule(name="one_cycle"), lambda x: (1 + math.cos(math.pi * x)) / 2,
    ),
    "inverse root": (
        Schedule(name="inverse_sqrt", warmup=0.01), lambda x: min(x / 0.01, math.sqrt(0.01 / x)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_it_is_its_formula_of_the_share_of_the_run(name):
    schedule, formula = FORMULAS[name]
    values = factors(schedule, (1,) * 2000)

    expected = [formula((step + 0.5) / 2000) for step in range(2000)]
    assert values == pytest.approx(
        expected, abs=0.03 if name in ("1-sqrt", "inverse root") else 2e-3
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_phase_begins_with_a_jump(name):
    """But for 1-sqrt, which falls at once by the root of a step, no step changes by much."""
    values = factors(Schedule(name=name, warmup=0.1, decay=0.3, final=0.1), (1,) * 1000)

    assert max(abs(a - b) for a, b in pairwise(values)) < 0.02


def test_decay_falls_by_its_own_schedule_from_all_of_it_to_nothing():
    for name, half in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        assert decay_left(name, 0.0) == 1.0 and decay_left(name, 0.5) == pytest.approx(half)
    assert decay_left("linear", 1.0) == decay_left("cosine", 1.0) == 0.0
    assert decay_left("cosine", 0.25) == pytest.approx((1 + 0.5**0.5) / 2)


@pytest.mark.parametrize("options", [{}, {"decay": "independent"}])
def test_the_decay_of_every_group_follows_it_and_the_rate_does_not(options):
    model = torch.nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.fill_(1.0)
    wanted = Optimizer(
        name="AdamW", lr=0.5, weight_decay=0.1, decay_schedule="linear", options=options
    )
    made = make_optimizer(wanted, model, {"weight": "matrix", "bias": "vector"})
    by, lengths = (1.0 if options else 0.5) * 0.1, []
    for progress in (0.0, 0.5, 0.9):
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        made.set_factor(1.0)
        made.set_progress(progress)
        made.step()
        lengths.append(model.weight[0, 0].item())

    assert lengths == pytest.approx([1 - by, (1 - by) * (1 - by / 2),
                                     (1 - by) * (1 - by / 2) * (1 - by / 10)])  # fmt: skip
    assert {group["lr"] for group in made.param_groups} == {0.5}
