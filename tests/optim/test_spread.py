"""Optimizers in two processes, which may share the work: all have what one would have."""

import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.optim.joint import make_optimizer
from lmplay.optim.known import KNOWN, replaced
from lmplay.plan import Optimizer

pytestmark = pytest.mark.slow  # two processes import torch
NAMES = [name for name, known in KNOWN.items() if not known.local_gradients]
SPREAD = [name for name in NAMES if KNOWN[name].by_matrix]


def made(name, spread, seed=0):
    """A model of four matrices and two vectors, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.ModuleList([nn.Module(), nn.Module(), nn.Linear(6, 9), nn.Linear(9, 6, bias=False)])
    for block in model[:2]:
        block.query = nn.Linear(6, 6, bias=False)
    roles = {n: "matrix" if p.dim() > 1 else "vector" for n, p in model.named_parameters()}
    wanted = replaced(Optimizer(name="AdamW", lr=0.01, weight_decay=0.1), name)
    wanted["options"] |= {"momentum_start": 0.5} if "Muon" in name else {}
    return model, make_optimizer(Optimizer(**wanted), model, roles, 12, spread)


def take_steps(model, optimizer, steps):
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        if optimizer.needs_curvature:
            optimizer.take_curvature({p: 1e3 * p.grad.square() for p in model.parameters()})
        optimizer.set_factor(1 - step / 12)
        optimizer.set_progress(step / 12)
        optimizer.step()


PROCESS = """
import copy, pathlib, sys, torch
from torch import distributed as dist
sys.path.insert(0, {here!r})
from test_spread import NAMES, made, take_steps

rank, folder = int(sys.argv[1]), pathlib.Path({folder!r})
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
found = {{}}
for name in NAMES:
    model, optimizer = made(name, spread=True)
    take_steps(model, optimizer, range(6))
    state, weights = copy.deepcopy([optimizer.state_dict(), model.state_dict()])
    of_matrices = getattr(optimizer.members[0], "base", optimizer.members[0])
    its = getattr(of_matrices, "optim", of_matrices)
    held = sum(len(values) > 0 for values in its.state.values())
    dist.broadcast_object_list(whole := [copy.deepcopy(state)])
    resumed, other = made(name, spread=True, seed=1)
    resumed.load_state_dict(weights)
    other.load_state_dict(whole[0])
    take_steps(model, optimizer, range(6, 12))
    take_steps(resumed, other, range(6, 12))
    found[name] = model.state_dict(), resumed.state_dict(), state, weights, held
torch.save(found, folder / f"{{rank}}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes found: weights at the end, again after a resume, the state half way."""
    folder = tmp_path_factory.mktemp("spread")
    code = PROCESS.format(here=str(pathlib.Path(__file__).parent), folder=str(folder))
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_what_one_has(both, name):
    model, optimizer = made(name, spread=False)
    take_steps(model, optimizer, range(12))

    for found in both:
        assert_close(found[name][0], dict(model.state_dict()), rtol=1e-5, atol=1e-6)
    assert_close(both[0][name][0], both[1][name][0], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_they_go_on_bit_for_bit_from_a_state_that_one_process_takes_up_too(both, name):
    ended, resumed, state, weights, _ = both[0][name]
    assert_close(resumed, ended, rtol=0, atol=0)
    alone, optimizer = made(name, spread=False, seed=1)
    alone.load_state_dict(weights)
    optimizer.load_state_dict(state)
    take_steps(alone, optimizer, range(6, 12))

    assert_close(dict(alone.state_dict()), ended, rtol=1e-5, atol=1e-6)


def test_each_process_holds_the_state_of_some_matrices_only(both):
    for name in SPREAD:
        held = [found[name][-1] for found in both]
        assert sum(held) == 4 and min(held) > 0, name
