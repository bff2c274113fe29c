"""The one clock: what a step trains on and how far the run is by then, from the plan alone."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil

from lmplay.plan import Plan


@dataclass(frozen=True)
class Moment:
    """A step, and what was trained on before it."""

    step: int  # counted from 0
    first_row: int  # of the step's rows, among all rows of the run
    num_rows: int  # of the plan's longest length
    row_length: int  # tokens in each of the parts that they are cut in
    tokens_before: int  # of all steps before this one
    tokens: int  # of this step
    progress: float  # share of the run's tokens that was trained on before the step, 0 to 1


@dataclass(frozen=True)
class Phase:
    """Steps that are all alike."""

    step: int  # the first one
    first_row: int
    num_rows: int  # in a step
    row_length: int


class Clock:
    """Turns steps into rows, tokens and progress. Nothing else multiplies a step by a constant.

    Tokens are counted as places in rows: those that nothing is learned from count too. A ramp
    takes its next value with the first step before which its share of the tokens, not yet rounded
    up to whole steps, was trained on.

    Attributes:
        num_steps: of the run.
        num_tokens: of all of them together.
        phases: the run as steps that are alike, one phase where nothing ramps.
    """

    def __init__(self, plan: Plan, num_rows: int | None = None):
        """
        Args:
            num_rows: that the data has, where the plan has no budget of tokens.
        """
        if plan.tokens is not None:
            num_rows = -(-plan.tokens // plan.max_len)
        assert num_rows is not None
        self._max_len = plan.max_len
        self.phases: list[Phase] = []
        shares = sorted({share for share, _ in [*plan.batch_sizes, *plan.sequence_lengths]})
        step = row = 0
        for share, end in pairwise([*shares, 1]):
            size, length = _at(plan.batch_sizes, share), _at(plan.sequence_lengths, share)
            left = Fraction(str(end)) * num_rows - row  # 0.1 of 30 rows is 3 rows
            if left > 0:
                self.phases.append(Phase(step, row, size, length))
                step += ceil(left / size)
                row += ceil(left / size) * size
        self.num_steps, self._num_rows = step, row
        self.num_tokens = row * plan.max_len

    def at(self, step: int) -> Moment:
        """The moment before a step, 0 <= step <= num_steps; the last one is the end of the run."""
        if not 0 <= step <= self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        if step == self.num_steps:
            return Moment(step, self._num_rows, 0, self._max_len, self.num_tokens, 0, 1.0)
        phase = self.phases[bisect_right(self.phases, step, key=lambda phase: phase.step) - 1]
        first_row = phase.first_row + (step - phase.step) * phase.num_rows
        return Moment(
            step,
            first_row,
            phase.num_rows,
            phase.row_length,
            first_row * self._max_len,
            phase.num_rows * self._max_len,
            first_row / self._num_rows,
        )

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest step."""
        return max((phase.num_rows for phase in self.phases), default=0) * self._max_len

    def is_due(self, step: int, every_tokens: int) -> bool:
        """True at the start, and where the tokens before a step reach a multiple of these."""
        if step == 0:
            return True
        now, earlier = (self.at(s).tokens_before // every_tokens for s in (step, step - 1))
        return now != earlier

    def mean(self, of_length: Callable[[int], float]) -> float:
        """The mean over the run's tokens of what depends on the length of their rows."""
        ends = [phase.first_row for phase in self.phases[1:]] + [self._num_rows]
        rows: dict[int, int] = {}
        for phase, end in zip(self.phases, ends, strict=True):
            rows[phase.row_length] = rows.get(phase.row_length, 0) + end - phase.first_row
        if len(rows) <= 1:
            return of_length(next(iter(rows), self._max_len))
        return sum(count * of_length(length) for length, count in rows.items()) / self._num_rows


def _at(ramp: list[tuple[float, int]], share: float) -> int:
    return [value for start, value in ramp if start <= share][-1]
