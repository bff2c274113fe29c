"""What is proved on: an experiment at one size, its models and tokens."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lmplay.errors import UserError
from lmplay.model.abilities import follows_progress, scores_itself
from lmplay.model.experiment import Experiment
from lmplay.proofs.overfit import Overfit
from lmplay.proofs.proof import CLOSE, Refuted, how_far

# B rows, T positions

PROGRESS = (0.0, 0.5, 1.0)  # of a run, at which a model that changes is proved


class Specimen:
    """An experiment at one size: models and tokens for the proofs.

    Args:
        config: without it, TINY; a field `end` gets the last id as the end marker.
        progress: of a run, of which a model with `at` is told.

    Raises:
        UserError: the file has no TINY, or its Config refuses it.
    """

    def __init__(self, experiment: Experiment, config=None, progress: float = 0.0):
        if config is None and not experiment.tiny:
            raise UserError(
                f"{experiment.entry.path} has no TINY",
                hint="copy gpt2ish's: Config values at which a check takes seconds",
            )
        self.experiment = experiment
        self.given = config or experiment.config(**experiment.tiny)
        self.progress = progress
        self.config = self.config_with_dropout(0.0)
        self.scores_itself = scores_itself(experiment.module.Model)
        self.follows_progress = follows_progress(experiment.module.Model)

    def config_with_dropout(self, share: float):
        dropouts = {
            key: share
            for key, value in dataclasses.asdict(self.given).items()
            if "dropout" in key and isinstance(value, int | float)
        }
        return dataclasses.replace(self.given, **dropouts)

    def model(self, seed: int = 0, dropout: float = 0.0) -> nn.Module:
        model = self.experiment.model(self.config_with_dropout(dropout), seed=seed)
        torch.manual_seed(seed)  # so that noise drawn for it is the same each time too
        if self.follows_progress:
            model.at(self.progress)
        return model

    def randomised(self, sign: int = 1, strength: float = 1.0) -> nn.Module:
        """A model in eval mode in which no weight is at, or near, zero, and no two are alike.

        Zero-initialised weights would hide whatever lies behind them, and a norm whose scales are
        all 1 the means that it takes away. Matrices whose spread is small for their fan-in get
        noise of its usual spread; such vectors and scalars (gates, scales, biases) get 0.1 to
        0.5, times `sign` where they are all zero; all of it times `strength`.
        """
        model = self.model()
        with torch.no_grad():
            for weight in model.parameters():
                spread = (weight - weight.mean()).square().mean().sqrt()
                usual = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.3
                if spread >= 0.3 * usual:
                    continue
                if weight.dim() > 1:
                    weight += torch.randn_like(weight) * usual * strength
                else:
                    noise = 0.1 + 0.4 * torch.rand_like(weight)
                    weight += noise * (1 if weight.any() else sign) * strength
        return model.eval()

    def randomised_models(self) -> Iterator[tuple[str, nn.Module]]:
        """Two draws of the weights, each in eval and in training mode.

        They are randomised as strongly as leaves them ears: where multipliers multiply multipliers
        and no norm holds the stream, it can run so far off that no token matters any more.
        """
        tokens_BT = self.tokens(B=3)
        others_BT = torch.cat([tokens_BT[:, :-1], self.others(tokens_BT[:, -1:])], dim=1)
        for sign in (1, -1):
            for strength in (1.0, 0.5, 0.25, 0.1):
                model = self.randomised(sign, strength)
                last, other = (self.outputs(model, t)[:, -1] for t in (tokens_BT, others_BT))
                if min(map(how_far, other, last)) > 100 * CLOSE:
                    break
            yield "eval", model
            yield "training", copy.deepcopy(model).train()

    def tokens(self, B: int, T: int | None = None) -> Tensor:
        """Drawn ones; where a model knows the end marker, one in eight is that."""
        tokens_BT = torch.randint(self.config.vocab_size, (B, T or self.config.max_len))
        if (end := getattr(self.config, "end", None)) is not None:
            tokens_BT[torch.rand(tokens_BT.shape) < 1 / 8] = end
        return tokens_BT

    def others(self, tokens_BT: Tensor) -> Tensor:
        """Another token everywhere."""
        V = self.config.vocab_size
        return (tokens_BT + torch.randint(1, V, tokens_BT.shape)) % V

    def outputs(self, model: nn.Module, tokens_BT: Tensor) -> Tensor:
        """What a curve is made from: logits, or for a model with its own likelihood, nats."""
        torch.manual_seed(1)  # a model that draws numbers draws the same ones each time
        with torch.set_grad_enabled(model.training):  # as training and validation do
            if self.scores_itself:
                return model.log_likelihood(tokens_BT, tokens_BT.roll(-1, 1))[..., None].detach()
            return model(tokens_BT).detach()

    def lengths(self) -> list[int]:
        """Positions to cut at: all of the first 32, then those around powers of two."""
        T = self.config.max_len
        near = {2**k + step for k in range(5, T.bit_length()) for step in (-1, 0, 1)}
        return [t for t in range(1, T + 1) if t <= 32 or t in near or t >= T - 1]

    @functools.cached_property
    def overfit(self) -> "Overfit":
        return Overfit(self)


def throughout(claim: Callable[[Specimen], str]) -> Callable[[Specimen], str]:
    """The claim at the start, in the middle and at the end of a run, where a model changes."""

    def claim_throughout(specimen: Specimen) -> str:
        if not specimen.follows_progress:
            return claim(specimen)
        for progress in PROGRESS:
            try:
                found = claim(Specimen(specimen.experiment, specimen.given, progress))
            except Refuted as why:
                raise Refuted(f"at progress {progress:g}: {why}") from None
        return f"at progress {', '.join(f'{p:g}' for p in PROGRESS)}: {found}"

    return claim_throughout
