"""One update: clipped, masked where it is not finite, left out where fp16 overflows."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.joint import make_optimizer
from lmplay.plan import Optimizer
from lmplay.train.update import MOST_OVERFLOWS, Update

KINDS = [
    Optimizer(name="AdamW", lr=0.1),
    Optimizer(name="Adagrad", lr=0.1),
    Optimizer(name="SGD", lr=0.1),
    Optimizer(name="SGD", lr=0.1, options={"momentum": 0.9}),
    Optimizer(name="RMSprop", lr=0.1),
]
NAMES = ["AdamW", "Adagrad", "SGD", "momentum", "RMSprop"]


def update(kind=KINDS[0], fp16=False, clip=None):
    """An update of 3 x 4 weights of one; the scaler is the one that fp16 has on a GPU."""
    model = nn.Linear(4, 3, bias=False)
    nn.init.ones_(model.weight)
    scaler = torch.amp.GradScaler("cpu") if fp16 else None
    run = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(scaler=scaler),
        world_size=1,
        progress=0.0,
        device=torch.device("cpu"),
    )
    return Update(run, make_optimizer(kind, model, {"weight": "matrix"}), clip)


def step(taken, gradient, objective=1.0):
    """Take a step with this gradient in every weight; the norm that is reported."""
    scaler = taken.scaler
    if scaler is not None:
        scaler.scale(torch.ones(()))  # as the backward pass does
    weight = taken.run.model.weight
    weight.grad = torch.full_like(weight, gradient * (scaler.get_scale() if scaler else 1.0))
    return taken(torch.tensor(objective), factor=1.0)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("bad", [{"gradient": 1.0, "objective": float("nan")}, {"gradient": "nan"}])
def test_nothing_changes_from_the_first_step_that_is_not_finite(kind, fp16, bad):
    taken = update(kind, fp16)
    step(taken, 1.0)
    before = taken.run.model.weight.clone()
    for _ in range(MOST_OVERFLOWS if fp16 else 1):
        step(taken, **{k: float(v) for k, v in bad.items()})
    for _ in range(3):
        step(taken, 1.0)

    assert not taken.healthy
    assert_close(taken.run.model.weight, before, rtol=0, atol=0)


@pytest.mark.parametrize("fp16", [False, True])
def test_nothing_changes_where_the_fused_kernel_does_not_heed_the_flag(monkeypatch, fp16):
    class AdamW(torch.optim.AdamW):
        def step(self, closure=None):
            self.found_inf = None
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    taken = update(KINDS[0], fp16)
    step(taken, 1.0)
    before = taken.run.model.weight.clone()
    step(taken, float("nan"))

    assert taken.optimizer.members[0].defaults["fused"]
    assert_close(taken.run.model.weight, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("at", [0, 2])
def test_an_overflow_under_fp16_costs_that_step_alone(kind, at):
    overflowing, plain = update(kind, fp16=True), update(kind)
    for number in range(4):
        if number == at:
            step(overflowing, float("inf"))
        for taken in (overflowing, plain):
            step(taken, 0.5 + number)

    assert overflowing.healthy and overflowing.scaler.get_scale() == 2**15
    assert_close(overflowing.run.model.weight, plain.run.model.weight)


@pytest.mark.parametrize("fp16", [False, True])
def test_the_whole_gradient_is_clipped_and_its_norm_told_from_before(fp16):
    taken = update(KINDS[2], fp16, clip=1.0)
    norm = step(taken, 2.0)

    assert norm.item() == pytest.approx(2 * 12**0.5)
    moved = 1 - taken.run.model.weight
    assert moved.norm().item() == pytest.approx(0.1, rel=1e-5)


def test_gradients_are_cleared():
    taken = update()
    step(taken, 1.0)

    assert taken.run.model.weight.grad is None


def test_the_scaler_goes_on_from_a_checkpoint():
    one = update(fp16=True)
    step(one, float("inf"))
    step(one, 1.0)
    other = update(fp16=True)
    other.load_state(one.state())

    assert other.state() == one.state() and other.scaler.get_scale() == 2**15


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_nothing_follows_a_step_that_was_not_taken(kind):
    for fp16, bad in ((False, float("nan")), (True, float("inf"))):
        taken, calls = update(kind, fp16), []
        taken.run.model.after_step = lambda calls=calls: calls.append(1)
        step(taken, 1.0)
        step(taken, bad)
        before = taken.run.model.weight.clone()

        assert calls == [1] and not taken.taken
        step(taken, 1.0)  # without fp16 the run has failed by now
        assert calls == [1, 1] if fp16 else calls == [1]
        assert fp16 or torch.equal(taken.run.model.weight, before)


def test_projections_follow_the_step():
    taken = update()
    taken.run.model.after_step = lambda: taken.run.model.weight.clamp_(max=0.95)
    step(taken, 1.0)

    assert (taken.run.model.weight < 0.951).all()
