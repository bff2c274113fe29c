"""Two processes never train in one run, whatever the file system's locks are worth."""

import json
import os
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lmplay.errors import LOCKED, UserError
from lmplay.run import lock as module
from lmplay.run.folder import RunFolder

HOLD = """
import sys
from pathlib import Path
from lmplay.run.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


BROKEN = {
    "lets everybody in": "import fcntl\nfcntl.flock = lambda *what: None\n",
    "is not there": "import fcntl\ndef gone(*what): raise OSError(38, '')\nfcntl.flock = gone\n",
}
HOLD_BY_CLAIM = """
import sys
from pathlib import Path
from lmplay.errors import UserError
from lmplay.run import lock
broken = sys.argv[2]
exec(broken, {})
lock._TRY = broken + lock._TRY
lock.BEAT_SECONDS, lock.STALE_SECONDS = 0.2, 2.0
try:
    with lock.hold(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except UserError as error:
    print("refused", error.code, error.problem, flush=True)
"""


@pytest.fixture
def holder(tmp_path):
    """A second process that holds the run in `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, tmp_path / "run"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path, holder):
    with pytest.raises(UserError) as caught, RunFolder(tmp_path / "run").lock():
        pytest.fail("two processes hold one run")
    assert caught.value.code == LOCKED
    assert str(holder.pid) in caught.value.problem
    assert socket.gethostname() in caught.value.problem
    assert str(datetime.now(UTC).year) in caught.value.problem


def test_a_killed_process_leaves_a_run_that_can_be_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    run = RunFolder(tmp_path / "run")
    left = json.loads((run.path / "owner.json").read_text())

    with run.lock():
        owner = json.loads((run.path / "owner.json").read_text())

    assert (left["pid"], owner["pid"]) == (holder.pid, os.getpid())


def test_a_lock_without_a_readable_owner_still_locks(tmp_path):
    run = RunFolder(tmp_path)
    with run.lock():
        for text in ("", "[]", '{"pid": 1}'):
            (run.path / "owner.json").write_text(text)
            with pytest.raises(UserError) as caught, run.lock():
                pytest.fail("two locks on one run")
            assert caught.value.code == LOCKED


def test_the_lock_is_given_back_after_an_error(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(ZeroDivisionError), run.lock():
        raise ZeroDivisionError

    with run.lock():
        pass

    assert not (run.path / "owner.json").exists()


def test_deleting_the_folder_while_it_is_held_is_no_error(tmp_path):
    run = RunFolder(tmp_path / "run")

    with run.lock():
        for path in run.path.iterdir():
            path.unlink()
        run.path.rmdir()

    with run.lock():
        pass


# Where the lock is worth nothing


@pytest.fixture(params=BROKEN)
def claimant(request, tmp_path):
    """Starts processes that hold the run in `tmp_path / "run"`, where locks are broken."""
    started = []

    def start() -> subprocess.Popen:
        broken = BROKEN[request.param]
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD_BY_CLAIM, tmp_path / "run", broken],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_lock_that_works_is_found_to(tmp_path):
    with RunFolder(tmp_path).lock():
        assert module._proved == {tmp_path.stat().st_dev: True}


def test_a_claim_keeps_a_second_process_out_while_the_first_lives(claimant):
    first = claimant()
    assert first.stdout.readline() == "held\n"
    os.kill(first.pid, signal.SIGSTOP)  # it lives, though it does nothing
    second = claimant()
    answer = second.stdout.readline()
    os.kill(first.pid, signal.SIGCONT)

    assert answer.startswith(f"refused {LOCKED} process {first.pid} on {socket.gethostname()}")
    first.communicate("")
    assert claimant().stdout.readline() == "held\n"


def test_of_many_that_find_a_dead_process_s_claim_at_most_one_takes_it(claimant):
    dead = claimant()
    assert dead.stdout.readline() == "held\n"
    dead.kill()
    dead.wait()
    answers = [process.stdout.readline() for process in [claimant() for _ in range(4)]]

    assert [answer.split()[0] for answer in answers].count("held") <= 1
    assert "held\n" in [*answers, claimant().stdout.readline()]


def test_who_has_lost_its_claim_writes_no_more(claimant, tmp_path):
    first = claimant()
    assert first.stdout.readline() == "held\n"
    (tmp_path / "run" / "owner.json").write_text("another's")

    assert first.wait(timeout=60) == -signal.SIGKILL
