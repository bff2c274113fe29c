"""The standard streams of a command, whatever has become of those at their other end."""

import errno
import os
import sys
from contextlib import suppress
from io import StringIO

# what a disk, a terminal or a pipe may do to whoever writes: no mistake of ours
UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EPIPE, errno.EBADF,
    errno.ESTALE,
)  # fmt: skip


class Stderr:
    """sys.stderr of the moment, for what is worth less than the work that it tells of.

    A terminal that was closed, a reader that left, a full disk: what cannot be written is lost,
    and nothing is raised.
    """

    @property
    def rich_proxied_file(self) -> "Stderr":
        """How rich finds the stream behind its own stand-in while a live panel is drawn."""
        return self

    def write(self, text: str) -> int:
        """As of a text stream."""
        try:
            return self._now.write(text)
        except (OSError, ValueError):  # a ValueError is what a closed stream raises
            return 0

    def flush(self) -> None:
        """As of a text stream."""
        with suppress(OSError, ValueError):
            self._now.flush()

    def isatty(self) -> bool:
        """As of a text stream."""
        try:
            return self._now.isatty()
        except ValueError:
            return False

    def __getattr__(self, name: str) -> object:
        return getattr(self._now, name)

    @property
    def _now(self):
        stream = sys.stderr or StringIO()  # None where it was closed from the start
        return getattr(stream, "rich_proxied_file", stream)


def open_streams() -> None:
    """Make all three streams usable: cron and daemons may start a command with some closed.

    A file that is opened later would get a closed stream's number, and what is meant for the
    stream would be written into it. What a stream's encoding lacks is spelled out.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush_streams() -> OSError | None:
    """Write what is left, so that Python's end raises nothing; what kept stdout from it."""
    Stderr().flush()
    failed = None
    try:
        sys.stdout.flush()
    except ValueError:
        pass
    except OSError as error:
        failed = error
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _drain(stream)
    return failed


def _drain(stream) -> None:
    """Let go of what cannot be written, which Python would else try again at its end."""
    with suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
        stream.flush()
