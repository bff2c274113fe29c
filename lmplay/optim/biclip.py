"""BiClip: each number of the gradient between two sizes, without any state.

Source: Lee, Zaheer and Li 2025, arXiv:2502.04164 (TailOPT), of which this is the inner step.
"""

import torch


class BiClip(torch.optim.Optimizer):
    """SGD on gradients whose every number has at least one size and at most another.

    With both the same it is sign descent, with 0 and infinity plain SGD. A zero stays zero. The
    gradient's own clipping should be off: `--set clip=null`.

    Args:
        low: least size of a number.
        high: largest size of a number.
    Raises:
        ValueError: low is above high, or below zero.
    """

    def __init__(
        self, params, lr: float = 10.0, weight_decay: float = 0.0, low: float = 1e-6,
        high: float = 1e-4,
    ):  # fmt: skip
        if not 0 <= low <= high:
            raise ValueError(f"low={low} is not between 0 and high={high}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "low": low, "high": high})

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            sizes = [g.abs().clamp_(group["low"], group["high"]) for g in grads]  # DTensors too
            torch._foreach_mul_(sizes, torch._foreach_sign(grads))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, sizes, alpha=-group["lr"])
        return loss
