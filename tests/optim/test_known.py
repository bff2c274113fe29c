"""Every optimizer by name: it learns, resumes bit for bit, and every rate of it is known."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.errors import UserError
from lmplay.optim.joint import make_optimizer
from lmplay.optim.known import KNOWN, find, replaced
from lmplay.optim.registry import arguments_of
from lmplay.plan import Optimizer
from lmplay.run.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from lmplay.run.folder import RunFolder

ROLES = {"table.weight": "table", "blocks.0.query.weight": "matrix"}
ROLES |= {"blocks.1.query.weight": "matrix", "layer.weight": "matrix", "layer.bias": "vector"}
ROLES |= {"head.weight": "head"}
# rates at which this small problem is learned in 60 steps; of the others the default times ten
RATES = {"SGD": 1.0, "ASGD": 1.0, "Adadelta": 10.0, "Prodigy": 1.0, "Scion": 0.002, "Rprop": 1e-3}
RATES |= {"SOAP": 0.01, "PaLMSOAP": 0.01, "MARS": 0.01, "LAMB": 0.01, "AdEMAMix": 0.003}


class Bigrams(nn.Module):
    """Learns which of 12 tokens follows which."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(12, 8), nn.Linear(8, 16)
        self.blocks = nn.ModuleList([nn.Module(), nn.Module()])
        for block in self.blocks:
            block.query = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(16, 12, bias=False)

    def forward(self, tokens_T):
        x_TC = self.table(tokens_T)
        for block in self.blocks:
            x_TC = x_TC + block.query(x_TC)
        return self.head(torch.tanh(self.layer(x_TC)))


def of(name, lr=None, seed=0, num_steps=60, **options):
    """A model and the optimizer that `--optimizer` would make of it."""
    plans_own = Optimizer(name="AdamW", lr=1e-3, weight_decay=0.1)
    values = replaced(plans_own, name)
    lr = RATES.get(name, 10 * values["lr"]) if lr is None else lr
    values |= {"lr": lr, "options": values["options"] | options}
    torch.manual_seed(seed)
    model = Bigrams()
    return model, make_optimizer(Optimizer(**values), model, ROLES, num_steps)


def take_steps(model, optimizer, steps, num_steps=60):
    tokens_T = torch.arange(12)
    for step in steps:
        loss = nn.functional.cross_entropy(model(tokens_T), (5 * tokens_T + 1) % 12)
        loss.backward()
        if optimizer.needs_curvature:
            optimizer.take_curvature({p: 1e3 * p.grad.square() for p in model.parameters()})
        optimizer.set_factor(1 - step / num_steps)
        optimizer.set_progress(step / num_steps)
        optimizer.step_if(torch.tensor(True))
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("name", KNOWN)
def test_it_learns_with_every_parameter(name):
    model, optimizer = of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    num_steps = 300 if name == "Prodigy" else 60  # it begins at a rate of a millionth
    first = take_steps(model, optimizer, range(1), num_steps)
    last = take_steps(model, optimizer, range(1, num_steps), num_steps)

    assert last < 0.8 * first
    for key, value in model.state_dict().items():
        assert value.isfinite().all() and not torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", KNOWN)
def test_it_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    model, optimizer = of(name)
    take_steps(model, optimizer, range(12))
    folder = RunFolder(tmp_path)
    saved = Checkpoint(1, model.state_dict(), optimizer.state_dict(), {}, {})
    save_checkpoint(folder, saved, keep=1)
    read = newest_checkpoint(folder, print)
    other, resumed = of(name, seed=1)
    other.load_state_dict(read.model)
    resumed.load_state_dict(read.optimizer)
    for one, its in ((model, optimizer), (other, resumed)):
        take_steps(one, its, range(12, 25))

    assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", KNOWN)
def test_a_step_that_is_not_wanted_changes_nothing(name):
    model, optimizer = of(name)
    take_steps(model, optimizer, range(2))
    twin = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step_if(torch.tensor(False))

    assert_close(model.state_dict(), twin, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(set(KNOWN) - {"Rprop"}))  # it finds a step for each number
def test_a_models_own_share_of_a_rate_is_heeded(name):
    model, _ = of(name)
    model.parameter_groups = lambda: [{"params": [model.layer.weight], "lr_scale": 0.0}]
    wanted = replaced(Optimizer(name="AdamW", lr=1e-3, weight_decay=0.1), name)
    optimizer = make_optimizer(Optimizer(**wanted | {"lr": 10 * wanted["lr"]}), model, ROLES, 60)
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, range(8))

    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == set(before) - {"layer.weight"}


def test_what_a_model_is_judged_by_leaves_training_as_it_was(tmp_path):
    model, optimizer = of("ScheduleFreeAdamW", lr=0.03)
    other, looked_at = of("ScheduleFreeAdamW", lr=0.03)
    take_steps(model, optimizer, range(20))
    trained = copy.deepcopy(model.state_dict())
    for step in range(20):
        take_steps(other, looked_at, [step])
        with looked_at.averaged():
            judged = copy.deepcopy(other.state_dict())
            folder = RunFolder(tmp_path)
            state = looked_at.state_dict()
            save_checkpoint(folder, Checkpoint(step, other.state_dict(), state, {}, {}), keep=1)

    assert_close(other.state_dict(), trained, rtol=0, atol=0)
    assert not torch.equal(judged["layer.weight"], trained["layer.weight"])
    read = newest_checkpoint(folder, print)
    assert_close(read.model, judged, rtol=0, atol=0)
    resumed, its = of("ScheduleFreeAdamW", lr=0.03, seed=1)
    resumed.load_state_dict(read.model)
    its.load_state_dict(read.optimizer)
    for one, own in ((model, optimizer), (resumed, its)):
        take_steps(one, own, range(20, 30))
    assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("name", KNOWN)
def test_it_stays_finite_whatever_the_size_of_gradients_and_where_they_are_zero(name, scale):
    model, optimizer = of(name)
    draw = torch.Generator().manual_seed(0)
    for step in range(8):
        for p in model.parameters():
            p.grad = scale * torch.randn(p.shape, generator=draw) * (step != 4)
            p.grad[:1] = 0  # as of a token that is never there
        if optimizer.needs_curvature:
            optimizer.take_curvature({p: p.grad.square() for p in model.parameters()})
        optimizer.set_factor(1.0)
        optimizer.step()

    for key, value in model.state_dict().items():
        assert value.isfinite().all() and value.abs().max() < 100, key


CHANGED = {"momentum": 0.5, "betas": [0.5, 0.6, 0.7], "eps": 0.1, "beta": 0.5, "beta1": 0.5,
           "beta2": 0.5, "rho": 0.5, "gamma": 0.5, "nesterov": False, "scale": "original",
           "iteration": "polar_express", "top": 1, "block": 2, "low": 1e-3, "high": 1e-2,
           "sides": "row", "even": True, "buffers": 3, "ages": [40.0, 30.0], "begin": 0.9,
           "layers": 1, "period": 2, "alpha": 1.0, "rounds": 3}  # fmt: skip
OTHERWISE = {("Adafactor", "eps"): [1e-3, 0.5], ("BiClip", "low"): 1e-5,
             ("SGD", "nesterov"): True, ("Scion", "scale"): 3.0}  # fmt: skip


def offered(name):
    known = find(name, "optimizer")
    taken = arguments_of(known.kind) - {"lr", "weight_decay", *known.fixed}
    return [(name, option) for option in sorted(taken & CHANGED.keys())]


@pytest.mark.parametrize(("name", "option"), [pair for name in KNOWN for pair in offered(name)])
def test_no_option_is_swallowed(name, option):
    value = OTHERWISE.get((name, option), CHANGED[option])
    if option == "betas":
        value = value[: len(find(name, "optimizer").options.get("betas", [0, 0]))]
    ends = []
    for options in ({}, {option: value}):
        model, optimizer = of(name, **options)
        take_steps(model, optimizer, range(20), 20)
        ends.append(model.state_dict())

    assert any(not torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.weight_decay])
def test_weight_decay_is_not_swallowed(name):
    moved = {}
    for decay in (0.0, 0.5):
        values = replaced(Optimizer(name="AdamW", lr=1e-3, weight_decay=0.1), name)
        torch.manual_seed(0)
        model = Bigrams()
        optimizer = make_optimizer(Optimizer(**{**values, "weight_decay": decay}), model, ROLES)
        take_steps(model, optimizer, range(5))
        moved[decay] = model

    for role in {"matrix", "table", "head"}:
        key = next(key for key, its in ROLES.items() if its == role)
        assert not torch.equal(*(m.state_dict()[key] for m in moved.values())), key


@pytest.mark.parametrize("name", KNOWN)
def test_what_it_says_of_itself_is_whole(name):
    known = find(name, "optimizer")

    assert known.summary and known.paper and known.state and known.lr > 0
    assert isinstance(known.kind, type) and known.rest in KNOWN
    assert not set(known.by_role) - set(ROLES.values()) or known.by_role


def test_another_optimizer_keeps_how_far_the_plan_is_from_the_usual():
    plans_own = Optimizer(name="AdamW", lr=4e-3, weight_decay=0.05, options={"eps": 1e-6})
    lion = replaced(plans_own, "lion")

    assert (lion["name"], lion["lr"], lion["weight_decay"]) == ("Lion", 1.2e-3, 0.15)
    assert lion["options"] == {"betas": [0.9, 0.99]}
    assert replaced(plans_own, "prodigy")["lr"] == 1.0
    assert replaced(plans_own, "adamw") == plans_own.model_dump(mode="json")


def test_what_a_checkpoint_takes_is_known_of_every_optimizer():
    assert all(known.state.split()[-1].isdecimal() for known in KNOWN.values())


def test_an_unknown_one_gets_the_nearest():
    with pytest.raises(UserError) as raised:
        replaced(Optimizer(name="AdamW", lr=1e-3), "Muno")

    assert "Muon" in raised.value.hint and raised.value.code == 2
    assert raised.value.problem == "--optimizer: no optimizer called 'Muno'"


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError) as raised:
        of("Lion")

    assert "pytorch_optimizer" in raised.value.problem and "optimizers]" in raised.value.hint
