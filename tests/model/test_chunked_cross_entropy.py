"""Chunked sums and their gradients equal those of logits held whole, for every kind of target."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lmplay.model.chunked_cross_entropy import CHUNK, IGNORE, score

# N positions in a line, V vocabulary, K targets of a position

V = 61


def random_rows(num_rows, width=16, share_ignored=0.2, dtype=torch.float64):
    torch.manual_seed(1)
    x_NC = torch.randn(num_rows, width, dtype=dtype, requires_grad=True)
    targets_N = torch.randint(0, V, (num_rows,))
    targets_N[torch.rand(num_rows) < share_ignored] = IGNORE
    return x_NC, targets_N


class Capped(nn.Module):
    """A head that is not a plain linear layer: it caps its logits."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, V)

    def forward(self, x):
        return 5 * torch.tanh(self.linear(x) / 5)


@pytest.mark.parametrize("num_rows", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("head", [nn.Linear(16, V), nn.Linear(16, V, bias=False), Capped()])
def test_chunked_loss_and_gradients_equal_those_of_whole_logits(head, num_rows):
    head = head.double()
    head.zero_grad()
    x_NC, targets_N = random_rows(num_rows)
    sums = score(x_NC, head, targets_N)
    (sums.objective / 7).backward()
    fused = [p.grad.clone() for p in (x_NC, *head.parameters())]
    x_NC.grad = None
    head.zero_grad()
    logits_NV = head(x_NC)
    loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")
    (loss / 7).backward()

    assert_close(sums.loss, loss.detach(), rtol=1e-12, atol=1e-12)
    assert sums.hits == (logits_NV.argmax(-1) == targets_N).sum()
    assert_close(fused, [p.grad for p in (x_NC, *head.parameters())], rtol=1e-10, atol=1e-12)


def test_loss_without_gradients_is_the_same_number():
    head = nn.Linear(16, V).double()
    x_NC, targets_N = random_rows(50)
    with torch.no_grad():
        sums = score(x_NC, head, targets_N)

    assert_close(sums.loss, score(x_NC, head, targets_N).loss)


def test_low_precision_stays_near_the_reference():
    head = nn.Linear(16, V)
    x_NC, targets_N = random_rows(3000, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sums = score(x_NC, head, targets_N)
    sums.objective.backward()
    low = head.weight.grad.clone()
    head.zero_grad()
    exact = F.cross_entropy(head(x_NC), targets_N, ignore_index=IGNORE, reduction="sum")
    exact.backward()

    assert sums.loss.dtype == low.dtype == torch.float32
    assert_close(sums.loss, exact.detach(), rtol=1e-3, atol=0)
    assert (low - head.weight.grad).norm() < 1e-2 * head.weight.grad.norm()


def random_targets(num_rows, K):
    torch.manual_seed(3)
    targets_NK = torch.randint(0, V, (num_rows, K))
    targets_NK[torch.rand(num_rows, K) < 0.3] = IGNORE
    targets_NK[::5] = IGNORE  # rows without any
    targets_NK[1::5] = 7  # rows with the same one K times
    return targets_NK


def written_out(logits_NV, targets_NK, shares_NK, z_weight):
    """Each row by itself, each target by itself."""
    objective = loss = torch.zeros((), dtype=logits_NV.dtype)
    for logits_V, targets_K, shares_K in zip(logits_NV, targets_NK, shares_NK, strict=True):
        kept = [k for k in range(len(targets_K)) if targets_K[k] != IGNORE]
        for k in kept:
            loss = loss - shares_K[k] * logits_V.log_softmax(-1)[targets_K[k]]
        if kept:
            objective = objective + z_weight * logits_V.exp().sum().log() ** 2
    return objective + loss, loss


@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("K", [None, 1, 3])
@pytest.mark.parametrize("head", [nn.Linear(16, V), nn.Linear(16, V, bias=False), Capped()])
def test_every_kind_of_target_equals_its_loss_written_out(head, K, z_weight, monkeypatch):
    monkeypatch.setattr("lmplay.model.chunked_cross_entropy.CHUNK", 40)
    head = head.double()
    x_NC, _ = random_rows(90)
    targets_NK = random_targets(90, K or 1)
    shares_NK = torch.rand(90, K).double() if K else None
    targets = targets_NK if K else targets_NK[:, 0]
    found = []
    for is_chunked in (True, False):
        x_NC.grad = None
        head.zero_grad()
        if is_chunked:
            objective, loss, *_ = score(x_NC, head, targets, shares_NK, z_weight)
        else:
            ones = torch.ones(90, 1).double() if shares_NK is None else shares_NK
            objective, loss = written_out(head(x_NC), targets_NK, ones, z_weight)
        (objective / 7).backward()
        gradients = [p.grad.clone() for p in (x_NC, *head.parameters())]
        found.append([objective.detach(), loss.detach(), *gradients])

    assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_rows_without_a_target_move_nothing_even_where_they_are_weighted():
    head = nn.Linear(16, V)
    x_NC, _ = random_rows(6, dtype=torch.float32)
    targets_N = torch.full((6,), IGNORE)
    sums = score(x_NC, head, targets_N, z_weight=1.0)
    sums.objective.backward()

    assert sums.objective == sums.loss == 0
    assert not x_NC.grad.any() and not head.weight.grad.any() and not head.bias.grad.any()
