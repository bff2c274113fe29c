"""A call to another machine ends, one way or the other, within its limit."""

import threading

import pytest

from lmplay import network
from lmplay.errors import NO_DATA, UserError


class Clock:
    """Time that passes only in pauses."""

    def __init__(self, monkeypatch):
        self.now, self.pauses = 0.0, []
        monkeypatch.setattr(network, "clock", lambda: self.now)
        monkeypatch.setattr(network, "sleep", self.sleep)

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


def failing(error, times=10**9):
    def call():
        call.attempts += 1
        if call.attempts <= times:
            raise error
        return "answer"

    call.attempts = 0
    return call


def bounded(call, seconds=60.0):
    return network.bounded(call, seconds, "cannot reach it", "set this")


def test_a_call_that_recovers_gives_its_answer(monkeypatch):
    clock = Clock(monkeypatch)
    call = failing(ConnectionError("reset"), times=3)

    assert bounded(call) == "answer"
    assert len(clock.pauses) == 3
    assert clock.pauses == sorted(clock.pauses)


def test_a_call_that_never_recovers_is_given_up_within_the_limit(monkeypatch):
    clock = Clock(monkeypatch)
    call = failing(TimeoutError("no route"))

    with pytest.raises(UserError, match="cannot reach it: no route") as caught:
        bounded(call)

    assert caught.value.code == NO_DATA and caught.value.hint == "set this"
    assert call.attempts > 3 and clock.now <= 60


def test_the_reason_of_an_earlier_failure_is_not_lost(monkeypatch):
    monkeypatch.setattr(network, "sleep", lambda seconds: None)
    monkeypatch.setattr(network, "_jitter", type("Soon", (), {"uniform": lambda *_: 0.0})())
    release = threading.Event()
    attempts = []

    def call():
        attempts.append(1)
        if len(attempts) == 1:
            raise ConnectionError("name not known")
        release.wait()

    with pytest.raises(UserError, match=r"no answer within 0\.1 s \(name not known\)"):
        bounded(call, seconds=0.1)
    release.set()


def test_a_call_that_hangs_is_left_behind():
    release = threading.Event()

    with pytest.raises(UserError, match=r"no answer within 0\.05 s") as caught:
        bounded(release.wait, seconds=0.05)

    release.set()
    assert caught.value.code == NO_DATA


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("gated")])
def test_a_final_answer_is_not_asked_for_again(monkeypatch, error):
    clock = Clock(monkeypatch)
    call = failing(error)

    with pytest.raises(UserError):
        bounded(call)

    assert call.attempts == 1 and not clock.pauses


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (403, 1), (429, 3), (503, 3)])
def test_the_server_says_whether_another_attempt_helps(monkeypatch, status, attempts):
    Clock(monkeypatch)
    error = OSError(f"status {status}")
    error.response = type("Response", (), {"status_code": status})()
    call = failing(error, times=2)

    if attempts == 1:
        with pytest.raises(UserError):
            bounded(call)
    else:
        bounded(call)

    assert call.attempts == attempts


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 / 0)
