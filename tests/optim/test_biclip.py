"""BiClip between sign descent and SGD."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.biclip import BiClip

GRADIENT = torch.tensor([0.0, 1e-9, -0.5, 3.0, -1e4])


def moved(**options):
    weight = nn.Parameter(torch.ones(5, dtype=torch.float64))
    weight.grad = GRADIENT.double()
    BiClip([weight], **options).step()
    return 1 - weight.detach()


def test_its_limits_are_sign_descent_and_sgd():
    assert_close(moved(lr=0.1, low=2.0, high=2.0), 0.2 * GRADIENT.double().sign())
    assert_close(moved(lr=0.1, low=0.0, high=float("inf")), 0.1 * GRADIENT.double())


def test_every_number_moves_by_a_size_between_both_or_not_at_all():
    sizes = moved(lr=1.0, low=1e-3, high=1.0).abs()

    assert sizes[0] == 0 and (sizes[1:] >= 1e-3 - 1e-12).all() and (sizes <= 1 + 1e-12).all()


def test_it_decays_by_rate_times_decay():
    assert_close(
        moved(lr=0.1, low=0.0, high=0.0, weight_decay=0.5), torch.full((5,), 0.05).double()
    )


def test_sizes_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError):
        moved(low=2.0, high=1.0)
