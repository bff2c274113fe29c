"""The curve of a run equals that of a loop in plain torch, written here without the harness."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lmplay.catalog.entries import resolve
from lmplay.data.batches import open_data
from lmplay.model.experiment import load_experiment
from lmplay.model.scale import scale
from lmplay.plan_file import read_plan
from lmplay.run.records import read_rows
from lmplay.run.request import Request
from lmplay.seeds import stream_seed
from lmplay.train.session import run_experiment

PLAN = {
    "tokenizer": "byte",
    "sequence_length": 24,
    "batch_size": 6,
    "model": {
        "num_blocks": 2,
        "width": 16,
        "num_heads": 2,
        "embed_dropout": 0.0,
        "ff_dropout": 0.0,
    },
    "datasets": {"words": {"files": ["text.jsonl"]}},
    "stages": [{"datasets": ["words"]}],
    "tokens": 20 * 6 * 24,
    "optimizer": {
        "name": "AdamW",
        "lr": 0.02,
        "weight_decay": 0.1,
        "options": {"betas": [0.9, 0.95]},
    },
    "schedule": {"name": "linear", "warmup": 0.2},
    "clip": 0.5,
    "precision": "fp32",
    "validation": {"tokens": 400, "fraction": 0.1, "every_tokens": 10**6},
    "checkpoints": {"every_tokens": 10**6},
}


class Silent:
    def note(self, *_):
        pass

    preparing = start = row = example = note


def plain_loss(model, batch):
    logits_BTV = model(batch.tokens_BT)
    return F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=-100)


@pytest.mark.parametrize("name", ["gpt2ish", "ue", "value_norm"])
def test_a_run_equals_a_loop_in_plain_torch(tmp_path, cache, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    words = random.Random(0).choices(["one", "two", "three", "four", "five"], k=900)
    rows = [{"text": " ".join(words[i : i + 9])} for i in range(0, len(words), 9)]
    Path("text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Path("words.json").write_text(json.dumps(PLAN))
    plan, entry = read_plan("words.json"), resolve(name)
    result = run_experiment(Request(entry, plan, {}, {}, seed=3, mini_batch_size=4), Silent())
    folder = Path(result["run"])

    experiment = load_experiment(entry)
    tokenizer, data = open_data(plan, 3, print)
    config = scale(experiment, plan, tokenizer.vocab_size, tokenizer.end, {}).config
    model = experiment.model(config, stream_seed(3, "weights"))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), foreach=False)
    losses = []
    for step in range(20):
        rate = 0.02 * ((step + 1) / 4 if step < 4 else (20 - step) / 16)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = plain_loss(model, data.rows(step * 6, 6))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        nats = [
            plain_loss(model, batch).item() * int((batch.targets_BT >= 0).sum())
            for batch in data.validation_batches(1)
        ]

    curve = [row["loss"] for row in read_rows(folder / "train.csv")]
    last = read_rows(folder / "validation.csv")[-1]
    assert curve == pytest.approx(losses, rel=2e-4)
    assert last["loss"] == pytest.approx(sum(nats) / data.validation_tokens, rel=2e-4)
    bits = sum(nats) / math.log(2) / data.validation_bytes
    assert last["bits_per_byte"] == pytest.approx(bits, rel=2e-4)
