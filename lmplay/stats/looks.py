"""Planned looks: what looking again costs, exactly, for the t-test."""

from functools import cache

import numpy as np
from scipy.special import stdtrit

from lmplay.run.design import Design
from lmplay.stats.verdict import ALPHA, told_effect

_GRID, _NODES = 401, 200  # of the integration: figures are right to 0.3 % of themselves
_LEVELS = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_RARE = 2.5  # sd of paired differences: hardly any idea differs by more
_TINY = 1e-6  # below it the looks count as if each were a test of its own, which is the most


def foresight(design: Design, num_ideas: int, difference_sd: float | None) -> str:
    """What a comparison can tell, in a sentence for before its first run.

    Args:
        num_ideas: beside the baseline.
        difference_sd: of the paired differences in nats, as far as runs of this plan have shown.
    """
    if not design.spends:
        return "one seed tells nothing: --seeds 5 is a look"
    looks, seeds = tuple(design.looks), design.looks[-1]
    of = "one idea kept" if design.screen else f"{num_ideas} idea{'s' * (num_ideas > 1)}"
    level = level_of(looks, ALPHA / (1 if design.screen else max(num_ideas, 1)))
    effect = told_effect(seeds, level)
    size = "" if difference_sd is None else f", here about {effect * difference_sd:.2g} nats"
    told = f"{seeds} seeds, {of}: told is a difference of {effect:.1f} sd or more{size}"
    rare = "; few are so large: try --seeds 3+8" if effect > _RARE and not design.screen else ""
    return f"{told} (sd: of the paired differences){rare}"


def level_of(looks: tuple[int, ...], alpha: float = ALPHA) -> float:
    """The level of each look at which all together err, if there is no difference, in `alpha`.

    Args:
        looks: the numbers of seeds, rising.
    """
    levels, spent = _curve(looks)
    return float(np.exp(np.interp(np.log(alpha), spent, levels)))


def spent_at(looks: tuple[int, ...], level: float) -> float:
    """The chance that any of the looks has a p value of at most `level`, if there is no difference.

    It is the p value of a look whose own is `level`: alpha at `level_of(looks, alpha)`, and right
    below it too, where Holm needs it.
    """
    if len(looks) == 1 or level <= 0:
        return level
    levels, spent = _curve(looks)
    if level < _TINY:
        return min(1.0, level * len(looks))
    return float(np.exp(np.interp(np.log(level), levels, spent)))


@cache
def _curve(looks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of rising levels, and of what they spend."""
    if len(looks) == 1:
        ends = np.log([1e-300, 1.0])
        return ends, ends
    spent = [_spent(looks, level) for level in _LEVELS]
    levels = np.log([_TINY, *_LEVELS, 1.0])
    return levels, np.log([_TINY * len(looks), *spent, 1.0])


def _spent(looks: tuple[int, ...], level: float) -> float:
    """By recursion from the last look to the first seed.

    The sum of n differences over the root of their sum of squares, u, does not depend on that sum
    of squares if the mean is 0 (Basu's theorem), so u is a Markov chain: the next one is
    u cos(a) + sin(a) with a density of a proportional to cos(a)**(n - 1), and t is the tangent of
    the angle of u / sqrt(n) times sqrt(n - 1).
    """
    angle_U = np.pi / 2 * np.sin(np.linspace(-np.pi / 2, np.pi / 2, _GRID))  # denser at its ends
    middle = (angle_U[1:] + angle_U[:-1]) / 2
    low_U, high_U = np.append(-np.pi / 2, middle), np.append(middle, np.pi / 2)
    nodes_A, weights_A = np.polynomial.legendre.leggauss(_NODES)
    a_A = nodes_A * np.pi / 2
    silent_U = np.ones(_GRID)  # the chance that no look from here on finds anything
    for n in range(looks[-1], 1, -1):
        if n in looks:
            edge = np.arctan(stdtrit(n - 1, 1 - level / 2) / np.sqrt(n - 1))
            inside_U = np.minimum(high_U, edge) - np.maximum(low_U, -edge)
            silent_U = silent_U * np.clip(inside_U / (high_U - low_U), 0, 1)
        density_A = weights_A * np.cos(a_A) ** (n - 2)
        u_U1 = np.sqrt(n - 1) * np.sin(angle_U)[:, None]
        next_UA = (u_U1 * np.cos(a_A) + np.sin(a_A)) / np.sqrt(n)
        next_UA = np.arcsin(np.clip(next_UA, -1, 1))
        silent_U = np.interp(next_UA, angle_U, silent_U) @ (density_A / density_A.sum())
    return float(1 - silent_U[-1])
