"""The statistics of a verdict: arrays in, numbers out."""

from dataclasses import dataclass

import numpy as np
from scipy.special import nctdtr, stdtr, stdtrit

ALPHA = 0.05  # the rate of false verdicts; an interval holds the other 95 %

_CERTAIN = 1e6  # standard errors: beyond them scipy gives NaN


@dataclass(frozen=True)
class Paired:
    """What a two-sided paired t-test says: the mean, its interval, the p value.

    `sd` is of the differences.
    """

    mean: float
    low: float
    high: float
    p: float
    sd: float


def mean_interval(values: np.ndarray, level: float = ALPHA) -> tuple:
    """The mean over the first axis, and the two ends of its t interval.

    Args:
        values: at least two along the first axis; NaN makes its column NaN.
        level: the share of such intervals that miss the true mean.
    """
    count = len(values)
    mean = np.mean(values, axis=0)
    half = stdtrit(count - 1, 1 - level / 2) * np.std(values, axis=0, ddof=1) / np.sqrt(count)
    return mean, mean - half, mean + half


def paired(differences: np.ndarray, level: float = ALPHA) -> Paired:
    """Test whether the mean of paired differences is 0.

    Differences that are all 0 say nothing: p is 1. If they are all the same otherwise, p is 0.

    Args:
        differences: at least two, finite; one for each pair.
        level: of the interval.
    """
    if not np.any(differences):
        return Paired(0.0, 0.0, 0.0, 1.0, 0.0)
    mean, low, high = mean_interval(differences, level)
    sd = np.std(differences, ddof=1)
    t = abs(mean) / (sd / np.sqrt(len(differences))) if sd > 0 else np.inf
    p = 2 * stdtr(len(differences) - 1, -t)
    return Paired(float(mean), float(low), float(high), float(p), float(sd))


def is_equal_within(margin: float, differences: np.ndarray, level: float = 2 * ALPHA) -> bool:
    """Whether two one-sided tests say that the mean is nearer to 0 than `margin`.

    Args:
        differences: at least two, finite.
        level: twice that of each of the tests.
    Source: Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15.
    """
    _, low, high = mean_interval(differences, level)
    return bool(-margin < low and high < margin)


def told_effect(n: int, level: float) -> float:
    """The smallest mean of n differences that a test tells from 0, in their standard deviations."""
    return float(stdtrit(n - 1, 1 - level / 2) / np.sqrt(n)) if n > 1 else np.inf


def holm(p: np.ndarray) -> np.ndarray:
    """p values of several tests, adjusted so that any false one has the rate of a single test.

    NaN stands for what was not tested: it stays and does not count.
    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    adjusted = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested])]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted


def holm_levels(p: np.ndarray) -> np.ndarray:
    """The level that `holm` holds each p value to: ALPHA over the number that are no smaller."""
    return np.array([np.nan if np.isnan(one) else ALPHA / np.sum(p >= one) for one in p])


def power(effect: float, n: int, alpha: float) -> float:
    """The chance that a two-sided paired t-test of n pairs finds a difference.

    Args:
        effect: the mean of the differences over their standard deviation, both the true ones.
        alpha: the level of the test.
    Source: Cohen 1988, Statistical Power Analysis, chapter 2; exact by the noncentral t.
    """
    df = n - 1
    shift = min(abs(effect) * np.sqrt(n), _CERTAIN)
    edge = stdtrit(df, 1 - alpha / 2)
    below = np.nan_to_num(nctdtr(df, shift, [-edge, edge]))  # NaN where it is next to nothing
    return float(1 - below[1] + below[0])


def seeds_needed(effect: float, alpha: float, power: float = 0.8, most: int = 10_000) -> int | None:
    """The smallest number of pairs with this power, or None where `most` are not enough."""
    low, high = 1, most  # low is too few
    if _power(effect, most, alpha) < power:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(effect, middle, alpha) >= power else (middle, high)
    return high


def crossing(x: np.ndarray, y: np.ndarray, level: float) -> float | None:
    """The first x at which the line through the points is at `level` or below; None if never.

    Between a gap (a y that is not finite) and the point after it there is no line: the point
    itself counts.
    """
    reached = np.flatnonzero(y <= level)
    if not len(reached):
        return None
    at = reached[0]
    if at == 0 or not np.isfinite(y[at - 1]):
        return float(x[at])
    rest = (level - y[at]) / (y[at - 1] - y[at])
    return float(x[at] - rest * (x[at] - x[at - 1]))


_power = power  # `seeds_needed` has an argument of this name
