"""Adam-mini against AdamW and against its formula."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.adam_mini import AdamMini


def trained(kind, shape, num_steps=5, scale=1.0, **options):
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))
    optimizer = kind([weight], lr=0.05, weight_decay=0.2, betas=(0.9, 0.95), **options)
    for _ in range(num_steps):
        weight.grad = scale * torch.randn(shape, generator=draw, dtype=torch.float64)
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_where_a_row_is_one_number_it_is_adamw(shape):
    assert_close(trained(AdamMini, shape)[0], trained(torch.optim.AdamW, shape)[0])


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 5)])
def test_a_row_has_one_divisor(shape):
    made, optimizer = trained(AdamMini, shape)
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=draw, dtype=torch.float64)
    m = v = 0.0
    for t in range(1, 6):
        g = torch.randn(shape, generator=draw, dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * (g * g).flatten(1).mean(1)
        divisor = (v / (1 - 0.95**t)).sqrt().reshape(-1, *[1] * (len(shape) - 1)) + 1e-8
        w = w * (1 - 0.05 * 0.2) - 0.05 * (m / (1 - 0.9**t)) / divisor

    assert_close(made, w)
    (state,) = optimizer.state.values()
    assert state["exp_avg_sq"].numel() == shape[0]


def test_rows_of_any_size_of_gradient_move_alike():
    sizes_O1 = torch.tensor([[1.0], [1e-4], [1e3]])
    weight = nn.Parameter(torch.zeros(3, 50))
    optimizer = AdamMini([weight], lr=1.0, weight_decay=0.0)
    weight.grad = sizes_O1 * torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    optimizer.step()

    rms_O = weight.detach().square().mean(1).sqrt()
    assert_close(rms_O, torch.ones(3), rtol=1e-3, atol=1e-3)


def test_values_out_of_range_are_refused():
    for wrong in ({"betas": (1.0, 0.9)}, {"eps": -1.0}):
        with pytest.raises(ValueError):
            AdamMini([nn.Parameter(torch.zeros(2))], **wrong)
