"""What is proved on: an experiment at one size, its models and tokens."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn

from lmplay.errors import UserError
from lmplay.model.abilities import follows_progress, reader, scores_itself, takes_cache
from lmplay.model.cache import Cache
from lmplay.model.experiment import Experiment
from lmplay.model.objective import IGNORE, Objective
from lmplay.proofs.likelihood import Likelihood
from lmplay.proofs.overfit import Overfit
from lmplay.proofs.proof import CLOSE, Refuted, how_far

# B rows, T positions

# of gates, between two numbers; and what counters have counted: each opens others
OPENINGS = ((0.1, 1.0, 1e2), (-10.0, -0.1, 1e4), (6.0, 10.0, 1e6))
PROGRESS = (0.0, 0.5, 1.0)  # of a run, at which a model that changes is proved
BETWEEN = tuple(k / 20 for k in range(1, 20) if k != 10)  # at which it is looked at too


class Specimen:
    """An experiment at one size: models and tokens for the proofs.

    Args:
        config: at which size.
        progress: of a run, of which a model with `at` is told.
        dropouts: fields of Config that leave something out at random, besides those named so.
    """

    def __init__(
        self, experiment: Experiment, config, progress: float = 0.0, dropouts: Sequence[str] = ()
    ):
        self.experiment = experiment
        self.given = config
        self.progress = progress
        self.scores_itself = scores_itself(experiment.module.Model)
        self.follows_progress = follows_progress(experiment.module.Model)
        named = [key for key in self._shares() if "drop" in key]
        self.dropouts = list(dict.fromkeys([*named, *dropouts]))
        self.config = self.config_with_dropout(0.0)

    @classmethod
    def tiny(cls, experiment: Experiment, **values: object) -> "Specimen":
        """One at the size of TINY.

        Args:
            values: of Config, over TINY's.
        Raises:
            UserError: the file has no TINY, or its Config refuses it.
        """
        if not experiment.tiny:
            raise UserError(
                f"{experiment.entry.path} has no TINY",
                hint="copy gpt2ish's: Config values at which a check takes seconds",
            )
        specimen = cls(experiment, experiment.config(**experiment.tiny | values))
        return cls(experiment, specimen.given, dropouts=specimen.other_dropouts())

    def at(self, progress: float) -> "Specimen":
        """The same, at another part of a run."""
        return Specimen(self.experiment, self.given, progress, self.dropouts)

    @functools.cached_property
    def changes_over_a_run(self) -> bool:
        """Whether the same weights give anything else in the middle, or at the end."""
        if not self.follows_progress:
            return False
        model, tokens_BT = self.randomised(), self.tokens(B=2)
        found = []
        for progress in PROGRESS:
            model.at(progress)
            outputs = [self.outputs(model.train(mode), tokens_BT) for mode in (True, False)]
            minimised = self.objective(model, tokens_BT, tokens_BT.roll(-1, 1))
            found.append([*outputs, torch.tensor(minimised), *self.cached(model, tokens_BT)])
        return any(
            not torch.equal(*pair)
            for later in found[1:]
            for pair in zip(found[0], later, strict=True)
        )

    @functools.cached_property
    def turns(self) -> list[float]:
        """Where between those the same weights give something else than a little earlier."""
        if not self.follows_progress:
            return []
        model, tokens_BT = self.randomised(), self.tokens(B=2)
        found, turns = {}, []
        for progress in sorted(PROGRESS + BETWEEN):
            model.at(progress)
            found[progress] = self.outputs(model, tokens_BT)
            earlier = list(found.values())[-2:]
            if progress in BETWEEN and not torch.equal(earlier[0], earlier[-1]):
                turns.append(progress)
        return turns

    def config_with_dropout(self, share: float):
        return dataclasses.replace(self.given, **dict.fromkeys(self.dropouts, share))

    def _shares(self) -> list[str]:
        """The fields that may say how much is left out at random."""
        values = dataclasses.asdict(self.given).items()
        return [key for key, v in values if (type(v) is float and 0 <= v < 1) or "dropout" in key]

    def other_dropouts(self) -> list[str]:
        """A field of another name without which training draws no more numbers."""
        if not self._draws_without():
            return []
        for key in self._shares():
            if key not in self.dropouts and getattr(self.given, key) > 0:
                with suppress(ValueError):  # Config refuses it at 0
                    if not self._draws_without(key):
                        return [key]
        return []

    def _draws_without(self, *keys: str) -> bool:
        values = dict.fromkeys([*self.dropouts, *keys], 0.0)
        with torch.random.fork_rng(devices=[]):
            try:
                model = self.experiment.model(dataclasses.replace(self.given, **values), seed=0)
                return self.draws(model.train(), self.tokens(B=2))
            except Exception:  # which a proof will find
                return False

    def model(self, seed: int = 0, dropout: float = 0.0) -> nn.Module:
        model = self.experiment.model(self.config_with_dropout(dropout), seed=seed)
        torch.manual_seed(seed)  # so that noise drawn for it is the same each time too
        if self.follows_progress:
            model.at(self.progress)
        return model

    def randomised(self, sign: int = 1, strength: float = 1.0) -> nn.Module:
        """A model in eval mode, as `randomise` leaves it."""
        return randomise(self.model(), sign, strength)

    def opened(self) -> Iterator[nn.Module]:
        """Randomised models whose vectors and scalars are drawn anew: no gate stays shut."""
        for opening in OPENINGS:
            yield open_gates(self.randomised(), opening)

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

    def outputs(self, model: nn.Module, tokens_BT: Tensor, moves_buffers: bool = False) -> Tensor:
        """What a curve is made from: logits, or for a model with its own likelihood, nats.

        Args:
            moves_buffers: whether a pass in training mode leaves in buffers what it puts there.
        """
        torch.manual_seed(1)  # a model that draws numbers draws the same ones each time
        is_put_back = model.training and not moves_buffers
        kept = unchanged(model) if is_put_back else nullcontext()
        with kept, torch.set_grad_enabled(model.training):  # as training and validation do
            if self.scores_itself:
                return model.log_likelihood(tokens_BT, tokens_BT.roll(-1, 1))[..., None].detach()
            return model(tokens_BT).detach()

    def cached(self, model: nn.Module, tokens_BT: Tensor) -> list[Tensor]:
        """What a pass over all but the last token gives, and one over that; [] without a cache."""
        if self.scores_itself or not takes_cache(model):
            return []
        cache, parts, run = Cache(), tokens_BT.split([tokens_BT.shape[1] - 1, 1], 1), reader(model)
        found = []
        with torch.no_grad():
            for part_BT in parts:
                found.append(run(part_BT, cache=cache))
                cache.advance(part_BT.shape[1])
        return found

    def afresh(
        self, model: nn.Module, first_BT: Tensor, second_BT: Tensor, places: slice = slice(None)
    ) -> list[Tensor]:
        """The outputs of two copies, so that neither call can have left the other something."""
        pair = (first_BT, second_BT)
        return [self.outputs(copy.deepcopy(model), t)[:, places] for t in pair]

    def draws(self, model: nn.Module, tokens_BT: Tensor) -> bool:
        """Whether a pass draws random numbers."""
        self.outputs(model, tokens_BT)
        return _drew()

    def objective(
        self, model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor, only: Tensor | None = None
    ) -> float:
        """What training minimises, summed over the targets, or over those where `only`."""
        if only is not None:
            targets_BT = targets_BT.masked_fill(~only, IGNORE)
        torch.manual_seed(1)
        return Objective(copy.deepcopy(model).train())(tokens_BT, targets_BT).objective.item()

    def draws_in_objective(self, model: nn.Module, tokens_BT: Tensor) -> bool:
        self.objective(model, tokens_BT, tokens_BT.roll(-1, 1))
        return _drew()

    def lengths(self) -> list[int]:
        """Positions to cut at: all of the first 32, then those around powers of two."""
        T = self.config.max_len
        near = {2**k + step for k in range(5, T.bit_length()) for step in (-1, 0, 1)}
        return [t for t in range(1, T + 1) if t <= 32 or t in near or t >= T - 1]

    @functools.cached_property
    def likelihood(self) -> Likelihood:
        return Likelihood(self)

    @functools.cached_property
    def overfit(self) -> "Overfit":
        return Overfit(self)


Claim = Callable[[Specimen], str]


def throughout(claim: Claim, between: Claim | None = None) -> Claim:
    """The claim at the start, in the middle and at the end of a run, where a model changes.

    Args:
        between: a quicker one, of all that it is on the way.
    """

    def claim_throughout(specimen: Specimen) -> str:
        turns = specimen.turns if between else []
        if not turns and not specimen.changes_over_a_run:
            return claim(specimen)
        for progress in sorted([*PROGRESS, *turns]):
            asked = between if progress in turns else claim
            try:
                found = asked(specimen.at(progress))
            except Refuted as why:
                raise Refuted(f"at progress {progress:g}: {why}", why.unless) from None
        return f"at progress {', '.join(f'{p:g}' for p in PROGRESS)}: {found}"

    return claim_throughout


def _drew() -> bool:
    """Whether numbers were drawn since the seed was set to 1."""
    return not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(1).get_state())


def randomise(model: nn.Module, sign: int = 1, strength: float = 1.0) -> nn.Module:
    """Change a model so that no weight is at, or near, zero, and no two are alike; in eval mode.

    Zero-initialised weights would hide whatever lies behind them, and a norm whose scales are all
    1 the means that it takes away. Matrices whose spread is small for their fan-in get noise of
    its usual spread; such vectors and scalars (gates, scales, biases) get 0.1 to 0.5, times `sign`
    where they are all zero; all of it times `strength`.
    """
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


def open_gates(model: nn.Module, opening: tuple[float, float, float]) -> nn.Module:
    """The same, with vectors and scalars drawn anew, and as if counters had counted.

    A matrix whose numbers are nearly alike, such as a vector for each block, is drawn anew too.

    Args:
        opening: the least and the largest number, and what each counter says.
    """
    least, largest, count = opening
    with torch.no_grad():
        for weight in model.parameters():
            is_vector = weight.numel() == max(weight.shape, default=1)
            if is_vector or weight.std() < 0.1 * weight.mean().abs():
                weight.uniform_(least, largest)
        for buffer in model.buffers():
            if buffer.numel() == 1 and buffer.dtype != torch.bool:
                is_exact = buffer.is_floating_point() or buffer.is_complex()
                most = count if is_exact else min(count, torch.iinfo(buffer.dtype).max)
                buffer.fill_(most)
    return model


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Its modules drop nothing meanwhile."""
    shares = {part: part.p for part in model.modules() if isinstance(part, nn.Dropout)}
    try:
        for part in shares:
            part.p = 0.0
        yield
    finally:
        for part, share in shares.items():
            part.p = share


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What a pass does to the mode and the buffers of a model is undone."""
    training = model.training
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        model.train(training)
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
