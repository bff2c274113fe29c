"""Each parameter starts at numbers of its own, which other parameters do not move."""

import functools
import math
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.catalog.entries import parent_of
from lmplay.catalog.entry import read_file
from lmplay.model.experiment import load_experiment
from lmplay.model.initialization import with_own_streams

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = [read_file(path)[0] for path in sorted(FOLDER.glob("[!_]*.py"))]
NUM_BUILDS = 12

every_file = pytest.mark.parametrize("entry", FILES, ids=attrgetter("name"))


def state_of(entry, seed):
    experiment = load_experiment(entry)
    return experiment.model(experiment.config(**experiment.tiny), seed=seed).state_dict()


@functools.cache
def pooled(path, is_plain):
    """Every parameter's numbers of many builds, sorted."""
    entry = read_file(path)[0]
    states = [state_of(entry, None if is_plain else seed) for seed in range(NUM_BUILDS)]
    return {
        name: torch.cat([state[name].flatten() for state in states]).float().sort().values
        for name in states[0]
    }


def distance(one_N, other_N):
    """Kolmogorov and Smirnov's, in units that do not depend on N: above 1.6 once in a hundred."""
    both_N = torch.cat([one_N, other_N])
    below = [torch.searchsorted(some, both_N, right=True) / len(some) for some in (one_N, other_N)]
    return (below[0] - below[1]).abs().max().item() * math.sqrt(len(one_N) / 2)


@every_file
@pytest.mark.every_experiment
def test_one_seed_gives_one_start_and_another_seed_another(entry):
    start, again, other = (state_of(entry, seed) for seed in (3, 3, 4))
    plain, drawn_again = (state_of(entry, None) for _ in range(2))

    assert_close(again, start, rtol=0, atol=0)
    for name in start:
        is_drawn = not torch.equal(plain[name], drawn_again[name])
        assert torch.equal(other[name], start[name]) is not is_drawn, name


@every_file
@pytest.mark.every_experiment
def test_numbers_are_spread_as_the_file_says(entry):
    plain, own = pooled(entry.path, True), pooled(entry.path, False)

    for name in plain:
        assert distance(plain[name], own[name]) < 2.5, name


@pytest.mark.parametrize("entry", [e for e in FILES if e.parent], ids=attrgetter("name"))
@pytest.mark.every_experiment
def test_what_parent_and_child_share_starts_equal(entry):
    parent = parent_of(entry)
    mine, theirs = state_of(entry, 3), state_of(parent, 3)
    shared = [k for k in mine if k in theirs and mine[k].shape == theirs[k].shape]
    if not shared:
        pytest.skip(f"no parameter of {parent.name} is left")
    for name in shared:
        if name.endswith(".offset"):  # takes away what nets of different sizes make
            continue
        if not torch.equal(mine[name], theirs[name]):  # then it is drawn from something else
            plain = [pooled(each.path, True)[name] for each in (entry, parent)]
            assert distance(*plain) > 1.6, name


def build(model):
    """A Model without a Config, from a function that gives its parameters."""

    class Made(nn.Module):
        def __init__(self, config):
            super().__init__()
            model(self)

    return lambda seed=0: with_own_streams(Made, None, seed)


def start(model, seed=0):
    return build(model)(seed).state_dict()


@dataclass
class Fill:
    """One way to write a constructor, by what it does to `model.w` of shape (6, 8)."""

    name: str
    fill: object


def fresh(model):
    model.w = nn.Parameter(torch.empty(6, 8))
    return model.w


def overwritten(model):
    layer = nn.Linear(8, 6, bias=False)
    model.w = layer.weight
    nn.init.normal_(model.w, std=0.5)


def from_a_factory(model):
    model.w = nn.Parameter(torch.randn(6, 8) * 0.5)


def of_data(model):
    fresh(model)
    model.w.data.normal_()
    model.w.data *= 0.5


def replaced(model):
    fresh(model)
    model.w.data = torch.randn(6, 8) * 0.5


def in_place_of_zeros(model):
    model.w = nn.Parameter(torch.zeros(6, 8))
    with torch.no_grad():
        model.w += 0.5 * torch.randn(6, 8)


def copied(model):
    fresh(model)
    with torch.no_grad():
        model.w.copy_(nn.init.normal_(torch.empty(6, 8), std=0.5))


SAME = [overwritten, from_a_factory, of_data, replaced, in_place_of_zeros, copied]


@pytest.mark.parametrize("fill", SAME, ids=attrgetter("__name__"))
@pytest.mark.parametrize("before", [0, 3])
def test_a_start_depends_on_the_name_and_not_on_how_or_when_it_was_drawn(fill, before):
    def model(self):
        for i in range(before):
            self.add_module(f"other{i}", nn.GRU(4, 4))
        fill(self)

    expected = start(lambda self: nn.init.normal_(fresh(self), std=0.5))["w"]

    assert_close(start(model)["w"], expected)


def by_slices(model):
    for column in fresh(model).data.split(2, dim=1):
        nn.init.normal_(column)


def twice(model):
    nn.init.normal_(fresh(model))
    model.w.data += torch.randn(6, 8)


def of_two(model):
    model.w = nn.Parameter(torch.cat([torch.randn(3, 8), torch.randn(3, 8)]))


@pytest.mark.parametrize("fill", [by_slices, twice, of_two], ids=attrgetter("__name__"))
def test_several_draws_of_one_parameter_are_several_streams(fill):
    w = start(fill)["w"]

    assert w.unique().numel() == w.numel()
    assert not torch.equal(w[:3], w[3:]) and not torch.equal(w[:, :2], w[:, 2:4])
    assert not torch.equal(w, 2 * start(lambda self: nn.init.normal_(fresh(self)))["w"])


def test_what_is_copied_from_another_module_stays_a_copy():
    def model(self):
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.load_state_dict(self.one.state_dict())
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.one.weight

    made = start(model)

    assert torch.equal(made["one.weight"], made["other.weight"])
    assert made["tied.weight"] is not None and torch.equal(made["tied.weight"], made["one.weight"])
    assert torch.equal(
        made["one.weight"], start(lambda self: setattr(self, "one", nn.Linear(4, 4)))["one.weight"]
    )


def test_special_starts_and_buffers_have_streams_too():
    def model(self):
        nn.init.orthogonal_(fresh(self))
        self.trimmed = nn.Parameter(nn.init.trunc_normal_(torch.empty(50), a=-1, b=1))
        self.register_buffer("order", torch.randperm(40))
        self.register_buffer("noise", torch.rand(5))

    made, same, other = start(model), start(model), start(model, seed=1)

    assert_close(made, same, rtol=0, atol=0)
    assert all(not torch.equal(made[name], other[name]) for name in made)
    assert_close(made["w"] @ made["w"].T, torch.eye(6))
    assert made["trimmed"].abs().max() <= 1
    assert made["order"].sort().values.tolist() == list(range(40))


def test_draws_that_no_parameter_keeps_are_repeated_by_their_order():
    def model(self):
        self.scale = 1.0 if torch.empty(()).is_meta else float(torch.rand(()))
        self.w = nn.Parameter(torch.full((1,), self.scale))

    assert start(model)["w"] == start(model)["w"] != start(model, seed=1)["w"]


def test_torchs_own_numbers_are_neither_read_nor_moved():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = start(overwritten)
    found = torch.rand(3)
    other = start(overwritten)

    assert torch.equal(found, expected)
    assert_close(one, other, rtol=0, atol=0)


def test_an_error_in_a_constructor_leaves_torchs_numbers_alone():
    def model(self):
        torch.rand(3)
        if not torch.empty(()).is_meta:
            raise ValueError("no")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="no"):
        start(model)

    assert torch.equal(torch.get_rng_state(), before)
