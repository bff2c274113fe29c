"""The estimate of curvature: right in the mean, the same in parts and processes, traceless."""

import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.data.batches import Batch
from lmplay.errors import UserError
from lmplay.model.chunked_cross_entropy import IGNORE, drawn
from lmplay.model.objective import Objective
from lmplay.train.curvature import estimate_curvature

V, C = 5, 4


class Model(nn.Module):
    """One linear layer over features of the tokens: softmax regression."""

    def __init__(self, features_VC=None):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        given = torch.randn(V, C, generator=draw, dtype=torch.float64)
        self.table = nn.Embedding.from_pretrained(given if features_VC is None else features_VC)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(C, V, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(V, C, generator=draw))

    def hidden(self, tokens_BT, cache=None):
        return self.dropout(self.table(tokens_BT))

    def forward(self, tokens_BT, cache=None):
        return self.head(self.hidden(tokens_BT))


def run_of(model, rank=0, world_size=1, objective=None):
    from contextlib import nullcontext

    objective = objective or Objective(model)
    accelerator = SimpleNamespace(process_index=rank, scaler=None, backward=torch.Tensor.backward)
    sync = objective.no_sync if world_size > 1 else nullcontext
    return SimpleNamespace(
        model=model, objective=objective, accelerator=accelerator, world_size=world_size, seed=0,
        step=0, device=torch.device("cpu"), no_sync=sync,
    )  # fmt: skip


class Taker:
    def take_curvature(self, of_each):
        self.of_each = of_each


def batch_of(B=6, T=4):
    draw = torch.Generator().manual_seed(1)
    tokens_BT, targets_BT = torch.randint(0, V, (2, B, T), generator=draw)
    targets_BT[:, 0] = IGNORE
    return Batch(tokens_BT, targets_BT, int((targets_BT != IGNORE).sum()))


def estimated(model, batch=None, size=6, step=0):
    run, taker = run_of(model), Taker()
    run.step = step
    estimate_curvature(run, taker, batch or batch_of(), size)
    return taker.of_each[model.head.weight]


def test_its_mean_is_the_curvature_of_a_softmax_regression():
    model, batch = Model(), batch_of()
    found = sum(estimated(model, batch, step=step) for step in range(2000)) / 2000
    scored = batch.targets_BT != IGNORE
    x_NC = model.table(batch.tokens_BT)[scored]
    p_NV = torch.softmax(model.head(x_NC), -1).detach()
    exact_VC = (p_NV * (1 - p_NV)).T @ x_NC.square() / len(x_NC)  # the Hessian's diagonal

    assert_close(found, exact_VC, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("size", [1, 4])
def test_parts_change_nothing(size):
    assert_close(estimated(Model(), size=size), estimated(Model()))


def test_it_leaves_no_gradient_no_mode_and_no_random_number_behind():
    model = Model().train()
    before = torch.random.get_rng_state()
    estimated(model)

    assert model.head.weight.grad is None and model.training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_steps_draw_other_tokens():
    assert not torch.equal(estimated(Model(), step=1), estimated(Model(), step=0))


def test_tokens_are_drawn_by_their_probabilities_and_where_there_are_targets():
    logits_NV = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(8, -1)
    draws_N = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 0.9999])
    targets_N = torch.tensor([0] * 7 + [IGNORE])

    assert drawn(logits_NV, nn.Identity(), targets_N, draws_N).tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        -100,
    ]


def test_a_token_that_cannot_be_is_never_drawn():
    logits_NV = torch.tensor([[-float("inf"), 0.0, -float("inf")]])
    draws = torch.tensor([0.0]), torch.tensor([0.999999])

    for draws_N in draws:
        assert drawn(logits_NV, nn.Identity(), torch.tensor([0]), draws_N).tolist() == [1]


def test_a_model_that_draws_no_next_token_is_refused():
    model = Model()
    model.log_likelihood = lambda tokens_BT, targets_BT: targets_BT

    with pytest.raises(UserError, match="Sophia"):
        estimated(model)


PROCESS = """
import pathlib, sys, torch
from torch import distributed as dist
sys.path.insert(0, {here!r})
from test_curvature import Model, Objective, Taker, batch_of, estimate_curvature, run_of

rank, folder = int(sys.argv[1]), pathlib.Path({folder!r})
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
model, taker = Model(), Taker()
wrapped = torch.nn.parallel.DistributedDataParallel(Objective(model))
estimate_curvature(run_of(model, rank, 2, wrapped), taker, batch_of(), 2)
torch.save(taker.of_each[model.head.weight], folder / f"{{rank}}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_estimate_what_one_does(tmp_path):
    code = PROCESS.format(here=str(pathlib.Path(__file__).parent), folder=str(tmp_path))
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]

    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), estimated(Model()))
