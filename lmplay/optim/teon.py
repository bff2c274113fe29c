"""TEON: Muon that makes the momenta of neighbouring layers orthogonal together.

Source: Zhang et al. 2026, arXiv:2601.23261.
"""

import re

import torch
from torch import Tensor

from lmplay.optim.muon import ITERATIONS, Muon, orthogonalised

_PLACE = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")  # in a ModuleList: blocks.3.attention


class TEON(Muon):
    """Muon; but matrices of one kind from neighbouring blocks are one wide matrix for it.

    Two equal momenta thus take steps smaller by the root of two than Muon's, and so do random ones,
    about: `even` makes up for it, so that the comparison with Muon is not one of rates. A matrix
    without a neighbour is trained as by Muon.

    Args:
        params: groups with `names`, those of the parameters.
        layers: neighbours that are taken together.
        kinds: last parts of the names of modules whose weights are taken together, never those of
            output projections or MLPs.
        even: multiply their steps by the root of `layers`.
        more: Muon's own arguments.
    Raises:
        ValueError: names are given and none fits, or as `Muon` does.
    """

    def __init__(
        self, params, layers: int = 2, kinds: str = "query key value", even: bool = False, **more
    ):
        if layers < 1:
            raise ValueError(f"layers={layers} is below 1")
        super().__init__(params, layers=int(layers), kinds=kinds, even=even, **more)
        self._together: list[list[Tensor]] = []
        for group in self.param_groups:
            named = zip(group.get("names", []), group["params"], strict=False)
            self._together += neighbours(named, int(layers), kinds.split())
        if layers > 1 and not self._together and any("names" in g for g in self.param_groups):
            raise ValueError(f"no {int(layers)} neighbouring blocks have a {kinds} of one shape")

    def _directions(self, group: dict, params: list[Tensor], ahead: list[Tensor]) -> list[Tensor]:
        found = dict(zip(params, ahead, strict=True))
        joined = [parts for parts in self._together if all(p in found for p in parts)]
        alone = [[p] for p in params if not any(p is q for parts in joined for q in parts)]
        wide = [torch.cat([found[p] for p in parts], -1) for parts in [*joined, *alone]]
        made = orthogonalised(wide, *ITERATIONS[group["iteration"]])
        for parts, o_OI in zip([*joined, *alone], made, strict=True):
            size = len(parts) ** 0.5 if group["even"] else 1.0
            pieces = [size * piece for piece in o_OI.chunk(len(parts), -1)]
            found |= dict(zip(parts, pieces, strict=True))
        return [found[p] for p in params]


def neighbours(named, layers: int, kinds: list[str]) -> list[list[Tensor]]:
    """Parameters to take together: of one kind and shape, from blocks 0 to `layers` - 1, and so on.

    A block's number is the first one in a name; neighbours have equal names but for it.
    """
    found: dict[tuple, list[Tensor]] = {}
    for name, p in named:
        place = _PLACE.search(name)
        if place and name.split(".")[-2] in kinds:
            kind = name[: place.start()], name[place.end() :], p.shape
            found.setdefault((*kind, int(place[1]) // layers), []).append(p)
    return [parts for parts in found.values() if len(parts) == layers > 1]
