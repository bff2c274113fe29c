"""A run that was cut anywhere goes on bit by bit, and never on something else in silence."""

import json
import os
import random
import shutil

import pytest

from lmplay.optim.known import KNOWN

NUM_STEPS, NUM_PARTS = 12, 3  # parts of a step: 2, 2 and 1 of 5 rows
SETTINGS = {
    "dropout": [],
    "muon": ["--optimizer", "muon"],
    "sophia": ["--optimizer", "sophia"],
    "bf16": ["--precision", "bf16"],
    "llama": ["--exp", "llama"],
}


def test_a_cut_after_any_part_of_any_step_changes_no_bit(bench, trials, figure):
    bench.plan(steps=NUM_STEPS)
    settings, num = trials(["dropout"], list(SETTINGS)), 0
    everywhere = range(1, NUM_STEPS * NUM_PARTS + 1)

    for name in settings:
        bench.train(f"whole-{name}", *SETTINGS[name])
        for cut in trials([1, 8, 20], everywhere if name == "dropout" else everywhere[::5]):
            num += 1
            out = f"cut-{name}-{cut}"
            bench.train(out, *SETTINGS[name], fault=f"term@step.part:{cut}", code=143)
            assert bench.steps(out)[-1] == (cut - 1) // NUM_PARTS
            bench.train(out, *SETTINGS[name])
            bench.assert_same(out, f"whole-{name}")
            shutil.rmtree(bench.path / out)

    figure("bitwise_resume_every_step", f"{num} of {num} cuts identical, {len(settings)} settings")


def test_cuts_of_what_was_cut_before_change_no_bit(bench, trials, figure):
    bench.plan(steps=NUM_STEPS)
    bench.train("whole")
    draw = random.Random(0)
    num = trials(1, 20)

    for number in range(num):
        for _ in range(3):  # the first epoch ends in step 6
            part = draw.randrange(2, 9)
            bench.train(f"cut-{number}", fault=f"term@step.part:{part}", code=143)
        bench.train(f"cut-{number}")
        bench.assert_same(f"cut-{number}")

    figure("resume_of_resume", f"{num} of {num} runs with three cuts identical")


def test_the_time_of_day_decides_nothing(bench, trials, figure):
    bench.plan(steps=NUM_STEPS)
    bench.train("whole")
    num = trials(1, 10)
    draw = random.Random(0)

    for number in range(num):
        out = f"cut-{number}"
        bench.train(out, fault=f"term@step.part:{3 * number + 12 - 9 * (number > 7)}", code=143)
        for path in bench.folder(out).path.rglob("*"):
            os.utime(path, (draw.uniform(0, 2e9),) * 2)
        bench.train(out, setup="import time\ntime.time = lambda: 1e9")
        bench.assert_same(out)

    figure("clock_jump", f"{num} of {num}: clock set back to 2001, times of files shuffled")


@pytest.mark.soak
def test_every_optimizer_goes_on_bit_for_bit(bench, figure):
    bench.plan(steps=NUM_STEPS)

    for name in KNOWN:
        given = ["--optimizer", name]
        bench.train(f"whole-{name}", *given)
        bench.train(f"cut-{name}", *given, fault="term@step.part:20", code=143)
        bench.train(f"cut-{name}", *given)
        bench.assert_same(f"cut-{name}", f"whole-{name}")

    figure("bitwise_resume_every_optimizer", f"{len(KNOWN)} of {len(KNOWN)} identical")


EDITS = {
    "optimizer.lr": {"optimizer": {"name": "AdamW", "lr": 0.5}},
    "optimizer.name": {"optimizer": {"name": "SGD", "lr": 0.01}},
    "schedule": {"schedule": {"name": "cosine", "warmup": 0.5}},
    "clip": {"clip": 0.001},
    "tokenizer": {"tokenizer": "bpe:300"},
    "sequence_length": {"sequence_length": 8},
    "batch_size": {"batch_size": 4},
    "model": {"model": {"num_blocks": 2, "width": 8, "num_heads": 2}},
    "precision": {"precision": "bf16"},
    "validation": {"validation": {"tokens": 100, "fraction": 0.3, "every_tokens": 160}},
}


@pytest.fixture
def cut_run(bench):
    bench.plan(steps=NUM_STEPS)
    bench.train("whole")
    bench.train("cut", fault="term@step.part:20", code=143)
    return bench


def test_what_changes_under_a_run_is_told_or_refused(cut_run, trials, figure, tmp_path):
    bench = cut_run
    fields = trials(["optimizer.lr", "tokenizer"], list(EDITS))
    for field in fields:
        out = f"edited-{field}"
        shutil.copytree(tmp_path / "cut", tmp_path / out)
        shutil.copy(tmp_path / "cut.rows", tmp_path / f"{out}.rows")
        bench.plan(steps=NUM_STEPS, **EDITS[field])
        said = bench.train(out).said()
        assert "edited since this run began: plan tiny" in said
        bench.assert_same(out)
    bench.plan(steps=NUM_STEPS)
    experiment = (bench.folder("cut").experiment_py).read_text()
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "gpt2ish.py").write_text(experiment + "\n# another one\n")
    shutil.copytree(tmp_path / "cut", tmp_path / "edited-source")
    shutil.copy(tmp_path / "cut.rows", tmp_path / "edited-source.rows")
    said = bench.train("edited-source").said()
    assert "edited since this run began" in said and "gpt2ish.py" in said
    bench.assert_same("edited-source")
    (tmp_path / "experiments" / "gpt2ish.py").unlink()
    bench.plan(steps=NUM_STEPS, stages=[{"datasets": ["two"]}])
    assert "was trained on" in bench.train("cut", code=2).said()
    bench.plan(steps=NUM_STEPS)
    text = tmp_path / "one.jsonl"
    text.write_text(text.read_text() + "\n" + json.dumps({"text": "one more"}))
    said = bench.train("cut", code=2).said()
    assert "which has changed" in said

    num = len(fields) + 3
    figure("changed_on_resume", f"{num} of {num} fields told or refused", fields=[*fields])
