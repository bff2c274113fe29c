"""A model that follows the progress of its run is told it, wherever a copy of it is used."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lmplay.catalog.entries import resolve
from lmplay.model.abilities import set_progress
from lmplay.model.experiment import load_experiment
from lmplay.model.objective import Objective
from lmplay.plan_file import read_plan
from lmplay.run.folder import RunFolder
from lmplay.run.records import read_rows
from lmplay.run.request import Request
from lmplay.run.trained import open_trained
from lmplay.train import loop, prepared, reporter, session, validation
from lmplay.train.display import Display
from lmplay.train.session import run_experiment
from lmplay.train.signals import Stopped

AT = """
    def at(self, progress):
        self.progress = progress
"""


@pytest.fixture
def follower(place, monkeypatch):
    """An experiment that notes its progress."""
    (place / "experiments").mkdir()
    source = resolve("gpt2ish").source.replace("VARIANTS = {", "UNUSED = {")
    head, body = source.split("\n    def hidden(")
    (place / "experiments" / "mine.py").write_text(f"{head}{AT}\n    def hidden({body}")
    monkeypatch.setattr(prepared, "refuse_unproven", lambda *_: None)


@pytest.fixture
def used(monkeypatch):
    """What the model was told, and the step, wherever it scores."""
    found = []

    def watch(module):
        real = module.score

        def score(run, part):
            kind = "train" if run.objective.training else "validate"
            found.append((kind, run.step, run.model.progress))
            return real(run, part)

        monkeypatch.setattr(module, "score", score)

    watch(loop)
    watch(validation)
    return found


def train(out_dir="runs", fsdp=False, **changes):
    request = Request(resolve("mine"), read_plan("words", changes), changes, {}, device="cpu",
                      mini_batch_size=3, out_dir=Path(out_dir), fsdp=fsdp)  # fmt: skip
    with Display("") as display:
        return RunFolder(Path(run_experiment(request, display)["run"]))


def test_before_each_step_and_for_the_validation_and_the_checkpoint_behind_it(follower, used):
    folder = train()
    kept = [open_trained(folder, step, "cpu", "fp32") for step in (4, 8, 9)]

    assert {step for kind, step, _ in used if kind == "train"} == set(range(9))
    assert {step for kind, step, _ in used if kind == "validate"} == {0, 3, 6, 9}
    assert all(progress == step / 9 for _, step, progress in used)
    assert [trained.model.progress for trained in kept] == [4 / 9, 8 / 9, 1.0]
    assert [trained.progress for trained in kept] == [4 / 9, 8 / 9, 1.0]


def test_it_is_of_tokens_where_the_batch_grows(follower, used):
    train(batch_size=[[0, 2], [0.5, 8]])
    told = dict.fromkeys(progress for kind, _, progress in used if kind == "train")

    assert list(told) == [2 * step / 48 for step in range(12)] + [24 / 48, 32 / 48, 40 / 48]
    assert used[-1][1:] == (15, 1.0)


def test_a_run_that_goes_on_is_told_too(follower, used, monkeypatch):
    real = loop.take_step

    def stop(a_session, *rest):
        if a_session.run.step == 5:
            a_session.signals.code = 130
        return real(a_session, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "take_step", stop)
        train()
    used.clear()
    train()

    assert used[0][1] == 5
    assert all(progress == step / 9 for _, step, progress in used)


def test_the_gathered_copy_of_a_sharded_model_is_told(follower, monkeypatch):
    copies = []
    monkeypatch.setattr(session, "_refuse_fsdp", lambda *_: None)  # of one process
    real = reporter.greedy_text
    monkeypatch.setattr(
        reporter,
        "greedy_text",
        lambda model, *a: (copies.append(model.progress), real(model, *a))[1],
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(fsdp=True)
    finally:
        dist.destroy_process_group()

    assert copies == [0, 3 / 9, 6 / 9, 1.0]


def test_a_compiled_model_is_compiled_anew_only_where_a_number_it_uses_changes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(8, 8)

        def at(self, progress):
            self.progress = progress
            self.window = 2 if progress < 0.5 else 4

        def forward(self, tokens_BT):
            return self.table(tokens_BT) * self.window

    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    objective = Objective(Model())
    objective.compile(backend=count, dynamic=False)
    tokens_BT = torch.zeros(2, 4, dtype=torch.int64)
    for step in range(21):
        set_progress(objective.model, step / 20)
        objective(tokens_BT, tokens_BT)

    assert len(graphs) == 2


def test_a_run_whose_batch_and_rows_grow_goes_on_bit_for_bit_where_it_was_cut(place, monkeypatch):
    ramps = {"batch_size": [[0, 2], [0.4, 5]], "sequence_length": [[0, 8], [0.2, 16], [0.7, 32]]}

    def request(out_dir):
        return Request(resolve("gpt2ish"), read_plan("words", ramps), ramps, {}, device="cpu",
                       mini_batch_size=2, out_dir=Path(out_dir))  # fmt: skip

    def curves(folder):
        rows = [read_rows(path) for path in (folder.train_csv, folder.validation_csv)]
        clocks = {"tokens_per_second", "memory", "seconds"}
        return [[{k: row[k] for k in row.keys() - clocks} for row in some] for some in rows]

    real, shapes = loop.take_step, {}

    def take_step(a_session, batch, of_full):
        shapes[a_session.run.step] = tuple(batch.tokens_BT.shape)
        a_session.signals.code = 130 if a_session.run.step in cuts[:1] else None
        return real(a_session, batch, of_full)

    monkeypatch.setattr(loop, "take_step", take_step)
    cuts = []
    with Display("") as display:
        run_experiment(request("whole"), display)
        cuts = [0, 5, 9, 10, 14]  # the first of a phase among them, and the last of all
        while cuts:
            with pytest.raises(Stopped):
                run_experiment(request("cut"), display)
            cuts.pop(0)
        run_experiment(request("cut"), display)

    cut, facts = request("cut").folder, request("whole").folder.read()
    rows, validations = read_rows(cut.train_csv), read_rows(cut.validation_csv)
    assert curves(cut) == curves(request("whole").folder)
    assert (facts.num_steps, facts.num_tokens, facts.tokens_per_step) == (15, 48 * 32, 160)
    assert list(shapes.values()) == [(8, 8)] * 5 + [(4, 16)] * 4 + [(10, 16)] * 3 + [(5, 32)] * 3
    assert [row["tokens"] for row in rows[7:11]] == [512, 576, 736, 896]
    assert [row["step"] for row in validations] == [0, 8, 12, 15]  # every 480 tokens


def test_experiments_are_told_by_their_own_method_only():
    experiment = load_experiment(resolve("gpt2ish"))
    model = experiment.model(experiment.config(**experiment.tiny), seed=0)
    before = set(vars(model))
    set_progress(model, 0.5)

    assert set(vars(model)) == before
