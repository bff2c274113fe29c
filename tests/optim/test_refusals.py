"""Optimizers that a device or slices of weights would make wrong are refused."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close

from lmplay.errors import UserError
from lmplay.optim import refusals
from lmplay.optim.known import KNOWN
from lmplay.optim.refusals import refuse_fsdp, refuse_wrong_updates, wrong_update
from lmplay.optim.registry import build
from lmplay.optim.rules import rule_of
from lmplay.plan import Optimizer, RoleRule

CPU = torch.device("cpu")


def wrong(wanted, role="matrix"):
    return wrong_update(rule_of(wanted, role), CPU)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "Muon", "Adafactor", "Rprop"])
def test_updates_that_are_the_cpu_s_are_not_wrong(name):
    assert wrong(Optimizer(name=name, lr=0.01)) is None


@pytest.mark.parametrize(
    "values", [{"lr": 1e-30}, {"lr": 1e38}, {"lr": 1, "weight_decay": 1e38}], ids=str
)
def test_values_that_no_device_can_do_with_are_no_wrong_device(values):
    assert wrong(Optimizer(name="AdamW", **values)) is None


def test_changed_steps_are_compared_too():
    options = {"cautious": True, "decay": "independent"}

    assert wrong(Optimizer(name="AdamW", lr=0.01, weight_decay=0.1, options=options)) is None


class Other(torch.optim.AdamW):
    """Right for the first one that steps, which is on the CPU."""

    stepped = ()
    fault = ""

    def step(self, closure=None):
        if self not in self.stepped:
            self.stepped.append(self)
        is_other = self is not self.stepped[0]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        before = [weight.detach().clone() for weight in weights]
        if self.fault == "nothing is decayed" and is_other:
            for group in self.param_groups:
                group["weight_decay"] = 0.0
        super().step(closure)
        for weight, old in zip(weights, before, strict=True):
            is_transposed = not weight.is_contiguous()
            stays = {"transposed weights stay": is_transposed, "vectors stay": weight.dim() == 1}
            if is_other and stays.get(self.fault):
                weight.data = old


def replaced(monkeypatch, fault):
    kind = type("AdamW", (Other,), {"fault": fault, "stepped": []})
    monkeypatch.setattr(torch.optim, "AdamW", kind)


@pytest.mark.parametrize("fault", ["transposed weights stay", "vectors stay", "nothing is decayed"])
def test_a_device_that_updates_otherwise_is_found_out(monkeypatch, fault):
    replaced(monkeypatch, fault)

    told = wrong(Optimizer(name="AdamW", lr=0.01, weight_decay=1.0))
    assert told.startswith("they are off by")


def test_the_cpu_is_not_compared_with_itself_and_every_rule_is_asked_elsewhere(monkeypatch):
    asked = []
    monkeypatch.setattr(refusals, "wrong_update", lambda rule, device: asked.append(rule) or "off")
    wanted = Optimizer(name="AdamW", lr=0.1, roles={"head": RoleRule(name="SGD")})
    refuse_wrong_updates(wanted, CPU)
    assert not asked
    with pytest.raises(UserError, match="mps updates weights wrongly by AdamW: off"):
        refuse_wrong_updates(wanted, torch.device("mps"))
    monkeypatch.setattr(
        refusals, "wrong_update", lambda rule, device: asked.append(rule.known.name)
    )
    asked.clear()
    refuse_wrong_updates(wanted, torch.device("mps"))

    assert sorted(asked) == ["AdamW", "SGD"]
    asked.clear()
    refuse_wrong_updates(Optimizer(name="Kron", lr=0.1), torch.device("mps"))
    assert asked == ["AdamW"]  # which trains the rest; every device would draw other probes


@pytest.mark.parametrize("name", [n for n, k in KNOWN.items() if k.by_matrix or k.local_gradients])
def test_slices_are_refused_whoever_shares_work_or_gradients(name):
    with pytest.raises(UserError, match=f"--shard: {name} needs whole weights"):
        refuse_fsdp(Optimizer(name=name, lr=0.1))


@pytest.mark.parametrize(
    "wanted",
    [
        Optimizer(name="Muon", lr=0.1),
        Optimizer(name="AdamW", lr=0.1, roles={"matrix": RoleRule(name="Adafactor")}),
        Optimizer(name="AdamW", lr=0.1, options={"hyperball": True}),
    ],
)
def test_slices_are_refused_whoever_needs_whole_matrices(wanted):
    with pytest.raises(UserError, match="--shard"):
        refuse_fsdp(wanted)
    refuse_fsdp(Optimizer(name="AdamW", lr=0.1, roles={"head": RoleRule(name="SGD")}))


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_whatever_fsdp_takes_updates_spread_weights_as_whole_ones(alone):
    mesh = init_device_mesh("cpu", (1,))
    draw = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 6, 3, generator=draw)
    for known in KNOWN.values():
        if not known.is_elementwise:
            continue
        ends = []
        for is_spread in (False, True):
            place = (lambda x: distribute_tensor(x, mesh, [Shard(0)])) if is_spread else torch.clone
            weight = nn.Parameter(place(start))
            group = {"params": [weight], "lr": 0.01, "weight_decay": 0.0, "role": "matrix"}
            optimizer = build(known, dict(known.options), [group], "optimizer")
            for gradient in gradients:
                weight.grad = place(gradient)
                optimizer.step()
            ends.append(weight.full_tensor() if is_spread else weight)

        assert_close(ends[1].detach(), ends[0].detach(), msg=lambda text, k=known: k.name + text)
