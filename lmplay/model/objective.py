"""The one forward: tokens and targets to sums of loss and hits, the source of every curve."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmplay.model.abilities import has_hidden, scores_itself, trains_by_itself

# B rows, T positions, N = B T positions in a line, C model width, V vocabulary

IGNORE = -100  # a target that is not scored
CHUNK = 2048  # rows of logits that are alive at a time
BLOCK = 32  # of these, rows of which a CPU makes the softmax at a time


class Sums(NamedTuple):
    """Sums over the scored targets of some rows, each a scalar of fp32 on the model's device."""

    objective: Tensor  # what training minimises; the only one that carries a gradient
    loss: Tensor | None  # cross-entropy in nats; None where training did not compute it
    hits: Tensor | None  # targets that were the likeliest token


class Objective(nn.Module):
    """A model together with its loss: the one module that accelerate, autocast and compile see.

    A method called around it would run without precision, compilation and gradient averaging.

    Args:
        model: a `Model` of an experiment file; design section 3 says which methods are used.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Sums:
        """Sums over the targets that are not IGNORE.

        While training, an experiment's own `training_loss` is the objective, and then loss and
        hits are not computed; else, and always in eval mode, all three are the ruler's.
        """
        if self.training and trains_by_itself(self.model):
            return Sums(self._sum_of(self.model.training_loss, tokens_BT, targets_BT), None, None)
        if scores_itself(self.model):
            nats = self._sum_of(self.model.log_likelihood, tokens_BT, targets_BT)
            return Sums(nats, nats.detach(), None)
        if not has_hidden(self.model):
            logits_BTV = self.model(tokens_BT)
            return _scored(*_ruler(logits_BTV.flatten(0, 1), targets_BT.flatten()))
        x_BTC = self.model.hidden(tokens_BT)
        return score_hidden(x_BTC.flatten(0, 1), targets_BT.flatten(), self.model.head)

    def _sum_of(self, method, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        scored_BT = targets_BT != IGNORE
        nats_BT = method(tokens_BT, targets_BT).float()
        return torch.where(scored_BT, nats_BT, 0.0).sum()


def score_hidden(x_NC: Tensor, targets_N: Tensor, head: nn.Module) -> Sums:
    """Score positions before the head, CHUNK rows of logits at a time.

    Args:
        x_NC: what `Model.hidden` gave, positions in a line.
        targets_N: token ids, or IGNORE.
        head: maps each position alone. A plain `nn.Linear` is fused with the cross-entropy;
            anything else is run again in the backward pass, chunk by chunk.
    """
    if type(head) is nn.Linear:
        bias_V = head.bias
        return _scored(*_LinearCrossEntropy.apply(x_NC, head.weight, bias_V, targets_N))
    parts = []
    for x, targets in zip(x_NC.split(CHUNK), targets_N.split(CHUNK), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(_ruler_of_head, head, x, targets, use_reentrant=False))
        else:
            parts.append(_ruler_of_head(head, x, targets))
    nats, hits = (torch.stack(sums).sum() for sums in zip(*parts, strict=True))
    return _scored(nats, hits)


def _ruler(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy in nats, by an fp32 log-softmax, and the number of hits."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    logits_NV = logits_NV.to(wide)  # argmax is several times as fast in fp32 as in bf16
    nats = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")
    hits = (logits_NV.detach().argmax(-1) == targets_N).sum(dtype=torch.float32)
    return nats, hits


def _ruler_of_head(head: nn.Module, x_NC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    return _ruler(head(x_NC), targets_N)


def _scored(nats: Tensor, hits: Tensor) -> Sums:
    return Sums(nats, nats.detach(), hits.detach())


class _LinearCrossEntropy(torch.autograd.Function):
    """Linear layer and cross-entropy in one: the gradients are made while a chunk's logits exist.

    The sum's gradient is known but for a factor, so the backward pass only multiplies. Logits are
    made in autocast's precision, the softmax and the sum of the weight's gradient are kept in fp32.
    """

    @staticmethod
    def forward(ctx, x_NC, weight_VC, bias_V, targets_N):
        device = x_NC.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NC.dtype
        wide = torch.promote_types(low, torch.float32)  # fp32, but fp64 where a test asks for it
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx_NC = torch.empty_like(x_NC) if needs_x else None
        dbias_V = torch.zeros_like(bias_V, dtype=wide) if needs_bias else None
        weight_CV, x_all = weight_VC.to(low).T, x_NC.to(low)
        bias = None if bias_V is None else bias_V.to(low)
        has_buffer = device != "mps" and not torch.compiler.is_compiling()
        buffer = _logits_buffer(x_all, len(weight_VC)) if has_buffer else None
        gradient = _WeightGradient(low, wide)
        sums = []
        with torch.autocast(device, enabled=False):
            for start in range(0, len(x_NC), CHUNK):
                rows = slice(start, start + CHUNK)
                x, targets = x_all[rows], targets_N[rows]
                logits = _linear(x, weight_CV, bias, None if buffer is None else buffer[: len(x)])
                for block in _blocks(logits):
                    sums.append(_softmax_(logits[block], targets[block], wide, dbias_V))
                scored = (targets != IGNORE)[:, None]
                if needs_x:
                    dx_NC[rows] = (logits @ weight_CV.T) * scored
                if needs_weight:
                    gradient.add(logits, x * scored)
        ctx.save_for_backward(dx_NC, gradient.sum_VC, dbias_V)
        nats, hits = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
        ctx.mark_non_differentiable(hits)
        return nats, hits

    @staticmethod
    def backward(ctx, factor, _):
        return *(None if g is None else _scaled(g, factor) for g in ctx.saved_tensors), None


def _logits_buffer(x_NC: Tensor, V: int) -> Tensor:
    """Room for a chunk's logits, made once: on a CPU, fresh pages cost as much as the arithmetic.

    Rows begin at multiples of 64 numbers; a matrix product into rows of 50,257 takes 1.25 x as long
    in fp32. Not on MPS, where a product into such rows was wrong once (pytorch/pytorch#104832).
    """
    return x_NC.new_empty(min(CHUNK, len(x_NC)), -(-V // 64) * 64)[:, :V]


def _linear(x_NC: Tensor, weight_CV: Tensor, bias_V: Tensor | None, out: Tensor | None) -> Tensor:
    if bias_V is None:
        return torch.mm(x_NC, weight_CV, out=out)
    return torch.addmm(bias_V, x_NC, weight_CV, out=out)


def _blocks(logits_NV: Tensor) -> list[slice]:
    """Rows to treat together: few enough for a CPU's cache, all of them where kernels are fused."""
    is_eager_cpu = logits_NV.device.type == "cpu" and not torch.compiler.is_compiling()
    size = BLOCK if is_eager_cpu else len(logits_NV)
    return [slice(start, start + size) for start in range(0, len(logits_NV), size)]


def _softmax_(
    logits_NV: Tensor, targets_N: Tensor, wide: torch.dtype, dbias_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums of nats and hits of some rows, whose logits become the gradient of their cross-entropy.

    Rows that are not scored get one too, which is left out where it is used. `dbias_V` gets its
    share added.
    """
    scored_N = targets_N != IGNORE
    index_N1 = torch.where(scored_N, targets_N, 0)[:, None]
    wide_NV = logits_NV.to(wide)
    best_N1 = wide_NV.argmax(-1, keepdim=True)
    shares_NV = torch.softmax(wide_NV, -1)
    # the likeliest token has at least 1 / V: its logarithm is safe, and gives that of the sum
    log_sum_N1 = wide_NV.gather(1, best_N1) - shares_NV.gather(1, best_N1).log()
    nats_N = (log_sum_N1 - wide_NV.gather(1, index_N1))[:, 0]
    nats = torch.where(scored_N, nats_N, 0.0).sum()
    hits = (best_N1[:, 0] == targets_N).sum(dtype=torch.float32)
    shares_NV.scatter_add_(1, index_N1, -torch.ones_like(nats_N)[:, None])
    if dbias_V is not None:
        dbias_V += scored_N.to(wide) @ shares_NV
    logits_NV.copy_(shares_NV)
    return nats, hits


class _WeightGradient:
    """The sum over chunks of dlogits.T @ x, in fp32.

    In low precision the product is made as x.T @ dlogits, for which kernels need not turn the large
    matrix round; `sum_VC` is then a view of that.
    """

    def __init__(self, low: torch.dtype, wide: torch.dtype):
        self.is_low, self.wide = low != wide, wide
        self.sum_VC: Tensor | None = None

    def add(self, dlogits_NV: Tensor, x_NC: Tensor) -> None:
        if self.is_low:
            made_VC = (x_NC.T.contiguous() @ dlogits_NV).T.to(self.wide)
            self.sum_VC = made_VC if self.sum_VC is None else self.sum_VC.add_(made_VC)
        elif self.sum_VC is None:
            self.sum_VC = dlogits_NV.T @ x_NC
        else:
            self.sum_VC.addmm_(dlogits_NV.T, x_NC)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """A gradient times a number, which keeps its precision; its rows lie one behind the other."""
    if gradient.dtype != factor.dtype:
        return (gradient.to(factor.dtype) * factor).to(gradient.dtype)
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape))
