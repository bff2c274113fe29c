"""One model spread over processes by torch's fully_shard (FSDP2), its state gathered and scattered.

Every process holds a slice of each weight, of its gradient and of its optimizer state. A whole
weight exists only while its block runs. A checkpoint holds whole tensors, whoever wrote it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lmplay.errors import UserError


def apply_fsdp(objective: nn.Module, device: torch.device) -> list[nn.Module]:
    """Spread the parameters over all processes, in place: a group for each block, one for the rest.

    Only calls of `objective` see whole weights: a method called around it sees slices. Precision
    stays autocast's, so weights and gradients travel as they are stored.

    Returns:
        The blocks, each of which may be compiled; the whole may not.
    Raises:
        UserError: a parameter without dimensions, which cannot be spread.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for name, parameter in objective.named_parameters():
        if parameter.dim() == 0:
            raise UserError(f"--shard: {name} is a single number", "give it the shape (1,)")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    found = blocks(objective)
    for block in found:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in objective.parameters())
    return found


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost ModuleLists that repeat one class of the experiment's own.

    A member that shares a parameter with anything outside it is left out.
    """
    users: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, set()).add(module)
    found = []
    for block in _repeated(model):
        inside = set(block.modules())
        parameters = list(block.parameters())
        if parameters and all(users[parameter] <= inside for parameter in parameters):
            found.append(block)
    return found


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            yield from _repeated(child)
            continue
        members = list(child.children())  # each once
        kinds = {type(member) for member in members}
        if len(members) > 1 and len(kinds) == 1 and not kinds.pop().__module__.startswith("torch."):
            yield from members


@contextmanager
def no_sync(objective: nn.Module) -> Iterator[None]:
    """While entered, gradients are added up whole in each process and not exchanged."""
    objective.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        objective.set_requires_gradient_sync(True)


@torch.no_grad()
def gather_state(state, keep: bool = True, device: torch.device | str | None = None):
    """A state dict in which every spread tensor is whole; all processes must take part.

    A tensor that is there twice stays one. Without spread tensors it is given back as it is.

    Args:
        state: of a model with `keep_vars=True`, or of an optimizer.
        keep: False on a process that needs no result: its spread tensors become None.
        device: where the whole tensors end up; None leaves them where they are.
    """
    gathered: dict[int, Tensor | None] = {}

    def gather(value):
        if not hasattr(value, "full_tensor"):
            return value
        if id(value) not in gathered:
            full = value.full_tensor().detach()
            gathered[id(value)] = full.to(device or full.device) if keep else None
        return gathered[id(value)]

    return tree_map(gather, state)


def scatter_tensor(value, like: Tensor):
    """This process's slice of `value`, if that is a whole tensor and `like` one that is spread."""
    if not hasattr(like, "full_tensor") or getattr(value, "shape", None) != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def scatter_model_state(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A whole state dict as the model's own is: spread where that is."""
    likes = model.state_dict()
    return {key: scatter_tensor(value, likes.get(key, value)) for key, value in weights.items()}


def scatter_optimizer_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """A whole optimizer state as the optimizer's own would be: spread where its parameters are."""
    likes = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_each = {
        index: {key: scatter_tensor(value, likes[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": of_each}
