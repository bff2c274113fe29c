"""DeMo: processes tell each other only the largest frequencies of their own momentum.

Own code: the packaged version needs another package, a group of processes even where there is one,
and takes no convolutions.
Source: Peng, Quesnelle and Kingma 2024, arXiv:2411.19870, algorithm 1.
"""

import math
from functools import cache

import torch
from torch import Tensor
from torch import distributed as dist

# N blocks of a weight, A rows of a block, B its columns, K numbers told of a block


class DeMo(torch.optim.Optimizer):
    """Steps of one size for every number, whose signs come from what all processes tell.

    Each process adds its own gradient, which nobody has averaged, to a momentum of its own; takes
    the `top` largest numbers of the cosine transform of each block out of it; and steps by the sign
    of what the mean of all processes' numbers is turned back to. Weights stay equal everywhere.

    Args:
        beta: what of the momentum is left after a step.
        top: numbers told of each block.
        block: most rows and columns of a block; it has the largest divisors up to that.
    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        beta: float = 0.999,
        top: int = 32,
        block: int = 64,
    ):
        if not 0 <= beta <= 1 or top < 1 or block < 1:
            raise ValueError(f"beta={beta}, top={top} or block={block} is out of its range")
        defaults = {"beta": beta, "top": int(top), "block": int(block)}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **defaults})

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; all processes must take part."""
        loss = closure() if closure is not None else None
        told = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    told.append((group, p, *self._tell(group, p)))
        everyone = _exchanged([(at_NK, values_NK) for *_, at_NK, values_NK in told])
        for (group, p, *_), of_ranks in zip(told, everyone, strict=True):
            size = block_size(p, group["block"])
            at_NK, values_NK = (torch.cat(parts, -1) for parts in zip(*of_ranks, strict=True))
            mean_NAB = _spread(at_NK, values_NK, size)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(from_blocks(turned_back(mean_NAB), p.shape).sign_(), alpha=group["lr"])
        return loss

    def _tell(self, group: dict, p: Tensor) -> tuple[Tensor, Tensor]:
        """Places and values of the largest numbers, which are taken out of the momentum."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum, size = state["momentum"], block_size(p, group["block"])
        momentum.mul_(group["beta"]).add_(p.grad, alpha=group["lr"])
        turned_NF = turned(to_blocks(momentum, size)).flatten(1)
        at_NK = turned_NF.abs().topk(min(group["top"], turned_NF.shape[1]), sorted=False).indices
        values_NK = turned_NF.gather(1, at_NK)
        momentum.sub_(from_blocks(turned_back(_spread(at_NK, values_NK, size)), p.shape))
        return at_NK, values_NK

    def state_dict(self) -> dict:
        """The state with every process's momentum, one behind the other; all must take part."""
        whole = super().state_dict()
        state = {
            index: {"momentum": torch.stack(_of_all(values["momentum"]))}
            for index, values in whole["state"].items()
        }
        return {**whole, "state": state}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up this process's momentum; the mean of all where there were more or fewer."""
        rank, size = _place()
        state = {
            index: {"momentum": m[rank].clone() if len(m) == size else m.mean(0)}
            for index, m in ((i, values["momentum"]) for i, values in state_dict["state"].items())
        }
        super().load_state_dict({**state_dict, "state": state})


def block_size(p: Tensor, most: int) -> tuple[int, int]:
    """Rows and columns of the blocks of a weight, of which all dimensions but the first are one."""
    return tuple(max(d for d in range(1, most + 1) if size % d == 0) for size in _matrix(p).shape)


def to_blocks(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The blocks of a weight, shape (N, A, B)."""
    (A, B), x = size, _matrix(x)
    return x.unflatten(1, (-1, B)).unflatten(0, (-1, A)).transpose(1, 2).reshape(-1, A, B)


def from_blocks(x_NAB: Tensor, shape: torch.Size) -> Tensor:
    """The weight of this shape whose blocks these are."""
    rows = (shape[0] if shape else 1) // x_NAB.shape[1]
    return x_NAB.unflatten(0, (rows, -1)).transpose(1, 2).reshape(shape)


def turned(x_NAB: Tensor) -> Tensor:
    """The cosine transform of each block, which keeps lengths."""
    A, B = x_NAB.shape[1:]
    return cosines(A, x_NAB.dtype, x_NAB.device) @ x_NAB @ cosines(B, x_NAB.dtype, x_NAB.device).T


def turned_back(x_NAB: Tensor) -> Tensor:
    """The reverse of `turned`."""
    A, B = x_NAB.shape[1:]
    return cosines(A, x_NAB.dtype, x_NAB.device).T @ x_NAB @ cosines(B, x_NAB.dtype, x_NAB.device)


@cache
def cosines(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthogonal matrix of the cosine transform (its second form), one row a frequency."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    place = frequency.T + 0.5
    made = (math.pi / size * frequency * place).cos() * (2 / size) ** 0.5
    made[0] = size**-0.5
    return made.to(device, dtype)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(1, 1) if x.dim() == 0 else x.reshape(x.shape[0], -1)


def _spread(at_NK: Tensor, values_NK: Tensor, size: tuple[int, int]) -> Tensor:
    """Blocks of zeros but for these numbers; of several for one place the mean."""
    flat_NF = values_NK.new_zeros(len(at_NK), size[0] * size[1])
    flat_NF.scatter_reduce_(1, at_NK, values_NK, "mean", include_self=False)
    return flat_NF.unflatten(1, size)


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _of_all(x: Tensor) -> list[Tensor]:
    """A tensor of each process, in their order."""
    if _place()[1] == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(_place()[1])]
    dist.all_gather(parts, x.contiguous())
    return parts


def _exchanged(told: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    """What every process tells of each parameter: in two messages for all of them."""
    if not told:
        return []
    at, values = (
        _of_all(torch.cat([x.flatten() for x in each])) for each in zip(*told, strict=True)
    )
    sizes = [at_NK.numel() for at_NK, _ in told]
    split = [
        list(zip(a.split(sizes), v.split(sizes), strict=True))
        for a, v in zip(at, values, strict=True)
    ]
    return [
        [(a.view_as(at_NK), v.view_as(at_NK)) for a, v in of_ranks]
        for (at_NK, _), of_ranks in zip(told, zip(*split, strict=True), strict=True)
    ]
