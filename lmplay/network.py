"""Calls that may hang or fail on their way to another machine, bounded in time."""

import threading
from collections.abc import Callable
from random import Random
from time import monotonic as clock
from time import sleep
from typing import TypeVar

from lmplay.errors import NO_DATA, UserError

Result = TypeVar("Result")

_CLIENTS = {"aiohttp", "fsspec", "httpcore", "httpx", "httpx2", "requests", "urllib3"}
_jitter = Random()  # of its own: pauses must not move the seeded one


def bounded(call: Callable[[], Result], seconds: float, problem: str, hint: str) -> Result:
    """What `call` gives back, tried again after growing, jittered pauses.

    A call that never answers is left behind in its thread, so the limit holds whatever a library
    does about its own timeouts.

    Args:
        call: made in another thread; raises on failure.
        seconds: limit for all attempts and pauses together.
        problem: the start of the error's sentence, such as "cannot download X".
        hint: what the user can set.
    Raises:
        UserError: code NO_DATA, when the time is spent or another attempt cannot help.
        Exception: as `call` raised it, where it is no failure of the network.
    """
    deadline, pause, reason = clock() + seconds, 1.0, ""
    while True:
        outcome = _Attempt(call)
        outcome.join(max(0.0, deadline - clock()))
        if outcome.is_alive():
            reason = reason and f" ({reason})"
            raise UserError(f"{problem}: no answer within {seconds:g} s{reason}", hint, NO_DATA)
        error = outcome.error
        if error is None:
            return outcome.result
        if not _is_network_failure(error):
            raise error
        reason = " ".join(str(error).split()) or type(error).__name__
        wait = pause * _jitter.uniform(0.5, 1.0)
        if not _may_pass(error) or clock() + wait >= deadline:
            raise UserError(f"{problem}: {reason}", hint, NO_DATA) from error
        sleep(wait)
        pause *= 2


class _Attempt(threading.Thread):
    def __init__(self, call):
        super().__init__(daemon=True)
        self.call, self.result, self.error = call, None, None
        self.start()

    def run(self):
        try:
            self.result = self.call()
        except BaseException as error:
            self.error = error


def _is_network_failure(error: BaseException) -> bool:
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or module in _CLIENTS


def _may_pass(error: BaseException) -> bool:
    """False where the answer was final: not there, not allowed, or told to stay offline."""
    if isinstance(error, FileNotFoundError | PermissionError) or "Offline" in str(error):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status in (408, 429) or status >= 500
