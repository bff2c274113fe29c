"""Muon+: Muon whose rows and columns are made of one length after it was made orthogonal.

Five rounds leave singular values between 0.7 and 1.1; of an exactly orthogonal wide matrix all rows
have the length one already.
Source: arXiv:2602.21545, and nanochat for the whole matrix's length.
"""

from torch import Tensor

from lmplay.optim.muon import EPS, Muon, length

TINY = 1e-8  # added to the length of a row or a column
SIDES = {"row": (-1,), "col": (-2,), "row_col": (-1, -2), "col_row": (-2, -1), "whole": ()}


class MuonPlus(Muon):
    """Muon with one more normalisation of what is orthogonal by then.

    Afterwards the whole has the length of an orthogonal matrix, whatever was normalised: else the
    order of sides would be another rate.

    Args:
        sides: "row", "col", both in the order of "row_col" or "col_row", or "whole" for the last
            step alone.
        more: Muon's own arguments.
    """

    def __init__(self, params, sides: str = "row_col", **more):
        if sides not in SIDES:
            raise ValueError(f"sides={sides!r} is none of {', '.join(SIDES)}")
        super().__init__(params, sides=sides, **more)

    def _move(self, group: dict, parameter: Tensor, o_OI: Tensor) -> Tensor:
        for side in SIDES[group["sides"]]:
            o_OI = o_OI / (o_OI.norm(dim=side, keepdim=True) + TINY)
        whole = min(o_OI.shape[-2:]) ** 0.5
        return super()._move(group, parameter, o_OI * (whole / (length(o_OI) + EPS)))
