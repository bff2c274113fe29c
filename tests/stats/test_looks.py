"""What looking again costs, against figures of two other simulations and one of our own."""

import re

import numpy as np
import pytest
from scipy.special import stdtr

from lmplay.run.design import design_of
from lmplay.stats.looks import foresight, level_of, spent_at

LOOKS = (3, 5, 8, 12)


@pytest.mark.parametrize(
    ("looks", "level"),
    [(LOOKS, 0.0156), ((3, 5, 8), 0.0197), ((5, 8, 12), 0.0211), ((4, 8, 12), 0.0202)],
)
def test_levels_are_those_that_were_simulated(looks, level):
    assert level_of(looks) == pytest.approx(level, rel=0.02)  # which is what 200,000 draws leave


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.01])
def test_one_look_spends_what_its_level_is(alpha):
    assert level_of((5,), alpha) == pytest.approx(alpha)
    assert spent_at((5,), alpha) == alpha


def test_looking_unplanned_raises_false_verdicts_as_was_simulated():
    assert spent_at((3, 5), 0.05) == pytest.approx(0.087, rel=0.02)
    assert spent_at(LOOKS, 0.05) == pytest.approx(0.142, rel=0.02)


def test_the_p_of_a_look_is_alpha_at_its_level_and_rises_with_it():
    levels = np.geomspace(1e-9, 1, 60)
    spent = np.array([spent_at(LOOKS, level) for level in levels])

    assert spent_at(LOOKS, level_of(LOOKS)) == pytest.approx(0.05)
    assert np.all(np.diff(spent) > 0) or spent[-1] == 1
    assert np.all((levels <= spent) & (spent <= len(LOOKS) * levels))


def test_drawn_samples_are_found_as_often_as_is_said():
    draw, count = np.random.default_rng(0), 100_000
    total, squares, least = np.zeros(count), np.zeros(count), np.ones(count)
    for before, look in zip((0, *LOOKS), LOOKS, strict=False):
        values = draw.standard_normal((look - before, count))
        total, squares = total + values.sum(0), squares + (values**2).sum(0)
        error = np.sqrt(look * (squares - total**2 / look) / (look - 1))
        least = np.minimum(least, 2 * stdtr(look - 1, -np.abs(total) / error))

    for level in (0.05, 0.0156, 0.003):
        expected = spent_at(LOOKS, level)
        share = np.mean(least <= level)
        assert abs(share - expected) < 4 * np.sqrt(expected / count) + 0.003 * expected


@pytest.mark.parametrize(
    ("ideas", "seeds", "effect"),
    [
        *((1, 3, 2.5), (1, 5, 1.2), (1, 8, 0.8), (16, 3, 10.3), (16, 5, 2.8), (16, 8, 1.6)),
        *((40, 3, 16.3), (40, 5, 3.6), (40, 8, 1.8)),
    ],
)
def test_what_can_be_told_is_said_before_a_grid_starts(ideas, seeds, effect):
    text = foresight(design_of(str(seeds)), ideas, 0.01)

    told = float(re.search(r"a difference of ([0-9.]+) sd", text)[1])
    assert told == pytest.approx(effect, abs=0.101) and "here about" in text
    assert ("--seeds 3+8" in text) == (told > 2.5)


def test_one_seed_tells_nothing_and_says_so():
    assert foresight(design_of("1"), 3, None).startswith("one seed tells nothing")
