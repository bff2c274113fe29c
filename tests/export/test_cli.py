import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lmplay.errors import UserError
from lmplay.export.cli import app
from lmplay.run.checkpoint import read_checkpoint, save_checkpoint


@pytest.fixture
def run_command(make_run, capsys, tmp_path):
    """Runs the command on a run of `ue`; gives back stdout and stderr."""
    make_run("ue", steps=(10, 20))

    def run(*args):
        app([*map(str, args), "--runs", str(tmp_path)], standalone_mode=False)
        return capsys.readouterr()

    return run


def test_it_says_what_was_folded_and_how_to_open_it(run_command, tmp_path):
    out = tmp_path / "out"
    shown = run_command("run", out, "--to", "hf")
    facts = json.loads(run_command("run", tmp_path / "again", "--to", "hf", "--json").out)
    before, after = facts["parameters"]["trained"], facts["parameters"]["exported"]

    assert shown.out == (
        f"{out}: ue at step 20, folded to gpt2ish, {before:,} parameters to {after:,}\n"
        f'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)'
        "  # LmplayForCausalLM\n"
    )
    assert "seed 0: loading torch" in shown.err
    assert facts == {
        "schema_version": 1,
        "out": str(tmp_path / "again"),
        "run": str(tmp_path / "run"),
        "step": 20,
        "weights": None,
        "to": "hf",
        "folded": True,
        "folds_to": "gpt2ish",
        "parameters": {"trained": before, "exported": after},
        "class": "LmplayForCausalLM",
        "trust_remote_code": True,
    }


def test_an_average_of_the_weights_is_exported_by_its_name(make_run, tmp_path, capsys):
    folder = make_run("gpt2ish")
    facts = folder.read()
    folder.write(replace(facts, plan=facts.plan | {"averages": {"ema": 0.1}}))
    kept = read_checkpoint(folder, None, weights_only=False)
    kept.averages = {f"ema/{name}": weight + 1 for name, weight in kept.model.items()}
    save_checkpoint(folder, kept, keep=9)
    app([str(folder.path), str(tmp_path / "out"), "--weights", "ema"], standalone_mode=False)

    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights and all(torch.equal(weights[name], kept.model[name] + 1) for name in weights)


def test_without_folding_every_parameter_is_there(run_command, tmp_path):
    facts = json.loads(run_command("run", tmp_path / "out", "--no-fold", "--json").out)

    assert facts["folded"] is False and facts["folds_to"] is None
    assert facts["parameters"]["exported"] == facts["parameters"]["trained"]


def test_where_there_is_nothing_to_fold_it_says_so(make_run, capsys, tmp_path):
    folder, out = make_run("gpt2"), tmp_path / "out"
    app([str(folder.path), str(out), "--fold", "--to", "hf"], standalone_mode=False)
    first, second = capsys.readouterr().out.splitlines()

    assert first.startswith(f"{out}: gpt2 at step 10, ") and first.endswith(", nothing to fold")
    assert second == f'AutoModelForCausalLM.from_pretrained("{out}")  # GPT2LMHeadModel'


@pytest.mark.parametrize("args", [["run", "--step", 10], ["run/checkpoints/step-10"]])
def test_an_earlier_checkpoint_is_taken_by_step_or_by_folder(run_command, tmp_path, args):
    shown = run_command(*args, tmp_path / "out")

    assert f"{tmp_path}/out: ue at step 10, " in shown.out


def test_what_cannot_be_done_is_said_before_torch_is_loaded(run_command, capsys, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for args, problem in (
        (["run", tmp_path / "full"], "full is there already"),
        (["run", tmp_path / "full/file"], "file is there already"),
        (["rum", tmp_path / "out"], "there is no run rum"),
    ):
        with pytest.raises(UserError) as raised:
            run_command(*args)
        assert problem in raised.value.problem and raised.value.code == 2
    assert "loading torch" not in capsys.readouterr().err
    assert (tmp_path / "full/file").read_text() == "mine"


def test_a_checkpoint_that_is_not_there_is_named(run_command, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of step 11") as raised:
        run_command("run", tmp_path / "out", "--step", 11)

    assert raised.value.code == 5 and not (tmp_path / "out").exists()


def test_a_damaged_run_is_named_with_what_it_lacks(make_run, run_command, tmp_path):
    make_run("ue").run_json.write_text('{"label": "ue"}')
    with pytest.raises(UserError, match=r"run\.json is damaged: it lacks schema_version, exper"):
        run_command("run", tmp_path / "out")


@pytest.mark.slow
def test_the_module_runs_and_needs_no_transformers(make_run, tmp_path):
    folder = make_run("value_norm")
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['lmp-export', {str(folder.path)!r}, 'out', '--to', 'hf']\n"
        "runpy.run_module('lmplay.export', run_name='__main__', alter_sys=True)\n"
    )
    guarded = code.replace(
        "import runpy, sys\n", "import runpy, sys\nsys.modules['transformers'] = None\n"
    )
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", guarded],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out: value_norm at step 10")
    assert (tmp_path / "out/modeling_lmplay.py").is_file()
