"""What three learning rates say of the lowest loss."""

import pytest

from lmplay.stats.rates import lowest


def test_the_lowest_loss_is_at_the_vertex():
    found = lowest([0.5, 1, 2], [5.2, 5.0, 5.1], start=7.0)

    assert found.fitted and found.loss == pytest.approx(4.99583, abs=1e-5)


def test_a_run_that_diverged_bends_no_parabola():
    found = lowest([0.3, 1, 3], [5.08, 6.03, 28.7], start=7.1)  # whose vertex would lie at 2.4

    assert (found.loss, found.edge, found.fitted) == (5.08, -1, False)
