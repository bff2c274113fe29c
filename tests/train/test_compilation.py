"""Compiling where it is repaid."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmplay.catalog.entries import resolve
from lmplay.model.experiment import load_experiment
from lmplay.plan_file import read_plan
from lmplay.run.folder import RunFolder
from lmplay.run.request import Request
from lmplay.train import compilation as compiling
from lmplay.train import session
from lmplay.train.session import run_experiment

CPU = torch.device("cpu")


class Silent:
    def __init__(self):
        self.notes = []
        self.note = self.notes.append

    def start(self, *_):
        pass

    preparing = row = example = start


@pytest.fixture
def slow_machine(monkeypatch):
    """One that can compile, and whose products reach 1 GFLOP/s."""
    monkeypatch.setattr(compiling, "_can_build", lambda _: True)
    monkeypatch.setattr(compiling, "matmul_rate", lambda *_: 1e9)


@pytest.mark.parametrize(
    ("name", "precision", "seconds", "expected"),
    [
        ("gpt2ish", "bf16", 700, True),
        ("gpt2ish", "bf16", 500, False),
        ("gpt2ish", "fp32", 700, False),
        ("ue", "bf16", 700, False),  # `unique` breaks its graph
        ("recurrent", "bf16", 700, False),  # one graph, but of a loop over positions
    ],
)
def test_it_is_repaid_in_long_runs_of_mixed_precision_by_one_graph(
    slow_machine, name, precision, seconds, expected
):
    experiment = load_experiment(resolve(name))
    repaid = compiling.is_repaid(experiment, CPU, precision, lambda: seconds * 0.5e9)

    assert repaid is expected


def test_on_the_cpu_nothing_is_compiled_by_itself_nor_counted():
    assert not compiling.is_repaid(load_experiment(resolve("gpt2ish")), CPU, "bf16", pytest.fail)


@pytest.mark.parametrize("asked", [None, True, False])
def test_a_run_is_compiled_as_asked_for_else_as_it_began(place, monkeypatch, asked):
    def request(compiled, **changes):
        return Request(resolve("gpt2ish"), read_plan("words", changes), changes, {}, device="cpu",
                       mini_batch_size=5, compiled=compiled)  # fmt: skip

    real, display, repaid = torch.nn.Module.compile, Silent(), [True]
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **given: real(self, backend="aot_eager", **given)
    )
    monkeypatch.setattr(session, "is_repaid", lambda *_: repaid.pop())
    facts = RunFolder(Path(run_experiment(request(asked), display)["run"])).read()

    assert facts.compiled is (asked is not False)
    assert any(note.startswith("compiled: ") for note in display.notes) is facts.compiled
    assert (facts.compilation is not None) is facts.compiled
    if facts.compiled:
        assert facts.compilation.graphs > 0 and facts.compilation.breaks == 0
    assert len(repaid) == (asked is not None)
    for began in (True, False):  # is_repaid would raise: it is not asked again
        earlier = replace(facts, compiled=began)
        assert session._compiles(request(None), earlier, None, None, "fp32") is began
