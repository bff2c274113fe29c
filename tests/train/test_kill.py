"""A trainer that is killed again and again ends like one that never was."""

import json
import random
import subprocess
import sys
import time

import pytest

from lmplay.run.checkpoint import newest_checkpoint
from lmplay.run.folder import RunFolder
from lmplay.run.records import read_rows

NUM_STEPS = 80
PLAN = {
    "tokenizer": "byte",
    "sequence_length": 16,
    "batch_size": 2,
    "model": {"num_blocks": 1, "width": 16, "num_heads": 2},
    "datasets": {"words": {"files": ["words.txt"]}},
    "stages": [{"datasets": ["words"]}],
    "tokens": NUM_STEPS * 32,
    "optimizer": {"name": "AdamW", "lr": 0.01},
    "precision": "fp32",
    "validation": {"tokens": 100, "fraction": 0.2, "every_tokens": 20 * 32},
    "checkpoints": {"every_tokens": 5 * 32, "keep": 2},
}
CLOCKS = {"tokens_per_second", "memory", "seconds"}


def without_clocks(path):
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_rows(path)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_at_random_times_change_nothing(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(f"Line {i} of a text, and again line {i}." for i in range(4000))
    (tmp_path / "words.txt").write_text(text)
    (tmp_path / "words.json").write_text(json.dumps(PLAN))

    def trainer(out):
        command = [sys.executable, "-m", "lmplay.train", "--plan", "words.json", "--out-dir", out]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    assert trainer("whole").wait(timeout=400) == 0
    luck = random.Random(0)
    cut = RunFolder(tmp_path / "cut" / "words" / "gpt2ish" / "seed-0")
    kills = 0
    while kills < 3:
        process = trainer("cut")
        began = len(read_rows(cut.train_csv)) if cut.train_csv.exists() else 0
        aim = began + luck.randrange(1, 25)
        while process.poll() is None:
            if cut.train_csv.exists() and len(read_rows(cut.train_csv)) >= aim:
                process.kill()
                break
            time.sleep(luck.random() * 0.01)
        kills += 1
        process.wait()
    assert trainer("cut").wait(timeout=400) == 0
    whole = RunFolder(tmp_path / "whole" / "words" / "gpt2ish" / "seed-0")

    assert without_clocks(cut.train_csv) == without_clocks(whole.train_csv)
    assert without_clocks(cut.validation_csv) == without_clocks(whole.validation_csv)
    one, other = (newest_checkpoint(folder, print) for folder in (cut, whole))
    assert one.step == other.step == NUM_STEPS
    assert all((one.model[name] == other.model[name]).all() for name in other.model)
