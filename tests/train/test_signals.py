import os
import signal
from types import SimpleNamespace

import torch

from lmplay.train.signals import Signals, agreed


def a_run(step=0, during=lambda: None):
    """One of two processes, of which the other asks for nothing."""

    def gather(tensor):
        during()
        return torch.cat([tensor, torch.zeros_like(tensor)])

    return SimpleNamespace(
        world_size=2, step=step, device="cpu", accelerator=SimpleNamespace(gather=gather)
    )


def ask():
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_checkpoint_that_was_asked_for_is_saved_once():
    with Signals() as signals:
        ask()
        answers = [agreed(a_run(), signals, 1) for _ in range(2)]

    assert answers == [(0, True), (0, False)]


def test_a_signal_that_comes_while_processes_agree_is_answered_by_the_next_agreement():
    with Signals() as signals:
        answers = [agreed(a_run(during=ask), signals, 1), agreed(a_run(), signals, 1)]

    assert answers == [(0, False), (0, True)]


def test_between_two_looks_at_the_device_a_signal_waits():
    with Signals() as signals:
        ask()
        answers = [agreed(a_run(step), signals, 10) for step in (9, 10)]

    assert answers == [(0, False), (0, True)]


def test_a_terminal_that_closes_sends_more_than_one_hangup_and_the_run_is_saved():
    with Signals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)

        assert signals.code == 128 + signal.SIGHUP
