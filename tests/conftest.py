"""What all tests share. A process has one thread: models this small only get slower with more."""

import functools
import hashlib
import json
import os
import random
import signal
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import settings

from lmplay.catalog.entry import read_file
from lmplay.run.facts import DataFacts, Facts

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for every subprocess
settings.register_profile("lmplay", deadline=None)  # a busy machine is no failure
settings.load_profile("lmplay")
for number in (signal.SIGINT, signal.SIGHUP):  # which nohup and a shell's & tell us to ignore
    if signal.getsignal(number) is signal.SIG_IGN:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)

ROOT = Path(__file__).parent.parent
LEDGER = ROOT / "tests" / "proven.json"  # experiment files and the hash of all that their tests run
DAYS = 8  # in which every unchanged file has its turn
RUN = ("*.py", "catalog/*.py", "model/*.py", "proofs/*.py", "optim/*.py", "export/*.py")


@functools.cache
def bundled() -> dict[str, str]:
    """The experiment files, and the hash of each with its parents, these tests and lmplay."""
    paths = [path for pattern in RUN for path in sorted((ROOT / "lmplay").glob(pattern))]
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    paths += [path for path in tests if b"mark.every_experiment" in path.read_bytes()]
    paths.append(ROOT / "tests" / "models.py")
    harness = hashlib.sha256(version("torch").partition("+")[0].encode())
    for path in paths:
        harness.update(path.read_bytes())
    files = {path.stem: read_file(path)[0] for path in (ROOT / "experiments").glob("[!_]*.py")}

    def hash_of(name: str) -> str:
        whole, entry = harness.copy(), files.get(name)
        while entry:
            whole.update(entry.source.encode())
            entry = files.get(entry.parent)
        return whole.hexdigest()[:16]

    return {name: hash_of(name) for name in sorted(files)}


@functools.cache
def is_due(name: str) -> bool:
    """Whether what an unchanged file was tested for is tested again now; a changed one always is.

    Args:
        name: of an experiment file, or several with plus signs; an idea of the tests own is due
            as the baseline is.
    """
    known, files = json.loads(LEDGER.read_text()), bundled()
    parts = [part if part in files else "gpt2ish" for part in name.split("+")]
    if any(files[part] != known.get(part) for part in parts):
        return True
    has_its_turn = (date.today().toordinal() + crc32(name.encode())) % DAYS == 0
    return "LMP_ALL" in os.environ or (has_its_turn and "LMP_PROVE" not in os.environ)


def pytest_collection_modifyitems(config, items):
    """Leave out the tests of experiments that are not due."""
    due, rest = [], []
    for item in items:
        names = item.callspec.params.values() if item.get_closest_marker("every_experiment") else ()
        paths = [getattr(value, "path", value) for value in names]
        named = [path.stem for path in paths if isinstance(path, Path)]
        named += ["+".join(path) for path in paths if isinstance(path, tuple)]
        (due if all(map(is_due, named)) else rest).append(item)
    config.hook.pytest_deselected(items=rest)
    items[:] = due


def pytest_report_header():
    """Say what is left out."""
    num_due = sum(map(is_due, bundled()))
    return (
        f"{num_due} of {len(bundled())} experiment files: changed, or their turn (LMP_ALL=1: all)"
    )


def pytest_sessionfinish(session, exitstatus):
    """After `make proofs`, remember what has passed."""
    is_worker = hasattr(session.config, "workerinput")
    if "LMP_PROVE" in os.environ and exitstatus == 0 and not is_worker:
        LEDGER.write_text(json.dumps(bundled(), indent=0) + "\n")


@pytest.fixture(autouse=True)
def same_numbers():
    """A test draws the same numbers whatever ran before it; most of them load torch, not all."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def cache(tmp_path, tmp_path_factory, monkeypatch):
    """Where lmplay keeps prepared text: each test's own, but for proofs, which all tests share.

    A proof is remembered by the hash of all that it ran, so what one test proved holds for the
    rest; it takes most of the time of a tiny run.
    """
    shared = tmp_path_factory.getbasetemp().parent / "checks"  # of all processes of a test run
    shared.mkdir(exist_ok=True)
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "checks").symlink_to(shared)
    monkeypatch.setenv("LMP_DATASETS", str(folder))
    return folder


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    """A folder with a plan on text of its own: 9 steps, dropout on, 2 epochs, an uneven end."""
    monkeypatch.chdir(tmp_path)
    words = random.Random(0).choices(["one", "two", "three", "four", "five"], k=700)
    rows = [{"text": " ".join(words[i : i + 7])} for i in range(0, len(words), 7)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    plan = {
        "tokenizer": "byte",
        "sequence_length": 32,
        "batch_size": 5,
        "model": {"num_blocks": 1, "width": 16, "num_heads": 2},
        "datasets": {"words": {"files": [str(tmp_path / "text.jsonl")]}},
        "stages": [{"datasets": ["words"]}],
        "tokens": 9 * 5 * 32,
        "optimizer": {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup": 0.2},
        "precision": "fp32",
        "validation": {"tokens": 300, "fraction": 0.1, "every_tokens": 3 * 160},
        "checkpoints": {"every_tokens": 4 * 160, "keep": 3},
    }
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "words.json").write_text(json.dumps(plan))
    return tmp_path


@pytest.fixture(scope="session")
def make_facts():
    """Makes what run.json says of a small finished run, but for the values that are given."""

    def make(data=None, **values):
        texts = {
            "content": "c",
            "fingerprint": "a",
            "validation_fingerprint": "b",
            "tokenizer": "byte",
        }
        sizes = {"vocab_size": 257, "validation_tokens": 300, "validation_bytes": 300}
        known = {
            "experiment": "gpt2ish",
            "file": "gpt2ish",
            "stack": [],
            "docstring_summary": "The baseline.",
            "plan_name": "quick",
            "seed": 0,
            "changes": {},
            "label": "gpt2ish",
            "plan": {"optimizer": {"lr": 0.001}, "schedule": {"name": "constant"}},
            "config": {"width": 32},
            "scale_differs": {},
            "bound": False,
            "data": DataFacts(**texts | sizes | (data or {})),
            "flops_per_token": 1e6,
            "parameters": {"trained": 3_000_000, "matmul": 2_000_000, "lookup": 1_000_000},
            "num_steps": 20,
            "num_tokens": 2000,
            "tokens_per_step": 100,
            "device": "cpu",
            "device_name": "a CPU",
            "threads": 2,
            "platform": "here",
            "versions": {"lmplay": "0.2.0", "torch": "2.13.0", "python": "3.11.7"},
            "git_commit": None,
            "precision": "fp32",
            "world_size": 1,
            "mini_batch_size": 2,
            "compiled": False,
            "fsdp": False,
            "command": [],
            "started": "2026-01-01T00:00:00+00:00",
            "status": "finished",
        }
        known |= values
        known.setdefault("num_tokens", known["num_steps"] * known["tokens_per_step"])
        return Facts(**known)

    return make
