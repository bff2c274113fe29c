"""From a plan's optimizer to who trains each parameter."""

import pytest
import torch
from torch import nn

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.model.experiment import load_experiment
from lmplay.model.roles import roles_of
from lmplay.optim.rules import groups_of
from lmplay.plan import Optimizer, RoleRule

PLAIN = Optimizer(name="AdamW", lr=0.1, weight_decay=0.3)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Claiming(Model):
    def parameter_groups(self):
        return [
            {"params": [self.linear.weight], "lr_scale": 0.1, "weight_decay": 0.5},
            {"params": [self.norm.weight], "role": "gain"},
        ]


ROLES = {"linear.weight": "matrix", "linear.bias": "vector"}
ROLES |= {"norm.weight": "vector", "norm.bias": "vector"}


def groups(wanted=PLAIN, model=None, **roles):
    return groups_of(wanted, model or Model(), {**ROLES, **roles})


def with_roles(**roles):
    return PLAIN.model_copy(update={"roles": {k: RoleRule(**v) for k, v in roles.items()}})


def test_weight_decay_falls_on_matrices_only():
    for group in groups():
        assert {p.dim() > 1 for p in group.params} == {group.weight_decay == 0.3}


def test_a_decay_that_is_meant_for_vectors_falls_on_them():
    decays = {g.rule.role: g.weight_decay for g in groups(with_roles(vector={"weight_decay": 0.2}))}

    assert decays == {"matrix": 0.3, "vector": 0.2}


def test_a_role_differs_in_what_is_said_of_it_and_in_nothing_else():
    wanted = with_roles(matrix={"lr": 0.5, "options": {"eps": 1e-9}}, vector={"name": "SGD"})
    wanted = wanted.model_copy(update={"options": {"betas": [0.8, 0.9], "eps": 1e-7}})
    of = {group.rule.role: group for group in groups(wanted)}

    assert of["matrix"].rule.known.name == "AdamW" and of["matrix"].lr == 0.5
    assert of["matrix"].rule.options == {"betas": [0.8, 0.9], "eps": 1e-9}
    assert of["vector"].rule.known.name == "SGD" and of["vector"].lr == 0.1
    assert of["vector"].rule.options == {}


def test_what_an_optimizer_does_not_take_is_trained_by_another():
    wanted = Optimizer(name="Muon", lr=0.1, weight_decay=0.3, options={"momentum": 0.9})
    of = {group.rule.role: group.rule for group in groups(wanted)}

    assert (of["matrix"].known.name, of["vector"].known.name) == ("Muon", "AdamW")
    assert of["matrix"].options == {"momentum": 0.9} and of["vector"].options == {
        "betas": [0.9, 0.95]
    }


def test_a_model_may_ask_for_a_scale_a_decay_and_a_role_of_its_own():
    roles = {"norm.weight": "gain"}
    of = {g.rule.role: g for g in groups(with_roles(gain={"lr": 3.0}), Claiming(), **roles)}

    assert (of["matrix"].lr_scale, of["matrix"].weight_decay) == (0.1, 0.5)
    assert of["matrix"].lr == pytest.approx(0.01)
    assert (of["gain"].lr, of["gain"].weight_decay, len(of["gain"].params)) == (3.0, 0.0, 1)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (with_roles(conv={"lr": 1.0}), ["optimizer.roles.conv", "no parameter", "matrix, vector"]),
        (with_roles(matrx={"lr": 1.0}), ["optimizer.roles.matrx", "did you mean 'matrix'"]),
        (with_roles(matrix={"name": "Adan"}), ["optimizer.roles.matrix.name", "Adan"]),
    ],
)
def test_a_rule_that_is_for_nothing_is_refused(wanted, told):
    with pytest.raises(UserError) as raised:
        groups(wanted)

    assert raised.value.code == 2
    assert all(word in raised.value.problem + raised.value.hint for word in told)


def test_a_role_without_a_rule_is_refused():
    with pytest.raises(UserError) as raised:
        groups(PLAIN, Claiming(), **{"norm.weight": "gain"})

    assert "norm.weight the role 'gain'" in raised.value.problem
    assert "--set optimizer.roles.gain.lr=0.1" in raised.value.hint


@pytest.mark.parametrize("name", ["gpt2ish", "ue", "uw6", "llama_tied"])
def test_every_parameter_of_an_experiment_is_trained_once(name):
    experiment = load_experiment(resolve(name))
    config = experiment.config(**experiment.tiny)
    model = experiment.model(config, device="meta")
    model.get_parameter(next(n for n, _ in model.named_parameters())).requires_grad_(False)
    found = groups_of(PLAIN, model, roles_of(experiment, config))

    given = [id(p) for group in found for p in group.params]
    assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(isinstance(p, torch.Tensor) for group in found for p in group.params)
