"""Averages of weights in a run: judged beside the weights, saved, exact, and of no effect."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lmplay.catalog.entries import resolve
from lmplay.data.batches import open_data
from lmplay.errors import UserError
from lmplay.optim.averages import WeightAverages
from lmplay.optim.joint import make_optimizer
from lmplay.plan import Averages, Optimizer, Plan
from lmplay.plan_file import read_plan
from lmplay.run.checkpoint import newest_checkpoint, without_ties
from lmplay.run.folder import RunFolder
from lmplay.run.records import read_rows
from lmplay.run.request import Request
from lmplay.run.trained import open_trained
from lmplay.stats.compare import curve, final_rows, pair_runs, read_run
from lmplay.stats.frames import curves
from lmplay.train import loop
from lmplay.train.session import run_experiment
from lmplay.train.signals import Stopped

AVERAGES = {"averages.ema": 0.3, "averages.lawa": 0.5, "averages.tail_ema": 0.15}
NAMES = ["ema", "lawa", "tail_ema"]
TABLES = {"token_table.weight", "position_table.weight"}
CLOCKS = {"tokens_per_second", "memory", "seconds"}


class Silent:
    def note(self, *_):
        pass

    preparing = start = row = example = note


def train(out_dir="runs", exp="gpt2ish", changes=AVERAGES):
    plan = read_plan("words", changes)
    request = Request(resolve(exp), plan, changes, {}, mini_batch_size=2, out_dir=Path(out_dir))
    return RunFolder(Path(run_experiment(request, Silent())["run"]))


@pytest.fixture
def folder(place):
    return train()


def test_with_averages_a_run_trains_the_same_and_its_curves_are_of_the_weights(folder):
    plain = train("plain", changes={})
    kept, bare = (newest_checkpoint(each, print) for each in (folder, plain))
    runs = [read_run(each) for each in (folder, plain)]
    finals = [final_rows(pair_runs([each], None))[0] for each in runs]
    validations = [curve(each, "validation", "loss", "tokens").y for each in runs]
    frames = [curves(each.path).drop(columns=["experiment", "seconds"]) for each in runs]

    assert kept.averages and not bare.averages
    assert_close(kept.model, bare.model, rtol=0, atol=0)
    assert_close(kept.optimizer["state"], bare.optimizer["state"], rtol=0, atol=0)
    assert finals[0]["loss"] == finals[1]["loss"] and (validations[0] == validations[1]).all()
    assert frames[0].equals(frames[1])
    with pytest.raises(UserError, match="keeps no average 'ema'") as raised:
        open_trained(plain, None, "cpu", "fp32", "ema")
    assert "--set averages.ema" in raised.value.hint


def test_a_run_that_was_stopped_has_the_averages_of_one_that_was_not(folder, monkeypatch):
    real, cuts = loop.take_step, [2, 5, 8]

    def stop(session, *rest):
        if cuts and session.run.step == cuts[0]:
            session.signals.code = 130 + 0 * cuts.pop(0)
        return real(session, *rest)

    monkeypatch.setattr(loop, "take_step", stop)
    while cuts:
        with pytest.raises(Stopped):
            train("cut")
    cut = train("cut")
    whole, again = (newest_checkpoint(each, print).averages for each in (folder, cut))

    assert len(whole) > 3 * 10 and set(whole) == set(again)
    assert sum(tensor.nbytes for tensor in without_ties(whole)[0].values()) == most_bytes(folder)
    assert_close(again, whole, rtol=0, atol=0)
    rows = [
        [{key: row[key] for key in row.keys() - CLOCKS} for row in read_rows(each.validation_csv)]
        for each in (folder, cut)
    ]
    assert rows[0] == rows[1]


def most_bytes(folder):
    model = open_trained(folder, None, "cpu", "fp32").model
    return WeightAverages(Averages(ema=0.3, lawa=0.5, tail_ema=0.15), model, TABLES).most_bytes


@torch.no_grad()
def test_the_loss_of_an_average_is_that_of_the_model_which_has_it(folder):
    last = read_rows(folder.validation_csv)[-1]
    plan = Plan.model_validate_json(json.dumps(folder.read().plan))
    _, data = open_data(plan, 0, print)
    for name in (None, *NAMES):
        model = open_trained(folder, None, "cpu", "fp32", name).model
        nats = 0.0
        for batch in data.validation_batches(2):
            logits_BTV = model(batch.tokens_BT)
            flat = logits_BTV.flatten(0, 1), batch.targets_BT.flatten()
            nats += torch.nn.functional.cross_entropy(*flat, reduction="sum").item()
        column = "loss" if name is None else f"loss_of_{name}"
        assert last[column] == pytest.approx(nats / data.validation_tokens, rel=1e-5)
    assert len({last["loss"], *(last[f"loss_of_{name}"] for name in NAMES)}) == 4
    with pytest.raises(UserError, match="keeps no average 'emma'") as raised:
        open_trained(folder, None, "cpu", "fp32", "emma")
    assert raised.value.hint == "it keeps ema, lawa, tail_ema"


def test_a_tied_table_has_one_average_and_both_its_names_get_it(place):
    folder = train(exp="llama_tied", changes={"averages.ema": 0.3})
    raw, averaged = (
        open_trained(folder, None, "cpu", "fp32", name).model for name in (None, "ema")
    )

    assert averaged.head.weight is averaged.token_table.weight
    assert not torch.equal(averaged.head.weight, raw.head.weight)
    kept = newest_checkpoint(folder, print).averages
    assert torch.equal(kept["ema/token_table.weight"], averaged.head.weight)
    assert "ema/head.weight" not in kept


def test_an_optimizer_with_an_average_of_its_own_takes_no_other(place):
    pytest.importorskip("pytorch_optimizer", reason="the extra `optimizers` is not installed")
    with pytest.raises(UserError, match="ScheduleFreeAdamW is judged by an average of its own"):
        train(changes={"averages.ema": 0.1, "optimizer.name": "ScheduleFreeAdamW"})


def test_a_step_that_is_not_taken_adds_the_weights_that_it_left():
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(Optimizer(name="AdamW", lr=0.1), model, dict.fromkeys(
        ["weight", "bias"], "matrix"))  # fmt: skip
    averages, seen = WeightAverages(Averages(ema=0.5), model), []
    for number, gradient in enumerate([1.0, float("inf"), 2.0, 1.0], start=1):
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, gradient)
        optimizer.set_factor(1.0)
        optimizer.step_if(torch.tensor(gradient < 9))
        averages.take(number / 8)
        seen.append(model.weight.detach().clone())

    assert torch.equal(seen[0], seen[1])
    assert_close(averages.read("ema")["weight"], torch.stack(seen).mean(0))
