"""DeMo: its transform, what it tells and keeps, and processes that stay equal."""

import copy
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.demo import DeMo, block_size, cosines, from_blocks, to_blocks, turned, turned_back

F64 = torch.float64
SHAPES = [(6, 8), (7, 10), (5,), (), (4, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_turned_and_turned_back_are_the_weight(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    x_NAB = to_blocks(x, block_size(x, 4))
    turned_NAB = turned(x_NAB)

    assert x_NAB.shape[1] <= 4 and x_NAB.shape[2] <= 4
    assert_close(from_blocks(turned_back(turned_NAB), x.shape), x)
    assert_close(turned_NAB.norm(), x.norm())


def test_the_transform_is_that_of_cosines():
    x_B = torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    assert_close(cosines(3, F64, torch.device("cpu")) @ x_B,
                 torch.tensor([12**0.5, -(2**0.5), 0.0], dtype=F64))  # fmt: skip


def weights(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=F64)) for shape in SHAPES]


def take_steps(params, optimizer, steps, rank=0):
    for step in steps:
        draw = torch.Generator().manual_seed(100 * step + rank)
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw, dtype=F64)
        optimizer.step()


def test_told_whole_it_is_the_sign_of_the_gradient():
    params = weights()
    before = copy.deepcopy(params)
    take_steps(params, DeMo(params, lr=0.1, weight_decay=0.5, top=10**6), [0])

    for p, old in zip(params, before, strict=True):
        assert_close(p.detach(), (1 - 0.05) * old.detach() - 0.1 * p.grad.sign())


def test_what_is_told_and_what_is_kept_are_the_momentum():
    params = weights()
    optimizer = DeMo(params, lr=0.1, weight_decay=0.0, top=2, block=4)
    take_steps(params, optimizer, [0])

    for p in params:
        sent = 0.1 * p.grad - optimizer.state[p]["momentum"]
        kept_NF = turned(to_blocks(optimizer.state[p]["momentum"], block_size(p, 4))).flatten(1)
        told_NF = turned(to_blocks(sent, block_size(p, 4))).flatten(1)
        assert ((told_NF.abs() > 1e-12).sum(1) <= 2).all()
        assert_close(
            (told_NF * kept_NF).abs().max(), torch.zeros((), dtype=F64), atol=1e-15, rtol=0
        )
        assert (told_NF.abs().amax(1) >= kept_NF.abs().amax(1)).all()


def test_the_momentum_written_out():
    weight = nn.Parameter(torch.zeros(4, dtype=F64))
    optimizer = DeMo([weight], lr=0.1, weight_decay=0.0, beta=0.5, top=1)
    take_steps([weight], optimizer, range(3))
    turn_FB = cosines(4, F64, torch.device("cpu"))
    w, m = torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64)
    for step in range(3):
        draw = torch.Generator().manual_seed(100 * step)
        m = 0.5 * m + 0.1 * torch.randn(4, generator=draw, dtype=F64)
        # a vector is a column of blocks, transformed along its rows alone
        told_F = turn_FB @ m
        told_F[told_F.abs() < told_F.abs().max()] = 0
        m = m - turn_FB.T @ told_F
        w = w - 0.1 * (turn_FB.T @ told_F).sign()

    assert_close(weight.detach(), w)


PROCESS = """
import pathlib, sys, torch
from torch import distributed as dist
sys.path.insert(0, {here!r})
from test_demo import DeMo, take_steps, weights

rank, folder = int(sys.argv[1]), pathlib.Path({folder!r})
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
params = weights()
optimizer = DeMo(params, lr=0.1, top=3, block=4)
take_steps(params, optimizer, range(3), rank)
state = optimizer.state_dict()
resumed = weights(seed=1)
other = DeMo(resumed, lr=0.1, top=3, block=4)
for mine, its in zip(resumed, params):
    mine.data.copy_(its)
other.load_state_dict(state)
take_steps(params, optimizer, range(3, 6), rank)
take_steps(resumed, other, range(3, 6), rank)
torch.save([params, resumed, state["state"]], folder / f"{{rank}}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_stay_equal_and_each_goes_on_from_its_own_momentum(tmp_path):
    code = PROCESS.format(here=str(pathlib.Path(__file__).parent), folder=str(tmp_path))
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    (params, resumed, state), (others, _, its) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)
    )

    assert_close(params, others, rtol=0, atol=0)
    assert_close(resumed, params, rtol=0, atol=0)
    assert_close(state, its, rtol=0, atol=0)
    first, second = state[0]["momentum"]
    assert not torch.equal(first, second)
    alone = weights()
    fewer = DeMo(alone, lr=0.1)
    fewer.load_state_dict({**fewer.state_dict(), "state": state})
    assert_close(fewer.state[alone[0]]["momentum"], (first + second) / 2)
