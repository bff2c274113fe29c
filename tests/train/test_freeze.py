"""Frozen parameters stay as they were, whatever trains the others."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.catalog.entries import resolve
from lmplay.errors import BAD_INPUT, UserError
from lmplay.model.experiment import load_experiment
from lmplay.optim.joint import make_optimizer
from lmplay.plan import Optimizer
from lmplay.plan_file import read_plan
from lmplay.run.checkpoint import read_checkpoint
from lmplay.run.folder import RunFolder
from lmplay.run.records import read_rows
from lmplay.run.request import Request
from lmplay.seeds import stream_seed
from lmplay.train.initial_model import find_initial
from lmplay.train.session import run_experiment
from lmplay.train.signals import Stopped
from lmplay.train.update import Update

BODY = ["blocks.*", "*_table.weight"]  # all but the last norm and the head
MOMENTUM = {"name": "SGD", "lr": 0.1, "weight_decay": 0.5, "options": {"momentum": 0.9}}


class Silent:
    """Stands where the display is, and stops at a step where it is told to."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def row(self, kind, row):
        if kind == "checkpoint" and row["step"] == self.stop_at:
            raise Stopped(130)

    def note(self, *_):
        pass

    start = example = preparing = note


def request(exp="gpt2ish", out_dir="runs", **changes):
    plan = read_plan("words", changes)
    return Request(resolve(exp), plan, changes, {}, out_dir=Path(out_dir), mini_batch_size=5)


def run(*args, display=None, **changes):
    result = run_experiment(request(*args, **changes), display or Silent())
    return RunFolder(Path(result["run"]))


def weights_of(folder):
    return read_checkpoint(folder, None, weights_only=True).model


def first_weights(folder, exp="gpt2ish"):
    experiment = load_experiment(resolve(exp))
    config = experiment.config(**folder.read().config)
    return experiment.model(config, stream_seed(0, "weights")).state_dict()


def is_frozen(name):
    return name.startswith("blocks.") or name.endswith("_table.weight")


@pytest.mark.parametrize("optimizer", [None, MOMENTUM])
def test_a_frozen_parameter_keeps_its_first_value_and_the_others_move(place, optimizer):
    changes = {"freeze": BODY, **({"optimizer": optimizer} if optimizer else {})}
    folder = run(**changes)
    first, last = first_weights(folder), weights_of(folder)

    assert first.keys() == last.keys()
    assert {name for name in first if torch.equal(first[name], last[name])} == set(
        filter(is_frozen, first)
    )


def test_the_optimizer_knows_and_the_counts_say_what_is_trained(place):
    folder = run(freeze=BODY)
    parameters = folder.read().parameters
    checkpoint = read_checkpoint(folder, None, weights_only=False)
    moments = checkpoint.optimizer["state"].values()
    sizes = {name: weight.numel() for name, weight in checkpoint.model.items()}

    assert parameters["frozen"] == sum(size for name, size in sizes.items() if is_frozen(name))
    assert parameters["trained"] + parameters["frozen"] == sum(sizes.values())
    assert sum(state["exp_avg"].numel() for state in moments) == parameters["trained"]


def test_the_norm_that_is_clipped_is_that_of_the_trained_parameters(place):
    rest = ["final_norm.*", "head.*"]
    folders = [run(), run(freeze=BODY), run(freeze=rest)]
    whole, of_rest, of_body = (read_rows(f.train_csv)[0]["grad_norm"] for f in folders)

    assert whole**2 == pytest.approx(of_body**2 + of_rest**2, rel=1e-4)
    assert 0 < of_rest < whole and 0 < of_body < whole


def test_a_run_with_frozen_parameters_goes_on_bit_by_bit(place):
    whole = run(out_dir="a", freeze=BODY)
    with pytest.raises(Stopped):
        run(out_dir="b", freeze=BODY, display=Silent(stop_at=4))
    resumed = run(out_dir="b", freeze=BODY)

    assert_close(weights_of(resumed), weights_of(whole), rtol=0, atol=0)


def test_what_a_run_freezes_is_in_the_name_of_its_folder(place):
    some = request(freeze=["blocks.0.*"]).folder.path.parent.name
    more = request(freeze=BODY).folder.path.parent.name

    assert some == "gpt2ish,freeze=blocks.0.%2A+"
    assert len({some, more, request().folder.path.parent.name}) == 3


def test_weights_of_another_run_can_be_begun_with_and_frozen(place):
    parent = run()
    wanted = request("ue", freeze=["blocks.*"])
    wanted = replace(wanted, initial=find_initial(str(parent.path), Path("runs")))
    folder = RunFolder(Path(run_experiment(wanted, Silent())["run"]))
    theirs, ours = weights_of(parent), weights_of(folder)

    blocks = [name for name in ours if name.startswith("blocks.")]
    assert blocks and all(torch.equal(ours[name], theirs[name]) for name in blocks)
    assert not torch.equal(ours["head.weight"], theirs["head.weight"])


@pytest.mark.parametrize(
    ("freeze", "told"),
    [
        (["blokcs.0.*"], "'blokcs.0.*' did you mean 'blocks.0.*'? there are token_table.weight"),
        (["head.*", "blocks.7.*"], "'blocks.7.*' did you mean 'blocks.0.*'?"),
        (["*"], "freeze leaves no parameter to train"),
    ],
)
def test_what_cannot_be_frozen_is_told_before_any_text_is_prepared(place, freeze, told):
    with pytest.raises(UserError) as raised:
        run(freeze=freeze)

    said = f"{raised.value.problem} {raised.value.hint}"
    assert raised.value.code == BAD_INPUT and told in said
    assert not list((place / "cache").glob("words*"))


class Projecting(nn.Module):
    """Claims its parameters, and sets all of them after a step."""

    def __init__(self):
        super().__init__()
        self.kept, self.trained = nn.Linear(2, 2), nn.Linear(2, 2)

    def parameter_groups(self):
        return [{"params": [self.kept.weight, self.trained.weight], "lr_scale": 0.5}]

    def after_step(self):
        for parameter in self.parameters():
            parameter.fill_(7.0)


def test_no_method_of_a_model_moves_what_is_frozen():
    model = Projecting()
    model.kept.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = SimpleNamespace(
        model=model, accelerator=SimpleNamespace(scaler=None), world_size=1,
        device=torch.device("cpu"), progress=0.0,
    )  # fmt: skip
    wanted = Optimizer(name="AdamW", lr=0.1, weight_decay=0.5)
    optimizer = make_optimizer(wanted, model, {n: "matrix" for n, _ in model.named_parameters()})
    model.trained(model.kept(torch.ones(1, 2))).sum().backward()
    Update(run, optimizer, None)(torch.tensor(1.0), factor=1.0)

    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in model.trained.parameters()}
    for name, value in model.state_dict().items():
        expected = before[name] if name.startswith("kept") else torch.full_like(value, 7.0)
        assert torch.equal(value, expected)
