"""The design of a comparison: which seeds it looks at and when, declared before its first run."""

import re
from dataclasses import dataclass, field, replace

from lmplay.errors import UserError

_SEEDS = re.compile(r"(?:([0-9]{1,6})\+)?([0-9]{1,6})(?:\.\.([0-9]{1,6}))?")
_GROWTH = 1.5  # of the number of seeds from one planned look to the next


@dataclass(frozen=True, kw_only=True)
class Design:
    """What every run of a comparison says in run.json: looking again is another test.

    A screen's seeds come first and only decide who goes on; they never enter a verdict. The looks
    are at the first so many of the seeds after them.
    """

    first_seed: int = 0
    screen: int = 0  # seeds; 0 is no screen
    looks: list[int]  # numbers of seeds, rising
    rates: list[float] = field(default_factory=lambda: [1.0])  # factors of the plan's learning rate

    @property
    def seeds(self) -> range:
        """All of them, the screen's too."""
        return range(self.first_seed, self.first_seed + self.screen + self.looks[-1])

    @property
    def stages(self) -> list[range]:
        """The seeds of the screen, if there is one, then those of each look."""
        after = self.first_seed + self.screen
        screen = [range(self.first_seed, after)] if self.screen else []
        return [*screen, *(range(after, after + look) for look in self.looks)]

    @property
    def spends(self) -> bool:
        """Whether it tests anything: one seed is no evidence, so looking at it costs nothing."""
        return self.looks[-1] > 1

    @property
    def words(self) -> str:
        """What declares it on the command line."""
        first = f"--seed {self.first_seed} " if self.first_seed else ""
        rates = f" --rates {','.join(f'{rate:g}' for rate in self.rates)}"
        return f"{first}--seeds {self.seeds_text}{rates if len(self.rates) > 1 else ''}"

    @property
    def seeds_text(self) -> str:
        """The value of --seeds: 5, 3..12 or 3+8."""
        screen = f"{self.screen}+" if self.screen else ""
        first = f"{self.looks[0]}.." if len(self.looks) > 1 else ""
        return f"{screen}{first}{self.looks[-1]}"

    def later(self) -> "Design":
        """The same on the seeds after these, which nobody has looked at."""
        return replace(self, first_seed=self.seeds.stop)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The place of a run among those of one experiment at several learning rates."""

    factor: float  # of the plan's rate
    of: str  # the label of the run at the plan's own rate


def design_of(seeds: str, first_seed: int = 0, rates: list[float] | None = None) -> Design:
    """The design that --seeds declares.

    Args:
        seeds: "5" is one look at five seeds; "3..12" are planned looks from three to twelve, each
            at half as many seeds again; "3+8" is a screen on three and one look at eight fresh.
    Raises:
        UserError: it is none of these.
    """
    match = _SEEDS.fullmatch(seeds.strip())
    hint = "5 is one look, 3..12 are planned looks, 3+8 screens on 3 and confirms on 8 fresh ones"
    if not match:
        raise UserError(f"--seeds {seeds}: no design", hint=hint)
    screen, first, last = (None if part is None else int(part) for part in match.groups())
    if last is not None and last <= first:
        raise UserError(f"--seeds {seeds}: the looks do not rise", hint=hint)
    least = 1 if screen is last is None else 2
    if min(first, screen or first) < least:
        raise UserError(f"--seeds {seeds}: too few seeds", hint=hint)
    looks = _planned(first, last or first)
    return Design(
        first_seed=first_seed, screen=screen or 0, looks=looks, rates=sorted(rates or [1.0])
    )


def _planned(first: int, last: int) -> list[int]:
    looks = [first]
    while looks[-1] < last:
        looks.append(min(last, -int(-looks[-1] * _GROWTH // 1)))
    return looks
