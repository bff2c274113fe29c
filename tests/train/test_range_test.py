"""The range test finds the rates of problems whose answer is known, and touches no run."""

import json
import math

import pytest
import torch
from torch import nn

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.optim.joint import make_optimizer
from lmplay.plan import Optimizer
from lmplay.plan_file import read_plan
from lmplay.run.request import Request
from lmplay.stats.range_plot import draw_range
from lmplay.train import range_test as tested
from lmplay.train.find_lr_cli import print_rates
from lmplay.train.range_test import RangeTest, find_rate, range_test


class Silent:
    def note(self, *_):
        pass

    preparing = start = row = example = note


def bowl(curvature, optimizer, noise=0.0):
    """Steps on half the curvature times w squared; the loss before each."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    made = make_optimizer(optimizer, model, {"weight": "matrix"})
    draw = torch.Generator().manual_seed(0)

    def step(factor):
        loss = curvature / 2 * model.weight.square().sum()
        model.zero_grad()
        loss.backward()
        made.set_factor(factor)
        made.step()
        return loss.item() * (1 + noise * torch.randn((), generator=draw).item())

    return step


@pytest.mark.parametrize("curvature", [1.0, 4.0, 40.0])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_gradient_descent_on_a_bowl_diverges_at_two_over_its_curvature(curvature, noise):
    found = range_test(bowl(curvature, Optimizer(name="SGD", lr=0.1), noise))

    right = 2 / curvature / 0.1
    assert right / 1.3 < found.divergence < 1.3 * right
    assert found.steepest < found.elbow < found.divergence
    assert found.suggestion == found.elbow / 3


def test_marks_are_where_a_drawn_curve_has_them():
    """Flat at 5, falling to 2 from 0.01 to 1, flat to 10, then up by a factor in each decade."""
    places = [i / 20 for i in range(-60, 41)]
    drawn = [5 - 1.5 * min(max(p + 2, 0), 2) + 30 * max(p - 1, 0) for p in places]
    found = RangeTest([10**p for p in places], drawn)

    assert 0.01 < found.steepest < 1
    assert found.elbow == pytest.approx(10, rel=0.4)
    assert found.divergence == pytest.approx(10**1.1, rel=0.35)


def test_what_never_rises_has_no_divergence_and_its_last_rate_as_elbow():
    found = RangeTest([0.1, 1.0, 10.0, 100.0], [4.0, 3.0, 2.0, 1.0])

    assert found.divergence is None and found.elbow == 100.0


def test_a_loss_that_is_not_finite_ends_it_there():
    found = range_test(lambda factor: math.nan if factor > 1 else 3.0)

    assert 0.5 < found.factors[-1] <= 1
    assert found.divergence is not None
    with pytest.raises(UserError, match="not even"):
        range_test(lambda factor: math.inf)


@pytest.mark.parametrize(("name", "role"), [("Muon", None), ("AdamW", "matrix"), ("SGD", "table")])
def test_it_trains_any_optimizer_and_role_and_begins_no_run(place, monkeypatch, name, role):
    monkeypatch.setattr(tested, "STEPS_A_DECADE", 2)
    monkeypatch.setattr(tested, "WARM_STEPS", 1)
    changes = {"optimizer": {"name": name, "lr": 0.01}}
    request = Request(resolve("gpt2ish"), read_plan("words", changes), {}, {}, mini_batch_size=5)
    sessions, real = [], tested.trial_session

    def kept(*args):
        sessions.append(real(*args))
        return sessions[-1]

    monkeypatch.setattr(tested, "trial_session", kept)
    found = find_rate(request, role, Silent())
    trained = [name for name, p in sessions[0].run.model.named_parameters() if p.requires_grad]

    assert len(found.factors) > 4 and all(map(math.isfinite, found.losses))
    assert not request.folder.path.exists()
    if role == "table":
        assert trained == ["token_table.weight", "position_table.weight"]
    else:
        assert ("token_table.weight" in trained) == (role is None)


def test_the_command_prints_what_to_set_and_draws_beside_the_runs(place, monkeypatch, capsys):
    monkeypatch.setattr(tested, "STEPS_A_DECADE", 2)
    plan = read_plan("words", {"optimizer.name": "SGD", "optimizer.lr": 0.1})
    request = Request(resolve("gpt2ish"), plan, {}, {}, mini_batch_size=5)
    print_rates(request, "table", True)
    found = json.loads(capsys.readouterr().out)

    assert found["set"] == [f"optimizer.roles.table.lr={found['suggestion']:.3g}"]
    assert found["lr"] == pytest.approx(0.1) and len(found["points"]) > 4
    assert found["figure"] == "runs/words/gpt2ish/find_lr_table.png"
    assert (place / found["figure"]).stat().st_size > 1000

    print_rates(request, None, False)
    shown = capsys.readouterr()
    assert "suggestion" in shown.out and "try --set optimizer.lr=" in shown.out


def test_a_role_that_no_parameter_has_is_refused(place):
    request = Request(resolve("gpt2ish"), read_plan("words"), {}, {}, mini_batch_size=5)

    with pytest.raises(UserError, match="--role conv: no parameter has it"):
        find_rate(request, "conv", Silent())


def test_the_figure_repeats_to_the_byte(tmp_path):
    found = RangeTest([0.1, 1.0, 10.0, 100.0], [4.0, 3.0, 2.0, 9.0])
    made = [draw_range(found, 0.01, "a title", tmp_path / name / "a.png") for name in "ab"]

    assert made[0].read_bytes() == made[1].read_bytes()
    assert json.dumps(found.smoothed)
