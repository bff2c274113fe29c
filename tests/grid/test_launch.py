"""Several processes of one command: heard as one, stopped as one, and training as one."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.grid import launch as launching
from lmplay.grid.launch import launch, refuse_missing_gpus
from lmplay.plan_file import read_plan
from lmplay.run import accelerator
from lmplay.run.checkpoint import newest_checkpoint
from lmplay.run.folder import RunFolder
from lmplay.run.records import read_rows
from lmplay.run.request import Request
from lmplay.train.display import Display
from lmplay.train.session import run_experiment


def python(code):
    return [sys.executable, "-c", f"import os, sys, time; rank = os.environ['RANK']; {code}"]


def test_every_process_is_told_its_place_and_only_the_first_is_heard(capfd):
    code = launch(
        python("print(rank, 'of', os.environ['WORLD_SIZE']); print(rank, file=sys.stderr)"), 3
    )
    heard = capfd.readouterr()

    assert code == 0
    assert heard.out == "0 of 3\n" and heard.err == "0\n"


def test_one_that_fails_alone_is_heard_and_whoever_waits_for_it_is_ended(monkeypatch, capfd):
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.1)
    code = launch(python("time.sleep(60) if rank == '0' else sys.exit('no memory')"), 2)

    assert code == 1
    assert capfd.readouterr().err == "process 1 of 2 failed:\nno memory\n"


def test_the_first_ones_own_exit_code_counts(capfd):
    code = launch(python("sys.stderr.write(rank); sys.exit(6 if rank == '0' else 1)"), 2)

    assert code == 6
    assert capfd.readouterr().err == "0"


def test_a_signal_reaches_every_process_once(tmp_path):
    worker = (
        "import os, pathlib, signal, sys\n"
        "def stop(*_): print('stopped', file=me, flush=True); sys.exit(130)\n"
        "me = open(os.environ['RANK'], 'w')\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "print('ready', file=me, flush=True)\n"
        "while True: signal.pause()\n"
    )
    launched = f"launch([{sys.executable!r}, '-c', {worker!r}], 2)"
    end = f"import sys; from lmplay.grid.launch import launch; sys.exit({launched})"
    process = subprocess.Popen([sys.executable, "-c", end], cwd=tmp_path)
    files = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not all(f.exists() and f.read_text() for f in files):
        time.sleep(0.02)  # until both wait for it
    process.send_signal(signal.SIGINT)

    assert process.wait(timeout=400) == 130
    assert [file.read_text() for file in files] == ["ready\nstopped\n"] * 2


@pytest.mark.parametrize(
    ("seen", "device", "words"),
    [(0, "auto", "torch sees 0"), (4, "auto", "torch sees 4"), (8, "cpu", "two answers")],
)
def test_gpus_that_are_not_there_are_refused(monkeypatch, seen, device, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    with pytest.raises(UserError, match=words) as raised:
        refuse_missing_gpus(5, device)

    assert raised.value.code == 2
    refuse_missing_gpus(seen, "cuda")


def test_processes_that_did_not_become_one_group_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerator, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(UserError, match="in a group of 1"):
        accelerator.make_accelerator(torch.device("cpu"), "fp32")


def rewind(folder, step):
    """Make a finished run one that was stopped after this step, which has a checkpoint."""
    for path in folder.checkpoints.glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    folder.write(folder.read().stopped("a test"))


@pytest.mark.slow
def test_sharded_processes_go_on_from_one_and_one_goes_on_from_them(place, capfd):
    plain = {"embed_dropout": 0.0, "ff_dropout": 0.0, "num_blocks": 2}
    averages = {"averages.ema": 0.4, "averages.lawa": 0.5, "averages.tail_ema": 0.2}
    both = plain | averages
    changes = [part for key, value in both.items() for part in ("--set", f"{key}={value}")]

    def alone(out_dir):
        request = Request(
            resolve("gpt2ish"), read_plan("words", averages), both, plain,
            device="cpu", mini_batch_size=1, out_dir=Path(out_dir),
        )  # fmt: skip
        with Display("alone") as display:
            return RunFolder(Path(run_experiment(request, display)["run"]))

    one = alone("one")
    shutil.copytree("one", "two")
    two = RunFolder("two" / one.path.relative_to("one"))
    rewind(two, 4)
    command = [
        *(sys.executable, "-m", "lmplay.train", "--plan", "words", *changes, "--out-dir", "two"),
        *("--device", "cpu", "--mini-batch-size", "1", "--shard", "--json"),
    ]
    capfd.readouterr()
    assert launch(command, 2) == 0
    heard = capfd.readouterr()
    facts = two.read()
    rewind(two, 8)
    alone("two")

    assert json.loads(heard.out)["status"] == "finished"  # one document
    assert heard.err.count("going on at step 4") == 1 and "Traceback" not in heard.err
    assert facts.world_size == 2 and facts.fsdp and "fsdp" in facts.changed_midway
    for name in ("train_csv", "validation_csv"):
        rows = [read_rows(getattr(folder, name)) for folder in (one, two)]
        for a, b in zip(*rows, strict=True):
            averaged = [column for column in a if column.startswith("loss_of_")]
            assert len(averaged) == (3 if name == "validation_csv" else 0)
            for column in ("step", "tokens", "loss", "accuracy", *averaged):
                assert a[column] == pytest.approx(b[column], rel=1e-5)
    kept = [newest_checkpoint(folder, print).averages for folder in (one, two)]
    assert set(kept[0]) == set(kept[1])
    for key, value in kept[0].items():
        if not key.endswith("key.bias"):  # which no softmax sees
            torch.testing.assert_close(kept[1][key], value, rtol=1e-3, atol=1e-5)
    assert two.samples_md.read_text().count("## step 6") == 2  # before and after the rewinding
