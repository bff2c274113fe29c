"""Optimizers by name: what is known, refused, and made of one kernel."""

import pytest
import torch
from torch import nn

from lmplay.errors import UserError
from lmplay.optim.known import find
from lmplay.optim.registry import build, has_fused_kernel, is_maskable


def built(name, lr=0.1, weight_decay=0.0, shape=(4, 4), **options):
    """An optimizer over one weight of ones."""
    weight = nn.Parameter(torch.ones(shape))
    group = {"params": [weight], "lr": lr, "weight_decay": weight_decay}
    return build(find(name, "optimizer"), options, [group], "optimizer")


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("AdamV", {}, "Adam"),
        ("LBFGS", {}, "LBFGS"),
        ("AdamW", {"beta": [0.9, 0.95]}, "betas"),
        ("AdamW", {"betas": [0.9, 1.5]}, "beta"),
        ("AdamW", {"fused": True, "foreach": True}, "fused"),
        ("Rprop", {"weight_decay": 0.1}, "weight_decay"),
        ("Muon", {"shape": (4,)}, "(4,)"),
    ],
)
def test_an_unknown_optimizer_or_option_is_named(name, values, told):
    with pytest.raises(UserError) as raised:
        built(name, **values)

    assert raised.value.code == 2 and raised.value.problem.startswith("optimizer")
    assert told in raised.value.problem + raised.value.hint


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_the_update_is_one_kernel_where_torch_has_it_and_nobody_chose_another(name):
    fused, chosen = built(name), built(name, foreach=True)

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


def test_a_kernel_that_a_device_lacks_is_not_asked_for():
    assert has_fused_kernel(torch.optim.Adagrad, torch.device("cpu"))
    assert not has_fused_kernel(torch.optim.Adagrad, torch.device("mps"))
    assert not has_fused_kernel(torch.optim.RMSprop, torch.device("cpu"))
