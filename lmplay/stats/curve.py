"""Values over an axis: differences where both were recorded, and smoothing that moves nothing."""

from dataclasses import dataclass

import numpy as np

_FORGOTTEN = 60  # half-lives after which a weight is lost in float64
_EXPONENTS = 500  # half-lives that one block of `smooth` spans: 2**500 is far from overflow


@dataclass(frozen=True)
class Curve:
    """Values over a strictly rising axis, both float64; NaN is a gap that no line crosses."""

    x: np.ndarray
    y: np.ndarray

    @property
    def empty(self) -> bool:
        """True where there is nothing to draw."""
        return not np.isfinite(self.y).any()


NO_CURVE = Curve(np.empty(0), np.empty(0))


def difference(curve: Curve, baseline: Curve) -> Curve:
    """`curve` minus `baseline` where both were recorded, never beyond.

    Between two points a curve is the straight line that joins them, so the difference has a point
    wherever either curve has one. A gap of either is a gap.
    """
    if np.array_equal(curve.x, baseline.x):
        return Curve(curve.x, curve.y - baseline.y)
    if not len(curve.x) or not len(baseline.x):
        return NO_CURVE
    low = max(curve.x[0], baseline.x[0])
    high = min(curve.x[-1], baseline.x[-1])
    x = np.union1d(curve.x, baseline.x)
    x = x[(low <= x) & (x <= high)]
    return Curve(x, _interpolate(curve, x) - _interpolate(baseline, x))


def smooth(curve: Curve, half_life: float) -> Curve:
    """The mean of each point's neighbours on both sides, weights halving every `half_life` of x.

    Two-sided, so nothing moves along the axis; divided by the sum of the weights that are there,
    so a constant stays itself up to both ends. Each point counts for the stretch of axis that it
    stands for, and nothing is averaged over a gap. At an end all neighbours are on one side, so
    a curve that stops while it is steep is shown flatter there than it is.

    Args:
        half_life: in units of x; 0 leaves the curve as it is.
    """
    if half_life <= 0 or curve.empty:
        return curve
    y = curve.y.copy()
    for start, stop in _stretches(np.isfinite(y)):
        y[start:stop] = _mean_of_neighbours(curve.x[start:stop] / half_life, y[start:stop])
    return Curve(curve.x, y)


def _interpolate(curve: Curve, x: np.ndarray) -> np.ndarray:
    """The curve at `x`, which lies within it; NaN between two points of which one is NaN."""
    right = np.searchsorted(curve.x, x).clip(max=len(curve.x) - 1)
    hit = curve.x[right] == x
    left = np.where(hit, right, right - 1)
    width = np.where(hit, 1.0, curve.x[right] - curve.x[left])
    share = (x - curve.x[left]) / width
    return np.where(hit, curve.y[right], (1 - share) * curve.y[left] + share * curve.y[right])


def _stretches(whole: np.ndarray) -> list[tuple[int, int]]:
    """Where the runs of True start and stop."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], whole, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _mean_of_neighbours(u: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Over all j, the mean of y[j] with weight share[j] * 2**-|u[j] - u[i]|.

    A point's share is the stretch of axis that it stands for, so crowded points do not pull the
    mean to their side; on an even axis every share is the same.
    """
    if len(u) == 1 or np.diff(u).min() > _FORGOTTEN:
        return y
    steps = np.diff(u)
    share = (np.append(steps[0], steps) + np.append(steps, steps[-1])) / 2
    middle = y.mean()  # small numbers round less
    values = np.stack([share, share * (y - middle)])
    before = _decaying_sums(u, values)
    after = _decaying_sums(-u[::-1], values[:, ::-1])[:, ::-1]
    weight, total = before + after - values  # the point itself is in both
    return middle + total / weight


def _decaying_sums(u: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each i the sum over j <= i of values[:, j] * 2**(u[j] - u[i]); u rises strictly.

    Done by a running sum of values * 2**u, a block of axis at a time, so that no power overflows.
    """
    sums = np.empty_like(values)
    start, carried = 0, np.zeros(len(values))
    while start < len(u):
        stop = int(np.searchsorted(u, u[start] + _EXPONENTS, side="right"))
        growth = np.exp2(u[start:stop] - u[start])
        block = values[:, start:stop] * growth
        block[:, 0] += carried
        sums[:, start:stop] = np.cumsum(block, axis=1) / growth
        if stop < len(u):
            carried = sums[:, stop - 1] * np.exp2(u[stop - 1] - u[stop])
        start = stop
    return sums
