"""Whether a likelihood of a model's own is one: probabilities of all texts sum to at most 1."""

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmplay.model.abilities import draws_likelihood
from lmplay.model.objective import Objective
from lmplay.proofs.overfit import adam

if TYPE_CHECKING:
    from lmplay.proofs.specimen import Specimen

# N texts, T positions

STEPS = 60  # of Adam on drawn tokens, in which a leak would be learned
FEW = 4  # tokens, of which longer texts are made
LONG = 4  # tokens of such a text
DRAWS = 128  # of a bound, to average over
SHARPER = 8  # times its matrices, a model is as sure as after a long training
LARGEST = {True: 1.001, False: 1.05}  # a sum that is no mistake: exact, or of averages over draws
LEAST = 0.02  # nats per token below the entropy of drawn tokens, beyond the error, that are none


class Likelihood:
    """The sums of the probabilities of all texts of one length, or of a share of them.

    They are Kraft's sums: a loss that is no likelihood, or one whose target can be seen, gives
    more than 1, and no text can be coded in so few bits. A bound is averaged over draws, and taken
    where it is two standard errors higher. Texts of the full length are too many: there, tokens
    drawn by chance need as many nats as they have (Gibbs' inequality).
    """

    def __init__(self, specimen: "Specimen"):
        V, T = specimen.config.vocab_size, specimen.config.max_len
        few = list(range(min(FEW, V)))
        model = specimen.model()
        objective = Objective(model).train()
        optimizer = adam(model)
        for step in range(STEPS):
            length = min(T, (2, LONG, T)[step % 3])
            tokens_NT = torch.randint(len(few) if step % 3 else V, (256 // length, length + 1))
            optimizer.zero_grad()
            sums = objective(tokens_NT[:, :-1], tokens_NT[:, 1:])
            (sums.objective / tokens_NT[:, 1:].numel()).backward()
            optimizer.step()
        self._model = model.eval()
        self.is_exact = not draws_likelihood(model)
        self.is_exact &= not specimen.draws(model, torch.zeros(2, 2, dtype=torch.int64))
        self.sums = {"1 token": self._sum(specimen, itertools.product(range(V), repeat=1))}
        if T >= 2 and V <= 128:
            two = range(V) if self.is_exact else few
            self.sums["2 tokens"] = self._sum(specimen, itertools.product(two, repeat=2))
        if T >= LONG:
            self.sums[f"{LONG} tokens"] = self._sum(specimen, itertools.product(few, repeat=LONG))
        drawn_NT = torch.randint(len(few), (32, T + 1))
        more_N = self._nats(drawn_NT[:, :-1], drawn_NT[:, 1:], 0) / T - math.log(len(few))
        self.beyond = more_N.mean().item()  # the entropy of drawn tokens, nats per token
        self.least = -LEAST - 5 * more_N.std().item() / len(more_N) ** 0.5
        if self.is_exact:
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(SHARPER if weight.dim() > 1 else 1.0)
            one = itertools.product(range(V), repeat=1)
            self.sums["1 token, when sure"] = self._sum(specimen, one)

    @property
    def is_one(self) -> bool:
        return max(self.sums.values()) <= LARGEST[self.is_exact] and self.beyond >= self.least

    def _sum(self, specimen: "Specimen", texts) -> float:
        targets_NT = torch.tensor(list(texts))
        tokens_NT = torch.cat([torch.zeros_like(targets_NT[:, :1]), targets_NT[:, :-1]], dim=1)
        drawn = [self._nats(tokens_NT, targets_NT, seed) for seed in range(2)]
        if torch.equal(*drawn):
            nats_N = drawn[0]
        else:
            drawn += [self._nats(tokens_NT, targets_NT, seed) for seed in range(2, DRAWS)]
            nats_DN = torch.stack(drawn)
            nats_N = nats_DN.mean(0) + 2 * nats_DN.std(0) / DRAWS**0.5
        return (-nats_N).exp().sum().item()

    @torch.no_grad()
    def _nats(self, tokens_NT: Tensor, targets_NT: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        if draws_likelihood(self._model):  # which is what is reported
            return self._model.likelihood_draws(tokens_NT, targets_NT).double().mean(0).sum(1)
        return self._model.log_likelihood(tokens_NT, targets_NT).double().sum(1)
