"""Scion as the library has it, with momentum as the word is used everywhere else."""

import pytorch_optimizer


class Scion(pytorch_optimizer.SCION):
    """The library's: steps of one norm, each weight drawn towards a ball of that norm.

    Args:
        momentum: what of the average of gradients is left after a step; the library gives this name
            to the share of the new one.
        norm_type: number of the norm, as the library counts them.
        norm_kwargs: of that norm.
        scale: radius of the ball.
    """

    def __init__(
        self,
        params,
        lr: float = 2**-12,
        momentum: float = 0.9,
        constraint: bool = True,
        norm_type: int = 0,
        norm_kwargs: dict | None = None,
        scale: float = 1.0,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} is not in [0, 1)")
        super().__init__(params, lr, momentum, constraint, norm_type, norm_kwargs, scale)

    def step(self, closure=None):
        """Take one step."""
        own = [group["momentum"] for group in self.param_groups]
        for group, momentum in zip(self.param_groups, own, strict=True):
            group["momentum"] = 1 - momentum
        loss = super().step(closure)
        for group, momentum in zip(self.param_groups, own, strict=True):
            group["momentum"] = momentum
        return loss
