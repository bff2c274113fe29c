"""Muon and its relatives against torch's own and against their formulas in fp64."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.muon import (
    ITERATIONS,
    NEWTON_SCHULZ,
    POLAR_EXPRESS,
    AdaMuon,
    Muon,
    NorMuon,
    orthogonalised,
)

SHAPES = [(6, 6), (12, 5), (5, 12)]


def trained(kind, shapes=SHAPES, num_steps=6, dtype=torch.float64, **options):
    """Weights after some steps, and the gradients that they got."""
    draw = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(s, generator=draw, dtype=dtype)) for s in shapes]
    optimizer = kind(weights, lr=0.02, weight_decay=0.3, **options)
    grads = [
        [torch.randn(s, generator=draw, dtype=dtype) for s in shapes] for _ in range(num_steps)
    ]
    for step in grads:
        for weight, grad in zip(weights, step, strict=True):
            weight.grad = grad.clone()
        optimizer.step()
    return [weight.detach() for weight in weights], grads


def made_orthogonal(m_OI, coefficients, room):
    """The iteration as it is written, for one matrix."""
    if m_OI.shape[0] > m_OI.shape[1]:
        return made_orthogonal(m_OI.T, coefficients, room).T
    x_OI = m_OI / (m_OI.norm() * room + 1e-7)
    for a, b, c in coefficients:
        A_OO = x_OI @ x_OI.T
        x_OI = a * x_OI + (b * A_OO + c * A_OO @ A_OO) @ x_OI
    return x_OI


def written_out(grads, kind=Muon, momentum=0.95, nesterov=True, iteration="newton_schulz",
                scale="rms", beta2=0.95):  # fmt: skip
    """The trajectory of each weight, by the formulas."""
    draw = torch.Generator().manual_seed(0)
    ends = []
    for index, shape in enumerate(SHAPES):
        w = torch.randn(shape, generator=draw, dtype=torch.float64)
        O, I = shape  # noqa: E741
        average, moment = torch.zeros_like(w), 0.0
        for step in grads:
            g = step[index]
            average = momentum * average + (1 - momentum) * g
            ahead = momentum * average + (1 - momentum) * g if nesterov else average
            o = made_orthogonal(ahead, *ITERATIONS[iteration])
            factor = {
                "rms": 0.2 * max(O, I) ** 0.5,
                "original": max(1, O / I) ** 0.5,
                "spectral": (O / I) ** 0.5,
            }[scale]
            if kind is NorMuon:
                moment = beta2 * moment + (1 - beta2) * o.pow(2).mean(1, keepdim=True)
                even = o / (moment.sqrt() + 1e-7)
                o = even * o.norm() / even.norm()
            if kind is AdaMuon:
                moment = beta2 * moment + (1 - beta2) * o.pow(2)
                o = o / (moment.sqrt() + 1e-8)
                o, factor = o / o.norm(), 0.2 * (O * I) ** 0.5
            w = w * (1 - 0.02 * 0.3) - 0.02 * factor * o
        ends.append(w)
    return ends


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Muon, {}),
        (Muon, {"nesterov": False, "momentum": 0.8}),
        (Muon, {"iteration": "polar_express"}),
        (Muon, {"scale": "original"}),
        (Muon, {"scale": "spectral"}),
        (NorMuon, {}),
        (NorMuon, {"beta2": 0.8, "scale": "original"}),
        (AdaMuon, {}),
        (AdaMuon, {"beta2": 0.8, "iteration": "polar_express"}),
    ],
)
def test_it_does_what_its_formula_says(kind, options):
    weights, grads = trained(kind, **options)

    assert_close(weights, written_out(grads, kind, **options), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("scale", "theirs"), [("rms", "match_rms_adamw"), ("original", "original")]
)
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_torch_s_own_but_for_the_rounding_of_that_to_bf16(scale, theirs, nesterov):
    mine, _ = trained(Muon, dtype=torch.float32, scale=scale, nesterov=nesterov)
    other, _ = trained(
        torch.optim.Muon, dtype=torch.float32, adjust_lr_fn=theirs, nesterov=nesterov
    )
    start, _ = trained(Muon, dtype=torch.float32, num_steps=0)

    for one, two, before in zip(mine, other, start, strict=True):
        assert (one - two).norm() < 0.03 * (two - before).norm()


def test_experts_are_made_orthogonal_each_for_itself():
    draw = torch.Generator().manual_seed(1)
    stack_EOI = torch.randn(3, 4, 7, generator=draw)
    together = orthogonalised([stack_EOI], NEWTON_SCHULZ, 1.0)[0]

    for one, alone in zip(together, stack_EOI, strict=True):
        assert_close(one, orthogonalised([alone], NEWTON_SCHULZ, 1.0)[0])


@pytest.mark.parametrize(
    ("coefficients", "room", "low", "high"),
    [(NEWTON_SCHULZ, 1.0, 0.66, 1.14), (POLAR_EXPRESS, 1.02, 0.85, 1.15)],
)
def test_singular_values_end_near_one_and_vectors_stay(coefficients, room, low, high):
    draw = torch.Generator().manual_seed(2)
    m_OI = torch.randn(96, 160, generator=draw, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(m_OI, full_matrices=False)
    made_OI = orthogonalised([m_OI], coefficients, room)[0]
    values = (U.T @ made_OI @ Vh.T).diagonal()

    assert low < values.min() and values.max() < high
    assert_close(made_OI, U @ values.diag() @ Vh, rtol=1e-8, atol=1e-8)


def test_a_transposed_gradient_gives_the_transposed_update_of_any_size():
    m_OI = torch.randn(5, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one, other, large = (
        orthogonalised([m], NEWTON_SCHULZ, 1.0)[0] for m in (m_OI, m_OI.T, 1e4 * m_OI)
    )

    assert_close(other, one.T)
    assert_close(large, one, rtol=1e-5, atol=1e-5)


def test_rows_become_alike_in_length_and_the_whole_keeps_its_own():
    draw = torch.Generator().manual_seed(4)
    sizes_O1 = torch.logspace(0, 2, 20)[:, None]  # some rows get gradients a hundred times others'
    rows = {}
    for kind in (Muon, NorMuon):
        weight = nn.Parameter(torch.zeros(20, 60))
        optimizer = kind([weight], lr=1.0, weight_decay=0.0)
        for _ in range(60):
            before = weight.detach().clone()
            weight.grad = torch.randn(20, 60, generator=draw) * sizes_O1
            optimizer.step()
        rows[kind] = (weight.detach() - before).norm(dim=1)

    assert rows[NorMuon].max() / rows[NorMuon].min() < 1.5
    assert rows[NorMuon].norm() == pytest.approx(rows[Muon].norm().item(), rel=0.2)


def test_the_first_step_of_adamuon_is_a_sign_of_the_root_mean_square_of_a_fifth():
    weight = nn.Parameter(torch.zeros(6, 8))
    weight.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    o_OI = orthogonalised([weight.grad], NEWTON_SCHULZ, 1.0)[0]
    AdaMuon([weight], lr=1.0, weight_decay=0.0).step()

    assert_close(weight.detach(), -0.2 * o_OI.sign(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "wrong", [{"momentum": 1.0}, {"iteration": "svd"}, {"scale": "none"}, {"shape": (4,)}], ids=str
)
def test_what_it_cannot_do_is_refused(wrong):
    weight = nn.Parameter(torch.zeros(wrong.pop("shape", (4, 4))))
    with pytest.raises(ValueError):
        Muon([weight], **wrong)
