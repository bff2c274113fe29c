"""SOAP as the library has it, with a state that a checkpoint gives back bit for bit."""

import pytorch_optimizer
from torch import Tensor


class SOAP(pytorch_optimizer.SOAP):
    """The library's SOAP, whose rotations lie in memory as a checkpoint would have them.

    Its QR decomposition leaves them column by column, and a product of the same numbers in another
    order is rounded otherwise.
    """

    def step(self, closure=None):
        """Take one step."""
        loss = super().step(closure)
        for state in self.state.values():
            for key, value in state.items():
                if isinstance(value, list):
                    state[key] = [v.contiguous() if isinstance(v, Tensor) else v for v in value]
        return loss


class PaLMSOAP(SOAP):
    """SOAP whose average of squares has the factor 1 - t^-0.8 in its step t, as PaLM's Adafactor.

    So the first square counts whole, and none needs a correction; momentum has none either, which
    makes the first steps small. `beta1` is of momentum, `shampoo_beta` of the products that are
    turned by.
    """

    def __init__(
        self,
        params,
        lr: float = 3e-3,
        weight_decay: float = 1e-2,
        beta1: float = 0.95,
        shampoo_beta: float = 0.95,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        eps: float = 1e-8,
    ):
        super().__init__(
            params, lr, (beta1, 0.0), shampoo_beta, weight_decay, precondition_frequency,
            max_precondition_dim, correct_bias=False, eps=eps,
        )  # fmt: skip

    def step(self, closure=None):
        """Take one step."""
        for group in self.param_groups:
            done = group.get("step", 0)  # the library's first one only looks at the gradient
            group["betas"] = (group["betas"][0], 1 - max(done, 1) ** -0.8)
        return super().step(closure)
