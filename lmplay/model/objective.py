"""The one forward: tokens and targets to sums of loss and hits, the source of every curve."""

import torch
from torch import Tensor, nn

from lmplay.errors import UserError, nearest
from lmplay.model.abilities import (
    draws_likelihood,
    has_hidden,
    has_terms,
    scores_itself,
    trains_by_itself,
)
from lmplay.model.chunked_cross_entropy import IGNORE, Sums, drawn, score, score_logits

# B rows, T positions, C model width, V vocabulary, K targets of a position

_SCORED = ("x", "head", "targets", "shares", "weight", "z_weight")
_FORMED = ("penalty", "weight")
_RULE = (
    "a term has x, head and targets, and may have shares, weight and z_weight; "
    "or it has penalty, and may have weight"
)


class Objective(nn.Module):
    """A model together with its loss: the one module that accelerate, autocast and compile see.

    A method called around it would run without precision, compilation and gradient averaging.

    Args:
        model: a `Model` of an experiment file; design section 3 says which methods are used.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor, draws_BT: Tensor | None = None
    ) -> Sums:
        """Sums over the targets that are not IGNORE.

        While training, an experiment's own `training_loss` is the objective, and then loss and
        hits are not computed; or the weighted sum of its `loss_terms` is, of which the first gives
        loss and hits. Else, and always in eval mode, all three are the ruler's.

        Args:
            draws_BT: numbers in [0, 1), for the ruler's sums over tokens that the model itself
                draws by them in place of the targets.
        Raises:
            UserError: a term breaks the contract, or a model that has no logits was to draw.
        """
        if draws_BT is not None:
            return self._sum_of_drawn(tokens_BT, targets_BT, draws_BT)
        if self.training and trains_by_itself(self.model):
            return Sums(self._sum_of(self.model.training_loss, tokens_BT, targets_BT), None, None)
        if self.training and has_terms(self.model):
            return self._sum_of_terms(tokens_BT, targets_BT)
        if draws_likelihood(self.model):
            return self._mean_of_draws(tokens_BT, targets_BT)
        if scores_itself(self.model):
            nats = self._sum_of(self.model.log_likelihood, tokens_BT, targets_BT)
            return Sums(nats, nats.detach(), None)
        if not has_hidden(self.model):
            logits_BTV = self.model(tokens_BT)
            return score_logits(logits_BTV.flatten(0, 1), targets_BT.flatten())
        x_BTC = self.model.hidden(tokens_BT)
        return score(x_BTC.flatten(0, 1), self.model.head, targets_BT.flatten())

    def _mean_of_draws(self, tokens_BT: Tensor, targets_BT: Tensor) -> Sums:
        """The variance is that of draws which have nothing to do with one another: an upper bound
        where they are spread evenly."""
        nats_SBT = self.model.likelihood_draws(tokens_BT, targets_BT)
        nats_SB = torch.where(targets_BT != IGNORE, nats_SBT.float(), 0.0).sum(-1)
        nats = nats_SB.mean(0).sum()
        return Sums(nats, nats.detach(), None, nats_SB.detach().var(0).sum() / len(nats_SB))

    def _sum_of_drawn(self, tokens_BT: Tensor, targets_BT: Tensor, draws_BT: Tensor) -> Sums:
        if scores_itself(self.model) or trains_by_itself(self.model):
            raise UserError(
                "the model draws no next token, which Sophia's estimate of curvature needs",
                hint="train it with another optimizer",
            )
        given = targets_BT.flatten(), draws_BT.flatten()
        if not has_hidden(self.model):
            logits_NV = self.model(tokens_BT).flatten(0, 1)
            return score_logits(logits_NV, drawn(logits_NV, nn.Identity(), *given))
        x_NC = self.model.hidden(tokens_BT).flatten(0, 1)
        return score(x_NC, self.model.head, drawn(x_NC, self.model.head, *given))

    def _sum_of(self, method, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return _sum_of_scored(method(tokens_BT, targets_BT), targets_BT)

    def _sum_of_terms(self, tokens_BT: Tensor, targets_BT: Tensor) -> Sums:
        terms = self.model.loss_terms(tokens_BT, targets_BT)
        first = terms[0] if terms else {}
        has_own = first.get("head") is self.model.head and first.get("targets") is targets_BT
        if not has_own or first.get("shares") is not None:
            raise UserError(
                "loss_terms: the first term is not the next token's cross-entropy",
                hint='it begins {"x": self.hidden(tokens_BT), "head": self.head, '
                '"targets": targets_BT}, so that train.csv keeps its loss and accuracy',
            )
        scored = [_scored_term(term, targets_BT) for term in terms]
        objective = sum(
            term.get("weight", 1.0) * sums.objective
            for term, sums in zip(terms, scored, strict=True)
        )
        return Sums(objective, scored[0].loss, scored[0].hits)


def _scored_term(term: dict, targets_BT: Tensor) -> Sums:
    """The sums of one term, its weight left out.

    Raises:
        UserError: it has unknown keys or lacks some, or a shape does not fit.
    """
    known, needed = (_FORMED, _FORMED[:1]) if "penalty" in term else (_SCORED, _SCORED[:3])
    for key in term:
        if key not in known:
            raise UserError(f"loss_terms: a term has no key {key!r}", nearest(key, known) + _RULE)
    for key in needed:
        if key not in term:
            raise UserError(f"loss_terms: a term lacks {key!r}", hint=_RULE)
    shape_BT = targets_BT.shape
    if "penalty" in term:
        _check_shape(term["penalty"], "penalty", "(B, T)", term["penalty"].shape == shape_BT)
        return Sums(_sum_of_scored(term["penalty"], targets_BT), None, None)
    x_BTC, targets, shares = term["x"], term["targets"], term.get("shares")
    is_row = x_BTC.dim() == 3 and x_BTC.shape[:2] == shape_BT
    _check_shape(x_BTC, "x", "(B, T, C)", is_row)
    if shares is None:
        _check_shape(targets, "targets", "(B, T) without shares", targets.shape == shape_BT)
    else:
        is_row = targets.dim() == 3 and targets.shape[:2] == shape_BT
        _check_shape(targets, "targets", "(B, T, K) where there are shares", is_row)
        _check_shape(shares, "shares", "(B, T, K), as targets", shares.shape == targets.shape)
        if shares.requires_grad:
            raise UserError("loss_terms: shares are constants", hint="give shares.detach()")
        shares = shares.flatten(0, 1)
    z_weight = term.get("z_weight", 0.0)
    return score(x_BTC.flatten(0, 1), term["head"], targets.flatten(0, 1), shares, z_weight)


def _check_shape(given: Tensor, name: str, shape: str, fits: bool) -> None:
    if not fits:
        raise UserError(f"loss_terms: {name} has shape {tuple(given.shape)}, not {shape}", _RULE)


def _sum_of_scored(nats_BT: Tensor, targets_BT: Tensor) -> Tensor:
    wide_BT = nats_BT.to(torch.promote_types(nats_BT.dtype, torch.float32))
    return torch.where(targets_BT != IGNORE, wide_BT, 0.0).sum()
