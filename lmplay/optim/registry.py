"""Optimizers by name: what each takes, and how one is built over groups of parameters."""

import inspect
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from lmplay.errors import UserError, nearest

_UNFIT = {"Optimizer", "LBFGS", "SparseAdam"}  # abstract; needs a closure; needs sparse gradients
# each number of a weight is updated from its own gradient alone, so a slice as in the whole weight;
# of the others in torch 2.13, Adafactor looks at whole rows and columns, Muon at whole matrices
_ELEMENTWISE = {
    *("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
}
_MATRICES_ONLY = {"Muon"}


@dataclass(frozen=True)
class KnownOptimizer:
    """An optimizer that a plan can name."""

    name: str
    kind: type[torch.optim.Optimizer]
    is_elementwise: bool  # a slice of a weight is updated as in the whole weight
    takes: frozenset[str] | None = None  # roles that it trains; None for all
    rest: str = "AdamW"  # trains the other roles, where the plan names nothing else

    @property
    def accepted(self) -> set[str]:
        """Names of its options; the rate and the decay are no options."""
        return set(inspect.signature(self.kind).parameters) - {"params", "lr", "weight_decay"}

    @property
    def has_decay(self) -> bool:
        """Whether it takes a weight decay."""
        return "weight_decay" in inspect.signature(self.kind).parameters


def entries() -> dict[str, KnownOptimizer]:
    """Every optimizer by its name."""
    known = {
        name: KnownOptimizer(
            name,
            kind,
            name in _ELEMENTWISE,
            frozenset({"matrix"}) if name in _MATRICES_ONLY else None,
        )
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    return {name: known[name] for name in sorted(known.keys() - _UNFIT)}


def find(name: str, key: str) -> KnownOptimizer:
    """The optimizer called `name`.

    Args:
        key: of the plan, for the message.
    Raises:
        UserError: there is none.
    """
    known = entries()
    if name not in known:
        hint = nearest(name, known) + f"there are {', '.join(known)}"
        raise UserError(f"{key}.name: no optimizer called {name!r}", hint=hint)
    return known[name]


def build(
    entry: KnownOptimizer, options: dict, groups: list[dict], key: str
) -> torch.optim.Optimizer:
    """One optimizer over groups that say their own rate and decay.

    Fused kernels are used where torch has them for the parameters' device.

    Args:
        key: of the plan, for the message.
    Raises:
        UserError: it has no such option, has no decay, or refuses a value.
    """
    if not entry.has_decay:
        if any(group["weight_decay"] for group in groups):
            raise UserError(f"{key}.weight_decay: {entry.name} has none", hint="set it to 0")
        groups = [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]
    for option in options:
        if option not in entry.accepted:
            takes = ", ".join(sorted(entry.accepted))
            hint = nearest(option, entry.accepted) + f"{entry.name} takes {takes}"
            raise UserError(f"{key}.options: {entry.name} has no {option!r}", hint=hint)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    if not options.get("foreach") and has_fused_kernel(entry.kind, groups[0]["params"][0].device):
        options.setdefault("fused", True)
    try:
        return entry.kind(groups, lr=groups[0]["lr"], **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{key}: {entry.name} refuses: {error}") from None


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
