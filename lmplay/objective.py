"""The one forward: tokens and targets to sums of loss and hits, the source of every curve."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# B rows, T positions, N = B T positions in a line, C model width, V vocabulary

IGNORE = -100  # a target that is not scored
CHUNK = 1024  # rows of logits that are alive at a time


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
        if self.training and hasattr(self.model, "training_loss"):
            return Sums(self._sum_of(self.model.training_loss, tokens_BT, targets_BT), None, None)
        if hasattr(self.model, "log_likelihood"):
            nats = self._sum_of(self.model.log_likelihood, tokens_BT, targets_BT)
            return Sums(nats, nats.detach(), None)
        if not hasattr(self.model, "hidden"):
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
    nats = F.cross_entropy(logits_NV.to(wide), targets_N, ignore_index=IGNORE, reduction="sum")
    hits = (logits_NV.detach().argmax(-1) == targets_N).sum(dtype=torch.float32)
    return nats, hits


def _ruler_of_head(head: nn.Module, x_NC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    return _ruler(head(x_NC), targets_N)


def _scored(nats: Tensor, hits: Tensor) -> Sums:
    return Sums(nats, nats.detach(), hits.detach())


class _LinearCrossEntropy(torch.autograd.Function):
    """Linear layer and cross-entropy in one: the gradients are made while a chunk's logits exist.

    The sum's gradient is known but for a factor, so the backward pass only multiplies. Logits are
    made in autocast's precision, the softmax and the weight's gradient are kept in fp32.
    """

    @staticmethod
    def forward(ctx, x_NC, weight_VC, bias_V, targets_N):
        device = x_NC.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NC.dtype
        wide = torch.promote_types(low, torch.float32)  # fp32, but fp64 where a test asks for it
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        nats = torch.zeros((), dtype=wide, device=x_NC.device)
        hits = torch.zeros((), dtype=torch.float32, device=x_NC.device)
        dx_NC = torch.empty_like(x_NC) if needs_x else None
        dweight_VC = torch.zeros_like(weight_VC, dtype=wide) if needs_weight else None
        dbias_V = torch.zeros_like(bias_V, dtype=wide) if needs_bias else None
        weight_CV, x_all = weight_VC.to(low).T, x_NC.to(low)
        bias = None if bias_V is None else bias_V.to(low)
        num_rows, V = min(CHUNK, len(x_NC)), len(weight_VC)
        # made once, filled by every chunk: on a CPU, fresh pages cost as much as the arithmetic
        low_buffer = x_all.new_empty(num_rows, V)
        wide_buffer, logp_buffer = (x_all.new_empty(num_rows, V, dtype=wide) for _ in range(2))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(x_NC), CHUNK):
                rows = slice(start, start + CHUNK)
                x, targets = x_all[rows], targets_N[rows]
                scored = targets != IGNORE
                index = torch.where(scored, targets, 0)[:, None]
                buffers = low_buffer, wide_buffer, logp_buffer
                logits, wide_logits, logp = (buffer[: len(x)] for buffer in buffers)
                if bias is None:
                    torch.mm(x, weight_CV, out=logits)
                else:
                    torch.addmm(bias, x, weight_CV, out=logits)
                hits += (logits.argmax(-1) == targets).sum()
                torch.log_softmax(wide_logits.copy_(logits), -1, out=logp)
                nats -= torch.where(scored, logp.gather(1, index)[:, 0], 0.0).sum()
                if not (needs_x or needs_weight or needs_bias):
                    continue
                dlogits = logp.exp_().scatter_add_(1, index, -torch.ones_like(logp[:, :1]))
                dlogits *= scored[:, None]
                if needs_bias:
                    dbias_V += dlogits.sum(0)
                dlogits = logits.copy_(dlogits)
                if needs_x:
                    dx_NC[rows] = dlogits @ weight_CV.T
                if needs_weight:
                    dweight_VC += dlogits.T @ x
        ctx.save_for_backward(dx_NC, dweight_VC, dbias_V)
        ctx.mark_non_differentiable(hits)
        return nats, hits

    @staticmethod
    def backward(ctx, factor, _):
        dx_NC, dweight_VC, dbias_V = ctx.saved_tensors
        grads = (
            None if g is None else g * factor.to(g.dtype) for g in (dx_NC, dweight_VC, dbias_V)
        )
        return *grads, None
