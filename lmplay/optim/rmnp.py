"""RMNP: Muon whose rows are made of one length, in place of making the whole orthogonal.

Source: Deng et al. 2026, arXiv:2603.20527.
"""

import torch
from torch import Tensor

from lmplay.optim.muon import SCALES, Muon

TINY = 1e-12  # least length that a row is divided by


class RMNP(Muon):
    """Momentum, each row of which, one for each output, is divided by its own length.

    With the scale "rms" a step has the root mean square 0.2, as Muon's; "original" is the paper's,
    with which tall matrices take larger steps than Muon's.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: str = "rms",
    ):
        super().__init__(params, lr, weight_decay, momentum, nesterov, scale=scale)

    def _directions(self, group: dict, params: list[Tensor], ahead: list[Tensor]) -> list[Tensor]:
        rows = [m_OI.norm(dim=-1, keepdim=True).clamp_(min=TINY) for m_OI in ahead]
        return torch._foreach_div(ahead, [r.expand_as(m) for r, m in zip(rows, ahead, strict=True)])

    def _move(self, group: dict, parameter: Tensor, o_OI: Tensor) -> Tensor:
        if group["scale"] == "rms":
            return o_OI * (0.2 * o_OI.shape[-1] ** 0.5)
        return o_OI * SCALES[group["scale"]](*o_OI.shape[-2:])
