"""Muon and its relatives: momentum of matrices, made orthogonal before it is a step.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al.
    2025, arXiv:2502.16982 (the scale that has AdamW's rates); Amsel et al. 2025, arXiv:2505.16932
    (Polar Express); Li et al. 2025, arXiv:2510.05491 (NorMuon); Si et al. 2025, arXiv:2507.11005.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lmplay.machine import resolve_precision

# O output rows of a matrix, I its inputs, N matrices of one shape

Coefficients = Sequence[tuple[float, float, float]]
EPS = 1e-7
LARGE = 256  # rows and columns from which a CPU's products in bf16 repay turning numbers into it
# of X becoming a X + (b A + c A A) X with A = X X', once for each round; the second lets all
# singular values above 0.001 end near one, if none begins above one
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
ITERATIONS = {"newton_schulz": (NEWTON_SCHULZ, 1.0), "polar_express": (POLAR_EXPRESS, 1.02)}
SCALES = {
    "rms": lambda O, I: 0.2 * max(O, I) ** 0.5,  # noqa: E741
    "original": lambda O, I: max(1.0, O / I) ** 0.5,  # noqa: E741
    "spectral": lambda O, I: (O / I) ** 0.5,  # noqa: E741
}


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are brought near one, at the size that `scale` says.

    Stacks of matrices, as of experts, are orthogonalised each for itself. Matrices of one shape go
    through the products together: in bf16 on CUDA, and on a CPU that has it in hardware where they
    are LARGE; else as they are.

    Args:
        params: groups of parameters with two dimensions or more; the last two are the matrix.
        lr: with the scale "rms", a rate of AdamW.
        weight_decay: decoupled: the weight shrinks by `lr * weight_decay`.
        momentum: of the average of gradients.
        nesterov: look ahead by one gradient.
        iteration: "newton_schulz" or "polar_express".
        scale: "rms" for steps with the root mean square 0.2, "original" for the square root of
            rows over columns if that is above one, "spectral" for it in any case.
    Raises:
        ValueError: a parameter is no matrix, or a value is unknown or out of its range.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        iteration: str = "newton_schulz",
        scale: str = "rms",
        **own,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} is not in [0, 1)")
        for key, value, known in (("iteration", iteration, ITERATIONS), ("scale", scale, SCALES)):
            if value not in known:
                raise ValueError(f"{key}={value!r} is none of {', '.join(known)}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        defaults |= {"nesterov": nesterov, "iteration": iteration, "scale": scale, **own}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() < 2:
                    raise ValueError(f"a parameter has the shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            averages = self._averages(group, params, grads)
            ahead = averages
            if group["nesterov"]:
                ahead = torch._foreach_lerp(grads, averages, group["momentum"])
            made = self._directions(group, params, ahead)
            moves = [self._move(group, p, o_OI) for p, o_OI in zip(params, made, strict=True)]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, moves, alpha=-group["lr"])
        return loss

    def _averages(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Of the gradients, this step's too."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        return averages

    def _directions(self, group: dict, params: list[Tensor], ahead: list[Tensor]) -> list[Tensor]:
        return orthogonalised(ahead, *ITERATIONS[group["iteration"]])

    def _move(self, group: dict, parameter: Tensor, o_OI: Tensor) -> Tensor:
        return o_OI * SCALES[group["scale"]](*o_OI.shape[-2:])


class NorMuon(Muon):
    """Muon whose rows, one for each output, are divided by the root of their recent mean square.

    The whole keeps its length. `beta2` is of the average of these squares.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        iteration: str = "newton_schulz",
        scale: str = "rms",
        beta2: float = 0.95,
    ):
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2={beta2} is not in [0, 1)")
        super().__init__(
            params, lr, weight_decay, momentum, nesterov, iteration, scale, beta2=beta2
        )

    def _move(self, group: dict, parameter: Tensor, o_OI: Tensor) -> Tensor:
        state = self.state[parameter]
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros_like(o_OI[..., :1])
        square_O1 = o_OI.square().mean(-1, keepdim=True)
        state["second_moment"].lerp_(square_O1, 1 - group["beta2"])
        even_OI = o_OI / (state["second_moment"].sqrt() + EPS)
        return super()._move(group, parameter, even_OI * (length(o_OI) / length(even_OI)))


class AdaMuon(Muon):
    """Muon divided by the root of its recent squares, as in the paper's first version.

    A step has the root mean square 0.2, whatever the shape. `beta2` is of the average of squares.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        iteration: str = "newton_schulz",
        beta2: float = 0.95,
        eps: float = 1e-8,
    ):
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2={beta2} is not in [0, 1)")
        super().__init__(
            params, lr, weight_decay, momentum, nesterov, iteration, "rms", beta2=beta2, eps=eps
        )

    def _move(self, group: dict, parameter: Tensor, o_OI: Tensor) -> Tensor:
        state = self.state[parameter]
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros_like(o_OI)
        state["second_moment"].lerp_(o_OI.square(), 1 - group["beta2"])
        made_OI = o_OI / (state["second_moment"].sqrt() + group["eps"])
        size = (o_OI.shape[-1] * o_OI.shape[-2]) ** 0.5
        return made_OI * (0.2 * size / length(made_OI))


def orthogonalised(matrices: list[Tensor], coefficients: Coefficients, room: float) -> list[Tensor]:
    """Each matrix with its singular values brought near one, its singular vectors kept.

    Args:
        matrices: shape (..., O, I); left unchanged.
        coefficients: of each round.
        room: the length of a matrix is made 1 / `room` at first.
    Returns:
        Tensors of the same shapes and types.
    """
    made: list[Tensor | None] = [None] * len(matrices)
    alike: dict[tuple, list[int]] = {}
    for index, m in enumerate(matrices):
        alike.setdefault((m.shape, m.dtype, m.device), []).append(index)
    for indices in alike.values():
        shape, kind = matrices[indices[0]].shape, matrices[indices[0]].dtype
        x_NOI = torch.stack([matrices[i] for i in indices]).reshape(-1, *shape[-2:])
        if kind != torch.float64 and _is_bf16_fast(x_NOI.device.type, min(shape[-2:])):
            x_NOI = x_NOI.bfloat16()
        is_tall = shape[-2] > shape[-1]
        x_NOI = x_NOI.mT if is_tall else x_NOI
        x_NOI = x_NOI / (length(x_NOI) * room + EPS)
        for a, b, c in coefficients:
            A_NOO = x_NOI @ x_NOI.mT
            B_NOO = torch.baddbmm(A_NOO, A_NOO, A_NOO, beta=b, alpha=c)
            x_NOI = torch.baddbmm(x_NOI, B_NOO, x_NOI, beta=a)
        x_NOI = x_NOI.mT if is_tall else x_NOI
        for i, one in zip(indices, x_NOI.to(kind).reshape(-1, *shape), strict=True):
            made[i] = one
    return made


def length(x_OI: Tensor) -> Tensor:
    """The Frobenius norm of each matrix, shape (..., 1, 1)."""
    return x_OI.norm(dim=(-2, -1), keepdim=True)


@cache
def _is_bf16_fast(device: str, size: int) -> bool:
    if device == "cpu":
        return size >= LARGE and resolve_precision("amp", torch.device(device)) == "bf16"
    return device == "cuda"
