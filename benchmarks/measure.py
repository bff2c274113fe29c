"""What the benchmarks share: sides in processes of their own, taken in turn, and the table."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from lmplay.errors import UserError
from lmplay.run.provenance import machine_facts

PRECISIONS = ("fp32", "bf16")  # that are compared
PEER = "transformers"


def has_peer() -> bool:
    """Whether the extra `bench` is installed."""
    try:
        return bool(version(PEER))
    except PackageNotFoundError:
        return False


def chosen(option: str, given: str, known: Iterable[str]) -> list[str]:
    """The names that an option lists with commas.

    Raises:
        UserError: one of them is not known.
    """
    names, known = given.split(","), list(known)
    for name in names:
        if name not in known:
            raise UserError(f"{option}: there is no {name!r}", hint=f"there are {', '.join(known)}")
    return names


def without_peer(note: Callable[[str], None]) -> None:
    """Say that only our own side is measured."""
    note(f"{PEER} is not installed, so there is no ratio: pip install 'lmplay[bench]'")


class Side:
    """A process that measures one side and waits, asleep, while the others have their turn.

    Args:
        file: the benchmark that holds the side.
        kind: one of those that it gives to `serve`.
        settings: what it is told; JSON.
        name: what the table calls it.
    """

    def __init__(self, file: str, kind: str, settings: dict, name: str):
        self.name = name
        command = [sys.executable, file, "--side", kind, json.dumps(settings)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._is_ready = False

    def ready(self) -> None:
        """Wait until it could take its first turn."""
        if not self._is_ready:
            self._reply()
        self._is_ready = True

    def turn(self) -> dict:
        """Let it take its next turn, and wait for what it measured.

        Raises:
            UserError: the process has ended; its own words are on stderr.
        """
        self.ready()
        with suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the side {self.name} ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process and everything that it holds."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Turns:
    """The other end of a `Side`: what is between `wait`, or `restart`, and `done` is timed."""

    def __init__(self):
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a library prints is no reply
        self._began = 0.0
        self._measured: dict = {}
        self._is_ready = False

    def wait(self) -> None:
        """Sleep until it is this side's turn."""
        if not self._is_ready:
            self._reply()
        self._is_ready = True
        if not sys.stdin.readline():
            sys.exit()
        self._began = time.perf_counter()

    def restart(self) -> None:
        """Time from here: systems take memory and caches from what sleeps, and give them back."""
        now = time.perf_counter()
        self._measured["waking_seconds"] = now - self._began
        self._began = now

    def done(self, **measured: object) -> None:
        """Report the seconds of this turn and whatever else is known."""
        seconds = time.perf_counter() - self._began
        self._reply(seconds=seconds, **self._measured, **measured)
        self._measured = {}

    def _reply(self, **said: object) -> None:
        print(json.dumps(said), file=self._replies, flush=True)


def serve(sides: dict[str, Callable[[Turns, dict], None]]) -> bool:
    """In a process that `Side` started: run the side and return True when it has ended."""
    if sys.argv[1:2] != ["--side"]:
        return False
    settings = json.loads(sys.argv[3])
    torch.set_num_threads(settings["threads"])
    sides[sys.argv[2]](Turns(), settings)
    return True


def interleave(sides: Sequence[Side], seconds: float, warm_up: int = 1) -> dict[str, list[dict]]:
    """Every side's turns: `warm_up` that are not timed, then A B A B until `seconds` are over.

    Returns:
        Under each name what its turns measured, the warm-up first. Two rounds at least.
    """
    measured: dict[str, list[dict]] = {side.name: [] for side in sides}
    for side in sides:
        side.ready()
    for side in sides:
        for _ in range(warm_up):
            measured[side.name].append(side.turn())
    began, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - began < seconds:
        for side in sides if rounds % 2 == 0 else reversed(sides):  # drift favours nobody
            measured[side.name].append(side.turn())
        rounds += 1
    return measured


def median_ratio(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The median of the rounds' ratios theirs / mine, the smallest and the largest."""
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def row(
    what: str,
    unit: str,
    ours: float,
    theirs: float | None = None,
    ratio: float | None = None,
    wanted: float | None = None,
    spread: Sequence[float] | None = None,
) -> dict:
    """A line of the table that `make bench` writes.

    Args:
        what: was measured, and against whom.
        ratio: how many times as good as the other side ours is; `spread` over the rounds.
        wanted: the ratio that it should reach; for memory, the share that it should stay under.
    """
    return {
        "what": what,
        "unit": unit,
        "ours": ours,
        "theirs": theirs,
        "ratio": ratio,
        "spread": spread,
        "wanted": wanted,
    }


def report(name: str, device: torch.device, threads: int, cases: list[dict], rows: list[dict]):
    """The JSON document of a benchmark."""
    return {
        "schema_version": 1,
        "benchmark": name,
        "machine": facts(device, threads),
        "rows": rows,
        "cases": cases,
    }


def facts(device: torch.device, threads: int) -> dict:
    """The machine, the versions and the commit that a table was made with."""
    made = machine_facts(device) | {"threads": threads}
    if has_peer():
        made["versions"][PEER] = version(PEER)
    return made


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
