"""One optimizer over groups of parameters: its arguments checked, its kernels chosen."""

import inspect
from functools import cache, partial

import torch
from torch import nn

from lmplay.errors import UserError, nearest
from lmplay.optim.known import KnownOptimizer
from lmplay.optim.modifiers import MODIFIERS, Modified
from lmplay.optim.momentum import RAMP, Ramp, full_momentum
from lmplay.optim.spread import Spread

# of torch 2.13's fused kernels, those that DTensor knows; for the others the host waits
_FUSED_ON_SLICES = ("Adam", "AdamW")


def build(
    known: KnownOptimizer, options: dict, groups: list[dict], key: str, spread: bool = False
) -> torch.optim.Optimizer:
    """One optimizer over groups that say their own rate and decay.

    Fused kernels are used where torch has them for the parameters' device. What `Modified` takes is
    an option of every optimizer, but for those that hold their weights in place by themselves; what
    a `Ramp` takes, of every one with `momentum`, or with `betas` unless it holds its weights.

    Args:
        key: of the plan, for the message.
        spread: let each process take some whole matrices, where the optimizer is one of these.
    Raises:
        UserError: it has no such option, has no decay, refuses a value, or is not installed.
    """
    arguments = arguments_of(known.kind)
    if "weight_decay" not in arguments and "decay" not in options:
        if any(group["weight_decay"] for group in groups):
            raise UserError(f"{key}.weight_decay: {known.name} has none", hint="set it to 0")
        groups = [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]
    accepted = arguments - {"lr", "weight_decay", *known.fixed}
    if not known.holds_weights:
        accepted |= set(MODIFIERS) - set(known.fixed)
    if known.local_gradients:
        accepted -= {"cautious"}  # a process's own gradient agrees with no other's
    if "momentum" in arguments or ("betas" in arguments and not known.holds_weights):
        accepted |= set(RAMP)
    for option in options:
        if option not in accepted:
            takes = ", ".join(sorted(accepted))
            hint = nearest(option, accepted) + f"{known.name} takes {takes}"
            raise UserError(f"{key}.options: {known.name} has no {option!r}", hint=hint)
    by_role = known.by_role.get(groups[0].get("role"), {})
    options = {**known.fixed, **by_role, **options}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    changed, ramp = (
        {k: options.pop(k) for k in names if k in options and k not in arguments}
        for names in (MODIFIERS, RAMP)
    )
    first = groups[0]["params"][0]
    is_fused = has_fused_kernel(known.kind, first.device) and not options.get("foreach")
    if is_fused and (not hasattr(first, "full_tensor") or known.name in _FUSED_ON_SLICES):
        options.setdefault("fused", True)
    try:
        kind = (
            partial(Spread, optimizer_class=known.kind)
            if spread and known.by_matrix
            else known.kind
        )
        made = kind(groups, lr=groups[0]["lr"], **options)
        for group in made.param_groups if ramp else []:
            group["momentum_ramp"] = Ramp(full=full_momentum(group), **ramp).numbers
        return Modified(made, **changed) if changed else made
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{key}: {known.name} refuses: {error}") from None


def arguments_of(kind: type) -> set[str]:
    """Names of what a class takes besides the parameters, and of what ours hand on to ours."""
    given = inspect.signature(kind).parameters.values()
    names = {one.name for one in given if one.kind is not one.VAR_KEYWORD} - {"params"}
    parent = kind.__base__
    hands_on = len(names) + 1 < len(given) and parent.__module__.startswith("lmplay.")
    return names | arguments_of(parent) if hands_on else names


def has_fused_kernel(kind: type[torch.optim.Optimizer], device: torch.device) -> bool:
    """True where torch updates all weights of a device in one kernel; Adagrad on MPS has none."""
    try:
        name = f"aten::_fused_{kind.__name__.lower()}_"
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, device.type.upper())
    except RuntimeError:  # no such operator on any device
        return False


def is_maskable(optimizer: torch.optim.Optimizer) -> bool:
    """True where the update can be skipped on the device, by a flag that the host never reads."""
    device = optimizer.param_groups[0]["params"][0].device
    return bool(optimizer.defaults.get("fused")) and _heeds_its_flag(type(optimizer), device)


@cache
def _heeds_its_flag(kind: type[torch.optim.Optimizer], device: torch.device) -> bool:
    """Found out: on MPS the kernels updated all the same (until pytorch/pytorch#186360)."""
    weight = nn.Parameter(torch.ones(4, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = kind([weight], lr=0.5, fused=True)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    return bool((weight == 1).all())
