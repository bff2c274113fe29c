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
