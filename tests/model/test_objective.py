"""The one forward: chunked sums equal torch's, gradients do not depend on the parts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lmplay.catalog.entries import resolve
from lmplay.model.experiment import load_experiment
from lmplay.model.objective import CHUNK, IGNORE, Objective, score_hidden

V = 61


def tiny_model(**values):
    experiment = load_experiment(resolve("gpt2ish"))
    config = experiment.config(
        **{**experiment.tiny, "embed_dropout": 0.0, "ff_dropout": 0.0, **values}
    )
    return experiment.model(config, seed=0)


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
    sums = score_hidden(x_NC, targets_N, head)
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
        sums = score_hidden(x_NC, targets_N, head)

    assert_close(sums.loss, score_hidden(x_NC, targets_N, head).loss)


def test_low_precision_stays_near_the_reference():
    head = nn.Linear(16, V)
    x_NC, targets_N = random_rows(3000, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sums = score_hidden(x_NC, targets_N, head)
    sums.objective.backward()
    low = head.weight.grad.clone()
    head.zero_grad()
    exact = F.cross_entropy(head(x_NC), targets_N, ignore_index=IGNORE, reduction="sum")
    exact.backward()

    assert sums.loss.dtype == low.dtype == torch.float32
    assert_close(sums.loss, exact.detach(), rtol=1e-3, atol=0)
    assert (low - head.weight.grad).norm() < 1e-2 * head.weight.grad.norm()


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
