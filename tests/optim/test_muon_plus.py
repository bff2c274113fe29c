"""Muon+: rows and columns of one length after the matrix was made orthogonal."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.muon import NEWTON_SCHULZ, Muon, orthogonalised
from lmplay.optim.muon_plus import SIDES, MuonPlus

G_OI = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def stepped(g_OI, kind=MuonPlus, **options):
    """A weight, zero at first, after one step at the rate one."""
    weight = nn.Parameter(torch.zeros_like(g_OI))
    weight.grad = g_OI.clone()
    kind([weight], lr=1.0, **options).step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
@pytest.mark.parametrize("sides", SIDES)
def test_it_does_what_its_paper_says(sides, shape):
    g_OI = G_OI.reshape(shape)
    o = orthogonalised([g_OI], NEWTON_SCHULZ, 1.0)[0]
    for side in {"row_col": "rc", "col_row": "cr", "row": "r", "col": "c", "whole": ""}[sides]:
        o = o / (o.norm(dim=1 if side == "r" else 0, keepdim=True) + 1e-8)
    expected = 0.2 * 12**0.5 * o * (8**0.5 / o.norm())

    assert_close(stepped(g_OI, sides=sides), -expected, rtol=1e-5, atol=1e-6)


def test_the_side_that_is_last_ends_with_one_length():
    for sides, dim in (("row", 1), ("col", 0), ("row_col", 0), ("col_row", 1)):
        lengths = stepped(G_OI, sides=sides).norm(dim=dim)
        assert_close(lengths, lengths.mean().expand_as(lengths))


def test_whatever_is_normalised_a_step_has_the_size_of_an_orthogonal_one():
    sizes = [stepped(G_OI, sides=sides).norm() for sides in SIDES]

    assert_close(torch.stack(sizes), torch.full_like(torch.stack(sizes), 0.2 * 96**0.5))
    assert 0.7 < stepped(G_OI, Muon).norm() / sizes[0] < 1.15


def test_the_size_of_gradients_does_not_matter_and_rows_of_zeros_stay():
    assert_close(stepped(1e3 * G_OI), stepped(G_OI), rtol=1e-5, atol=1e-6)
    with_zeros = G_OI.clone()
    with_zeros[2] = 0
    made = stepped(with_zeros)
    assert made.isfinite().all() and not made[2].any()
    assert not stepped(torch.zeros(3, 4)).any()


def test_unknown_sides_are_refused():
    with pytest.raises(ValueError, match="row_col"):
        stepped(G_OI, sides="rows")
