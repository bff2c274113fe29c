"""Where an optimizer would be wrong: on some devices, and on slices of weights."""

import torch
from torch import Tensor, nn

from lmplay.errors import UserError
from lmplay.model.roles import ROLES
from lmplay.optim.known import KNOWN
from lmplay.optim.registry import build
from lmplay.optim.rules import Rule, rule_of
from lmplay.plan import Optimizer

CLOSE = 0.1  # of an update; Muon computes its own in bf16


def refuse_fsdp(wanted: Optimizer) -> None:
    """Raise a UserError unless every optimizer updates a slice of a weight as in the whole."""
    for rule in _rules(wanted):
        whole = {"cautious", "hyperball"} & set(rule.options)  # they measure whole tensors
        if not rule.known.is_elementwise or whole:
            fit = [known.name for known in KNOWN.values() if known.is_elementwise]
            raise UserError(
                f"--shard: {rule.known.name} needs whole weights and gradients, and each process "
                "has slices",
                hint=f"these do not: {', '.join(fit)}",
            )


def refuse_wrong_updates(wanted: Optimizer, device: torch.device) -> None:
    """Raise a UserError where a few updates on this device are not those on the CPU.

    The CPU itself is not compared with itself. An optimizer that draws random numbers is left out,
    since every device draws others, and so is one that needs more of a step than its gradients.
    """
    if device.type == "cpu":
        return
    for rule in _rules(wanted):
        if not rule.known.is_comparable:
            continue
        if told := wrong_update(rule, device):
            raise UserError(
                f"{device.type} updates weights wrongly by {rule.known.name}: {told}",
                hint="--set optimizer.options.foreach=true, --device cpu, or another torch",
            )


def wrong_update(rule: Rule, device: torch.device) -> str | None:
    """How far the updates on a device are from those on the CPU; None where they are close.

    The weights are as large and as many as kernels treat apart, and a vector for optimizers that
    take one. One matrix lies transposed in memory: on MPS such weights once stayed as they were
    (pytorch/pytorch#118115).
    """
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(300, 300, generator=draw), torch.randn(64, 48, generator=draw).T]
    weights += [torch.randn(4, 4, generator=draw) for _ in range(32)]
    if rule.known.takes_role("vector") and not rule.known.by_role:
        weights.append(torch.randn(7, generator=draw))
    gradients = [
        [torch.randn(weight.shape, generator=draw) for weight in weights] for _ in range(3)
    ]
    exact = _updated(rule, weights, gradients, torch.device("cpu"))
    for weight, right, found in zip(
        weights, exact, _updated(rule, weights, gradients, device), strict=True
    ):
        moved, off = (right - weight).norm(), (found - right).norm()
        if right.isfinite().all() and not off <= CLOSE * moved:
            return f"they are off by {off:.1e} where they move by {moved:.1e}"
    return None


def _updated(
    rule: Rule, weights: list[Tensor], gradients: list[list[Tensor]], device: torch.device
) -> list[Tensor]:
    """Weights after some steps on a device, on the CPU."""
    mine = [nn.Parameter(weight.clone().to(device)) for weight in weights]
    group = {"params": mine, "lr": 0.01, "weight_decay": rule.weight_decay, "role": rule.role}
    group |= {"full_lr": 0.01, "lr_scale": 1.0}
    optimizer = build(rule.known, rule.options, [group], rule.key)
    for step in gradients:
        for weight, gradient in zip(mine, step, strict=True):
            weight.grad = torch.empty_like(weight).copy_(gradient)
        optimizer.step()
    return [weight.detach().cpu() for weight in mine]


def _rules(wanted: Optimizer) -> list[Rule]:
    """The rules of a plan, each optimizer with its options once."""
    every = [rule_of(wanted, role) for role in [*ROLES, *wanted.roles]]
    return list({(r.known.name, repr(r.options)): r for r in every}.values())
