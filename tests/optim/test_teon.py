"""TEON: momenta of neighbouring layers made orthogonal together."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.muon import NEWTON_SCHULZ, Muon, orthogonalised
from lmplay.optim.teon import TEON, neighbours

F64 = torch.float64
NAMES = [f"blocks.{i}.attention.{kind}.weight" for i in range(3) for kind in ("query", "output")]


def stepped(kind=TEON, names=NAMES, num_steps=1, seed=0, **options):
    """Matrices, zero at first, after some steps at the rate one, by name."""
    draw = torch.Generator().manual_seed(seed)
    weights = [nn.Parameter(torch.zeros(4, 6, dtype=F64)) for _ in names]
    named = {"names": names} if kind is TEON else {}
    optimizer = kind([{"params": weights, **named}], lr=1.0, weight_decay=0.0, **options)
    grads = []
    for _ in range(num_steps):
        grads = [torch.randn(4, 6, generator=draw, dtype=F64) for _ in names]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        optimizer.step()
    made = [weight.detach() for weight in weights]
    return dict(zip(names, made, strict=True)), dict(zip(names, grads, strict=True))


def test_alone_every_layer_is_muon_s():
    assert_close(stepped(layers=1, num_steps=4)[0], stepped(Muon, num_steps=4)[0])


def test_pairs_are_one_wide_matrix_and_what_has_no_neighbour_is_muon_s():
    made, grads = stepped()
    muon, _ = stepped(Muon)
    first, second = NAMES[0], NAMES[2]
    wide = orthogonalised([torch.cat([grads[first], grads[second]], 1)], NEWTON_SCHULZ, 1.0)[0]

    for name, piece in zip((first, second), wide.chunk(2, 1), strict=True):
        assert_close(made[name], -0.2 * 6**0.5 * piece)
        assert not torch.allclose(made[name], muon[name])
    for name in (NAMES[4], *NAMES[1::2]):  # the third query, and output projections
        assert_close(made[name], muon[name])


def test_even_steps_are_larger_by_the_root_of_the_layers_and_then_as_large_as_muon_s():
    made, even = stepped()[0], stepped(even=True)[0]
    muon, _ = stepped(Muon)

    assert_close(even[NAMES[0]], 2**0.5 * made[NAMES[0]])
    assert_close(even[NAMES[1]], made[NAMES[1]])
    sizes = [torch.stack([m[NAMES[0]], m[NAMES[2]]]).norm() for m in (even, muon)]
    assert sizes[0] == pytest.approx(sizes[1].item(), rel=0.1)


def test_two_equal_momenta_share_one_step():
    g_OI = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=F64)
    alone = orthogonalised([g_OI], NEWTON_SCHULZ, 1.0)[0]
    pair = orthogonalised([torch.cat([g_OI, g_OI], 1)], [*NEWTON_SCHULZ, (2, -1.5, 0.5)], 1.0)[0]

    assert_close(pair[:, :6], pair[:, 6:])
    U, _, Vh = torch.linalg.svd(alone, full_matrices=False)
    assert_close(pair[:, :6], U @ Vh / 2**0.5, rtol=0.2, atol=0.2)


def test_who_stands_together():
    p, wide = torch.zeros(2, 2), torch.zeros(2, 3)
    named = [("a.0.key.weight", p), ("a.1.key.weight", p), ("b.1.key.weight", p),
             ("a.2.key.weight", p), ("a.3.key.weight", wide), ("key.weight", p)]  # fmt: skip

    assert [len(parts) for parts in neighbours(named, 2, ["key"])] == [2]
    assert neighbours(named, 2, ["value"]) == []
    assert neighbours(named, 1, ["key"]) == []


def test_a_model_without_neighbours_is_refused():
    with pytest.raises(ValueError, match="no 2 neighbouring blocks"):
        stepped(names=["layer.weight"])
