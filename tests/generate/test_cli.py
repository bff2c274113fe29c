import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmplay import machine
from lmplay.errors import UserError
from lmplay.generate.cli import app
from lmplay.model.experiment import load_source
from lmplay.run.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from lmplay.run.folder import RunFolder

SOURCE = Path(__file__).parents[2] / "experiments" / "gpt2ish.py"
CONFIG = {"vocab_size": 257, "max_len": 32, "num_blocks": 1, "width": 16, "num_heads": 2}


@pytest.fixture(scope="module")
def make_run(make_facts):
    """Writes a run on bytes whose checkpoints differ; a token's vector decides what follows."""

    def make(
        path,
        label="gpt2ish",
        started="2026-01-01T00:00:00+00:00",
        seed=0,
        steps=(10,),
        precision="fp32",
    ):
        folder = RunFolder(path)
        values = {"plan": {"tokenizer": "byte"}, "config": CONFIG, "precision": precision}
        folder.write(make_facts(label=label, seed=seed, started=started, **values))
        shutil.copy(SOURCE, folder.experiment_py)
        experiment = load_source(SOURCE.read_text(), Path("gpt2ish.py"), {})
        for step in steps:
            model = experiment.model(experiment.config(**CONFIG), seed=seed + step)
            with torch.no_grad():
                model.head.weight.mul_(8)  # else every byte is nearly as likely
                model.head.bias[128:] = -50  # ASCII, and no end marker
                model.head.bias[:32] = -50
            save_checkpoint(
                folder, Checkpoint(step, model.state_dict(), {}, {}, {"progress": 1.0}), keep=9
            )
        return folder

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_run):
    out_dir = tmp_path_factory.mktemp("work") / "runs"
    make_run(out_dir / "quick/gpt2ish/seed-0", steps=(10, 20))
    make_run(out_dir / "quick/newer/seed-1", "newer", "2026-02-02T00:00:00+00:00", seed=1)
    return out_dir


class Input(io.TextIOWrapper):
    """A stdin that is a person's, or a pipe."""

    def __init__(self, data, is_terminal):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.fixture
def generator(runs, monkeypatch, capsys):
    """Runs the command; gives back stdout and stderr."""

    def run(*args, stdin=b"", terminal=False, out_dir=runs):
        monkeypatch.setattr(sys, "stdin", Input(stdin, terminal))
        app([*map(str, args), "--runs", str(out_dir), "--device", "cpu"], standalone_mode=False)
        return capsys.readouterr()

    return run


def samples(shown):
    return json.loads(shown.out)["samples"]


def test_the_text_stands_behind_its_prompt(generator):
    shown = generator("quick/gpt2ish/seed-0", "def ", "--max-tokens", 12)
    [sample] = samples(generator("quick/gpt2ish/seed-0", "def ", "--max-tokens", 12, "--json"))

    assert shown.out == f"def {sample['text']}\n"
    assert "step 20" in shown.err
    assert "12 tokens in" in shown.err


def test_json_is_one_document_that_tells_all(generator, runs):
    shown = generator("quick/gpt2ish/seed-0", "ab", "--json", "--max-tokens", 5, "--top-k", 9)

    document = json.loads(shown.out)
    [sample] = document.pop("samples")
    assert len(sample["tokens"]) == 5
    assert bytes(sample["tokens"]).decode() == sample["text"]
    assert (sample["prompt"], sample["stop_reason"]) == ("ab", "length")
    assert document == {
        "schema_version": 1,
        "run": str(runs / "quick/gpt2ish/seed-0"),
        "step": 20,
        "weights": None,
        "seed": 0,
        "settings": {
            "max_tokens": 5,
            "temperature": 0.8,
            "top_k": 9,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "num_samples": 1,
            "stop": [],
            "device": "cpu",
            "precision": "fp32",
            "compile": False,
        },
    }


def test_an_average_of_the_weights_writes_by_its_name(generator, make_run, tmp_path):
    folder, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", seed=5)
    facts = folder.read()
    folder.write(replace(facts, plan=facts.plan | {"averages": {"ema": 0.1, "lawa": None}}))
    kept, theirs = (read_checkpoint(each, None, weights_only=False) for each in (folder, other))
    kept.averages = {f"ema/{name}": weight for name, weight in theirs.model.items()}
    save_checkpoint(folder, kept, keep=9)

    wanted, plain = generator(other.path, "ab", "--json"), generator(folder.path, "ab", "--json")
    averaged = generator(folder.path, "ab", "--json", "--weights", "ema")

    assert samples(averaged) == samples(wanted) != samples(plain)
    assert json.loads(averaged.out)["weights"] == "ema"
    with pytest.raises(UserError, match="keeps no average 'lawa'"):
        generator(folder.path, "ab", "--weights", "lawa")


def test_a_device_that_computes_wrongly_writes_nothing(generator, monkeypatch, capsys):
    asked = []

    def refuse(device, precision, experiment, config, note, is_trained):
        asked.append((device.type, precision, experiment.source, config.max_len, is_trained))
        raise UserError("cpu computes gpt2ish wrongly in bf16")

    monkeypatch.setattr("lmplay.proofs.device.refuse_wrong", refuse)
    with pytest.raises(UserError):
        generator("quick/gpt2ish/seed-0", "ab", "--precision", "bf16")

    assert asked == [("cpu", "bf16", SOURCE.read_text(), 32, False)]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("trained", "gain", "asked", "used", "says"),
    [
        ("bf16", 2.0, (), "bf16", False),
        ("bf16", 0.1, (), "fp32", False),
        ("fp32", 2.0, (), "fp32", False),
        ("fp16", 2.0, (), "bf16", False),
        ("fp16", 0.1, (), "fp32", False),
        ("fp32", 0.1, ("--precision", "bf16"), "bf16", True),
    ],
)
def test_a_run_writes_in_what_it_was_trained_in_where_that_is_fast(
    generator, make_run, tmp_path, monkeypatch, trained, gain, asked, used, says
):
    monkeypatch.setattr(machine, "bf16_gain", lambda: gain)
    folder = make_run(tmp_path / "run", precision=trained)

    written = generator(folder.path, "ab", "--max-tokens", 2, "--json", *asked)

    assert json.loads(written.out)["settings"]["precision"] == used
    assert ("10.0 times as long" in written.err) == says


def test_a_model_that_draws_by_itself_draws_by_the_seed(generator):
    generator("quick/gpt2ish/seed-0", "ab", "--seed", 7)

    assert torch.initial_seed() == 7


def test_prompts_come_from_an_option_a_file_or_stdin(generator, tmp_path):
    (tmp_path / "prompt.txt").write_text("hej å\n", encoding="utf-8")
    ways = [
        generator("--prompt", "hej å", "--json"),
        generator("--prompt-file", tmp_path / "prompt.txt", "--json"),
        generator("--json", stdin="hej å\n".encode()),
    ]

    assert ways[0].out == ways[1].out == ways[2].out
    assert samples(ways[0])[0]["prompt"] == "hej å"
    assert "newer" in ways[0].err  # the run that started last


def test_no_text_at_all_starts_a_new_document(generator):
    [sample] = samples(generator("--json", stdin=b""))

    assert sample["prompt"] == ""
    assert len(sample["tokens"]) == 200  # well past the context of 32


@pytest.mark.parametrize("name", ["quick/gpt2ish/seed-0", "quick/gpt2ish"])
def test_a_run_is_named_by_its_place(generator, runs, name):
    by_name = generator(name, "a", "--json")
    by_path = generator(runs / name, "a", "--json")

    assert by_name.out == by_path.out


def test_an_earlier_checkpoint_is_taken_by_step_or_by_folder(generator, runs):
    by_step = generator("quick/gpt2ish/seed-0", "a", "--json", "--step", 10)
    folder = runs / "quick/gpt2ish/seed-0/checkpoints/step-10"
    by_folder = generator(folder, "a", "--json")

    assert by_step.out == by_folder.out
    assert json.loads(by_step.out)["step"] == 10
    assert samples(by_step) != samples(generator("quick/gpt2ish/seed-0", "a", "--json"))


def test_a_seed_fixes_the_texts_and_the_samples_differ(generator):
    options = ("--prompt", "a", "--json", "--num-samples", 3)
    first, again, other = (
        [sample["text"] for sample in samples(generator(*options, "--seed", seed))]
        for seed in (1, 1, 2)
    )

    assert first == again
    assert len({*first, *other}) == 6


def test_a_sample_is_the_same_however_many_are_written(generator):
    few = samples(generator("--prompt", "a", "--json", "--num-samples", 2, "--max-tokens", 30))
    many = samples(generator("--prompt", "a", "--json", "--num-samples", 40, "--max-tokens", 30))

    assert many[:2] == few
    assert len({sample["text"] for sample in many}) == 40


def test_several_samples_stand_apart(generator):
    options = ("--prompt", "a", "--num-samples", 3, "--max-tokens", 6)
    shown = generator(*options)
    texts = [sample["text"] for sample in samples(generator(*options, "--json"))]

    assert shown.out == "---\n".join(f"a{text}\n" for text in texts)


def test_how_fast_it_was_is_told_after_the_last_sample(generator, monkeypatch):
    both = io.StringIO()
    monkeypatch.setattr(sys.stdout, "write", both.write)
    monkeypatch.setattr("lmplay.generate.cli.note", lambda text: both.write(f"{text}\n"))
    generator("--prompt", "a", "--num-samples", 3, "--max-tokens", 6)

    assert "18 tokens in" in both.getvalue().rpartition("---\n")[2].splitlines()[1]


def test_compiled_steps_write_the_same_and_say_what_came_of_it(generator, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: real(f, backend="eager", **given))
    monkeypatch.setattr("lmplay.generate.packing.pack", lambda *given: False)
    asked = ["--prompt", "ab", "--greedy", "--precision", "bf16", "--num-samples", 2]

    plain, compiled = generator(*asked), generator(*asked, "--compile")

    assert compiled.out == plain.out
    assert "compiled: " in compiled.err and "compiled: " not in plain.err
    asked = ["--precision", "bf16", "--compile"]
    talk = generator(*asked, stdin=b"first\nsecond\n", terminal=True)
    assert talk.err.count("compiled: ") == 1


def test_a_cpu_compiles_nothing_in_fp32(generator):
    with pytest.raises(UserError, match="--compile: on the CPU, fp32 is faster without") as caught:
        generator("--prompt", "a", "--compile")

    assert "--precision bf16" in caught.value.hint


def test_greedy_is_temperature_zero(generator):
    greedy = generator("--prompt", "a", "--json", "--greedy", "--seed", 3)
    cold = generator("--prompt", "a", "--json", "--temperature", 0, "--seed", 3)

    assert greedy.out == cold.out


def test_a_stop_string_ends_the_text(generator):
    [whole] = samples(generator("--prompt", "a", "--json"))
    stop = whole["text"][7:9]
    [cut] = samples(generator("--prompt", "a", "--json", "--stop", "never!", "--stop", stop))

    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["stop_reason"] == "stop"


def test_a_full_context_is_told(generator):
    shown = generator("--prompt", "a" * 30, "--max-tokens", 9)

    assert "context of 32 tokens is full" in shown.err


def test_a_person_is_asked_until_the_input_ends(generator):
    shown = generator(stdin=b"/help\nab\nab\n", terminal=True)

    answers = shown.out.split("> ")[1:]
    assert len(answers) == 4  # the last one met the end
    assert answers[0] == ""
    assert answers[1].startswith("ab") and answers[2].startswith("ab")
    assert answers[1] != answers[2]  # asking again answers anew
    assert shown.err.count("Ctrl-D ends") == 2


def test_ctrl_c_stops_the_text_and_asks_again(generator, monkeypatch):
    from lmplay.model import decoding

    passes = []

    def interrupted(model, tokens_BT, cache, real=decoding.last_logits):
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt
        return real(model, tokens_BT, cache)

    monkeypatch.setattr(decoding, "last_logits", interrupted)
    shown = generator("--max-tokens", 20, stdin=b"first\nsecond\n", terminal=True)

    _, first, second, _ = shown.out.split("> ")
    assert len(first) == len("first") + 4 + 1
    assert len(second) == len("second") + 20 + 1


def test_control_characters_do_not_reach_a_terminal(generator, monkeypatch):
    shown = generator("--prompt", "a\x1b[2Jb\tc", "--max-tokens", 1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    safe = generator("--prompt", "a\x1b[2Jb\tc", "--max-tokens", 1)

    assert shown.out.startswith("a\x1b[2Jb\tc")
    assert safe.out.startswith("a\ufffd[2Jb\tc")


@pytest.mark.parametrize(
    "args, problem, hint",
    [
        (["quick/gpt2ich/seed-0", "a"], "no run", "gpt2ish/seed-0"),
        (["Once upon a time"], "no run", "--prompt"),
        (["quick", "a"], "holds 2 runs", "name one"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0", "greedy"),
        (["--prompt", "a", "--top-p", "0"], "--top-p 0.0", ""),
        (["--prompt", "a", "--top-p", "1.5"], "--top-p 1.5", ""),
        (["--prompt", "a", "--top-k", "-3"], "--top-k -3", ""),
        (["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty 0.0", ""),
        (["--prompt", "a", "--repetition-penalty", "inf"], "--repetition-penalty inf", ""),
        (["--prompt", "a", "--temperature", "nan"], "--temperature nan", ""),
        (["--prompt", "a", "--stop", ""], "--stop string is empty", ""),
        (["--prompt", "a", "--precision", "int3"], "int3", "fp32"),
        (["--prompt", "a", "--step", "11"], "11", ""),
        (["--prompt", "a", "--prompt-file", "b"], "2 prompts", "give one"),
        (["--prompt-file", "no/such.txt"], "no/such.txt", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said(generator, capsys, args, problem, hint):
    with pytest.raises(UserError) as caught:
        generator(*args)

    shown = capsys.readouterr()
    assert problem in caught.value.problem
    assert hint in caught.value.hint
    assert shown.out == "" and ("loading torch" not in shown.err or "--step" in args)


def test_a_damaged_run_is_named_with_what_it_lacks(generator, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text('{"label": "gpt2ish"}')

    with pytest.raises(UserError, match=r"run.json is damaged: it lacks schema_version, exper"):
        generator(tmp_path / "run", "a")


def test_an_empty_folder_of_runs_says_how_to_train_one(generator, tmp_path):
    with pytest.raises(UserError, match="no run") as caught:
        generator("--prompt", "a", out_dir=tmp_path)
    assert "lmp-trainer" in caught.value.hint


def test_json_asks_no_one(generator):
    with pytest.raises(UserError, match="needs a prompt"):
        generator("--json", terminal=True)


def test_a_prompt_that_is_no_text_is_refused(generator, tmp_path):
    cases = {
        b"caf\xe9": "is not UTF-8 text: .* byte 3",
        "a".encode("utf-16")[:-1]: "is not UTF-16 text",
        "a".encode("utf-16-le"): "holds no text",
    }
    for content, told in cases.items():
        (tmp_path / "prompt.txt").write_bytes(content)

        with pytest.raises(UserError, match=told):
            generator("--prompt-file", tmp_path / "prompt.txt")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])  # of Notepad, of PowerShell
def test_a_prompt_from_windows_is_read_as_training_reads_text(generator, tmp_path, encoding):
    (tmp_path / "prompt.txt").write_bytes("one\r\ntwo\r\n".encode(encoding))

    shown = generator("--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 2, "--json")

    assert json.loads(shown.out)["samples"][0]["prompt"] == "one\ntwo"


def test_a_prompt_that_is_typed_in_a_script_from_windows_is_one_too(generator):
    stop = ["--stop", "\r\n"]
    shown = generator("--prompt", "\ufeffone\r\ntwo", "--max-tokens", 2, "--json", *stop)

    said = json.loads(shown.out)
    assert said["samples"][0]["prompt"] == "one\ntwo" and said["settings"]["stop"] == ["\n"]
