"""RMNP: rows of one length, whatever they were, and its formula in fp64."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.muon import Muon
from lmplay.optim.rmnp import RMNP

F64 = torch.float64


def stepped(grads, kind=RMNP, start=None, **options):
    """A weight, zero at first, after some steps at the rate one."""
    weight = nn.Parameter(torch.zeros_like(grads[0]) if start is None else start.clone())
    optimizer = kind([weight], **{"lr": 1.0, "weight_decay": 0.0, **options})
    for gradient in grads:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def test_the_published_example():
    made = stepped([torch.tensor([[3.0, 4.0], [0.0, 0.5]])], scale="original")

    assert_close(made, -torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


@pytest.mark.parametrize("scale", ["rms", "original"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_it_does_what_its_paper_says(shape, scale):
    draw = torch.Generator().manual_seed(0)
    w, *grads = torch.randn(7, *shape, generator=draw, dtype=F64)
    path = stepped(grads, start=w, lr=0.02, weight_decay=0.3, scale=scale)
    m = torch.zeros_like(w)
    factor = {"rms": 0.2 * shape[1] ** 0.5, "original": max(1, shape[0] / shape[1]) ** 0.5}[scale]
    for g in grads:
        m = 0.95 * m + g
        d = g + 0.95 * m
        w = (1 - 0.02 * 0.3) * w - 0.02 * factor * d / d.norm(dim=1, keepdim=True)

    assert_close(path, w)


def test_the_sizes_of_rows_do_not_matter_and_zeros_stay():
    g_OI = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=F64)
    sizes_O1 = torch.logspace(-3, 3, 5, dtype=F64)[:, None]

    assert_close(stepped([g_OI * sizes_O1] * 3), stepped([g_OI] * 3))
    assert not stepped([torch.zeros(3, 4)]).any()


def test_of_one_column_it_is_the_sign_and_its_steps_are_as_large_as_muon_s():
    column_O1 = torch.tensor([[3.0], [-0.1], [0.0]])
    assert_close(stepped([column_O1], scale="original"), -(3**0.5) * column_O1.sign())
    for shape in [(60, 60), (30, 90)]:
        g_OI = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        sizes = [stepped([g_OI], kind).square().mean().sqrt() for kind in (RMNP, Muon)]
        assert_close(sizes[0], sizes[1], rtol=0.25, atol=0)
