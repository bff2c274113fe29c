"""Cross-entropy of a head's logits, some rows at a time: no B x T x V tensor is ever alive."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# N positions in a line, C model width, V vocabulary, K targets of a position

IGNORE = -100  # a target that is not scored
CHUNK = 2048  # rows of logits that are alive at a time
BLOCK = 32  # of these, rows of which a CPU makes the softmax at a time


class Sums(NamedTuple):
    """Sums over the scored targets of some rows, each a scalar of fp32 on the model's device."""

    objective: Tensor  # what training minimises; the only one that carries a gradient
    loss: Tensor | None  # cross-entropy in nats; None where training did not compute it
    hits: Tensor | None  # targets that were the likeliest token
    variance: Tensor | None = None  # of the loss, where it is a mean over draws


class Kind(NamedTuple):
    """What is scored: the next token of each position, unless a term says otherwise."""

    z_weight: float = 0.0  # times the squared log-partition of each scored position
    is_soft: bool = False  # several targets for each position, with a share each

    @property
    def is_plain(self) -> bool:
        """One target for each position and nothing else."""
        return not (self.is_soft or self.z_weight)


def score(
    x_NC: Tensor,
    head: nn.Module,
    targets: Tensor,
    shares_NK: Tensor | None = None,
    z_weight: float = 0.0,
) -> Sums:
    """Score positions before the head, CHUNK rows of logits at a time.

    Args:
        x_NC: positions in a line.
        head: maps each position alone. A plain `nn.Linear` is fused with the cross-entropy;
            anything else is run again in the backward pass, chunk by chunk.
        targets: token ids or IGNORE, (N,) or (N, K) with `shares_NK`.
        shares_NK: how much each target counts, constants; that of an ignored one counts nothing.
        z_weight: of the squared log-partition of each position that has a target.
    Returns:
        `objective` with the log-partition's part, `loss` without.
    """
    kind = Kind(z_weight, shares_NK is not None)
    if type(head) is nn.Linear:
        return _sums(
            *_LinearCrossEntropy.apply(x_NC, head.weight, head.bias, targets, shares_NK, kind)
        )
    parts = []
    for start in range(0, len(x_NC), CHUNK):
        rows = slice(start, start + CHUNK)
        shares = None if shares_NK is None else shares_NK[rows]
        given = head, x_NC[rows], targets[rows], shares, kind
        if torch.is_grad_enabled():
            parts.append(checkpoint(_sums_of_head, *given, use_reentrant=False))
        else:
            parts.append(_sums_of_head(*given))
    return _sums(*(torch.stack(sums).sum() for sums in zip(*parts, strict=True)))


def score_logits(logits_NV: Tensor, targets_N: Tensor) -> Sums:
    """Score positions whose logits are there: the ruler, by an fp32 log-softmax."""
    return _sums(*_sums_of_logits(logits_NV, targets_N, None, Kind()))


@torch.no_grad()
def drawn(x_NC: Tensor, head: nn.Module, targets_N: Tensor, draws_N: Tensor) -> Tensor:
    """Tokens that a model draws by its own probabilities, where there are targets; else IGNORE.

    Args:
        draws_N: numbers in [0, 1); a token is the first at which the sum of all probabilities up
            to it is above its number.
    """
    parts = []
    for start in range(0, len(x_NC), CHUNK):
        rows = slice(start, start + CHUNK)
        logits_NV = head(x_NC[rows])
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        below_NV = torch.softmax(logits_NV.to(wide), -1).cumsum(-1) <= draws_N[rows, None]
        parts.append(below_NV.sum(-1).clamp_(max=logits_NV.shape[-1] - 1))
    return torch.where(targets_N == IGNORE, IGNORE, torch.cat(parts))


def _sums(objective: Tensor, nats: Tensor, hits: Tensor) -> Sums:
    return Sums(objective, nats.detach(), hits.detach())


def _sums_of_head(
    head: nn.Module, x_NC: Tensor, targets: Tensor, shares_NK: Tensor | None, kind: Kind
) -> tuple[Tensor, Tensor, Tensor]:
    return _sums_of_logits(head(x_NC), targets, shares_NK, kind)


def _sums_of_logits(
    logits_NV: Tensor, targets: Tensor, shares_NK: Tensor | None, kind: Kind
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the objective, of nats and of hits, written out."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    logits_NV = logits_NV.to(wide)  # argmax is several times as fast in fp32 as in bf16
    targets_NK = targets if kind.is_soft else targets[:, None]
    hits = (logits_NV.detach().argmax(-1, keepdim=True) == targets_NK).sum(dtype=torch.float32)
    if kind.is_plain:
        nats = F.cross_entropy(logits_NV, targets, ignore_index=IGNORE, reduction="sum")
        return nats, nats, hits
    scored_NK = targets_NK != IGNORE
    log_sum_N1 = logits_NV.logsumexp(-1, keepdim=True)
    nats_NK = log_sum_N1 - logits_NV.gather(1, torch.where(scored_NK, targets_NK, 0))
    if kind.is_soft:
        nats_NK = shares_NK.to(wide) * nats_NK
    nats = torch.where(scored_NK, nats_NK, 0.0).sum()
    squared_N1 = torch.where(scored_NK.any(-1, keepdim=True), log_sum_N1, 0.0).square()
    return nats + kind.z_weight * squared_N1.sum(), nats, hits


class _LinearCrossEntropy(torch.autograd.Function):
    """Linear layer and cross-entropy in one: the gradients are made while a chunk's logits exist.

    The sum's gradient is known but for a factor, so the backward pass only multiplies. Logits are
    made in autocast's precision, the softmax and the sum of the weight's gradient are kept in fp32.
    """

    @staticmethod
    def forward(ctx, x_NC, weight_VC, bias_V, targets, shares_NK, kind):
        device = x_NC.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NC.dtype
        wide = torch.promote_types(low, torch.float32)  # fp32, but fp64 where a test asks for it
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx_NC = torch.empty_like(x_NC) if needs_x else None
        dbias_V = torch.zeros_like(bias_V, dtype=wide) if needs_bias else None
        weight_CV, x_all = weight_VC.to(low).T, x_NC.to(low)
        bias = None if bias_V is None else bias_V.to(low)
        has_buffer = device != "mps" and not torch.compiler.is_compiling()
        buffer = _logits_buffer(x_all, len(weight_VC)) if has_buffer else None
        gradient = _WeightGradient(low, wide)
        targets_NK = targets if kind.is_soft else targets[:, None]
        sums = []
        with torch.autocast(device, enabled=False):
            for start in range(0, len(x_NC), CHUNK):
                rows = slice(start, start + CHUNK)
                x, targets = x_all[rows], targets_NK[rows]
                shares = shares_NK[rows] if kind.is_soft else None
                logits = _linear(x, weight_CV, bias, None if buffer is None else buffer[: len(x)])
                for block in _blocks(logits):
                    share = shares[block] if kind.is_soft else None
                    sums.append(
                        _softmax_(logits[block], targets[block], share, kind, wide, dbias_V)
                    )
                scored = (targets != IGNORE).any(-1, keepdim=True)
                if needs_x:
                    dx_NC[rows] = (logits @ weight_CV.T) * scored
                if needs_weight:
                    gradient.add(logits, x * scored)
        ctx.save_for_backward(dx_NC, gradient.sum_VC, dbias_V)
        objective, nats, hits = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
        ctx.mark_non_differentiable(nats, hits)
        return objective, nats, hits

    @staticmethod
    def backward(ctx, factor, *_):
        made = (None if g is None else _scaled(g, factor) for g in ctx.saved_tensors)
        return *made, None, None, None


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
    logits_NV: Tensor,
    targets_NK: Tensor,
    shares_NK: Tensor | None,
    kind: Kind,
    wide: torch.dtype,
    dbias_V: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the objective, of nats and of hits of some rows; logits become its gradient.

    Rows that are not scored get one too, which is left out where it is used. `dbias_V` gets its
    share added.
    """
    scored_NK = targets_NK != IGNORE
    index_NK = torch.where(scored_NK, targets_NK, 0)
    wide_NV = logits_NV.to(wide)
    best_N1 = wide_NV.argmax(-1, keepdim=True)
    shares_NV = torch.softmax(wide_NV, -1)
    # the likeliest token has at least 1 / V: its logarithm is safe, and gives that of the sum
    log_sum_N1 = wide_NV.gather(1, best_N1) - shares_NV.gather(1, best_N1).log()
    nats_NK = log_sum_N1 - wide_NV.gather(1, index_NK)
    given_NK = scored_NK.to(wide)
    if kind.is_soft:
        given_NK = torch.where(scored_NK, shares_NK.to(wide), 0.0)
        nats_NK = given_NK * nats_NK
    objective = nats = torch.where(scored_NK, nats_NK, 0.0).sum()
    hits = (best_N1 == targets_NK).sum(dtype=torch.float32)
    scored_N1 = scored_NK.any(-1, keepdim=True)
    if not kind.is_plain:
        squared_N1 = torch.where(scored_N1, log_sum_N1, 0.0).square()
        objective = nats + kind.z_weight * squared_N1.sum()
        shares_NV *= given_NK.sum(-1, keepdim=True) + 2 * kind.z_weight * log_sum_N1
    shares_NV.scatter_add_(1, index_NK, -given_NK)
    if dbias_V is not None:
        dbias_V += scored_N1[:, 0].to(wide) @ shares_NV
    logits_NV.copy_(shares_NV)
    return objective, nats, hits


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
