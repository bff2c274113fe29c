"""Curves are subtracted where both were recorded, and smoothed without moving."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lmplay.stats.curve import Curve, difference, smooth

FINITE = st.floats(-1e3, 1e3).map(lambda value: round(value, 6))


@st.composite
def curves(draw, values=FINITE, min_size=1):
    x = sorted(draw(st.sets(st.integers(0, 10_000), min_size=min_size, max_size=40)))
    y = draw(st.lists(values, min_size=len(x), max_size=len(x)))
    return Curve(np.array(x, np.float64), np.array(y, np.float64))


@given(ours=curves(), theirs=curves())
def test_a_difference_stays_inside_what_both_recorded(ours, theirs):
    result = difference(ours, theirs)

    assert all(result.x >= max(ours.x[0], theirs.x[0]))
    assert all(result.x <= min(ours.x[-1], theirs.x[-1]))


@given(ours=curves(), theirs=curves())
def test_a_difference_is_the_difference_of_the_lines_as_numpy_draws_them(ours, theirs):
    result = difference(ours, theirs)

    expected = np.interp(result.x, ours.x, ours.y) - np.interp(result.x, theirs.x, theirs.y)
    np.testing.assert_allclose(result.y, expected, atol=1e-8)


@given(ours=curves(), theirs=curves())
def test_a_difference_has_a_point_wherever_either_curve_has_one(ours, theirs):
    result = difference(ours, theirs)

    low, high = max(ours.x[0], theirs.x[0]), min(ours.x[-1], theirs.x[-1])
    points = {*ours.x, *theirs.x}
    assert set(result.x) == {x for x in points if low <= x <= high}


@given(ours=curves(), theirs=curves())
def test_swapping_two_curves_turns_the_sign(ours, theirs):
    one, other = difference(ours, theirs), difference(theirs, ours)

    np.testing.assert_array_equal(one.x, other.x)
    np.testing.assert_array_equal(one.y, -other.y)


@given(ours=curves())
def test_the_difference_of_a_curve_with_itself_is_zero(ours):
    assert not difference(ours, ours).y.any()


def test_curves_that_never_meet_have_no_difference():
    assert not len(
        difference(Curve(np.arange(3.0), np.ones(3)), Curve(np.arange(5.0, 8), np.ones(3))).x
    )


def test_a_gap_is_not_crossed_but_its_edges_count():
    ours = Curve(np.array([0.0, 2, 4, 6, 8]), np.array([1.0, 1, np.nan, 1, 1]))
    theirs = Curve(np.arange(9.0), np.zeros(9))

    result = difference(ours, theirs)

    np.testing.assert_array_equal(np.isnan(result.y), [0, 0, 0, 1, 1, 1, 0, 0, 0])


@given(shape=curves(), value=FINITE, half_life=st.floats(0.01, 1e5))
def test_smoothing_leaves_a_constant_alone(shape, value, half_life):
    constant = Curve(shape.x, np.full_like(shape.y, value))

    np.testing.assert_allclose(smooth(constant, half_life).y, value, rtol=1e-12)


@given(original=curves(), half_life=st.floats(0.01, 1e5))
def test_smoothing_stays_between_the_least_and_the_greatest(original, half_life):
    result = smooth(original, half_life).y

    slack = 1e-9 * (1 + abs(original.y).max())
    assert original.y.min() - slack <= result.min() and result.max() <= original.y.max() + slack


@given(original=curves(), half_life=st.floats(0.01, 1e5))
def test_smoothing_looks_the_same_from_both_sides(original, half_life):
    mirrored = Curve(-original.x[::-1], original.y[::-1])

    np.testing.assert_allclose(
        smooth(mirrored, half_life).y[::-1], smooth(original, half_life).y, atol=1e-8
    )


def test_smoothing_does_not_move_a_peak_or_a_straight_line():
    x = np.arange(201.0)
    peak, line = np.where(x == 100, 1.0, 0.0), 3 * x

    assert smooth(Curve(x, peak), 10.0).y.argmax() == 100
    assert smooth(Curve(x, line), 5.0).y[100] == pytest.approx(300)


def test_smoothing_is_the_weighted_mean_that_it_says():
    x = np.arange(1.0, 2001) * 7
    y = np.random.default_rng(0).normal(size=len(x))

    result = smooth(Curve(x, y), 20.0).y

    weights = 2.0 ** -(abs(x[:, None] - x) / 20.0)
    np.testing.assert_allclose(result, weights @ y / weights.sum(1), rtol=1e-10, atol=1e-12)


@given(original=curves(min_size=4), half_life=st.floats(1, 1e5), data=st.data())
def test_smoothing_never_looks_across_a_gap(original, half_life, data):
    gap = data.draw(st.integers(1, len(original.x) - 2))
    before = original.y.copy()
    before[gap] = np.nan
    after = before.copy()
    after[gap + 1 :] += 100

    result = [smooth(Curve(original.x, y), half_life).y for y in (before, after)]

    np.testing.assert_array_equal(result[0][:gap], result[1][:gap])
    assert np.isnan(result[0][gap])


@given(original=curves())
def test_no_half_life_is_no_smoothing(original):
    assert smooth(original, 0.0) is original


@given(original=curves(), half_life=st.floats(1, 100))
def test_smoothing_on_an_even_axis_commutes_with_scaling_both(original, half_life):
    assume(len(original.x) > 1)
    scaled = Curve(original.x * 8, original.y)

    np.testing.assert_allclose(
        smooth(scaled, half_life * 8).y, smooth(original, half_life).y, atol=1e-9
    )
