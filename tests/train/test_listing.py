"""What --check prints of a GPU, and --describe of a plan that ramps."""

import json

import pytest
import torch

from lmplay import machine
from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.plan_file import read_plan
from lmplay.proofs import at_size
from lmplay.proofs import device as device_check
from lmplay.proofs.proof import Proof
from lmplay.train.listing import describe, list_experiments, list_optimizers, print_check


def test_check_tells_what_a_gpu_computes_wrongly_at_the_plan_s_size(place, monkeypatch, capsys):
    asked = []

    def check_on(device, precision, experiment, config):
        asked.append((device.type, precision, config.max_len, config.width))
        return [Proof("causal", False, "position 0 moves by 65%")]

    monkeypatch.setattr(machine, "resolve_device", torch.device)
    monkeypatch.setattr(device_check, "check_on", check_on)
    monkeypatch.setattr(at_size, "check_at_size", lambda *given: [])
    with pytest.raises(UserError) as caught:
        print_check(resolve("gpt2ish"), read_plan("words"), {"width": 32}, "mps", "bf16", True)
    proofs = json.loads(capsys.readouterr().out)["proofs"]

    assert asked == [("mps", "bf16", 32, 32)]
    assert caught.value.problem == f"gpt2ish fails 1 of {len(proofs)} proofs"
    assert (proofs[-1]["name"], proofs[-1]["where"]) == ("causal", "mps in bf16")
    assert len(proofs) > 10


def test_check_on_the_cpu_proves_at_tiny_size_and_at_the_plan_s(place, monkeypatch, capsys):
    monkeypatch.setattr(device_check, "check_on", None)
    print_check(resolve("gpt2ish"), read_plan("words"), {}, "cpu", "bf16", True)
    proofs = json.loads(capsys.readouterr().out)["proofs"]

    assert all(proof["passed"] is not False for proof in proofs)
    assert {proof["where"] for proof in proofs} == {
        *("TINY", "8 x 32 tokens in fp32", "4 x 32 tokens in bf16"),
    }


def test_a_described_plan_says_from_which_step_on_its_batch_and_rows_are_others(place, capsys):
    ramps = {"batch_size": [[0, 2], [0.5, 5]], "sequence_length": [[0, 8], [0.25, 32]]}
    describe(None, read_plan("words", ramps), {}, True, as_json=False)
    shown = capsys.readouterr()

    assert json.loads(shown.out)["batch_size"] == ramps["batch_size"]
    assert shown.err.splitlines() == [
        "from step 1 on: 8 rows of 8 tokens",
        "from step 7 on: 2 rows of 32 tokens",
        "from step 13 on: 5 rows of 32 tokens",
        "17 steps, 1,568 tokens",
    ]
    describe(None, read_plan("words"), {}, True, as_json=False)
    assert capsys.readouterr().err == ""


def test_every_optimizer_is_listed_with_what_trains_what_it_does_not(capsys):
    list_optimizers(as_json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["optimizers"]}

    assert rows["AdamW"]["roles"] == "all" and rows["AdamW"]["package"] == "torch"
    assert rows["Muon"]["roles"] == ["matrix"] and rows["Muon"]["rest"] == "AdamW"
    assert rows["Lion"]["package"] == "pytorch-optimizer"


def test_describe_says_who_trains_what(place, capsys):
    wanted = {"optimizer.roles.matrix.name": "Muon", "optimizer.roles.matrix.lr": 0.5}
    describe(resolve("gpt2ish"), read_plan("words", wanted), {}, False, True)
    told = json.loads(capsys.readouterr().out)
    rows = {row["role"]: row for row in told["trained_by"]}

    assert rows["matrix"]["optimizer"] == "Muon" and rows["matrix"]["lr"] == 0.5
    assert rows["vector"]["weight_decay"] == 0.0 and rows["head"]["optimizer"] == "AdamW"
    assert sum(row["parameters"] for row in rows.values()) == told["parameters"]["trained"]


def test_a_path_in_brackets_is_shown_whole(tmp_path, capsys):
    folder = tmp_path / "[red]ideas[/red]"
    folder.mkdir(parents=True)
    path = folder / "mine.py"
    path.write_text(resolve("gpt2ish").source)

    describe(resolve(str(path)), read_plan("quick"), {}, False, False)

    assert str(path) in capsys.readouterr().out


def test_a_list_has_each_familys_experiments_together_and_baselines_last(capsys):
    list_experiments("", as_json=False)
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    of_llama = [line.split()[:2] for line in lines if line.startswith("    ") and line[4] != " "]
    families = [words[1] for words in of_llama[of_llama.index(["attention_sinks", "attention"]) :]]
    families = [family for family in families if family in ("attention", "mlp", "positions")]

    assert families == sorted(families) and len(set(families)) == 3
    assert lines.index(next(x for x in lines if x.startswith("  llama"))) > lines.index(
        next(x for x in lines if x.startswith("  uw5"))
    )
    assert "attention" in shown.err and "list:FAMILY" in shown.err


def test_a_family_is_listed_alone_and_a_file_of_ones_own_with_its_path(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.py").write_text(resolve("qk_norm").source)
    list_experiments("attention", as_json=False)
    listed = capsys.readouterr().out
    list_experiments("attention", as_json=True)
    rows = json.loads(capsys.readouterr().out)["experiments"]

    assert "qk_norm" in listed and "headwise_gate" in listed and "canon" not in listed
    assert next(x for x in listed.splitlines() if x.startswith("mine")).endswith("mine.py")
    assert {row["family"] for row in rows} == {"attention"}


def test_describe_says_the_source_what_is_kept_and_what_it_stacks_with(place, monkeypatch, capsys):
    found = {"squared_relu": "", "rwkv7": "lines"}
    monkeypatch.setattr("lmplay.catalog.partners.partners", lambda entry: found)
    describe(resolve("multi_query"), read_plan("words"), {}, False, True)
    told = json.loads(capsys.readouterr().out)
    describe(resolve("multi_query"), read_plan("words"), {}, False, False)
    shown = capsys.readouterr().out

    assert told["family"] == "attention" and "arXiv:2305.13245" in told["source"]
    assert told["cache_bytes"]["32"] == 32 * 2 * 8 * 4  # one head of two, in one block
    assert told["stacks_with"] == ["squared_relu"] and told["collides_with"] == {"rwkv7": "lines"}
    assert "2,048 bytes a row after 32 tokens" in shown
    assert "Stacks with 1 of 2 other ideas on its baseline; not with rwkv7." in shown


def test_what_tiny_size_says_all_about_is_not_looked_for_in_a_large_model(
    place, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(at_size, "check_at_size", None)  # which would fail
    path = tmp_path / "idea.py"
    source = resolve("gpt2ish").source
    path.write_text(source.replace("is_causal=T > 1", "is_causal=False"))
    with pytest.raises(UserError, match="fails"):
        print_check(resolve(str(path)), read_plan("words"), {}, "cpu", "fp32", True)
    proofs = json.loads(capsys.readouterr().out)["proofs"]

    assert {p["where"] for p in proofs} == {"TINY"}
    assert [p["name"] for p in proofs if p["passed"] is False] == ["causal"]
