"""Changes to the step of any optimizer: which part of it is taken, how weights decay.

Each looks at a step after it was taken, so that it is the same for every optimizer.
"""

from itertools import compress
from typing import Literal, get_args

import torch
from torch import Tensor

from lmplay.optim.muon import length

Decay = Literal["decoupled", "independent", "corrected", "cautious"]
DECAYS = get_args(Decay)
LEAST_SHARE = 1e-3  # of a tensor that agrees with its gradient, as the others are scaled up by it
_OFF_BALL = ("table", "head", "conv", "vector")
MODIFIERS = ("cautious", "decay", "hyperball")  # their options, for any optimizer


class Modified:
    """An optimizer whose steps are changed after it took them; it has the interface of torch's.

    The optimizer itself decays nothing; all decay is done here, of the weights before the step.

    Args:
        base: of torch's kind.
        cautious: take only what goes against the gradient of this very step, scaled up by the share
            of a tensor that this is (Liang et al. 2024, arXiv:2411.16085).
        decay: "decoupled", by rate times decay; "independent", by the schedule's factor times
            decay, whatever the rate (Wortsman et al. 2023, arXiv:2309.14322); "corrected", by the
            first times the factor (Defazio 2025, arXiv:2506.02285); "cautious", as the first, where
            the step and the decay go the same way (Chen et al. 2025, arXiv:2510.12402).
        hyperball: the step has the rate times the weight's length, and leaves that as it was (Wen
            et al. 2026, arXiv:2606.16899); for matrices, each of a stack for itself, which decay
            then leaves alone. Tables, heads, convolutions and vectors step as ever.
    Raises:
        ValueError: a value is unknown, or a matrix that would keep its length is all zero.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        cautious: bool = False,
        decay: str = "decoupled",
        hyperball: bool = False,
    ):
        if decay not in DECAYS:
            raise ValueError(f"decay={decay!r} is none of {', '.join(DECAYS)}")
        if not isinstance(cautious, bool) or not isinstance(hyperball, bool):
            raise ValueError("cautious and hyperball are true or false")
        self.base, self.cautious, self.decay, self.hyperball = base, cautious, decay, hyperball
        for group in self.param_groups:
            for p in group["params"]:
                if self._is_on_ball(group, p) and not p.flatten(-2).any(-1).all():
                    shape = tuple(p.shape)
                    raise ValueError(f"a matrix of shape {shape} is all zero, and would stay so")
        self.defaults: dict = {}  # without a kernel that reads a flag

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's own."""
        return self.base.param_groups

    @property
    def state(self) -> dict:
        """The optimizer's own."""
        return self.base.state

    @torch.no_grad()
    def step(self) -> None:
        """Take one step, and change it."""
        before = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad.clone() for p in params] if self.cautious else None
            before.append((params, [p.clone() for p in params], grads))
        decays = [group.get("weight_decay", 0.0) for group in self.param_groups]
        for group in self.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = 0.0
        self.base.step()
        for group, decay, (params, old, grads) in zip(
            self.param_groups, decays, before, strict=True
        ):
            if "weight_decay" in group:
                group["weight_decay"] = decay
            if params:
                self._change(group, decay, params, old, grads)

    def _change(
        self, group: dict, decay: float, params: list[Tensor], old: list[Tensor], grads
    ) -> None:
        moves = torch._foreach_sub(old, params)
        if self.cautious:
            agrees = torch._foreach_mul(moves, grads)
            agrees = [(both > 0).to(move.dtype) for both, move in zip(agrees, moves, strict=True)]
            shares = [one.mean().clamp_(min=LEAST_SHARE) for one in agrees]
            torch._foreach_div_(agrees, shares)
            torch._foreach_mul_(moves, agrees)
        if self.cautious or self.hyperball:
            for p, before, move in zip(params, old, moves, strict=True):
                self._place(group, p, before, move)
        free = [not self._is_on_ball(group, p) for p in params]
        params, old, moves = (list(compress(each, free)) for each in (params, old, moves))
        if decay and params:
            rate = group["lr"]
            full = group["full_lr"] * group["lr_scale"]
            factor = rate / full if full else 0.0
            by = {"independent": factor, "corrected": rate * factor}.get(self.decay, rate) * decay
            falling = old
            if self.decay == "cautious":
                falling = torch._foreach_mul(moves, old)
                falling = [before * (same >= 0) for before, same in zip(old, falling, strict=True)]
            torch._foreach_add_(params, falling, alpha=-by)

    def _place(self, group: dict, p: Tensor, before: Tensor, move: Tensor) -> None:
        if self._is_on_ball(group, p):
            radius, moved = length(before), length(move)
            moves = moved > 0
            made = before - move * torch.where(moves, group["lr"] * radius / moved, 0.0)
            p.copy_(made * torch.where(moves, radius / length(made), 1.0))
        else:
            p.copy_(before - move)

    def _is_on_ball(self, group: dict, p: Tensor) -> bool:
        return self.hyperball and p.dim() > 1 and group.get("role") not in _OFF_BALL

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """The optimizer's own state: a change keeps none."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up the optimizer's own state."""
        self.base.load_state_dict(state_dict)
