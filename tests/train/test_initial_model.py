"""A run begins with trained weights: copied by name, unfolded where the parent is plain."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.plan_file import read_plan
from lmplay.run.checkpoint import read_checkpoint
from lmplay.run.folder import RunFolder
from lmplay.run.request import Request
from lmplay.train.initial_model import find_initial
from lmplay.train.session import run_experiment
from lmplay.train.signals import Stopped


class Silent:
    """Stands where the display is; remembers the notes, and stops at a step where it is told to."""

    def __init__(self, stop_at=None):
        self.notes, self.stop_at = [], stop_at

    def note(self, text):
        self.notes.append(text)

    def row(self, kind, row):
        if row["step"] == self.stop_at:
            raise Stopped(130)

    def preparing(self, *_):
        pass

    start = example = preparing


def request(exp="gpt2ish", initial=None, config=None, **changes):
    out_dir = Path("runs")
    return Request(
        entry=resolve(exp),
        plan=read_plan("words", changes),
        changes=changes | (config or {}),
        config=config or {},
        out_dir=out_dir,
        mini_batch_size=5,
        initial=None if initial is None else find_initial(str(initial), out_dir),
    )


def run(*args, display=None, **values):
    result = run_experiment(request(*args, **values), display or Silent())
    return RunFolder(Path(result["run"]))


def first_weights(exp, initial, **values):
    """The weights before the first step: the checkpoint of a run that learns nothing."""
    folder = run(exp, initial, **{"optimizer.lr": 1e-30, "optimizer.weight_decay": 0, **values})
    return read_checkpoint(folder, None, weights_only=True).model


@pytest.fixture
def parent(place):
    return run()


def test_a_child_begins_with_its_parents_weights_and_says_which_are_its_own(parent):
    display = Silent()
    folder = run("value_norm", parent.path, display=display)
    began = folder.read().initial_model

    assert began.fresh == [
        "blocks.0.attention.value_norm.weight",
        "blocks.0.attention.value_norm.bias",
    ]
    assert began.unfolded == began.unused == [] and began.logits_differ > 0
    assert any("starts from" in note and "value_norm.weight" in note for note in display.notes)


def test_weights_are_copied_exactly(parent):
    theirs = read_checkpoint(parent, None, weights_only=True).model
    ours = first_weights("gpt2ish", parent.path)

    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=1e-20)


def test_a_unified_embedding_reproduces_its_parents_table(place):
    parent = run(config={"width": 192})
    began = run("ue", parent.path, config={"width": 192}).read().initial_model

    assert began.unfolded == ["token_table"] and began.fresh == []
    assert began.logits_differ < 0.15  # measured: 0.045
    assert run("ue").read().initial_model is None


def test_a_run_that_begins_with_weights_has_a_folder_and_a_label_of_its_own(parent):
    begun = request("gpt2ish", parent.path)
    earlier = request("gpt2ish", parent.checkpoints / "step-4")

    assert begun.folder.path != request("gpt2ish").folder.path
    assert begun.folder.path != earlier.folder.path
    assert begun.label.startswith("gpt2ish,initial_model=gpt2ish~")


@pytest.mark.parametrize("stop_at", [2, 6])  # before the first checkpoint, and after it
def test_stopped_anywhere_it_goes_on_to_the_same_weights(parent, stop_at):
    whole = run("ue", parent.path)
    again = request("ue", parent.path)
    again = replace(again, out_dir=Path("again"))
    with pytest.raises(Stopped):
        run_experiment(again, Silent(stop_at))
    result = run_experiment(again, Silent())

    resumed = RunFolder(Path(result["run"]))
    assert resumed.read().initial_model == whole.read().initial_model
    theirs = read_checkpoint(whole, None, weights_only=True).model
    for key, weight in read_checkpoint(resumed, None, weights_only=True).model.items():
        assert torch.equal(weight, theirs[key]), key


def test_other_sizes_are_refused_with_what_to_set(parent):
    with pytest.raises(UserError) as refused:
        run("gpt2ish", parent.path, config={"width": 32})

    assert "(257, 16), here (257, 32)" in refused.value.problem
    assert refused.value.hint == "--set width=16"
    assert refused.value.code == 2


def test_other_tokens_are_refused(parent):
    with pytest.raises(UserError, match=r"the tokens of .* \(byte\) are not this plan's"):
        run("gpt2ish", parent.path, tokenizer="bpe:300")


def test_a_model_with_nothing_in_common_is_refused(parent, place):
    source = (Path(resolve("gpt2ish").path)).read_text()
    (place / "experiments").mkdir()
    for name in ("token_table", "position_table", "blocks", "final_norm"):
        source = source.replace(f"self.{name}", f"self.other_{name}")
    head = "nn.Linear(config.width, config.vocab_size)"
    source = source.replace(head, f"nn.Sequential({head})")
    (place / "experiments/other.py").write_text(source)

    with pytest.raises(UserError, match="no parameter in common"):
        run("other", parent.path)


def test_what_is_no_run_and_no_folder_of_weights_is_refused(place):
    (place / "empty").mkdir()
    (place / "empty/config.json").write_text("{}")

    with pytest.raises(UserError, match="holds no safetensors"):
        find_initial("empty", Path("runs"))
    with pytest.raises(UserError, match="there is no run"):
        find_initial("nothing", Path("runs"))


def test_a_native_checkpoint_of_transformers_answers_as_there(place):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 257}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    theirs.save_pretrained(place / "theirs")

    began = run("gpt2", place / "theirs").read().initial_model
    ours = first_weights("gpt2", place / "theirs")

    assert began.name.startswith("theirs~") and began.fresh == began.unused == []
    assert began.logits_differ == 0
    table = theirs.transformer.wte.weight.detach()
    torch.testing.assert_close(ours["token_table.weight"], table, rtol=0, atol=1e-20)
