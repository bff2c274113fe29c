"""Sophia's step against its formula in fp64, its limits, and the estimate that it waits for."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.sophia import Sophia

F64 = torch.float64


def stepped(curvature, num_steps=7, **options):
    """The weight after each step, its start and gradients."""
    draw = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(num_steps + 1, 5, 4, generator=draw, dtype=F64)
    weight = nn.Parameter(start.clone())
    optimizer = Sophia([weight], lr=0.05, weight_decay=0.2, period=3, **options)
    path = []
    for step, gradient in enumerate(grads):
        weight.grad = gradient.clone()
        assert optimizer.needs_curvature == (step % 3 == 0)
        if optimizer.needs_curvature:
            optimizer.take_curvature({weight: curvature(gradient)})
        optimizer.step()
        path.append(weight.detach().clone())
    assert set(optimizer.state[weight]) == {"momentum", "hessian_moment"}  # 8 bytes a parameter
    return path, start, grads


def test_it_does_what_its_paper_says():
    path, w, grads = stepped(lambda g: 90 * g.square(), rho=0.5)
    m = h = torch.zeros_like(w)
    clipped = []
    for t, g in enumerate(grads):
        m = 0.965 * m + 0.035 * g
        h = 0.99 * h + 0.01 * 90 * g.square() if t % 3 == 0 else h
        u = m / (0.5 * h).clamp(min=1e-12)
        clipped.append((u.abs() > 1).double().mean().item())
        w = (1 - 0.05 * 0.2) * w - 0.05 * u.clamp(-1, 1)
        assert_close(path[t], w)

    assert 0.05 < sum(clipped) / len(clipped) < 0.95  # both branches were taken


def test_without_curvature_it_is_the_sign_of_momentum():
    path, start, grads = stepped(torch.zeros_like, num_steps=1)

    assert_close(path[0], 0.99 * start - 0.05 * grads[0].sign())


def test_with_much_curvature_it_is_newton_s_step():
    path, start, grads = stepped(lambda g: torch.full_like(g, 1e4), num_steps=1)

    assert_close(path[0], 0.99 * start - 0.05 * 0.035 * grads[0] / (0.05 * 0.01 * 1e4))


def test_a_parameter_that_the_ruler_does_not_see_has_no_curvature():
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([2.0, -3.0, 0.0])
    optimizer = Sophia([weight], lr=0.05, weight_decay=0.0)
    optimizer.take_curvature({})
    optimizer.step()

    assert_close(weight.detach(), -0.05 * weight.grad.sign())


def test_a_step_without_the_estimate_that_is_due_is_our_mistake():
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)

    with pytest.raises(RuntimeError, match="estimate"):
        Sophia([weight]).step()
