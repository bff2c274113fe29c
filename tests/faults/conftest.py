"""Real processes that are killed, stopped and starved; the figures of `make soak`.

A trial is forked from a server that has loaded torch and done nothing else, so that it costs a
second and not five; it is a process of its own all the same, and what kills it is SIGKILL.
"""

import hashlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from filelock import FileLock

from lmplay.run.folder import RunFolder
from lmplay.run.records import read_rows

HERE = Path(__file__).parent
FIGURES = HERE.parents[1] / "docs" / "reliability.json"
SOAK = bool(os.environ.get("LMP_SOAK"))
CLOCKS = {"tokens_per_second", "memory", "seconds"}
ROWS, ROW_LENGTH = 5, 16  # rows in a batch go through the model two by two: the last part is short
PATIENCE = 1800.0 if SOAK else 300.0  # seconds; a trial that has not ended by then hangs

_CONTEXT = multiprocessing.get_context("forkserver")


class Trial:
    """A command under way in a process of its own."""

    def __init__(self, **names):
        self.log = Path(names["LOG"])
        _CONTEXT.set_forkserver_preload(["lmplay.train.session", "torch._dynamo"])
        self.process = _CONTEXT.Process(
            target=runpy.run_path, args=(str(HERE / "child.py"), names, "child")
        )
        self.process.start()
        self.pid = self.process.pid

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, a signal's negated; a trial that hangs fails the test."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"it hangs: {self.said()}")
        return self.process.exitcode

    def has_stopped(self) -> bool:
        """Wait until it has stopped itself at its fault; False where it ended before."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                stat = Path(f"/proc/{self.pid}/stat").read_text()
            except FileNotFoundError:
                return False
            if (state := stat.rpartition(")")[2].split()[0]) in "TZ":
                return state == "T"
            time.sleep(0.002)
        pytest.fail(f"it neither stops nor ends: {self.said()}")

    def seconds_until(self, *signals: int) -> float:
        """Send these to a stopped trial, let it go on, and say how long it took to end."""
        began = time.monotonic()
        for number in signals:
            self.send(number)
        self.send(signal.SIGCONT)
        self.wait()
        return time.monotonic() - began

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Bench:
    """A folder with a plan and text of its own, and what is trained there."""

    def __init__(self, path: Path, cache: Path):
        self.path, self.cache = path, cache
        self.num_trials = 0
        draw = random.Random(0)
        for name in ("one", "two"):
            texts = [" ".join(str(draw.getrandbits(30)) for _ in range(4)) for _ in range(16)]
            lines = [json.dumps({"text": text}) for text in texts]
            (path / f"{name}.jsonl").write_text("\n".join(lines))
        (path / "plans").mkdir()

    def plan(self, name: str = "tiny", steps: int = 12, every: int = 3, **values) -> None:
        """Write a plan of two stages: one text, then both, so that its second epoch begins."""
        per_step = ROWS * ROW_LENGTH
        plan = {
            "tokenizer": "byte",
            "sequence_length": ROW_LENGTH,
            "batch_size": ROWS,
            "model": {"num_blocks": 1, "width": 8, "num_heads": 2},
            "datasets": {n: {"files": [str(self.path / f"{n}.jsonl")]} for n in ("one", "two")},
            "stages": [{"datasets": ["one"]}, {"datasets": ["one", "two"]}],
            "tokens": steps * per_step,
            "optimizer": {"name": "AdamW", "lr": 0.01},
            "precision": "fp32",
            "validation": {"tokens": 200, "fraction": 0.2, "every_tokens": 2 * every * per_step},
            "checkpoints": {"every_tokens": every * per_step, "keep": 2},
        }
        (self.path / "plans" / f"{name}.json").write_text(json.dumps(plan | values))

    def command(self, name: str, *args, out="out", fault=None, setup="", **env) -> Trial:
        """Begin a command: train, generate, stats or export."""
        self.num_trials += 1
        ledger = self.path / f"{Path(out).name}.rows"
        return Trial(
            COMMAND=name, ARGS=[*map(str, args)], CWD=str(self.path),
            LOG=str(self.path / f"log-{self.num_trials}"), LEDGER=str(ledger),
            ENV={"LMP_DATASETS": str(self.cache), "OMP_NUM_THREADS": "1", **env},
            FAULT=fault, SETUP=setup,
        )  # fmt: skip

    def start(self, out: str, *args, plan="tiny", rows=2, **options) -> Trial:
        """Begin to train, or go on, in the folder `out`; {out}.rows says on what."""
        common = ["--plan", plan, "--out-dir", out, "--mini-batch-size", rows]
        return self.command("train", *common, *args, out=out, **options)

    def start_group(self, out: str, *args, faults=(None, None), **options) -> list[Trial]:
        """Begin to train in one process for each of `faults`, as torchrun starts them."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = str(taken.getsockname()[1])
        group = {"WORLD_SIZE": str(len(faults)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        group["LOCAL_WORLD_SIZE"] = group["WORLD_SIZE"]
        return [
            self.start(out, *args, fault=fault, RANK=str(n), LOCAL_RANK=str(n), **group, **options)
            for n, fault in enumerate(faults)
        ]

    def train_group(self, out: str, *args, codes=(0, 0), **options) -> list[Trial]:
        """Train to the end in several processes, which is `codes`."""
        trials = self.start_group(out, *args, **options)
        ended = tuple(trial.wait() for trial in trials)
        assert ended == codes, "\n".join(trial.said() for trial in trials)
        return trials

    def train(self, out: str, *args, code: int = 0, **options) -> Trial:
        """Train to the end, which is `code`."""
        trial = self.start(out, *args, **options)
        assert trial.wait() == code, trial.said()
        return trial

    def folder(self, out: str) -> RunFolder:
        """The only run in `out`."""
        return RunFolder(next((self.path / out).rglob("run.json")).parent)

    def state(self, out: str) -> str:
        """A hash of the newest checkpoint: weights, moments and random states, byte by byte."""
        folder = self.folder(out).checkpoints
        newest = self.steps(out)[-1]
        files = json.loads((folder / f"step-{newest}" / "manifest.json").read_bytes())["files"]
        tensors = {n: entry["sha256"] for n, entry in files.items() if n.endswith(".safetensors")}
        return hashlib.sha256(json.dumps([newest, tensors], sort_keys=True).encode()).hexdigest()

    def curves(self, out: str) -> list:
        """Every row of both curves, but for what a clock or the memory says."""
        files = [self.folder(out).train_csv, self.folder(out).validation_csv]
        return [
            [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_rows(file)]
            for file in files
        ]

    def trained_on(self, out: str) -> dict[int, Counter]:
        """The rows of each step when it was last taken, those of all processes together."""
        lines: dict[tuple[int, int], list] = {}
        for line in (self.path / f"{out}.rows").read_text().splitlines():
            entry = json.loads(line)
            lines[entry["step"], entry["rank"]] = entry["rows"]
        steps: dict[int, Counter] = defaultdict(Counter)
        for (step, _), rows in lines.items():
            steps[step].update(rows)
        return steps

    def assert_same(self, out: str, whole: str = "whole") -> None:
        """Both were trained alike: curves, weights, moments, random states, rows, nothing left."""
        assert self.curves(out) == self.curves(whole)
        assert self.state(out) == self.state(whole)
        assert self.num_moved(out, whole) == 0
        names = [path.name for path in self.folder(out).checkpoints.iterdir()]
        assert not [name for name in names if name.startswith(".")], names

    def steps(self, out: str) -> list[int]:
        """The steps of its checkpoints."""
        folder = self.folder(out).checkpoints
        return sorted(int(path.name.partition("-")[2]) for path in folder.glob("step-*"))

    def num_taken(self, out: str) -> int:
        """Steps that were taken so far, those that were taken twice counted twice."""
        ledger = self.path / f"{out}.rows"
        return len(ledger.read_text().splitlines()) if ledger.exists() else 0

    def num_moved(self, one: str, other: str) -> int:
        """Rows that a step of one training has and the same step of the other lacks."""
        a, b = self.trained_on(one), self.trained_on(other)
        return sum((a[n] - b[n]).total() + (b[n] - a[n]).total() for n in {*a, *b})


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("soak") and not SOAK:
            item.add_marker(pytest.mark.skip(reason="make soak"))


@pytest.fixture
def bench(tmp_path, cache):
    return Bench(tmp_path, cache)


@pytest.fixture
def trials():
    """How many trials: the first number in the suite, the second under `make soak`."""
    return lambda short, long: long if SOAK else short


@pytest.fixture
def figure(request):
    """Keeps what a test measured, under the name of its row in the table, where this is a soak."""
    began = time.monotonic()

    def keep(name: str, text: str, **values) -> None:
        print(f"{name}: {text}")
        if not SOAK:
            return
        with FileLock(f"{FIGURES}.lock"):
            known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
            seconds = round(time.monotonic() - began, 1)
            test = f"{request.path.relative_to(HERE.parents[1])}::{request.node.name}"
            known[name] = {"figure": text, "values": values, "seconds": seconds, "test": test}
            FIGURES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")

    return keep
