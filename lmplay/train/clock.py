"""The one clock: what a step trains on and how far the run is by then, from the plan alone."""

from dataclasses import dataclass

from lmplay.plan import Plan


@dataclass(frozen=True)
class Moment:
    """A step, and what was trained on before it."""

    step: int  # counted from 0
    first_row: int  # of the step among those of the whole run: as many came before it
    num_rows: int  # of the step
    row_length: int  # tokens in a row of the plan
    progress: float  # share of the run's tokens that was trained on before the step, 0 to 1

    @property
    def tokens_before(self) -> int:
        """Tokens of all steps before this one."""
        return self.first_row * self.row_length

    @property
    def tokens(self) -> int:
        """Tokens of this step."""
        return self.num_rows * self.row_length


class Clock:
    """Turns steps into rows, tokens and progress. Nothing else multiplies a step by a constant.

    Tokens are counted as places of full rows: those that nothing is learned from count too.

    Attributes:
        num_steps: of the run.
        num_tokens: of all of them together, the last one rounded up to a whole step.
    """

    def __init__(self, plan: Plan, num_rows: int | None = None):
        """
        Args:
            num_rows: that the data has, where the plan has no budget of tokens.
        """
        self._batch_size, self._row_length = plan.batch_size, plan.sequence_length
        if plan.tokens is not None:
            num_rows = -(-plan.tokens // plan.sequence_length)
        assert num_rows is not None
        self.num_steps = -(-num_rows // plan.batch_size)
        self._num_rows = self._first_row(self.num_steps)
        self.num_tokens = self._num_rows * plan.sequence_length

    def at(self, step: int) -> Moment:
        """The moment before a step, 0 <= step <= num_steps; the last one is the end of the run."""
        if not 0 <= step <= self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        first_row = self._first_row(step)
        progress = 1.0 if step == self.num_steps else first_row / self._num_rows
        return Moment(step, first_row, self._batch_size, self._row_length, progress)

    def is_due(self, step: int, every_tokens: int) -> bool:
        """True at the start, and where the tokens before a step reach a multiple of these."""
        if step == 0:
            return True
        now, earlier = (self.at(s).tokens_before // every_tokens for s in (step, step - 1))
        return now != earlier

    def _first_row(self, step: int) -> int:
        return step * self._batch_size
