"""Optimizers of torch by name, and the routing of parameters to them."""

import functools
import inspect

import torch
from torch import Tensor, nn

from lmplay.errors import UserError, nearest
from lmplay.model.abilities import has_groups
from lmplay.plan import Optimizer

CLOSE = 0.1  # of an update; Muon computes its own in bf16
_UNFIT = {"Optimizer", "LBFGS", "SparseAdam"}  # abstract; needs a closure; needs sparse gradients
# each number of a weight is updated from its own gradient alone, so a slice as in the whole weight;
# of the others in torch 2.13, Adafactor looks at whole rows and columns, Muon at whole matrices
_ELEMENTWISE = {
    *("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
}


def make_optimizer(wanted: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a plan over the parameters of a model.

    Weight decay falls on matrices (two dimensions or more) and never on vectors. A model's
    `parameter_groups()` may claim parameters first, each group with `lr_scale` and `weight_decay`
    of its own. Frozen parameters are in no group. Fused kernels are used where torch has them for
    the parameters' device.

    Raises:
        UserError: torch.optim has no such class, the class no such option, or it refuses a value.
    """
    known = {
        name: value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    names = sorted(set(known) - _UNFIT)
    if wanted.name not in names:
        hint = nearest(wanted.name, names) + f"there are {', '.join(names)}"
        raise UserError(f"optimizer.name: no optimizer called {wanted.name!r}", hint=hint)
    kind = known[wanted.name]
    accepted = set(inspect.signature(kind).parameters) - {"params", "lr"}
    if wanted.weight_decay and "weight_decay" not in accepted:
        raise UserError(f"optimizer.weight_decay: {wanted.name} has none", hint="set it to 0")
    accepted.discard("weight_decay")  # it goes with the groups
    for option in wanted.options:
        if option not in accepted:
            hint = nearest(option, accepted) + f"{wanted.name} takes {', '.join(sorted(accepted))}"
            raise UserError(f"optimizer.options: {wanted.name} has no {option!r}", hint=hint)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in wanted.options.items()}
    groups = _groups(model, wanted)
    if not options.get("foreach") and has_fused_kernel(kind, groups[0]["params"][0].device):
        options.setdefault("fused", True)
    try:
        return kind(groups, lr=wanted.lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer: torch.optim.{wanted.name} refuses: {error}") from None


def refuse_fsdp(wanted: Optimizer) -> None:
    """Raise a UserError unless the optimizer updates a slice of a weight as in the whole."""
    if wanted.name not in _ELEMENTWISE:
        raise UserError(
            f"--shard: {wanted.name} needs whole matrices, and each process has a slice of them",
            hint=f"these do not: {', '.join(sorted(_ELEMENTWISE))}",
        )


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


@functools.cache
def _heeds_its_flag(kind: type[torch.optim.Optimizer], device: torch.device) -> bool:
    """Found out: on MPS the kernels updated all the same (until pytorch/pytorch#186360)."""
    weight = nn.Parameter(torch.ones(4, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = kind([weight], lr=0.5, fused=True)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    return bool((weight == 1).all())


def refuse_wrong_updates(wanted: Optimizer, device: torch.device) -> None:
    """Raise a UserError where a few updates on this device are not those on the CPU.

    The weights are as large and as many as kernels treat apart, and a vector for optimizers that
    take one. One matrix lies transposed in memory: on MPS such weights once stayed as they were
    (pytorch/pytorch#118115).
    """
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(300, 300, generator=draw), torch.randn(64, 48, generator=draw).T]
    weights += [torch.randn(4, 4, generator=draw) for _ in range(32)]
    if wanted.name in _ELEMENTWISE:
        weights.append(torch.randn(7, generator=draw))
    models = [
        nn.ParameterList(weight.clone().to(place) for weight in weights)
        for place in ("cpu", device)
    ]
    optimizers = [make_optimizer(wanted, model) for model in models]
    for _ in range(3):
        gradients = [torch.randn(weight.shape, generator=draw) for weight in weights]
        for model, optimizer in zip(models, optimizers, strict=True):
            for mine, gradient in zip(model, gradients, strict=True):
                mine.grad = torch.empty_like(mine).copy_(gradient)
            set_learning_rate(optimizer, 0.01)
            optimizer.step()
    for before, *after in zip(weights, *models, strict=True):
        exact, found = (weight.detach().cpu() - before for weight in after)
        if exact.isfinite().all() and not (found - exact).norm() <= CLOSE * exact.norm():
            raise UserError(
                f"{device.type} updates weights wrongly by {wanted.name}: they are off by "
                f"{(found - exact).norm():.1e} where they move by {exact.norm():.1e}",
                hint="--set optimizer.options.foreach=true, --device cpu, or another torch",
            )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _groups(model: nn.Module, wanted: Optimizer) -> list[dict]:
    claimed: set[int] = set()
    groups = []
    for own in model.parameter_groups() if has_groups(model) else []:
        unknown = set(own) - {"params", "lr_scale", "weight_decay", "role"}
        if unknown:
            raise UserError(f"parameter_groups: unknown {sorted(unknown)}")
        params = [p for p in own["params"] if p.requires_grad]
        claimed |= {id(p) for p in params}
        decay = own.get("weight_decay", wanted.weight_decay)
        groups.append(_group(params, own.get("lr_scale", 1.0), decay))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in claimed]
    groups.append(_group([p for p in rest if p.dim() > 1], 1.0, wanted.weight_decay))
    groups.append(_group([p for p in rest if p.dim() <= 1], 1.0, 0.0))
    return [group for group in groups if group["params"]]


def _group(params: list[Tensor], lr_scale: float, weight_decay: float) -> dict:
    return {"params": params, "lr_scale": lr_scale, "weight_decay": weight_decay}
