"""Who holds a run: a lock that is proved to exclude, else a claim that a helper keeps fresh."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from lmplay.console import note
from lmplay.disk import make_folder
from lmplay.errors import LOCKED, UserError

BEAT_SECONDS = 2.0  # between two signs of life
STALE_SECONDS = 20.0  # a claim without any in this time is a dead process's

_proved: dict[int, bool] = {}  # of each file system that this process has met
_EXCLUDED = 3
_TRY = f"""
import fcntl, os, sys
try:
    fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit({_EXCLUDED})
"""
# no thread of ours: a library that computes for minutes would keep that from running
_BEAT = """
import os, select, signal, sys
path, mine, seconds = sys.argv[1], sys.argv[2].encode(), float(sys.argv[3])
holder = os.getppid()
while not select.select([0], [], [], seconds)[0] and os.getppid() == holder:
    try:
        with open(path, "rb") as claim:
            is_ours = claim.read() == mine
        if is_ours:
            os.utime(path)
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(path)):
            break  # the run was deleted
        is_ours = False
    except OSError:
        continue  # a network that recovers
    if not is_ours:
        sys.stderr.write(f"error: {path}: another process took this run over meanwhile\\n")
        os.kill(holder, signal.SIGKILL)  # whatever it still wrote, it would write into that run
        break
"""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run, so that no second process trains in it; the folder is made if need be.

    The operating system gives its lock back when the holder dies, however it dies, and owner.json
    only tells others who that is. Where two processes of this machine do not exclude each other,
    or there are no locks, owner.json is the claim itself: made at once or not at all, touched
    every BEAT_SECONDS, and taken over from a process that does not do so for STALE_SECONDS.

    Raises:
        UserError: a live process holds the run (code LOCKED), or the folder cannot be written.
    """
    owner = folder / "owner.json"
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "claim": secrets.token_hex(4)}
    facts["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    mine = json.dumps(facts) + "\n"
    with ExitStack() as held:
        try:
            make_folder(folder)
            lock = folder / "lock"
            if not _lock(lock, held):
                raise _locked(owner)
            if _excludes(lock):
                owner.write_text(mine)
            else:
                held.enter_context(_claimed(owner, mine))
        except OSError as error:
            hint = "choose another place with --out-dir"
            raise UserError(f"cannot write to {folder}: {error.strerror}", hint) from None
        try:
            yield
        finally:
            with suppress(OSError):  # also where the whole folder was deleted meanwhile
                if _holds(owner, mine):
                    owner.unlink()


def _lock(path: Path, held: ExitStack) -> bool:
    """Take the system's lock until `held` ends; False where another process has it.

    True also where the file system has none: that is for the proof to find.
    """
    if os.name == "nt":
        from filelock import FileLock, Timeout

        try:
            held.enter_context(FileLock(path).acquire(blocking=False))
        except Timeout:
            return False
        return True
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    # else who had it has taken the folder away meanwhile, and a third may make it anew
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _excludes(lock: Path) -> bool:
    """Whether a second process is kept out by the lock that this one holds."""
    if os.name == "nt":
        return True
    device = lock.stat().st_dev
    if device not in _proved:
        command = [sys.executable, "-ISc", _TRY, lock]
        tried = subprocess.run(command, timeout=60, capture_output=True)
        _proved[device] = tried.returncode == _EXCLUDED
    return _proved[device]


@contextmanager
def _claimed(owner: Path, mine: str) -> Iterator[None]:
    """Make `owner` our claim, and keep it fresh while entered."""
    note(f"{owner.parent}: locks do not work on this file system, so {owner.name} is kept fresh")
    while True:
        try:
            with open(owner, "x") as file:
                file.write(mine)
            break
        except FileExistsError:
            _remove_stale(owner)
    command = [sys.executable, "-ISc", _BEAT, owner, mine, str(BEAT_SECONDS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as helper:
        try:
            yield
        finally:
            helper.stdin.close()


def _remove_stale(owner: Path) -> None:
    """Watch a claim, and take it away if it shows no sign of life.

    Raises:
        UserError: it does, or somebody else took it meanwhile.
    """
    seen = _signs(owner)
    if seen is None:
        return
    # of all who watch this claim, only the one that makes this file may take it away
    right = owner.with_name(f".{owner.name}-{sha256(seen[0]).hexdigest()[:16]}")
    was_taken = right.exists()
    note(f"{owner}: looking for {STALE_SECONDS:.0f} s whether its process lives")
    until = time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        time.sleep(BEAT_SECONDS / 4)
        if _signs(owner) != seen:
            raise _locked(owner)
    if was_taken:  # by one that died before it was done
        right.unlink(missing_ok=True)
    try:
        right.touch(exist_ok=False)
    except FileExistsError:
        raise _locked(owner) from None
    try:
        if _signs(owner) != seen:
            raise _locked(owner)
        owner.unlink()
    finally:
        right.unlink()


def _signs(owner: Path) -> tuple[bytes, int] | None:
    try:
        return owner.read_bytes(), owner.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _holds(owner: Path, mine: str) -> bool:
    seen = _signs(owner)
    return seen is not None and seen[0] == mine.encode()


def _locked(owner: Path) -> UserError:
    try:
        facts = json.loads(owner.read_bytes())
        pid, host, started = facts["pid"], facts["host"], facts["started"]
    except (OSError, ValueError, LookupError, TypeError):  # between its lock and its note
        problem = f"another process holds {owner.parent}"
        return UserError(problem, hint="try again", code=LOCKED)
    problem = f"process {pid} on {host} has held {owner.parent} since {started}"
    return UserError(problem, hint=f"wait for it, or stop it: kill {pid}", code=LOCKED)
