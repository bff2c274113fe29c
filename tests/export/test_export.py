"""What is exported computes what was trained: in lmplay, and in transformers."""

import json
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model

from lmplay.catalog.entries import resolve
from lmplay.catalog.entry import read_file
from lmplay.errors import UserError
from lmplay.export import export as files
from lmplay.export.export import export
from lmplay.model.decoding import greedy_text
from lmplay.model.experiment import load_experiment
from lmplay.run.trained import open_trained

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = [read_file(path)[0] for path in sorted(FOLDER.glob("[!_]*.py"))]
FOLDING = [entry for entry in FILES if "def fold(" in entry.source]
PROMPT = [256, *b"def"]
NUM_TOKENS = 12


def tokens(B=2, T=16):
    return torch.randint(257, (B, T), generator=torch.Generator().manual_seed(1))


def trained(folder, step=None):
    return open_trained(folder, step, "cpu", "fp32").model


def same(ours, theirs):
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * max(1, ours.abs().max().item()))


@torch.no_grad()
def same_in_both(model, native):
    """Logits, and the text that lmp-generator and `generate` write, the end marker as any token."""
    same(model(tokens()), native(tokens()).logits)
    native.generation_config.eos_token_id = None
    prompt_BT = torch.tensor([PROMPT])
    options = {"attention_mask": torch.ones_like(prompt_BT), "do_sample": False}
    written = native.generate(prompt_BT, max_new_tokens=NUM_TOKENS, **options)
    assert written[0, len(PROMPT) :].tolist() == greedy_text(
        model, PROMPT, NUM_TOKENS, model.config.max_len
    )


NATIVE = ("gpt2", "llama", "grouped_query")
LEFT_TO_RIGHT = [entry for entry in FILES if "def log_likelihood(" not in entry.source]


@pytest.mark.parametrize("entry", LEFT_TO_RIGHT, ids=attrgetter("name"))
@pytest.mark.every_experiment
def test_every_experiment_answers_and_writes_in_transformers_as_in_lmplay(
    entry, make_run, opened, tmp_path
):
    folder = make_run(str(entry.path))
    made = export(folder, None, "hf", True, tmp_path / "out")
    folds_to_llama = entry.folds_to == "llama"

    assert made["trust_remote_code"] is (entry.name not in NATIVE and not folds_to_llama)
    assert made["folded"] is (made["parameters"]["exported"] < made["parameters"]["trained"])
    same_in_both(trained(folder), opened(tmp_path / "out", made["trust_remote_code"]))


@pytest.mark.parametrize("entry", FOLDING, ids=attrgetter("name"))
@pytest.mark.every_experiment
def test_what_folds_is_exported_as_it_was_trained_too(entry, make_run, opened, tmp_path):
    folder = make_run(str(entry.path))
    made = export(folder, None, "hf", False, tmp_path / "out")
    native = opened(tmp_path / "out")

    assert made["folded"] is False
    assert sum(p.numel() for p in native.parameters()) == made["parameters"]["exported"]
    same_in_both(trained(folder), native)


@torch.no_grad()
def test_how_far_its_run_was_and_what_ends_a_document_go_along(make_run, opened, tmp_path):
    source = resolve("gpt2ish").source.replace("VARIANTS = {", "UNUSED = {")
    field, method = "    vocab_size: int\n", "\n    def hidden("
    at = "\n    def at(self, progress):\n        self.scale = 1 + progress\n"
    source = source.replace(field, f"{field}    end: int\n").replace(method, at + method)
    (tmp_path / "mine.py").write_text(source)
    folder = make_run(str(tmp_path / "mine.py"))
    export(folder, None, "hf", True, tmp_path / "out")
    export(folder, None, "safetensors", True, tmp_path / "plain")
    ours, native = trained(folder), opened(tmp_path / "out")

    assert ours.scale == native.model.scale == 2.0
    assert native.config.values["end"] == ours.config.end == 60
    for name in ("out", "plain"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["progress"] == 1.0


@torch.no_grad()
def test_a_fold_to_gpt2_is_gpt2_without_code(make_run, opened, tmp_path):
    folder = make_run("foc1_1+gpt2")
    made = export(folder, None, "hf", True, tmp_path / "out")
    as_trained = export(folder, None, "hf", False, tmp_path / "more")

    assert (made["folds_to"], made["class"]) == ("gpt2", "GPT2LMHeadModel")
    assert as_trained["class"] == "LmplayForCausalLM"
    assert not list((tmp_path / "out").glob("*.py"))
    same_in_both(trained(folder), opened(tmp_path / "out", trust=False))


@torch.no_grad()
def test_a_changed_gpt2_keeps_its_ties_in_transformers_and_after_saving(make_run, opened, tmp_path):
    entry = resolve("gpt2")
    own = tmp_path / "gpt2.py"
    own.write_text(entry.source.replace("F.gelu(h_BTF", "F.gelu(2 * h_BTF"))
    folder = make_run(str(own))
    made = export(folder, None, "hf", True, tmp_path / "out")
    native = opened(tmp_path / "out")
    native.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")

    assert made["class"] == "LmplayForCausalLM"
    for model in (native, again):
        assert model.model.head.weight is model.model.token_table.weight
        same_in_both(trained(folder), model)


def test_the_folder_carries_the_runs_own_source_and_values(make_run, tmp_path):
    folder = make_run("ue1_5")
    export(folder, None, "hf", True, tmp_path / "out")
    package = Path(files.__file__).parents[1]
    config = json.loads((tmp_path / "out/config.json").read_text())

    def bytes_of(name):
        return (tmp_path / "out" / name).read_bytes()

    assert bytes_of("experiment.py") == folder.experiment_py.read_bytes()
    assert bytes_of("cache.py") == (package / "model/cache.py").read_bytes()
    assert bytes_of("folding.py") == (package / "model/folding.py").read_bytes()
    assert config["values"] == folder.read().config
    assert config["values"]["unify"] == "positions"


@torch.no_grad()
@pytest.mark.parametrize("name", ["value_norm", "ue16x", "gpt2"])
def test_plain_safetensors_load_in_what_config_json_names(name, make_run, tmp_path):
    folder = make_run(name)
    export(folder, None, "safetensors", True, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    target = load_experiment(resolve(config["folds_to"] or config["file"]))
    shared = {key: value for key, value in config["values"].items() if key in target.fields}
    model = target.model(target.config(**shared)).eval()
    load_model(model, tmp_path / "out/model.safetensors")

    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    assert config["folded"] is (name == "ue16x")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert ("head.weight" in file.keys()) is (name != "gpt2")  # noqa: SIM118
    same(trained(folder)(tokens()), model(tokens()))


@torch.no_grad()
def test_a_step_is_chosen(make_run, opened, tmp_path):
    folder = make_run("gpt2ish", steps=(10, 20))
    newest = export(folder, None, "hf", True, tmp_path / "newest")
    export(folder, 10, "hf", True, tmp_path / "earlier")

    assert newest["step"] == 20
    same(trained(folder, 20)(tokens()), opened(tmp_path / "newest")(tokens()).logits)
    same(trained(folder, 10)(tokens()), opened(tmp_path / "earlier")(tokens()).logits)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space"), RuntimeError])
def test_what_is_stopped_while_writing_leaves_nothing(error, make_run, tmp_path, monkeypatch):
    def stopped(*_):
        raise error

    folder = make_run("gpt2ish")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(files, "save_tokenizer", stopped)
    with pytest.raises(UserError if isinstance(error, OSError) else error):
        export(folder, None, "hf", True, tmp_path / "out")

    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_folder_is_taken_and_files_are_readable_by_the_umask(make_run, tmp_path):
    (tmp_path / "out").mkdir()
    export(make_run("gpt2ish"), None, "safetensors", True, tmp_path / "out")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}

    assert len(modes) == 1


@pytest.mark.parametrize("method", ["log_likelihood", "generate"])
def test_a_model_without_logits_from_left_to_right_is_refused(method, make_run, tmp_path):
    entry = resolve("gpt2ish")
    own = f"    def {method}(self, *_):\n        return None\n\n    def hidden("
    path = tmp_path / "gpt2ish.py"
    path.write_text(entry.source.replace("    def hidden(", own))
    folder = make_run(str(path))
    with pytest.raises(UserError, match="no logits from left to right") as raised:
        export(folder, None, "hf", True, tmp_path / "out")

    assert raised.value.code == 2 and "safetensors" in raised.value.hint
    assert export(folder, None, "safetensors", True, tmp_path / "out")["step"] == 10
