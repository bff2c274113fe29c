"""What --check prints of a GPU."""

import json

import pytest
import torch

from lmplay import machine
from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.plan import read_plan
from lmplay.proofs import device as device_check
from lmplay.proofs.proof import Proof
from lmplay.train.listing import print_check


def test_check_tells_what_a_gpu_computes_wrongly_at_the_plan_s_size(place, monkeypatch, capsys):
    asked = []

    def check_on(device, precision, experiment, config):
        asked.append((device.type, precision, config.max_len, config.width))
        return [Proof("causal", False, "position 0 moves by 65%")]

    monkeypatch.setattr(machine, "resolve_device", torch.device)
    monkeypatch.setattr(device_check, "check_on", check_on)
    with pytest.raises(UserError) as caught:
        print_check(resolve("gpt2ish"), read_plan("words"), {"width": 32}, "mps", "bf16", True)
    proofs = json.loads(capsys.readouterr().out)["proofs"]

    assert asked == [("mps", "bf16", 32, 32)]
    assert caught.value.problem == f"gpt2ish fails 1 of {len(proofs)} proofs"
    assert proofs[-1]["name"] == "causal, on mps in bf16" and len(proofs) > 10


def test_check_on_the_cpu_proves_at_tiny_size_alone(place, monkeypatch, capsys):
    monkeypatch.setattr(device_check, "check_on", None)
    print_check(resolve("gpt2ish"), read_plan("words"), {}, "cpu", "bf16", True)

    assert all(p["passed"] is not False for p in json.loads(capsys.readouterr().out)["proofs"])
