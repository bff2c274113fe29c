"""K-Maxwell: Muon whose momentum is a mixture of averages of several ages, old at first.

Source: modded-nanogpt's pull requests 340, 357 and 359 (2026); ages and weights for a given mean
    age as their reports have them.
"""

import torch
from torch import Tensor

from lmplay.optim.muon import Muon


class KMaxwell(Muon):
    """Muon until `begin`; from then on its average is a mixture of `buffers` ones of its gradients.

    All begin as copies of the single average, so that nothing jumps. Their mean ages, in steps, are
    spaced evenly in their logarithms; the mean age of the mixture falls from the first of `ages`,
    which it has at `begin`, to the second at the end of the run, and no buffer is touched by that.

    Args:
        buffers: kept for each parameter; one is plain momentum of the age `longest`.
        shortest: mean age of the youngest, in steps; an average with the factor b has b / (1 - b).
        longest: mean age of the oldest.
        ages: of the mixture, at its begin and at its end.
        begin: share of the run's tokens from which on it mixes.
        more: Muon's own arguments.
    Raises:
        ValueError: no mixture of these buffers has such an age, or as `Muon` does.
    """

    def __init__(
        self,
        params,
        buffers: int = 6,
        shortest: float = 3.0,
        longest: float = 64.0,
        ages: tuple[float, float] = (50.0, 22.0),
        begin: float = 0.24,
        **more,
    ):
        if not 0 <= begin < 1 or not 0 < shortest <= longest or len(ages) != 2:
            raise ValueError(f"begin={begin}, shortest={shortest}, longest={longest}, ages={ages}")
        spaced = spaced_ages(int(buffers), shortest, longest)
        for age in ages:
            shares(age, spaced)
        super().__init__(params, spaced=spaced, ages=tuple(ages), begin=begin, **more)

    def _averages(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        progress, begin = group.get("progress", 0.0), group["begin"]
        mixing = [p for p in params if "momenta" in self.state[p]]
        plain = [p for p in params if "momenta" not in self.state[p]]
        grad_of = dict(zip(params, grads, strict=True))
        average_of = {}
        if plain:
            its = super()._averages(group, plain, [grad_of[p] for p in plain])
            average_of = dict(zip(plain, its, strict=True))
        if mixing:
            done = (progress - begin) / (1 - begin)
            its = self._mixtures(group, mixing, [grad_of[p] for p in mixing], done)
            average_of |= dict(zip(mixing, its, strict=True))
        for p in plain if progress >= begin else []:
            copies = average_of[p].expand(len(group["spaced"]), *p.shape)
            self.state[p] = {"momenta": copies.clone()}
        return [average_of[p] for p in params]

    def _mixtures(
        self, group: dict, params: list[Tensor], grads: list[Tensor], done: float
    ) -> list[Tensor]:
        momenta = [self.state[p]["momenta"] for p in params]
        for k, age in enumerate(group["spaced"]):
            torch._foreach_lerp_([m[k] for m in momenta], grads, 1 - age / (age + 1))
        first, last = (shares(age, group["spaced"]) for age in group["ages"])
        now = [(1 - done) * a + done * b for a, b in zip(first, last, strict=True)]
        shares_K = momenta[0].new_tensor(now)
        return [(shares_K @ m.flatten(1)).view(m.shape[1:]) for m in momenta]


def spaced_ages(buffers: int, shortest: float, longest: float) -> list[float]:
    """Mean ages of the buffers, rising, the last one the longest."""
    if buffers < 1:
        raise ValueError(f"buffers={buffers} is below 1")
    ratio = shortest / longest
    return [longest * ratio ** (k / max(buffers - 1, 1)) for k in reversed(range(buffers))]


def shares(age: float, spaced: list[float]) -> list[float]:
    """The share of each buffer in a mixture of this mean age; their sum is one.

    All but the last are to one another as 1, 2, 3, ...

    Raises:
        ValueError: the age is not between the mean age of those and that of the last.
    """
    if len(spaced) == 1:
        return [1.0]
    ramp = [2 * k / (len(spaced) * (len(spaced) - 1)) for k in range(1, len(spaced))]
    young = sum(share * own for share, own in zip(ramp, spaced, strict=False))
    if not young <= age <= spaced[-1]:
        raise ValueError(f"age {age} of the mixture is not in [{young:.1f}, {spaced[-1]:g}]")
    last = (age - young) / (spaced[-1] - young)
    return [*(share * (1 - last) for share in ramp), last]
