"""A function in a process of its own, which signals reach and whose death takes nothing along."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

from lmplay.console import in_words, leave
from lmplay.errors import UserError
from lmplay.train.display import Display
from lmplay.train.signals import Stopped

# A server that has loaded torch and done nothing else forks each process: its peak of memory is its
# own, and one that the operating system kills takes nothing along. Forking is unsafe on macOS.
_CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


def run_in_subprocess(
    function: Callable, argument: object, display: Display, forwarder: "SignalForwarder"
):
    """What `function(argument, display)` gives back, called in a process of its own.

    Raises:
        UserError: as the function did; or it broke, or the process died, which the message says.
        Stopped: the process was stopped by a signal that reached this one.
    """
    forwarder.wait(0)
    receiving, sending = _CONTEXT.Pipe(duplex=False)
    _CONTEXT.set_forkserver_preload(["lmplay.train.session"])
    process = _CONTEXT.Process(
        target=_run_and_reply, args=(function, argument, sending, os.getcwd(), dict(os.environ))
    )
    process.start()
    sending.close()
    answer = None
    with forwarder.sending_to(process.pid), suppress(EOFError, ConnectionResetError):
        while answer is None:
            kind, *values = receiving.recv()
            if kind == "show":
                name, arguments = values
                getattr(display, name)(*arguments)
            else:
                answer = kind, values
    process.join()
    receiving.close()
    if answer is None:  # it died without a word
        if forwarder.code is not None:
            raise Stopped(forwarder.code)
        number = -process.exitcode
        hint = "the system's memory may not suffice" if number == signal.SIGKILL else ""
        how = f"signal {number}" if number > 0 else f"exit code {process.exitcode}"
        raise UserError(f"its process was ended by {how}", hint=hint, code=1)
    kind, values = answer
    if kind == "stopped":
        raise Stopped(*values)
    if kind == "error":
        raise UserError(*values)
    return values[0]


class SignalForwarder:
    """While entered, hands signals on to the run under way; between runs they end the grid."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self):
        self.code: int | None = None  # the exit code that the first signal asked for
        self._pid: int | None = None

    def __enter__(self):
        wanted = [n for n in self._NUMBERS if signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def sending_to(self, pid: int) -> Iterator[None]:
        """While entered, signals go to the process `pid`."""
        self._pid = pid
        try:
            yield
        finally:
            self._pid = None

    def wait(self, seconds: float) -> None:
        """Sleep; a signal ends it.

        Raises:
            Stopped: one came, now or when the run that it went to had just ended.
        """
        time.sleep(seconds)
        if self.code is not None:
            raise Stopped(self.code)

    def _receive(self, number, _frame):
        if number != signal.SIGUSR1 and self.code is None:
            self.code = 128 + number
        if self._pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)
        elif number != signal.SIGUSR1:
            raise Stopped(128 + number)


class _DisplayProxy:
    """The display, for the process of a run; a reader that is gone stops the run."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe

    def send(self, *message: object) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            os.kill(os.getpid(), signal.SIGTERM)

    def __getattr__(self, name: str) -> Callable:
        return lambda *arguments: self.send("show", name, arguments)


def _run_and_reply(
    function: Callable, argument: object, pipe: Connection, folder: str, environ: dict
):
    """The process of a run: a group of its own, so that a Ctrl-C comes once, by the forwarder."""
    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)  # until training has begun
    proxy = _DisplayProxy(pipe)
    try:
        proxy.send("done", function(argument, proxy))
    except Stopped as stop:
        proxy.send("stopped", stop.code)
    except UserError as error:
        proxy.send("error", error.problem, error.hint, error.code)
    except SystemExit as stop:
        proxy.send("stopped", stop.code)
    except BaseException as error:
        told = in_words(error) if isinstance(error, OSError) else None
        if told is None:
            proxy.note(traceback.format_exc())
            told = UserError(f"{type(error).__name__}: {error}", code=1)
        proxy.send("error", told.problem, told.hint, told.code)
