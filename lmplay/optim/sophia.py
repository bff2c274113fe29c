"""Sophia-G as the library has its step; `train/curvature.py` makes the estimate that it needs."""

import pytorch_optimizer
import torch
from torch import Tensor


class Sophia(pytorch_optimizer.SophiaH):
    """Momentum divided by an average of the curvature's diagonal, each number at most one.

    An estimate of the curvature is due at the first step and every `period` after it, and given to
    `take_curvature` before the step. `rho` says how much is clipped: between a tenth and half of
    all numbers should not be.
    Source: Liu et al. 2023, arXiv:2305.14342, algorithms 2 and 3.
    """

    def __init__(
        self,
        params,
        lr: float = 6e-4,
        weight_decay: float = 0.2,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.05,
        period: int = 10,
        eps: float = 1e-12,
    ):
        if rho <= 0:
            raise ValueError(f"rho={rho} is not above 0")
        super().__init__(
            params, lr, betas, weight_decay, p=rho, update_period=period, eps=eps / rho
        )
        self._curvature: dict[Tensor, Tensor] | None = None

    @property
    def needs_curvature(self) -> bool:
        """Whether the next step needs an estimate."""
        return self.param_groups[0].get("step", 0) % self.update_period == 0

    def take_curvature(self, of_each: dict[Tensor, Tensor]) -> None:
        """An estimate for the next step, by parameter."""
        self._curvature = of_each

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step.

        Raises:
            RuntimeError: an estimate was due and not given.
        """
        given, self._curvature = self._curvature, None
        if self.needs_curvature and given is None:
            raise RuntimeError("Sophia needs an estimate of curvature in this step")
        params = [p for group in self.param_groups for p in group["params"]]
        mine = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        for group, (lr, decay) in zip(self.param_groups, mine, strict=True):
            # the library clips at rho, not at one
            group["lr"], group["weight_decay"] = lr / group["p"], decay * group["p"]
        # what the ruler's loss does not see has no curvature
        if given is not None:
            given = [given.get(p, torch.zeros_like(p)) for p in params]
        loss = super().step(closure, given)
        for group, (lr, decay) in zip(self.param_groups, mine, strict=True):
            group["lr"], group["weight_decay"] = lr, decay
        for p in params:
            self.state[p].pop("hessian", None)
        return loss
