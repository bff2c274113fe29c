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
    """The start of a hint, "did you mean 'ue16x'? ", or nothing where no name is near.

    Letters that changed places are the likeliest slip, and capitals are none.
    """
    known = {each.lower(): each for each in names}
    letters = sorted(name.lower())
    swapped = (each for each in known if sorted(each) == letters)
    close = get_close_matches(name.lower(), known, n=1, cutoff=0.55)
    found = next(swapped, close[0] if close else None)
    return f"did you mean {known[found]!r}? " if found else ""
