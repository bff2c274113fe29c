"""Pretraining and then instructions in one plan: what is scored, shown and resumed."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lmplay.catalog.entries import resolve
from lmplay.model.experiment import load_experiment
from lmplay.plan_file import read_plan
from lmplay.run.checkpoint import read_checkpoint
from lmplay.run.folder import RunFolder
from lmplay.run.records import read_rows
from lmplay.run.request import Request
from lmplay.train.session import run_experiment
from lmplay.train.signals import Stopped

# T positions, V vocabulary

END = 256  # of the byte tokenizer
T = 32  # each document below has this many targets, its end among them, so it is a row
STORIES = [("", f"Story {i} is about a cat, no {i}."[: T - 1].ljust(T - 1, ".")) for i in range(4)]
ASKED = [(f"What is {i} + {i}?", f"It is {2 * i}".ljust(T - 17, "!")) for i in range(4)]
CHATS = [(f"Hi {i}", f"I'm {i}".ljust(T - 24, "?")) for i in range(4)]
RENDERED = {
    "stories": STORIES,
    "asked": [(f"{prompt}\n\n", truth) for prompt, truth in ASKED],
    "chats": [(f"User:\n{said}\n\nAssistant:\n", truth) for said, truth in CHATS],
}


class Silent:
    """Stands where the display is, and stops at a step where it is told to."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def row(self, kind, row):
        if kind == "checkpoint" and row["step"] == self.stop_at:
            raise Stopped(130)

    def note(self, *_):
        pass

    start = example = preparing = note


@pytest.fixture
def school(tmp_path, cache, monkeypatch):
    """A plan of stories, then of questions or chats: a step of each, half a row held out."""
    monkeypatch.chdir(tmp_path)
    rows = {
        "stories": [{"text": text} for _, text in STORIES],
        "asked": [{"prompt": prompt, "truth": truth} for prompt, truth in ASKED],
        "chats": [
            {
                "messages": [
                    {"role": "user", "content": said},
                    {"role": "assistant", "content": truth},
                ]
            }
            for said, truth in CHATS
        ],
    }
    for name, some in rows.items():
        for start in ("", "validation-"):
            text = "".join(json.dumps(row) + "\n" for row in some)
            Path(f"{start}{name}.jsonl").write_text(text)
    (tmp_path / "plans").mkdir()

    def write(kind, epochs=1):
        files = {
            name: {
                "files": [f"{name}.jsonl", f"validation-{name}.jsonl"],
                "validation_split": "validation",
            }
            for name in ("stories", kind)
        }
        plan = {
            "tokenizer": "byte",
            "sequence_length": T,
            "batch_size": 4,
            "model": {"num_blocks": 1, "width": 16, "num_heads": 2, "embed_dropout": 0.1},
            "datasets": files,
            "stages": [{"datasets": ["stories"]}, {"datasets": [kind], "epochs": epochs}],
            "optimizer": {"name": "AdamW", "lr": 0.01},
            "precision": "fp32",
            "validation": {"tokens": 1000, "every_tokens": 4 * T},
            "checkpoints": {"every_tokens": 4 * T, "keep": 9},
        }
        (tmp_path / "plans" / "school.json").write_text(json.dumps(plan))

    return write


def run(display=None, out_dir="runs", **changes):
    plan = read_plan("school", changes)
    request = Request(
        resolve("gpt2ish"), plan, changes, {}, out_dir=Path(out_dir), mini_batch_size=3
    )
    return RunFolder(Path(run_experiment(request, display or Silent())["run"]))


def nats_by_hand(folder, step, documents):
    """Sum over each truth and its end of minus the log of its probability, and their number."""
    experiment = load_experiment(resolve("gpt2ish"))
    model = experiment.model(experiment.config(**folder.read().config)).eval()
    model.load_state_dict(read_checkpoint(folder, step, weights_only=True).model)
    nats, count = 0.0, 0
    for prompt, truth in documents:
        tokens = [END, *prompt.encode(), *truth.encode(), END]
        assert len(tokens) == T + 1
        logits_TV = model(torch.tensor([tokens[:-1]]))[0].double()
        for place in range(len(prompt), T):
            nats -= logits_TV[place].log_softmax(-1)[tokens[place + 1]].item()
            count += 1
    return nats, count


@pytest.mark.parametrize("kind", ["asked", "chats"])
def test_the_loss_of_an_instruction_stage_is_that_of_the_truth_by_hand(school, kind):
    school(kind)
    folder = run(**{"model.embed_dropout": 0.0, "model.ff_dropout": 0.0})
    first, second = read_rows(folder.train_csv)
    nats, count = nats_by_hand(folder, 1, RENDERED[kind])

    assert first["tokens"] == 4 * T
    assert second["tokens"] - first["tokens"] == count < 4 * T
    assert second["loss"] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.parametrize("kind", ["asked", "chats"])
def test_the_validation_is_scored_on_stories_and_truths_by_hand(school, kind):
    school(kind)
    folder = run()
    facts, rows = folder.read(), read_rows(folder.validation_csv)

    for row in rows[1:]:
        nats, count = nats_by_hand(folder, row["step"], STORIES + RENDERED[kind])
        assert facts.data.validation_tokens == count
        assert row["loss"] == pytest.approx(nats / count, rel=1e-5)
    num_bytes = sum(len(truth) for _, truth in STORIES + RENDERED[kind])
    assert facts.data.validation_bytes == num_bytes


def test_what_the_model_is_asked_is_shown_as_a_person_would_write_it(school):
    school("chats")
    text = run(sequence_length=2 * T, batch_size=2).samples_md.read_text()
    before, after = text.split("## step 2, chats\n")

    assert "## step 0, stories\n" in before and "Assistant:" not in before
    assert re.search(r"    User:\n    Hi \d\n    \n    Assistant:\n\n\*\*truth\*\*", after)
    assert re.search(r"\*\*truth\*\*\n\n    I'm \d\?+\n\n\*\*the model\*\*", after)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_run_stopped_where_instructions_begin_or_among_them_goes_on_exactly(school, stop_at):
    school("chats", epochs=4)
    whole = run(out_dir="whole")
    with pytest.raises(Stopped):
        run(Silent(stop_at), out_dir="parts")
    parts = run(out_dir="parts")
    ours, theirs = (read_checkpoint(folder, 5, weights_only=False) for folder in (parts, whole))

    assert_close(ours.model, theirs.model, rtol=0, atol=0)
    assert_close(ours.optimizer["state"], theirs.optimizer["state"], rtol=0, atol=0)
    losses = [[row["loss"] for row in read_rows(run.train_csv)] for run in (parts, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
