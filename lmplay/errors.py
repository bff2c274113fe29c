"""The one error a user can mend, and the exit codes that scripts rely on."""

from collections.abc import Iterable
from difflib import get_close_matches

BAD_INPUT = 2  # usage, plan, experiment file or failed check
NUMERIC = 3  # NaN or infinity in training
NO_DATA = 4  # data or network unavailable
BAD_CHECKPOINT = 5  # no checkpoint can be used
LOCKED = 6  # a live process holds the run


class UserError(Exception):
    """What the user can fix: one sentence on the problem, one on what to type next."""

    def __init__(self, problem: str, hint: str = "", code: int = BAD_INPUT):
        super().__init__(problem)
        self.problem = problem
        self.hint = hint
        self.code = code


def nearest(name: str, names: Iterable[str]) -> str:
    """The start of a hint, "did you mean 'ue16x'? ", or nothing where no name is near."""
    matches = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}? " if matches else ""
