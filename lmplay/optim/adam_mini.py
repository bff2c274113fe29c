"""Adam-mini: Adam with one second moment for each row of a matrix.

The paper's blocks are found from names; a row, one output or one token, is at least as fine as they
are and needs none.
Source: Zhang et al. 2024, arXiv:2406.16793.
"""

import torch


class AdamMini(torch.optim.Optimizer):
    """AdamW whose divisor is one number a row: the mean square of its gradients.

    A vector has a divisor for each number, as in AdamW; a row is all dimensions but the first.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        if not all(0 <= beta < 1 for beta in betas) or eps < 0:
            raise ValueError(f"betas={betas} are not in [0, 1), or eps={eps} is negative")
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "step": 0}
        )

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] += 1
            beta1, beta2 = group["betas"]
            grads, states = [p.grad for p in params], [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(_row_means(p))
            first = [state["exp_avg"] for state in states]
            second = [state["exp_avg_sq"] for state in states]
            squares = [_row_means(g.square()) for g in grads]
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_lerp_(second, squares, 1 - beta2)
            divisors = torch._foreach_div(second, 1 - beta2 ** group["step"])
            torch._foreach_sqrt_(divisors)
            torch._foreach_add_(divisors, group["eps"])
            rate = group["lr"] / (1 - beta1 ** group["step"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_addcdiv_(
                params,
                first,
                [d.expand_as(p) for d, p in zip(divisors, params, strict=True)],
                -rate,
            )
        return loss


def _row_means(x: torch.Tensor) -> torch.Tensor:
    return x.mean(tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else x
