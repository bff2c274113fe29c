import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from lmplay.stats.verdict import (
    crossing,
    holm,
    holm_levels,
    mean_interval,
    paired,
    power,
    seeds_needed,
)

FINITE = st.integers(-100_000, 100_000).map(lambda value: value / 10_000)
SAMPLES = st.lists(FINITE, min_size=2, max_size=8).map(np.array)
P = st.integers(0, 1_000).map(lambda value: value / 1_000)
PS = st.lists(P | st.just(np.nan), max_size=8).map(np.array)


@given(ours=SAMPLES, data=st.data())
def test_a_paired_test_is_that_of_scipy(ours, data):
    theirs = np.array(data.draw(st.lists(FINITE, min_size=len(ours), max_size=len(ours))))
    differences = ours - theirs
    assume(np.std(differences) > 1e-6)

    result = paired(differences)

    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert result.p == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-300)
    assert result.mean == pytest.approx(differences.mean())
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))


@given(differences=SAMPLES)
def test_p_is_below_5_percent_just_where_the_interval_leaves_out_0(differences):
    result = paired(differences)
    assume(abs(result.p - 0.05) > 1e-9)

    assert (result.p < 0.05) == (not result.low <= 0 <= result.high)


@given(differences=SAMPLES)
def test_turning_the_sign_turns_the_interval_and_leaves_p(differences):
    one, other = paired(differences), paired(-differences)

    assert one.p == other.p
    assert (one.low, one.mean, one.high) == (-other.high, -other.mean, -other.low)


def test_differences_that_are_all_zero_say_nothing():
    result = paired(np.zeros(5))

    assert (result.mean, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_one_difference_repeated_exactly_leaves_no_doubt():
    result = paired(np.full(4, -0.5))

    assert (result.mean, result.low, result.high, result.p) == (-0.5, -0.5, -0.5, 0)


@given(values=SAMPLES)
def test_an_interval_holds_its_mean_and_is_that_of_scipy(values):
    mean, low, high = mean_interval(values)

    assert low <= mean <= high
    error = stats.sem(values)
    assume(error > 1e-6)
    expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
    assert (low, high) == pytest.approx(expected)


def test_intervals_of_many_columns_are_those_of_each():
    values = np.random.default_rng(0).normal(size=(5, 7))

    together = np.array(mean_interval(values))
    apart = np.array([mean_interval(column) for column in values.T]).T
    np.testing.assert_allclose(together, apart, rtol=1e-12)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_95_of_100_intervals_hold_the_true_mean(num_seeds):
    samples = np.random.default_rng(0).normal(0.3, 2.0, size=(num_seeds, 20_000))

    _, low, high = mean_interval(samples)

    share = np.mean((low <= 0.3) & (high >= 0.3))
    assert abs(share - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 20_000)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_equal_arms_are_told_apart_in_5_of_100_cases(num_seeds):
    samples = np.random.default_rng(1).normal(size=(2_000, num_seeds))

    share = np.mean([paired(sample).p < 0.05 for sample in samples])

    assert abs(share - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 2_000)


@given(p=PS)
def test_holm_never_makes_p_smaller_nor_more_than_1_and_keeps_its_order(p):
    adjusted = holm(p)

    tested = ~np.isnan(p)
    assert np.array_equal(np.isnan(adjusted), ~tested)
    assert np.all((p[tested] <= adjusted[tested]) & (adjusted[tested] <= 1))
    order = np.argsort(p[tested])
    assert np.all(np.diff(adjusted[tested][order]) >= 0)


@given(p=PS, seed=st.integers(0, 2**32 - 1))
def test_holm_does_not_depend_on_the_order(p, seed):
    shuffled = np.random.default_rng(seed).permutation(len(p))

    np.testing.assert_array_equal(holm(p[shuffled]), holm(p)[shuffled])


@given(p=PS)
def test_holm_rejects_step_by_step_as_long_as_each_p_is_below_its_level(p):
    levels, adjusted = holm_levels(p), holm(p)
    assume(not np.any(np.isclose(p, levels, rtol=1e-9)))

    rejecting = True
    for i in np.argsort(p)[: np.sum(~np.isnan(p))]:
        rejecting = rejecting and p[i] < levels[i]
        assert (adjusted[i] < 0.05) == rejecting


def test_holm_gives_the_numbers_of_a_worked_example():
    np.testing.assert_allclose(
        holm(np.array([0.01, 0.04, np.nan, 0.03, 0.005])), [0.03, 0.06, np.nan, 0.06, 0.02]
    )


def test_a_single_test_is_not_corrected():
    assert holm(np.array([0.04])) == [0.04] and holm_levels(np.array([0.04])) == [0.05]


@pytest.mark.parametrize("effect, pairs", [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_the_seeds_for_80_percent_are_those_of_printed_tables(effect, pairs):
    assert seeds_needed(effect, 0.05) == pairs


@pytest.mark.parametrize("alpha", [0.05, 0.0125, 0.001])
@pytest.mark.parametrize("n", [2, 3, 5, 34, 200])
@pytest.mark.parametrize("effect", [0.0, 0.3, 1.0, 3.0])
def test_power_is_the_integral_over_the_spread_that_a_sample_can_have(effect, n, alpha):
    df, shift = n - 1, effect * np.sqrt(n)
    edge = special.stdtrit(df, 1 - alpha / 2)

    def found(spread):  # given the sample's spread over the true one
        tails = special.ndtr(shift - edge * spread) + special.ndtr(-shift - edge * spread)
        return tails * stats.chi.pdf(spread * np.sqrt(df), df) * np.sqrt(df)

    breaks = sorted({0.0, shift / edge / 2, shift / edge, 0.5, 1.0, 1.5, 2.0, 8.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [integrate.quad(found, *ends, limit=200)[0] for ends in pairwise(breaks)]
    assert power(effect, n, alpha) == pytest.approx(sum(parts), abs=1e-6)


def test_power_is_how_often_a_simulated_experiment_finds_the_effect():
    samples = np.random.default_rng(2).normal(1.0, 1.0, size=(3_000, 5))

    share = np.mean([paired(sample).p < 0.05 for sample in samples])

    expected = power(1.0, 5, 0.05)
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 3_000)


@given(
    effect=st.floats(0, 1e9), n=st.integers(2, 10_000), alpha=st.floats(1e-4, 0.05)
)  # scipy's noncentral t is NaN in places
def test_power_is_a_chance_no_less_than_the_level(effect, n, alpha):
    assert alpha * (1 - 1e-6) <= power(effect, n, alpha) <= 1 + 1e-9


@given(effect=st.floats(0.02, 20), alpha=st.floats(1e-3, 0.05))
def test_one_seed_less_than_needed_has_too_little_power(effect, alpha):
    needed = seeds_needed(effect, alpha)

    if needed is None:
        assert power(effect, 10_000, alpha) < 0.8
    else:
        assert power(effect, needed, alpha) >= 0.8
        assert needed == 2 or power(effect, needed - 1, alpha) < 0.8


def test_no_number_of_seeds_shows_what_is_not_there():
    assert seeds_needed(0.0, 0.05) is None
    assert seeds_needed(0.5, 0.05, most=33) is None


def test_a_crossing_lies_on_the_line_between_two_points():
    x, y = np.array([0.0, 10, 20, 30]), np.array([5.0, 4, 2, 1])

    assert crossing(x, y, 3.0) == 15
    assert crossing(x, y, 4.0) == 10
    assert crossing(x, y, 1.0) == 30
    assert crossing(x, y, 6.0) == 0
    assert crossing(x, y, 0.9) is None


def test_only_the_first_crossing_counts():
    assert crossing(np.arange(5.0), np.array([4.0, 2, 4, 2, 0]), 3.0) == 0.5


def test_no_line_crosses_a_gap():
    x = np.arange(4.0)

    assert crossing(x, np.array([4.0, np.nan, 2, 1]), 3.0) == 2
    assert crossing(x, np.array([4.0, np.inf, 2, 1]), 3.0) == 2
    assert crossing(x, np.array([4.0, np.nan, np.nan, np.nan]), 3.0) is None


@given(
    y=st.lists(FINITE, min_size=1, max_size=12).map(np.array),
    level=FINITE,
)
def test_before_a_crossing_the_line_is_above_the_level_and_there_it_is_not(y, level):
    x = np.arange(len(y)) * 3.0

    at = crossing(x, y, level)

    if at is None:
        assert np.all(y > level)
    else:
        assert np.interp(at, x, y) <= level + 1e-9
        before = np.arange(0, at, at / 50 or 1)
        assert np.all(np.interp(before, x, y) > level - 1e-9)
