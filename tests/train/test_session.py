"""One run from request to result: what it writes, how it resumes, what it survives."""

import csv
import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmplay import machine
from lmplay.catalog.entries import resolve
from lmplay.data import batches
from lmplay.data.batches import Batch, Data, open_data
from lmplay.data.bpe import train_bpe
from lmplay.data.tokenizers import END
from lmplay.errors import BAD_CHECKPOINT, BAD_INPUT, LOCKED, NUMERIC, UserError
from lmplay.memory import peak_memory
from lmplay.model.experiment import load_experiment
from lmplay.model.objective import IGNORE
from lmplay.plan_file import read_plan
from lmplay.run.checkpoint import newest_checkpoint
from lmplay.run.folder import RunFolder
from lmplay.run.records import read_rows
from lmplay.run.request import Request
from lmplay.seeds import stream_seed
from lmplay.train import curves, loop, prepared, session
from lmplay.train.saving import checkpoint_bytes
from lmplay.train.session import run_experiment
from lmplay.train.signals import Stopped
from lmplay.train.update import Update

NUM_STEPS = 9
CLOCKS = {"tokens_per_second", "memory", "seconds"}


class Silent:
    """Stands where the display is; remembers the notes."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    def preparing(self, *_):
        pass

    start = row = example = preparing


def request(out_dir="runs", exp="gpt2ish", changes=None, config=None, **values):
    changes = changes or {}
    return Request(
        entry=resolve(exp),
        plan=read_plan("words", changes),
        changes={**changes, **(config or {})},
        config=config or {},
        out_dir=Path(out_dir),
        **{"mini_batch_size": 2, **values},
    )


def run(*args, display=None, **values):
    return run_experiment(request(*args, **values), display or Silent())


def folder_of(result):
    return RunFolder(Path(result["run"]))


def stop_after(monkeypatch, step, code=130, parts=0):
    """Set the signal's flag once, when `step` updates are done and `parts` parts of the next."""
    real, seen = loop.score, [0]

    def score(a_run, part):
        scored = real(a_run, part)
        if a_run.objective.training:
            seen[0] += 1
            if seen[0] == step * 3 + parts:  # 5 rows in parts of 2
                flags[-1].code = code
        return scored

    flags = []
    init = loop.Signals.__init__
    monkeypatch.setattr(loop.Signals, "__init__", lambda self: (init(self), flags.append(self))[0])
    monkeypatch.setattr(loop, "score", score)


def trained_state(folder):
    checkpoint = newest_checkpoint(folder, print)
    return checkpoint.step, checkpoint.model, checkpoint.optimizer["state"], checkpoint.rng


def assert_equal_runs(one: RunFolder, other: RunFolder):
    for a, b in zip(trained_state(one), trained_state(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name in ("train_csv", "validation_csv"):
        rows = [
            [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_rows(path)]
            for path in (getattr(one, name), getattr(other, name))
        ]
        assert rows[0] == rows[1]


def test_a_run_ends_when_the_plans_seconds_are_spent_and_is_finished_then(place, monkeypatch):
    ticks = SimpleNamespace(perf_counter=itertools.count().__next__)  # each look is a second on
    monkeypatch.setattr(curves, "time", ticks)
    display = Silent()
    result = run(changes={"seconds": 3.5}, display=display)
    folder = folder_of(result)
    facts, validation = folder.read(), read_rows(folder.validation_csv)
    last = read_rows(folder.train_csv)[-1]

    assert last["seconds"] >= 3.5 > last["seconds"] - 1
    assert 0 < last["step"] < NUM_STEPS
    assert (facts.status, facts.num_steps, facts.num_tokens) == ("finished", last["step"], 1440)
    assert validation[-1]["step"] == newest_checkpoint(folder, print).step == last["step"]
    assert any("3.5 seconds are spent at step" in note for note in display.notes)
    assert run(changes={"seconds": 3.5})["num_steps"] == last["step"]


def test_a_run_leaves_all_that_it_takes_to_repeat_and_resume_it(place):
    result = run()
    folder = folder_of(result)
    facts = folder.read()
    train = read_rows(folder.train_csv)
    validation = read_rows(folder.validation_csv)

    assert folder.path == Path("runs/words/gpt2ish/seed-0")
    assert result["status"] == facts.status == "finished"
    assert [row["step"] for row in train] == list(range(1, NUM_STEPS + 1))
    assert [row["step"] for row in validation] == [0, 3, 6, 9]
    assert train[-1]["loss"] < train[0]["loss"] and validation[-1]["loss"] < validation[0]["loss"]
    assert train[-1]["tokens"] == NUM_STEPS * 160
    assert folder.experiment_py.read_text() == resolve("gpt2ish").source
    assert facts.parameters["trained"] == sum(t.numel() for t in trained_state(folder)[1].values())
    assert trained_state(folder)[0] == NUM_STEPS
    assert "step 9" in folder.samples_md.read_text()
    nats = validation[-1]["loss"] * facts.data.validation_tokens
    bits = nats / math.log(2) / facts.data.validation_bytes
    assert validation[-1]["bits_per_byte"] == pytest.approx(bits)


def test_a_process_that_is_not_the_first_writes_nothing(place, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    run()

    assert not Path("runs").exists()


def test_the_same_request_again_has_nothing_left_to_do(place):
    first = run()
    display = Silent()
    again = run(display=display)

    assert again == first and "finished" in display.notes[-1]


@pytest.mark.parametrize("optimizer", ["Sophia", "DeMo", "KMaxwell"])
def test_optimizers_that_the_loop_knows_of_go_on_as_if_never_stopped(place, monkeypatch, optimizer):
    changes = {"optimizer": {"name": optimizer, "lr": 0.01, "options": {"momentum_warmup": 0.5}}}
    if optimizer != "KMaxwell":
        del changes["optimizer"]["options"]
    uninterrupted = folder_of(run("a", changes=changes))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 5)
        run("b", changes=changes)

    assert_equal_runs(folder_of(run("b", changes=changes)), uninterrupted)


def test_the_clock_and_the_scaler_go_on_where_the_run_stopped(place, monkeypatch):
    loaded = []
    monkeypatch.setattr(Update, "state", lambda self: {"scale": 8.0})
    monkeypatch.setattr(Update, "load_state", lambda self, state: loaded.append(state))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 5)
        run()
    seconds = [row["seconds"] for row in read_rows(folder_of(run()).train_csv)]

    assert loaded == [{"scale": 8.0}]
    assert len(seconds) == NUM_STEPS and seconds == sorted(seconds)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(place, monkeypatch):
    uninterrupted = folder_of(run("a"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 6)
        run("b")
    newest = Path("b/words/gpt2ish/seed-0/checkpoints/step-6/model.safetensors")
    newest.write_bytes(newest.read_bytes()[:-1])
    display = Silent()
    resumed = folder_of(run("b", display=display))

    assert any("model.safetensors" in note for note in display.notes)
    assert any("step 4" in note for note in display.notes)
    assert_equal_runs(resumed, uninterrupted)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_not_restarted(place, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 5)
        run()
    for manifest in Path("runs").rglob("manifest.json"):
        manifest.write_text("{}")
    with pytest.raises(UserError) as raised:
        run()

    assert raised.value.code == BAD_CHECKPOINT


@pytest.mark.parametrize(
    ("size", "optimizer"), [(1, "AdamW"), (3, "AdamW"), (5, "AdamW"), (3, "Sophia"), (3, "MARS")]
)
def test_the_micro_batch_does_not_change_the_curve(place, size, optimizer):
    given = {"config": {"embed_dropout": 0.0, "ff_dropout": 0.0}}
    given["changes"] = {"optimizer": {"name": optimizer, "lr": 0.01}}
    reference = read_rows(folder_of(run("a", **given)).train_csv)
    rows = read_rows(folder_of(run("b", mini_batch_size=size, **given)).train_csv)

    for row, expected in zip(rows, reference, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["accuracy"] == pytest.approx(expected["accuracy"], abs=0.01)


def test_the_gradient_is_that_of_the_mean_loss_over_the_whole_batch(place):
    plain = {"embed_dropout": 0.0, "ff_dropout": 0.0}
    made = request(config=plain, changes={"clip": None})
    folder = folder_of(run_experiment(made, Silent()))
    experiment = load_experiment(made.entry)
    config = experiment.config(**folder.read().config)
    model = experiment.model(config, stream_seed(0, "weights"))
    batch = open_data(made.plan, 0, print)[1].rows(0, 5)
    logits_BTV = model(batch.tokens_BT)
    F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])

    assert read_rows(folder.train_csv)[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_validating_and_saving_more_often_changes_no_weight(place):
    seldom = folder_of(run("a"))
    often = folder_of(
        run("b", changes={"validation.every_tokens": 160, "checkpoints.every_tokens": 160})
    )

    torch.testing.assert_close(
        trained_state(often)[1:3], trained_state(seldom)[1:3], rtol=0, atol=0
    )
    assert len(read_rows(often.validation_csv)) == NUM_STEPS + 1


def test_the_display_is_told_before_a_validation_and_after_it(place):
    told = []
    display = Silent()
    display.row = lambda kind, row: told.append((kind, row["step"]))

    run(display=display)

    told = [(kind, step) for kind, step in told if kind.startswith("validati")]
    assert told == [(kind, n) for n in (0, 3, 6, 9) for kind in ("validating", "validation")]


def test_the_memory_of_a_step_is_kept_for_the_next(place, monkeypatch):
    asked = []
    monkeypatch.setattr(prepared, "keep_memory", lambda: asked.append(True))
    monkeypatch.setattr(session, "open_run", lambda *_, **__: asked.append("open") or 1 / 0)

    with pytest.raises(ZeroDivisionError):
        run()

    assert asked == [True, "open"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak cannot be set back")
def test_the_memory_of_a_run_is_not_that_of_preparing_its_text(place, monkeypatch):
    peaks = []

    def open_data(*args):
        torch.ones(100 << 18)  # 100 MiB
        peaks.append(peak_memory(torch.device("cpu")))
        return batches.open_data(*args)

    monkeypatch.setattr(prepared, "open_data", open_data)
    rows = read_rows(folder_of(run()).train_csv)

    assert max(row["memory"] for row in rows) < peaks[0] - (50 << 20)


def test_seeds_differ_and_repeat(place):
    one, same = (folder_of(run(out, seed=1)) for out in ("a", "b"))
    other = folder_of(run("a", seed=2))

    assert_equal_runs(one, same)
    losses = [read_rows(folder.train_csv)[0]["loss"] for folder in (one, other)]
    assert losses[0] != losses[1]


def test_what_differs_from_the_plan_is_in_the_name_of_the_folder(place):
    result = run(changes={"optimizer.lr": 0.02}, config={"width": 8})
    facts = folder_of(result).read()

    assert Path(result["run"]).parent.name == "gpt2ish,optimizer.lr=0.02,width=8"
    assert facts.label == "gpt2ish,lr=0.02,width=8"
    assert facts.scale_differs == {"width": [16, 8]}


def test_two_names_for_one_setting_share_one_run(place):
    assert run(exp="ue8x")["run"] == run(exp="ue")["run"]


def poison(monkeypatch, step, what="loss"):
    """Make the loss, or only its gradient, NaN in one step."""
    real = loop.score

    def score(a_run, part):
        scored = real(a_run, part)
        if a_run.objective.training and a_run.step == step - 1:
            bad = scored.objective * float("nan")
            if what == "gradient":
                bad = scored.objective.detach() + _NanGradient.apply(scored.objective)
            scored = scored._replace(objective=bad)
        return scored

    monkeypatch.setattr(loop, "score", score)


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 0

    @staticmethod
    def backward(ctx, factor):
        return factor * float("nan")


@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("cadence", [1, 10])
def test_after_a_step_that_is_not_finite_no_weight_changes(
    place, monkeypatch, cadence, what, optimizer
):
    seen = []
    real_init = curves.Curves.__init__

    def init(self, a_run, record):
        real_init(self, a_run, record)
        self.cadence = cadence  # 10 is what a GPU has: the device alone masks the updates
        seen.append(a_run)

    monkeypatch.setattr(curves.Curves, "__init__", init)
    changes = {"optimizer.name": optimizer, "checkpoints.every_tokens": 10**9}
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            run("a", changes=changes)
    poison(monkeypatch, 6, what)
    with pytest.raises(UserError) as raised:
        run("b", changes=changes)
    folder = RunFolder(seen[-1].folder.path)

    assert raised.value.code == NUMERIC and "step 6" in raised.value.problem
    assert what in raised.value.problem
    expected = trained_state(seen[0].folder)[1]
    torch.testing.assert_close(dict(seen[-1].model.state_dict()), expected, rtol=0, atol=0)
    assert folder.read().status == "failed" and folder.read().failures == 1
    assert [row["step"] for row in read_rows(folder.train_csv)] == [1, 2, 3, 4, 5]


def test_the_module_in_which_a_failure_begins_is_named(place, monkeypatch):
    real = session.open_run

    def open_run(*args):
        a_run = real(*args)
        up = a_run.model.blocks[0].mlp.up
        up.register_forward_hook(lambda m, x, y: y * float("nan") if a_run.step >= 5 else None)
        return a_run

    monkeypatch.setattr(session, "open_run", open_run)
    with pytest.raises(UserError) as raised:
        run(changes={"validation.every_tokens": 10**9})

    assert raised.value.code == NUMERIC and "step 6" in raised.value.problem
    assert raised.value.problem.endswith("it begins in blocks.0.mlp.up")
    facts = RunFolder(next(Path("runs/words").glob("*/seed-0"))).read()
    assert facts.exit_reason == raised.value.problem


def test_a_run_that_breaks_off_does_not_say_that_it_is_running(place, monkeypatch):
    monkeypatch.setattr(loop, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    facts = RunFolder(Path("runs/words/gpt2ish/seed-0")).read()

    assert (facts.status, facts.exit_reason) == ("failed", "division by zero")


def test_a_failed_run_keeps_its_checkpoint_and_can_go_on(place, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, 6)
        with pytest.raises(UserError):
            run("b")

    assert_equal_runs(folder_of(run("b")), folder_of(run("a")))


def test_a_live_run_refuses_a_second_trainer(place):
    folder = RunFolder(Path("runs/words/gpt2ish/seed-0"))
    with folder.lock(), pytest.raises(UserError) as raised:
        run()

    assert raised.value.code == LOCKED


def test_starting_anew_keeps_the_earlier_run_aside(place):
    run()
    display = Silent()
    result = run(resume=False, display=display)
    aside = [path for path in Path("runs/words/gpt2ish").iterdir() if path.name.startswith(".")]

    assert result["status"] == "finished"
    assert [RunFolder(path).read().status for path in aside] == ["finished"]
    assert any(str(aside[0]) in note for note in display.notes)


def leak(place):
    (place / "experiments").mkdir()
    source = resolve("gpt2ish").source.replace("is_causal=T > 1", "is_causal=False")
    (place / "experiments" / "gpt2ish.py").write_text(source)


def lose_the_text(place):
    (place / "text.jsonl").unlink()


@pytest.mark.parametrize("spoil", [leak, lose_the_text], ids=["a leak", "no text"])
def test_what_cannot_be_trained_anew_leaves_the_earlier_run_in_place(place, spoil):
    folder = folder_of(run())
    before = sorted(path.name for path in folder.path.parent.rglob("*"))
    spoil(place)
    with pytest.raises(UserError):
        run(resume=False)

    assert sorted(path.name for path in folder.path.parent.rglob("*")) == before
    assert folder.read().status == "finished"


def test_the_new_run_is_held_while_the_earlier_one_is_kept_aside(place, monkeypatch):
    folder = folder_of(run())
    monkeypatch.setattr(session, "train", lambda _: asked.append(hold(folder)))
    asked = []
    run(resume=False)

    assert asked == [LOCKED]


def hold(folder):
    with pytest.raises(UserError) as raised, folder.lock():
        pytest.fail("two processes hold one run")
    return raised.value.code


def test_a_run_goes_on_with_its_own_copy_of_an_edited_experiment(place, monkeypatch):
    (place / "experiments").mkdir()
    mine = place / "experiments" / "mine.py"
    source = resolve("gpt2ish").source
    mine.write_text(source.replace("VARIANTS = {", "UNUSED = {"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        run(exp="mine")
    mine.write_text(mine.read_text().replace("F.gelu", "F.relu"))
    display = Silent()
    result = run(exp="mine", display=display)

    assert any("mine.py" in note and "--resume none" in note for note in display.notes)
    assert "F.gelu" in folder_of(result).experiment_py.read_text()


def test_a_run_goes_on_with_its_own_copy_of_an_edited_tokenizer(place, monkeypatch):
    mine, words = place / "mine.json", [str(n**5) for n in range(99)]
    for size in (280, 290):
        (place / f"{size}.json").write_text(train_bpe("", size, words, END, print))
    shutil.copy(place / "280.json", mine)
    changes = {"tokenizer": str(mine)}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        run(changes=changes)
    shutil.copy(place / "290.json", mine)
    display = Silent()
    result = run(changes=changes, display=display)
    mine.unlink()

    assert any("tokenizer" in note and "--resume none" in note for note in display.notes)
    assert folder_of(result).read().data.vocab_size == 280
    assert run(changes=changes)["status"] == "finished"


def test_a_finished_run_does_not_answer_for_other_data(place):
    run()
    other = place / "other.jsonl"
    other.write_text((place / "text.jsonl").read_text().replace("five", "nine"))
    plan = json.loads((place / "plans" / "words.json").read_text())
    plan["datasets"]["words"]["files"] = [str(other)]
    (place / "plans" / "words.json").write_text(json.dumps(plan))
    with pytest.raises(UserError) as raised:
        run()

    assert raised.value.code == BAD_INPUT
    assert "text.jsonl, not on" in raised.value.problem and "--out-dir" in raised.value.hint


def test_a_finished_run_does_not_answer_for_a_text_that_has_changed(place):
    run()
    text = place / "text.jsonl"
    text.write_text(text.read_text().replace("five", "nine"))

    with pytest.raises(UserError, match="which has changed"):
        run()


def test_a_run_goes_on_with_the_same_text_at_another_place(place, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        run()
    (place / "text.jsonl").rename(place / "moved.jsonl")
    plan = json.loads((place / "plans" / "words.json").read_text())
    plan["datasets"]["words"]["files"] = [str(place / "moved.jsonl")]
    (place / "plans" / "words.json").write_text(json.dumps(plan))
    display = Silent()

    assert run(display=display)["status"] == "finished"
    assert not any("edited" in note for note in display.notes)
    assert run()["status"] == "finished"  # and so does what is finished


def test_other_data_under_a_run_that_began_is_refused(place, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        run()
    text = place / "text.jsonl"
    text.write_text(text.read_text().replace("five", "nine"))
    with pytest.raises(UserError) as raised:
        run()

    assert raised.value.code == BAD_INPUT and "which has changed" in raised.value.problem


def test_the_size_of_a_checkpoint_is_known_before_there_is_one(place, monkeypatch):
    known = []
    monkeypatch.setattr(session, "refuse_full_disk", lambda *given: known.append(given[:3]))
    folder = folder_of(run())
    files = [folder.checkpoints / "step-9" / f"{n}.safetensors" for n in ("model", "optimizer")]

    size = checkpoint_bytes(*known[0])
    assert size <= sum(file.stat().st_size for file in files) <= size + 20_000


@pytest.mark.parametrize(
    ("free", "told"),
    [(10**12, "the newest 3 stay"), (200_000, "but only 1 MB are free: make room")],
)
def test_what_checkpoints_take_is_told_before_the_first_step(place, monkeypatch, free, told):
    display, usage = Silent(), shutil.disk_usage(place)._replace(free=free)
    monkeypatch.setattr(session, "_train", lambda *_: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    run(display=display)

    assert any("a checkpoint takes about 1 MB" in n and n.endswith(told) for n in display.notes)


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(place, monkeypatch):
    usage = shutil.disk_usage(place)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="takes about 1 MB, and 1 MB are free") as raised:
        run()

    assert raised.value.code == BAD_CHECKPOINT and "--out-dir" in raised.value.hint
    assert not list(Path("runs").iterdir())


@pytest.mark.parametrize("step", [1, 5])  # before a validation, before a checkpoint
def test_a_run_that_is_deleted_under_way_ends_in_words_and_stays_deleted(place, monkeypatch, step):
    real = loop.take_step

    def take_step(a_session, *batch):
        if a_session.run.step == step:
            shutil.rmtree(a_session.run.folder.path)
        return real(a_session, *batch)

    monkeypatch.setattr(loop, "take_step", take_step)
    changes = {"validation.every_tokens": 3 * 160 if step == 1 else 10**6}
    with pytest.raises(UserError, match="seed-0 was deleted while it was trained"):
        run(changes=changes)

    assert not list(Path("runs").rglob("seed-0"))


def test_a_leaking_experiment_is_refused_before_training(place):
    (place / "experiments").mkdir()
    leak = resolve("gpt2ish").source.replace("is_causal=T > 1", "is_causal=False")
    (place / "experiments" / "leak.py").write_text(leak.replace("VARIANTS = {", "UNUSED = {"))
    with pytest.raises(UserError) as raised:
        run(exp="leak")

    assert raised.value.code == BAD_INPUT and "leak fails the check" in raised.value.problem
    assert not list(Path("runs").iterdir())  # what is refused leaves nothing behind


@pytest.mark.parametrize(("gain", "precision"), [(0.05, "fp32"), (2.0, "bf16")])
def test_a_plan_that_says_amp_trains_in_what_is_fast_here(place, monkeypatch, gain, precision):
    monkeypatch.setattr(machine, "bf16_gain", lambda: gain)
    display = Silent()
    result = run(changes={"precision": "amp", "tokens": 160}, display=display)

    assert folder_of(result).read().precision == precision
    assert not any("times as long" in text for text in display.notes)


def test_slow_bf16_is_obeyed_with_one_line_on_how_slow(place, monkeypatch):
    monkeypatch.setattr(machine, "bf16_gain", lambda: 0.05)
    display = Silent()
    result = run(changes={"precision": "bf16", "tokens": 160}, display=display)

    assert folder_of(result).read().precision == "bf16"
    assert sum("in bf16 takes 20.0 times as long" in text for text in display.notes) == 1


def test_a_device_that_computes_wrongly_is_refused_before_training(place, monkeypatch):
    asked = []

    def refuse(device, precision, experiment, config, note, **_):
        asked.append((device.type, precision, experiment.name, config.max_len))
        raise UserError("cpu computes gpt2ish wrongly in bf16")

    monkeypatch.setattr(prepared, "refuse_wrong", refuse)
    with pytest.raises(UserError):
        run(changes={"precision": "bf16"})

    assert asked == [("cpu", "bf16", "gpt2ish", 32)]
    assert not list(Path("runs").rglob("run.json"))


def test_a_device_that_updates_wrongly_is_refused_before_training(place, monkeypatch):
    asked = []

    def refuse(wanted, device):
        asked.append((wanted.name, device.type))
        raise UserError("cpu updates weights wrongly by SGD")

    monkeypatch.setattr(prepared, "refuse_wrong_updates", refuse)
    with pytest.raises(UserError):
        run(changes={"optimizer.name": "SGD"})

    assert asked == [("SGD", "cpu")]
    assert not list(Path("runs").rglob("run.json"))


def test_a_device_without_enough_memory_gets_smaller_parts(place, monkeypatch):
    real = loop.score

    def score(a_run, part):
        if len(part.tokens_BT) > 2:
            raise torch.OutOfMemoryError
        return real(a_run, part)

    plain = {"embed_dropout": 0.0, "ff_dropout": 0.0}
    reference = read_rows(folder_of(run("a", config=plain)).train_csv)
    monkeypatch.setattr(loop, "score", score)
    folder = folder_of(run("b", config=plain, mini_batch_size=None))

    assert folder.read().mini_batch_size == 2
    for row, expected in zip(read_rows(folder.train_csv), reference, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_memory_may_run_short_between_two_looks_at_the_device(place, monkeypatch):
    real_score, real_init = loop.score, curves.Curves.__init__
    sizes = []

    def score(a_run, part):
        sizes.append(len(part.tokens_BT))
        if a_run.step >= 4 and (sizes[-1] > 2 or sizes[-2:] == [2, 2]):  # a gradient is there then
            raise torch.OutOfMemoryError
        return real_score(a_run, part)

    def init(self, a_run, record):
        real_init(self, a_run, record)
        self.cadence = 10  # as on a GPU

    plain = {"embed_dropout": 0.0, "ff_dropout": 0.0}
    changes = {"validation.every_tokens": 10**9, "checkpoints.every_tokens": 10**9}
    reference = read_rows(folder_of(run("a", config=plain, changes=changes)).train_csv)
    monkeypatch.setattr(loop, "score", score)
    monkeypatch.setattr(curves.Curves, "__init__", init)
    rows = read_rows(
        folder_of(run("b", config=plain, changes=changes, mini_batch_size=None)).train_csv
    )

    assert {5, 2, 1} <= set(sizes)
    assert [row["loss"] for row in rows] == pytest.approx([r["loss"] for r in reference], rel=1e-5)


def test_a_step_without_a_target_has_an_empty_row_and_changes_nothing_else(place, monkeypatch):
    real = Data.rows

    def rows(self, first, *counts):
        made = real(self, first, *counts)
        if first == 3 * 5:
            made = Batch(made.tokens_BT, torch.full_like(made.targets_BT, IGNORE), 0)
        return made

    monkeypatch.setattr(Data, "rows", rows)
    rows = read_rows(folder_of(run()).train_csv)

    assert len(rows) == NUM_STEPS
    assert (rows[3]["loss"], rows[3]["accuracy"], rows[3]["grad_norm"]) == (None, None, 0.0)
    assert rows[3]["tokens"] == rows[2]["tokens"] and rows[4]["loss"] > 0


def test_a_run_goes_on_in_its_own_precision(place, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        run()
    plan = place / "plans" / "words.json"
    plan.write_text(plan.read_text().replace('"fp32"', '"bf16"'))

    assert folder_of(run()).read().precision == "fp32"


def test_what_changed_midway_stays_on_record(place, monkeypatch):
    for size in (2, 1, 1):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, 1)
            run(mini_batch_size=size)
    display = Silent()
    result = run(mini_batch_size=1, display=display)

    assert folder_of(result).read().changed_midway == ["mini_batch_size"]


RANDOM = """
    def log_likelihood(self, tokens_BT, targets_BT):
        logits_BTV = self(tokens_BT) + torch.rand(1, device=tokens_BT.device)
        nats_BT = F.cross_entropy(logits_BTV.mT, targets_BT, reduction="none")
        return nats_BT * (1 + torch.rand_like(nats_BT[:1, :1]))

    def generate(self, tokens_BT, num_tokens, choose):
        torch.rand(1, device=tokens_BT.device)
        return tokens_BT[:, :1].expand(-1, num_tokens)

    def hidden("""


def test_a_model_that_draws_numbers_when_tested_is_trained_as_if_it_were_not(place, monkeypatch):
    (place / "experiments").mkdir()
    source = resolve("gpt2ish").source.replace("VARIANTS = {", "UNUSED = {")
    (place / "experiments" / "mine.py").write_text(source.replace("\n    def hidden(", RANDOM))
    monkeypatch.setattr(prepared, "refuse_unproven", lambda *_: None)
    seldom, often = (
        folder_of(run(exp="mine", changes={"validation.every_tokens": every}))
        for every in (10**9, 160)
    )

    torch.testing.assert_close(
        trained_state(often)[1:3], trained_state(seldom)[1:3], rtol=0, atol=0
    )


def test_a_likelihood_is_scored_with_the_same_draws_each_time(place, monkeypatch):
    (place / "experiments").mkdir()
    source = resolve("gpt2ish").source.replace("VARIANTS = {", "UNUSED = {")
    (place / "experiments" / "mine.py").write_text(source.replace("\n    def hidden(", RANDOM))
    monkeypatch.setattr(prepared, "refuse_unproven", lambda *_: None)
    changes = {"optimizer.lr": 1e-30, "optimizer.weight_decay": 0}
    rows = read_rows(folder_of(run(exp="mine", changes=changes)).validation_csv)

    assert len({row["loss"] for row in rows}) == 1


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_operation_of_a_step_waits_or_uses_double_precision(
    place, monkeypatch, precision, optimizer
):
    real, seen = loop.take_step, Operations()

    def take_step(*args):
        with seen:
            return real(*args)

    monkeypatch.setattr(loop, "take_step", take_step)
    monkeypatch.setattr(loop, "rng_state", dict)  # it never leaves the host
    run(changes={"optimizer.name": optimizer, "tokens": 320, "precision": precision})

    assert torch.float32 in seen.dtypes and f"_fused_{optimizer.lower()}_" in seen.names
    assert (torch.bfloat16 in seen.dtypes) == (precision == "bf16")
    assert not seen.dtypes & {torch.float64, torch.complex128}
    assert not seen.waits


class Operations(TorchDispatchMode):
    """Notes the dtypes of what operations take and make, and what a GPU's host would wait for."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()
        self.names = set()
        self.waits = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, made)) if isinstance(t, torch.Tensor)]
        self.dtypes |= {t.dtype for t in tensors}
        self.names.add(func.overloadpacket.__name__)
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.waits.add(func.overloadpacket.__name__)
        return made


def test_a_compiled_run_has_the_same_names_and_no_graph_break(place, monkeypatch):
    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: real(self, backend="aot_eager", fullgraph=True, **options),
    )
    plain, compiled = (folder_of(run(out, compiled=out == "b")) for out in "ab")

    assert compiled.read().compiled and not plain.read().compiled
    assert trained_state(compiled)[1].keys() == trained_state(plain)[1].keys()
    losses = [[row["loss"] for row in read_rows(f.validation_csv)] for f in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # dropout draws other numbers


def break_the_compiler(monkeypatch, after=0):
    """Make every compilation fail; or leave this many graphs as they are, and fail then."""

    def broken(graph, inputs):
        compiled.append(graph)
        if len(compiled) > after:
            raise RuntimeError("no compiler here")
        return graph

    compiled = []
    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: real(self, backend=broken, **options)
    )


def test_a_model_that_does_not_compile_goes_on_without_and_says_so_once(place, monkeypatch):
    plain = folder_of(run("plain"))
    break_the_compiler(monkeypatch)
    display = Silent()
    fell_back = folder_of(run("broken", compiled=True, display=display))

    assert len([note for note in display.notes if "does not compile" in note]) == 1
    assert not fell_back.read().compiled and fell_back.read().changed_midway == []
    assert_equal_runs(fell_back, plain)


def test_a_compiler_that_fails_within_a_step_costs_that_step_nothing(place, monkeypatch):
    plain = folder_of(run("plain"))
    break_the_compiler(monkeypatch, after=1)  # validation compiles, the first step does not
    fell_back = folder_of(run("broken", compiled=True))

    assert_equal_runs(fell_back, plain)


def test_accumulation_by_accelerate_is_refused(place, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4"):
        run()


def test_csv_files_are_plain_csv(place):
    folder = folder_of(run())
    with folder.train_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert len(rows) == NUM_STEPS and float(rows[0]["loss"]) > 0
