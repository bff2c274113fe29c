"""Several optimizers behind one: they step, are skipped, saved and resumed together."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.joint import make_optimizer
from lmplay.plan import Optimizer, RoleRule
from lmplay.run.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from lmplay.run.folder import RunFolder

ROLES = {"0.weight": "matrix", "0.bias": "vector", "1.weight": "table"}
# fused, fused with a state that its first step makes, and foreach, which needs the host
MANY = Optimizer(
    name="AdamW", lr=0.1, weight_decay=0.1,
    roles={
        "vector": RoleRule(name="SGD", lr=0.5, options={"momentum": 0.9}),
        "table": RoleRule(name="RMSprop", lr=0.2),
    },
)  # fmt: skip


def made(wanted, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Embedding(5, 3))
    return model, make_optimizer(wanted, model, ROLES)


def take_steps(model, optimizer, seeds, wanted=True):
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.set_factor(1 / (1 + seed))
        optimizer.step_if(torch.tensor(wanted))


@pytest.mark.parametrize("options", [{}, {"betas": [0.9, 0.95], "eps": 1e-6}, {"foreach": True}])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad", "RMSprop"])
def test_one_optimizer_is_torch_s_own_bit_for_bit(name, options):
    if name != "AdamW":
        options = {k: v for k, v in options.items() if k == "foreach"}
    model, optimizer = made(Optimizer(name=name, lr=0.1, weight_decay=0.3, options=options))
    plain = copy.deepcopy(model)
    decayed = [p for p in plain.parameters() if p.dim() > 1]
    others = [p for p in plain.parameters() if p.dim() <= 1]
    fused = {"fused": True} if name != "RMSprop" and not options.get("foreach") else {}
    theirs = getattr(torch.optim, name)(
        [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        lr=0.1, **{**options, **fused},
    )  # fmt: skip
    take_steps(model, optimizer, range(4))
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        for parameter in plain.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        for group in theirs.param_groups:
            group["lr"] = 0.1 * (1 / (1 + seed))
        theirs.step()

    assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_each_member_trains_its_own_as_if_it_were_alone():
    model, optimizer = made(MANY)
    alone = copy.deepcopy(model)
    theirs = [
        torch.optim.AdamW([alone[0].weight], lr=0.1, weight_decay=0.1, fused=True),
        torch.optim.SGD([alone[0].bias], lr=0.5, momentum=0.9, fused=True),
        torch.optim.RMSprop([alone[1].weight], lr=0.2, weight_decay=0.1),
    ]
    take_steps(model, optimizer, [0])
    for mine, own in zip(alone.parameters(), model.parameters(), strict=True):
        mine.grad = own.grad
    for member in theirs:
        member.step()

    assert_close(model.state_dict(), alone.state_dict(), rtol=0, atol=0)


def test_the_rate_of_a_group_is_its_own_times_the_schedule_s_factor():
    _, optimizer = made(MANY)
    optimizer.set_factor(0.25)

    rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"matrix": 0.025, "vector": 0.125, "table": 0.05}


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_step_that_is_not_wanted_changes_no_member(at):
    (model, optimizer), (other, skipping) = made(MANY), made(MANY)
    take_steps(model, optimizer, range(4))
    take_steps(other, skipping, range(at))
    take_steps(other, skipping, [99], wanted=False)
    take_steps(other, skipping, range(at, 4))

    assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_gradients_are_unscaled_once_and_one_overflow_is_every_member_s():
    model, optimizer = made(MANY)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 16.0)
    model[0].bias.grad[0] = float("inf")
    scaler.unscale_(optimizer)
    scaler.update()

    assert (model[0].weight.grad == 2).all() and (model[1].weight.grad == 2).all()
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(num_steps, tmp_path):
    model, optimizer = made(MANY)
    take_steps(model, optimizer, range(num_steps))
    folder = RunFolder(tmp_path)
    state = optimizer.state_dict()
    save_checkpoint(folder, Checkpoint(1, model.state_dict(), state, {}, {}), keep=1)
    read = newest_checkpoint(folder, print)
    other, resumed = made(MANY, seed=1)
    other.load_state_dict(read.model)
    resumed.load_state_dict(read.optimizer)
    for one, its in ((model, optimizer), (other, resumed)):
        take_steps(one, its, range(num_steps, num_steps + 3))

    assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    mine, theirs = resumed.state_dict(), optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert_close(mine["state"], theirs["state"], rtol=0, atol=0)


def test_a_state_of_other_groups_is_not_taken_up():
    _, many = made(MANY)
    _, one = made(Optimizer(name="AdamW", lr=0.1))

    with pytest.raises(ValueError, match="other groups"):
        one.load_state_dict(many.state_dict())


def test_state_is_found_by_parameter_and_gradients_are_cleared():
    model, optimizer = made(MANY)
    take_steps(model, optimizer, [0])
    optimizer.zero_grad()

    assert set(optimizer.state) == set(model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
