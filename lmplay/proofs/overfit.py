"""One batch that is learned by heart, for what can be told from that."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmplay.model.abilities import has_after_step
from lmplay.model.objective import Objective
from lmplay.proofs.proof import nan_first

if TYPE_CHECKING:
    from lmplay.proofs.specimen import Specimen

# B rows, T positions

MOST_STEPS = 200  # of Adam, to learn one batch
GRADIENT_STEPS = 4  # until each gradient was non-zero: zero-initialised layers open one by one
MOST_SEEDS = 16  # of other starts, where some were not


def adam(model: nn.Module) -> torch.optim.Adam:
    """What learns in seconds; in one kernel, where all numbers are real."""
    is_real = all(weight.is_floating_point() for weight in model.parameters())
    return torch.optim.Adam(model.parameters(), lr=0.01, fused=is_real)


class Overfit:
    """One batch, learned until its next tokens are known; what three of the proofs look at.

    The rows run through one cycle of different tokens, so that a token tells the next one.
    """

    def __init__(self, specimen: "Specimen"):
        config = specimen.config
        # a bound counts what nothing tells too: which row it is, before a token is seen
        self.share = 0.6 if specimen.scores_itself else 0.2
        self.most = math.log(config.vocab_size)  # nats of one who knows nothing
        num_tokens = min(config.vocab_size, 16)
        cycle = torch.randperm(config.vocab_size)[:num_tokens]
        places_BT = torch.arange(config.max_len) + 3 * torch.arange(4)[:, None]
        tokens_BT, targets_BT, after_BT = (cycle[(places_BT + k) % num_tokens] for k in range(3))
        model = specimen.model()
        self.parameters = dict(model.named_parameters())
        self.largest_size: dict[str, float] = {}  # of the gradients that were there
        objective = Objective(model)
        optimizer = adam(model)
        self.start = self.end = self.evaluate(objective, tokens_BT, targets_BT)
        self.num_steps = 0
        while self.num_steps < MOST_STEPS and not self.learned:
            objective.train()
            if specimen.follows_progress:  # in each part of a run, then as it ends
                model.at((self.num_steps % 3) / 2 if self.num_steps < GRADIENT_STEPS else 1.0)
            optimizer.zero_grad()
            (objective(tokens_BT, targets_BT).objective / targets_BT.numel()).backward()
            if self.num_steps < GRADIENT_STEPS:
                self.note_gradients(model)
            optimizer.step()
            if has_after_step(model):
                model.after_step()
            self.num_steps += 1
            if self.num_steps >= GRADIENT_STEPS and self.num_steps % 4 == 0:
                self.end = self.evaluate(objective, tokens_BT, targets_BT)
        self.look_at_other_seeds(specimen)
        self.said: dict[str, float] = {}
        if not specimen.scores_itself:
            with torch.no_grad():
                guess_BT = model.eval()(tokens_BT).argmax(-1)
            asked = {"t": tokens_BT, "t+1": targets_BT, "t+2": after_BT}
            self.said = {k: (guess_BT == v).double().mean().item() for k, v in asked.items()}

    @property
    def learned(self) -> bool:
        return self.end <= self.share * min(self.start, self.most)

    @staticmethod
    @torch.no_grad()
    def evaluate(objective: Objective, tokens_BT: Tensor, targets_BT: Tensor) -> float:
        """Nats per target, by the ruler."""
        with torch.random.fork_rng(devices=[]):  # else training draws the same numbers again
            torch.manual_seed(1)
            sums = objective.eval()(tokens_BT, targets_BT)
        return sums.loss.item() / targets_BT.numel()

    def look_at_other_seeds(self, specimen: "Specimen") -> None:
        """Note gradients of other starts where some were zero: of experts that no token reached."""
        for seed in range(1, MOST_SEEDS):
            if 0 not in self.largest_size.values():
                return
            model = specimen.model(seed=seed)
            objective = Objective(model).train()
            optimizer = adam(model)
            for _ in range(GRADIENT_STEPS):
                tokens_BT = specimen.tokens(B=16)
                optimizer.zero_grad()
                sums = objective(tokens_BT, tokens_BT.roll(-1, 1))
                (sums.objective / tokens_BT.numel()).backward()
                self.note_gradients(model)
                optimizer.step()

    def note_gradients(self, model: nn.Module) -> None:
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                size = weight.grad.float().square().mean().sqrt().item()
                self.largest_size[name] = max(size, self.largest_size.get(name, 0.0), key=nan_first)
