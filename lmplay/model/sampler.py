"""The choice of a token: temperature, top-k, top-p, and the penalty of what was said before."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lmplay.errors import UserError

# B rows, T positions, K candidates, N parts of a vocabulary, P places in one, R rest, V vocabulary

_FEW = 1024  # tokens, which mostly hold a top-p; sorting all of a large vocabulary is slow


class Sampler:
    """Draws tokens: temperature, then top-k, then top-p.

    Row r of seed s has a generator of its own, so its draws do not depend on the rows beside it.
    Batches of another size may round the logits differently, so a near tie may still fall the
    other way.

    Args:
        seed: with the row's number, fixes every draw.
        temperature: divides the logits; 0 (or below 1e-6) takes the likeliest token.
        top_k: draw from this many likeliest tokens; 0 for all.
        top_p: draw from the smallest set of likeliest tokens that holds this share of the
            probability (of what top-k left); 1 for all.
    Raises:
        UserError: a value is out of range.
    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1 (top-p); Fan et al. 2018,
        arXiv:1805.04833, section 5.4 (top-k).
    """

    def __init__(self, seed: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
        if not 0 <= temperature < float("inf"):
            hint = "0 is greedy, 1 is the model's own spread"
            raise UserError(f"temperature {temperature} is not a number from 0 up", hint=hint)
        if top_k < 0:
            raise UserError(f"top-k {top_k} is below 0", hint="0 draws from all tokens")
        if not 0 < top_p <= 1:
            raise UserError(f"top-p {top_p} is not in (0, 1]", hint="1 draws from all tokens")
        self.seed = seed
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """One token id for each row, shape (B,), int64.

        Args:
            logits_BV: left unchanged. Dimensions between the first and the last are allowed (B, T,
                V for instance) and stay.
            rows: the number of each row, which names its generator.
        """
        if self.temperature < 1e-6:
            return _likeliest(logits_BV)
        scores_BV = logits_BV.float()
        scores_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)) / self.temperature
        weights_BK, ids_BK = self._candidates(scores_BV)
        mass_BK = weights_BK.cumsum(-1)
        last_B1 = torch.full_like(mass_BK[..., :1], mass_BK.shape[-1] - 1, dtype=torch.int64)
        if self.top_p < 1:
            limit_B1 = torch.full_like(mass_BK[..., :1], self.top_p)
            last_B1 = torch.searchsorted(mass_BK, limit_B1).minimum(last_B1)
        aim_B1 = self._noise(logits_BV, rows) * mass_BK.gather(-1, last_B1)
        index_B1 = torch.searchsorted(mass_BK, aim_B1, right=True).minimum(last_B1)
        tokens_B1 = index_B1 if ids_BK is None else ids_BK.gather(-1, index_B1)
        return tokens_B1.squeeze(-1)

    def _candidates(self, scores_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights of the tokens that may be drawn, and their ids; None where these are all."""
        V = scores_BV.shape[-1]
        if self.top_k:
            scores_BK, ids_BK = scores_BV.topk(min(self.top_k, V))
            return scores_BK.softmax(-1), ids_BK
        if self.top_p == 1:
            return scores_BV.softmax(-1), None
        all_B1 = scores_BV.logsumexp(-1, keepdim=True)
        scores_BK, ids_BK = scores_BV.topk(min(_FEW, V))
        weights_BK = (scores_BK - all_B1).exp()
        if (weights_BK.sum(-1) < self.top_p).any():
            scores_BK, ids_BK = scores_BV.sort(descending=True)
            weights_BK = (scores_BK - all_B1).exp()
        return weights_BK, ids_BK

    def _noise(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        assert len(rows) == len(logits_BV), "a row without a generator"
        shape = (*logits_BV.shape[1:-1], 1)
        noise = [torch.rand(shape, generator=self._generator(row)) for row in rows]
        return torch.stack(noise).to(logits_BV.device)

    def _generator(self, row: int) -> torch.Generator:
        if row not in self._generators:
            digest = hashlib.sha256(f"{self.seed} {row}".encode()).digest()
            seed = int.from_bytes(digest[:4], "little")  # torch's CPU generator uses 32 bits
            self._generators[row] = torch.Generator().manual_seed(seed)
        return self._generators[row]


GREEDY = Sampler(seed=0, temperature=0)


def _likeliest(logits_BV: Tensor) -> Tensor:
    """argmax, the first of equals; on a CPU by maxima of parts, which takes a fifth of the time."""
    if logits_BV.device.type != "cpu":
        return logits_BV.argmax(-1)
    V = logits_BV.shape[-1]
    size = math.isqrt(V)
    best_BN = logits_BV.unfold(-1, size, size).amax(-1)
    rest_BR = logits_BV[..., V // size * size :]
    if rest_BR.shape[-1]:
        best_BN = torch.cat([best_BN, rest_BR.amax(-1, keepdim=True)], dim=-1)
    start_B1 = best_BN.argmax(-1, keepdim=True) * size
    places_BP = (start_B1 + torch.arange(size, device=start_B1.device)).clamp(max=V - 1)
    return start_B1.squeeze(-1) + logits_BV.gather(-1, places_BP).argmax(-1)


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits with the tokens of the text so far made less likely, or more where penalty < 1.

    Args:
        seen_BV: bool, the tokens to penalise.
        penalty: above 0; a positive logit is divided by it, a negative one multiplied.
    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; multiplying the negative ones is how
        it is done since, or they would become likelier.
    """
    scaled_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, scaled_BV, logits_BV)
