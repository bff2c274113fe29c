"""Momentum that rises at first and may fall at the end, for whatever has momentum."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.errors import UserError
from lmplay.optim.joint import make_optimizer
from lmplay.optim.momentum import Ramp, momentum_at
from lmplay.plan import Optimizer


def made(name="Muon", **options):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    wanted = Optimizer(name=name, lr=0.1, options=options)
    return layer, make_optimizer(wanted, layer, {"weight": "matrix"})


def momenta(name="Muon", **options):
    _, optimizer = made(name, **options)
    found = []
    for progress in (0.0, 0.05, 0.1, 0.5, 0.9, 0.95):
        optimizer.set_progress(progress)
        found.append(optimizer.param_groups[0]["momentum"])
    return found


def test_it_rises_to_its_full_value_stays_and_falls_again():
    found = momenta(momentum_start=0.85, momentum_warmup=0.1, momentum_cooldown=0.1)

    assert found == pytest.approx([0.85, 0.9, 0.95, 0.95, 0.95, 0.9])


def test_nothing_moves_it_where_nobody_asks():
    assert momenta() == [0.95] * 6
    assert momentum_at(Ramp(full=0.95, momentum_start=0.95).numbers, 0.0) == 0.95


@pytest.mark.parametrize(
    "name", ["SGD", "Muon", "NorMuon", "RMNP", "Signum", "MuonH", "Kron", "Scion"]
)
def test_whatever_has_momentum_takes_a_ramp(name):
    own = {"momentum": 0.9} if name == "SGD" else {}
    found = momenta(name, momentum_start=0.5, momentum_warmup=0.5, **own)

    assert found[0] == 0.5 and found == sorted(found) and found[-1] > 0.85


NAMES = "Adam AdamW AdamH CAdamW NAdam RAdam AdamMini Lion AdEMAMix ADOPT MARS LAMB SOAP Sophia"
BETAS = {name: [0.9, 0.99] for name in NAMES.split()} | {"AdEMAMix": [0.9, 0.99, 0.999]}


@pytest.mark.parametrize("name", BETAS)
def test_the_first_of_betas_is_momentum(name):
    _, optimizer = made(name, momentum_start=0.5, momentum_warmup=0.5, betas=BETAS[name])
    found = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        optimizer.set_progress(progress)
        found.append(optimizer.param_groups[0]["betas"])

    first, *rest = BETAS[name]
    assert [each[0] for each in found] == pytest.approx([0.5, (first + 0.5) / 2, first, first])
    assert {each[1:] for each in found} == {tuple(rest)}


def test_a_step_of_adam_averages_by_the_momentum_of_its_progress():
    layer, optimizer = made("AdamW", momentum_start=0.5, momentum_warmup=1.0, betas=[0.9, 0.99])
    average = torch.zeros(3, 4)
    for step in range(4):
        draw = torch.Generator().manual_seed(step)
        layer.weight.grad = torch.randn(3, 4, generator=draw)
        optimizer.set_progress(step / 4)
        optimizer.step()
        average = average.lerp(layer.weight.grad, 0.5 - 0.4 * step / 4)

    assert_close(optimizer.state[layer.weight]["exp_avg"], average)


def test_a_step_uses_the_momentum_of_its_progress():
    (ramped, first), (plain, second) = made(momentum_start=0.5, momentum_warmup=1.0), made()
    for step in range(4):
        for layer, optimizer in ((ramped, first), (plain, second)):
            draw = torch.Generator().manual_seed(step)
            layer.weight.grad = torch.randn(3, 4, generator=draw)
            optimizer.set_progress(step / 4)
            if optimizer is second:
                optimizer.param_groups[0]["momentum"] = 0.5 + 0.45 * step / 4
            optimizer.step()

    assert_close(ramped.weight, plain.weight)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Adagrad", {"momentum_start": 0.5}), ("ScheduleFreeAdamW", {"momentum_start": 0.5}),
     ("AdamW", {"momentum_start": 0.99}), ("Muon", {"momentum_start": 0.99}),
     ("Muon", {"momentum_warmup": 0.7, "momentum_cooldown": 0.7})],
)  # fmt: skip
def test_a_ramp_that_cannot_be_is_refused(name, options):
    with pytest.raises(UserError):
        made(name, **options)
