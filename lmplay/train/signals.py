"""What a signal asks of training: to save and stop, or to save and go on."""

import signal

import torch

from lmplay.run.run import Run


class Stopped(Exception):
    """A signal asked for the end; the run was saved. `code` is the exit code that says which."""

    def __init__(self, code: int):
        super().__init__(f"stopped by signal {code - 128}")
        self.code = code


class Signals:
    """While entered, SIGINT, SIGTERM and SIGHUP set `code`, SIGUSR1 asks for a checkpoint.

    A second one leaves at once, but for SIGHUP, of which a terminal that closes may send several:
    nobody is there to hurry. A SIGHUP that is ignored, as under nohup, stays so.
    """

    def __init__(self):
        self.code: int | None = None
        self._num_saves = 0  # asked for; counted, since a flag that is cleared may lose a signal
        self._num_taken = 0

    def __enter__(self):
        wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since this was last called."""
        before, self._num_taken = self._num_taken, self._num_saves
        return self._num_taken > before

    def _receive(self, number, _frame):
        if number == signal.SIGUSR1:
            self._num_saves += 1
        elif self.code is None:
            self.code = 128 + number
        elif number != signal.SIGHUP:
            raise SystemExit(128 + number)


def agreed(run: Run, signals: Signals, cadence: int) -> tuple[int, bool]:
    """The exit code that a signal asked for (0 for none) and whether one asked for a checkpoint.

    Several processes decide together, every `cadence` steps, when they look at the device anyway,
    or they would wait for each other at different steps.
    """
    if run.world_size > 1 and run.step % cadence:
        return 0, False
    asked = [signals.code or 0, int(signals.take_save())]
    if run.world_size > 1:
        asked_R2 = run.accelerator.gather(torch.tensor([asked], device=run.device))
        asked = asked_R2.amax(0).tolist()
    return asked[0], bool(asked[1])
