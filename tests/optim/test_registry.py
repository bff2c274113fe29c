"""Optimizers by name, and who decays."""

import pytest
import torch
from torch import nn

from lmplay.errors import UserError
from lmplay.optim.registry import (
    has_fused_kernel,
    is_maskable,
    make_optimizer,
    refuse_wrong_updates,
    set_learning_rate,
)
from lmplay.plan import Optimizer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Claiming(Model):
    def parameter_groups(self):
        return [{"params": [self.linear.weight], "lr_scale": 0.1, "weight_decay": 0.5}]


def test_weight_decay_falls_on_matrices_only():
    optimizer = make_optimizer(Optimizer(name="AdamW", lr=0.1, weight_decay=0.3), Model())

    for group in optimizer.param_groups:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] == 0.3}


def test_every_parameter_is_given_to_the_optimizer_once():
    for model in (Model(), Claiming()):
        optimizer = make_optimizer(Optimizer(name="Adagrad", lr=0.1), model)
        given = [id(p) for group in optimizer.param_groups for p in group["params"]]

        assert sorted(given) == sorted(id(p) for p in model.parameters())


def test_a_model_may_claim_parameters_with_a_scale_and_a_decay_of_their_own():
    model = Claiming()
    optimizer = make_optimizer(Optimizer(name="SGD", lr=1.0, weight_decay=0.1), model)
    set_learning_rate(optimizer, 2.0)

    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 2.0]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (Optimizer(name="AdamV", lr=1e-3), "AdamW"),
        (Optimizer(name="LBFGS", lr=1e-3), "LBFGS"),
        (Optimizer(name="AdamW", lr=1e-3, options={"beta": [0.9, 0.95]}), "betas"),
        (Optimizer(name="AdamW", lr=1e-3, options={"betas": [0.9, 1.5]}), "beta"),
        (Optimizer(name="AdamW", lr=1e-3, options={"fused": True, "foreach": True}), "fused"),
    ],
)
def test_an_unknown_optimizer_or_option_is_named(wanted, told):
    with pytest.raises(UserError) as raised:
        make_optimizer(wanted, Model())

    assert told in raised.value.problem + raised.value.hint


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_the_update_is_one_kernel_where_torch_has_it_and_nobody_chose_another(name):
    fused, chosen = (
        make_optimizer(Optimizer(name=name, lr=0.1, options=options), Model())
        for options in ({}, {"foreach": True})
    )

    assert fused.defaults["fused"] and not chosen.defaults["fused"]


class Deaf(torch.optim.AdamW):
    """Fused, and updates whatever the flag says."""

    def step(self, closure=None):
        self.found_inf = None
        return super().step(closure)


def test_a_kernel_that_heeds_no_flag_is_not_masked_by_one():
    weight = nn.Parameter(torch.ones(2))

    assert is_maskable(torch.optim.AdamW([weight], fused=True))
    assert not is_maskable(Deaf([weight], fused=True))
    assert not is_maskable(torch.optim.AdamW([weight], foreach=True))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "Muon", "Adafactor", "Rprop"])
def test_updates_that_are_the_cpu_s_are_not_refused(name):
    refuse_wrong_updates(Optimizer(name=name, lr=0.01), torch.device("cpu"))


@pytest.mark.parametrize(
    "values", [{"lr": 1e-30}, {"lr": 1e38}, {"lr": 1, "weight_decay": 1e38}], ids=str
)
def test_values_that_no_device_can_do_with_are_no_wrong_device(values):
    refuse_wrong_updates(Optimizer(name="AdamW", **values), torch.device("cpu"))


@pytest.mark.parametrize("wrong", ["transposed weights stay", "vectors stay", "nothing is decayed"])
def test_a_device_that_updates_otherwise_is_refused(monkeypatch, wrong):
    stepped = []

    class Other(torch.optim.AdamW):
        """Right on the CPU, whose optimizer is the first to step."""

        def step(self, closure=None):
            if self not in stepped:
                stepped.append(self)
            weights = [weight for group in self.param_groups for weight in group["params"]]
            before = [weight.detach().clone() for weight in weights]
            if wrong == "nothing is decayed" and self is not stepped[0]:
                for group in self.param_groups:
                    group["weight_decay"] = 0.0
            super().step(closure)
            for weight, old in zip(weights, before, strict=True):
                is_transposed = wrong == "transposed weights stay" and not weight.is_contiguous()
                is_vector = wrong == "vectors stay" and weight.dim() == 1
                if self is not stepped[0] and (is_transposed or is_vector):
                    weight.data = old

    Other.__name__ = "AdamW"
    monkeypatch.setattr(torch.optim, "AdamW", Other)
    with pytest.raises(UserError) as caught:
        refuse_wrong_updates(
            Optimizer(name="AdamW", lr=0.01, weight_decay=1.0), torch.device("cpu")
        )

    assert caught.value.problem.startswith("cpu updates weights wrongly by AdamW: ")


def test_a_kernel_that_a_device_lacks_is_not_asked_for():
    assert has_fused_kernel(torch.optim.Adagrad, torch.device("cpu"))
    assert not has_fused_kernel(torch.optim.Adagrad, torch.device("mps"))
    assert not has_fused_kernel(torch.optim.RMSprop, torch.device("cpu"))


def test_an_optimizer_of_torch_minimises():
    names = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "RMSprop", "NAdam", "RAdam", "Rprop")
    for name in names:
        model = Model()
        optimizer = make_optimizer(Optimizer(name=name, lr=0.05), model)
        torch.manual_seed(0)
        x = torch.randn(32, 4)
        losses = []
        for _ in range(20):
            loss = (model.linear(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

        assert losses[-1] < losses[0], name
