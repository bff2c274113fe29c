"""A run under FSDP is the run that it would be anyway; how it is spread and made whole again.

One process makes a group of its own here: all of FSDP2 but the other processes. Two are in
test_launch.py.
"""

from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.model.experiment import load_experiment
from lmplay.model.objective import Objective
from lmplay.optim.refusals import refuse_fsdp
from lmplay.plan import Optimizer
from lmplay.plan_file import read_plan
from lmplay.run.checkpoint import newest_checkpoint
from lmplay.run.folder import RunFolder
from lmplay.run.fsdp import apply_fsdp, blocks, gather_state, no_sync, scatter_model_state
from lmplay.run.records import read_rows
from lmplay.run.request import Request
from lmplay.train import loop, session
from lmplay.train.display import Display
from lmplay.train.session import run_experiment

CPU = torch.device("cpu")


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tiny(name="gpt2ish", **values):
    experiment = load_experiment(resolve(name))
    return experiment.model(experiment.config(**{**experiment.tiny, **values}), seed=0)


def train(out_dir, exp="gpt2ish", fsdp=False, precision="fp32", compiled=False, **changes):
    changes = {"num_blocks": 2, **changes}
    of_plan = {k: v for k, v in changes.items() if "." in k or k == "freeze"}
    request = Request(
        resolve(exp), read_plan("words", of_plan), changes,
        {k: v for k, v in changes.items() if k not in of_plan}, precision=precision, device="cpu",
        mini_batch_size=2, out_dir=Path(out_dir), fsdp=fsdp, compiled=compiled,
    )  # fmt: skip
    with Display("") as display:
        return RunFolder(Path(run_experiment(request, display)["run"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"compiled": True},
        {"optimizer.name": "RMSprop"},
        {"freeze": ["token_table*", "blocks.0.*"]},
        {"exp": "sac1_1"},  # its blocks share what they read the tokens with
    ],
    ids=str,
)
def test_a_sharded_run_takes_the_steps_of_a_plain_one(place, alone, monkeypatch, options):
    monkeypatch.setattr(session, "_refuse_fsdp", lambda *_: None)  # of one process
    real = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **given: real(self, backend="aot_eager", **given)
    )
    plain, fsdp = (train(out, fsdp=out == "fsdp", **options) for out in ("a", "fsdp"))
    states = [newest_checkpoint(folder, print) for folder in (plain, fsdp)]
    rows = [read_rows(folder.validation_csv) for folder in (plain, fsdp)]

    assert fsdp.read().fsdp and fsdp.read().compiled == ("compiled" in options)
    for state in states:  # a softmax is blind to a key's bias: Adam scales up rounding errors there
        for key in [key for key in state.model if key.endswith("key.bias")]:
            del state.model[key]
    assert_close(states[1].model, states[0].model)
    assert_close(states[1].optimizer["state"], states[0].optimizer["state"])
    assert states[1].optimizer["param_groups"] == states[0].optimizer["param_groups"]
    assert [row["loss"] for row in rows[1]] == pytest.approx([row["loss"] for row in rows[0]])
    assert fsdp.samples_md.read_text() == plain.samples_md.read_text()


def test_a_sharded_run_that_fails_says_where(place, alone, monkeypatch):
    def poison(a_session, *rest):
        a_session.run.model.blocks[1].mlp.up.bias.data.to_local().fill_(float("nan"))
        return real(a_session, *rest)

    real = loop.take_step
    monkeypatch.setattr(loop, "take_step", poison)
    monkeypatch.setattr(session, "_refuse_fsdp", lambda *_: None)
    with pytest.raises(UserError) as raised:
        train("runs", fsdp=True)

    assert raised.value.problem.endswith("it begins in blocks.1.mlp.up")


def test_blocks_are_what_repeats_and_shares_nothing():
    model = tiny()
    assert blocks(Objective(model)) == list(model.blocks)

    model.blocks[1].mlp.up.weight = model.head.weight
    assert blocks(Objective(model)) == [model.blocks[0]]


def test_every_parameter_is_spread_and_made_whole_again(alone):
    model = tiny()
    model.head.weight = model.token_table.weight  # tied
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objective = Objective(model)
    apply_fsdp(objective, CPU)
    state = gather_state(model.state_dict(keep_vars=True))
    is_tied = state["head.weight"] is state["token_table.weight"]
    state = {key: value.clone() for key, value in state.items()}
    other = {key: torch.ones_like(value) for key, value in before.items()}
    model.load_state_dict(scatter_model_state(other, model))

    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert_close(state, before, rtol=0, atol=0)
    assert is_tied
    assert_close(gather_state(model.state_dict()), other, rtol=0, atol=0)


def test_gradients_are_exchanged_once_for_all_parts(alone):
    model, plain = tiny(), tiny()
    objective, expected = Objective(model).eval(), Objective(plain).eval()  # without dropout
    apply_fsdp(objective, CPU)
    parts_NBT = torch.randint(61, (3, 2, 16), generator=torch.Generator().manual_seed(0))
    with no_sync(objective):
        for part_BT in parts_NBT[:2]:
            objective(part_BT, part_BT).objective.backward()
        kept = [parameter.grad for parameter in model.parameters()]
    objective(parts_NBT[2], parts_NBT[2]).objective.backward()
    for part_BT in parts_NBT:
        expected(part_BT, part_BT).objective.backward()

    assert kept == [None] * len(kept)  # no slice of a gradient: nothing was exchanged
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(gather_state(parameter.grad), other.grad)


def test_a_single_number_cannot_be_spread(alone):
    model = tiny()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(UserError, match=r"model\.scale is a single number"):
        apply_fsdp(Objective(model), CPU)


def test_blocks_are_compiled_or_it_is_said_that_there_are_none(place, alone, monkeypatch):
    monkeypatch.setattr(session, "_refuse_fsdp", lambda *_: None)
    with pytest.raises(UserError, match="no repeated blocks"):
        train("runs", fsdp=True, compiled=True, num_blocks=1)


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_optimizers_that_need_whole_matrices_are_refused(name):
    with pytest.raises(UserError, match=f"{name} needs whole weights"):
        refuse_fsdp(Optimizer(name=name, lr=0.1))
    refuse_fsdp(Optimizer(name="AdamW", lr=0.1))


def test_a_lone_process_has_nothing_to_shard_with(place):
    with pytest.raises(UserError, match="needs several processes"):
        train("runs", fsdp=True)
