"""The one forward: what is minimised and what is reported; gradients do not depend on the parts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.model.chunked_cross_entropy import CHUNK
from lmplay.model.experiment import load_experiment
from lmplay.model.objective import IGNORE, Objective

V = 61


def tiny_model(**values):
    experiment = load_experiment(resolve("gpt2ish"))
    config = experiment.config(
        **{**experiment.tiny, "embed_dropout": 0.0, "ff_dropout": 0.0, **values}
    )
    return experiment.model(config, seed=0)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and every dtype."""

    def __init__(self):
        super().__init__()
        self.numel = 0
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
                self.dtypes.add(value.dtype)
        return made


@pytest.mark.parametrize("head", ["plain", "capped"])
def test_logits_of_all_positions_are_never_alive_together(head):
    B, T, vocab_size = 24, 512, 997
    model = tiny_model(vocab_size=vocab_size, max_len=T)
    if head == "capped":
        model.head = nn.Sequential(model.head, nn.Tanh())
    tokens_BT = torch.randint(0, vocab_size, (B, T))
    with LargestTensor() as seen:
        Objective(model)(tokens_BT, tokens_BT).objective.backward()

    assert CHUNK * vocab_size <= seen.numel < B * T * vocab_size / 4


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_gradient_does_not_depend_on_the_micro_batch(size):
    model = tiny_model().double()
    objective = Objective(model)
    torch.manual_seed(2)
    tokens_BT = torch.randint(0, V, (8, 16))
    targets_BT = torch.randint(0, V, (8, 16))
    targets_BT[torch.rand(8, 16) < torch.linspace(0, 0.9, 8)[:, None]] = IGNORE  # uneven rows
    num_targets = int((targets_BT != IGNORE).sum())
    logits_BTV = model(tokens_BT)
    F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for tokens, targets in zip(tokens_BT.split(size), targets_BT.split(size), strict=True):
        (objective(tokens, targets).objective / num_targets).backward()

    for parameter, expected in zip(model.parameters(), whole, strict=True):
        assert (parameter.grad - expected).norm() <= 1e-12 * max(expected.norm(), 1e-3)


class OwnLoss(nn.Module):
    """Twice the squared logit of the target: minimised in training, never reported."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(V, V)

    def forward(self, tokens_BT, cache=None):
        return self.table(tokens_BT)

    def training_loss(self, tokens_BT, targets_BT):
        return 2 * self(tokens_BT).gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0] ** 2


def test_own_training_loss_is_masked_and_never_reported():
    objective = Objective(OwnLoss())
    tokens_BT = torch.randint(0, V, (2, 8))
    targets_BT = tokens_BT.clone()
    targets_BT[:, ::2] = IGNORE
    trained = objective.train()(tokens_BT, targets_BT)
    reported = objective.eval()(tokens_BT, targets_BT)
    kept = objective.model.training_loss(tokens_BT, targets_BT)[:, 1::2].sum()

    assert_close(trained.objective, kept)
    assert trained.loss is None and trained.hits is None
    logits_NV = objective.model(tokens_BT).flatten(0, 1)
    expected = F.cross_entropy(
        logits_NV, targets_BT.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert_close(reported.loss, expected.detach())


class Several(nn.Module):
    """Every kind of term: two tokens ahead by the tied head, soft targets, a penalty, a cap."""

    def __init__(self, width=8):
        super().__init__()
        self.table = nn.Embedding(V, width)
        self.mix = nn.Linear(width, width)
        self.next = nn.Linear(width, width)
        self.head = nn.Linear(width, V)
        self.other = nn.Sequential(nn.Linear(width, V, bias=False), nn.Tanh())
        self.head.weight = self.table.weight

    def hidden(self, tokens_BT, cache=None):
        return torch.tanh(self.mix(self.table(tokens_BT)))

    def forward(self, tokens_BT, cache=None):
        return self.head(self.hidden(tokens_BT))

    def loss_terms(self, tokens_BT, targets_BT):
        x_BTC = self.hidden(tokens_BT)
        later_BT = F.pad(targets_BT[:, 1:], (0, 1), value=IGNORE)
        both_BT2 = torch.stack([targets_BT, later_BT], dim=-1)
        shares_BT2 = torch.tensor([0.25, 0.5], dtype=x_BTC.dtype).expand(both_BT2.shape)
        ahead_BTC = self.next(x_BTC)
        return [
            {"x": x_BTC, "head": self.head, "targets": targets_BT, "weight": 0.9, "z_weight": 0.1},
            {"x": ahead_BTC, "head": self.head, "targets": later_BT, "weight": 0.3},
            {"x": x_BTC, "head": self.other, "targets": both_BT2, "shares": shares_BT2},
            {"penalty": x_BTC.square().mean(-1), "weight": 0.05},
        ]


def written_out(model, tokens_BT, targets_BT):
    """Sum of the terms of Several, each as a textbook has it."""

    def nats_BT(logits_BTV, to_BT):
        return F.cross_entropy(logits_BTV.mT, to_BT, ignore_index=IGNORE, reduction="none")

    x_BTC = model.hidden(tokens_BT)
    later_BT = F.pad(targets_BT[:, 1:], (0, 1), value=IGNORE)
    logits_BTV, other_BTV = model.head(x_BTC), model.other(x_BTC)
    loss_BT = 0.9 * nats_BT(logits_BTV, targets_BT)
    scored_BT = targets_BT != IGNORE
    loss_BT = loss_BT + 0.9 * 0.1 * logits_BTV.logsumexp(-1) ** 2 * scored_BT
    loss_BT = loss_BT + 0.3 * nats_BT(model.head(model.next(x_BTC)), later_BT)
    loss_BT = loss_BT + 0.25 * nats_BT(other_BTV, targets_BT) + 0.5 * nats_BT(other_BTV, later_BT)
    loss_BT = loss_BT + 0.05 * (x_BTC**2).mean(-1) * scored_BT
    return loss_BT.sum()


def several_and_batch(B=8):
    torch.manual_seed(4)
    model = Several().double()
    tokens_BT, targets_BT = torch.randint(0, V, (2, B, 12))
    targets_BT[torch.rand(B, 12) < torch.linspace(0, 0.9, B)[:, None]] = IGNORE
    return model, tokens_BT, targets_BT


@pytest.mark.parametrize("size", [1, 3, 8])
def test_terms_have_the_gradient_of_their_weighted_sum_in_parts_of_any_size(size):
    model, tokens_BT, targets_BT = several_and_batch()
    expected = written_out(model, tokens_BT, targets_BT)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    objective = Objective(model)
    total = 0.0
    for tokens, targets in zip(tokens_BT.split(size), targets_BT.split(size), strict=True):
        sums = objective(tokens, targets)
        sums.objective.backward()
        total += sums.objective.detach()

    assert_close(total, expected.detach(), rtol=1e-12, atol=0)
    assert_close([p.grad for p in model.parameters()], gradients, rtol=1e-10, atol=1e-12)


def test_terms_leave_the_reported_loss_to_the_ruler():
    model, tokens_BT, targets_BT = several_and_batch()
    objective = Objective(model)
    trained = objective.train()(tokens_BT, targets_BT)
    model.loss_terms = None  # not even asked in eval mode
    reported = objective.eval()(tokens_BT, targets_BT)

    assert_close((trained.loss, trained.hits), (reported.loss, reported.hits))
    assert reported.objective == reported.loss != trained.objective


def test_terms_never_hold_the_logits_of_all_positions():
    B, T, vocab_size = 24, 512, 997
    model = tiny_model(vocab_size=vocab_size, max_len=T)
    capped = nn.Sequential(model.head, nn.Tanh())

    def loss_terms(tokens_BT, targets_BT):
        x_BTC = model.hidden(tokens_BT)
        soft_BT2 = targets_BT[..., None].expand(-1, -1, 2)
        shares_BT2 = torch.full(soft_BT2.shape, 0.5)
        return [
            {"x": x_BTC, "head": model.head, "targets": targets_BT, "z_weight": 1e-4},
            {"x": x_BTC, "head": model.head, "targets": soft_BT2, "shares": shares_BT2},
            {"x": x_BTC, "head": capped, "targets": soft_BT2, "shares": shares_BT2},
        ]

    model.loss_terms = loss_terms
    tokens_BT = torch.randint(0, vocab_size, (B, T))
    with LargestTensor() as seen:
        Objective(model)(tokens_BT, tokens_BT).objective.backward()

    assert CHUNK * vocab_size <= seen.numel < B * T * vocab_size / 4


PROCESS = """
import pathlib, sys, torch
from torch import distributed as dist
sys.path.insert(0, {here!r})
from test_objective import Objective, several_and_batch

rank, folder = int(sys.argv[1]), pathlib.Path({folder!r})
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
model, tokens_BT, targets_BT = several_and_batch()
wrapped = torch.nn.parallel.DistributedDataParallel(Objective(model))
with wrapped.no_sync():
    wrapped(tokens_BT[rank:4:2], targets_BT[rank:4:2]).objective.backward()
wrapped(tokens_BT[4 + rank::2], targets_BT[4 + rank::2]).objective.backward()
torch.save([2 * p.grad for p in model.parameters()], folder / f"{{rank}}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_terms_have_the_same_gradient_in_two_processes(tmp_path):
    code = PROCESS.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    codes = [process.wait() for process in processes]
    model, tokens_BT, targets_BT = several_and_batch()
    written_out(model, tokens_BT, targets_BT).backward()

    assert codes == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert_close(found, [p.grad for p in model.parameters()], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("place", "change", "rule"),
    [
        (0, {"targets": torch.zeros(8, 12, dtype=torch.int64)}, "first term is not the next"),
        (0, {"head": nn.Linear(8, V)}, "first term is not the next"),
        (1, {"wieght": 1.0}, "no key 'wieght'"),
        (3, {"x": torch.zeros(8, 12, 8)}, "no key 'x'"),
        (1, {"x": torch.zeros(96, 8)}, r"x has shape \(96, 8\), not \(B, T, C\)"),
        (1, {"targets": torch.zeros(8, 12, 2)}, "targets has shape"),
        (2, {"targets": torch.zeros(8, 12)}, "targets has shape"),
        (2, {"shares": torch.zeros(8, 12, 3)}, "shares has shape"),
        (2, {"shares": torch.zeros(8, 12, 2, requires_grad=True)}, "shares are constants"),
        (3, {"penalty": torch.zeros(8)}, "penalty has shape"),
    ],
)
def test_a_term_that_breaks_the_contract_is_named(place, change, rule):
    model, tokens_BT, targets_BT = several_and_batch()
    terms = model.loss_terms(tokens_BT, targets_BT)
    terms[place].update(change)
    model.loss_terms = lambda *_: terms

    with pytest.raises(UserError, match=rule):
        Objective(model)(tokens_BT, targets_BT)


@pytest.mark.parametrize("terms", [[], [{"penalty": torch.zeros(8, 12)}]])
def test_terms_without_the_ruler_are_refused(terms):
    model, tokens_BT, targets_BT = several_and_batch()
    model.loss_terms = lambda *_: terms

    with pytest.raises(UserError, match="first term is not the next"):
        Objective(model)(tokens_BT, targets_BT)


def test_a_term_that_lacks_its_targets_is_refused():
    model, tokens_BT, targets_BT = several_and_batch()
    terms = model.loss_terms(tokens_BT, targets_BT)
    del terms[1]["targets"]
    model.loss_terms = lambda *_: terms

    with pytest.raises(UserError, match="lacks 'targets'"):
        Objective(model)(tokens_BT, targets_BT)
