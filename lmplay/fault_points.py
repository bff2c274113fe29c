"""Named places at which a test lets a process die, stop or fail: LMP_FAULT=kill@save.fsync:2."""

import errno
import os
import signal


class _Fault:
    """ACTION@PLACE[:N]: at the N-th time that PLACE is reached, a signal or an error's name.

    `kill`, `stop`, `term` are signals that the process sends to itself; `enospc`, `eio` are raised.
    """

    def __init__(self, text: str):
        self._action, _, where = text.upper().partition("@")
        place, _, number = where.partition(":")
        self._place, self._left = place.lower(), int(number or 1)

    def reach(self, place: str) -> None:
        self._left -= place == self._place
        if place != self._place or self._left:
            return
        if number := getattr(signal, f"SIG{self._action}", None):
            os.kill(os.getpid(), number)
        else:
            number = getattr(errno, self._action)
            raise OSError(number, os.strerror(number))


_fault: _Fault | None = None


def arm(text: str | None) -> None:
    """Set the fault of this process; None or an empty text is none."""
    global _fault
    _fault = _Fault(text) if text else None


def reach(place: str) -> None:
    """Say that the process is at this place, where dying would hurt; nothing where none is armed.

    Raises:
        OSError: the armed fault is that error.
    """
    if _fault is not None:
        _fault.reach(place)


arm(os.environ.get("LMP_FAULT"))
