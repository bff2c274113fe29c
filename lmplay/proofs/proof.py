"""What proofs are made with: claims and what was found, models and tokens to look at."""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from lmplay.disk import make_folder, write_json
from lmplay.errors import UserError
from lmplay.model.abilities import has_after_step, scores_itself
from lmplay.model.experiment import Experiment
from lmplay.model.objective import Objective
from lmplay.roots import cache_root

# B rows, T positions

CLOSE = 1e-4  # how far logits may move, against the largest, where the order of additions differs
MOST_STEPS = 200  # of Adam, to learn one batch
NO_MEMORY = "there is not enough memory to tell"
GRADIENT_STEPS = 4  # until each gradient was non-zero: zero-initialised layers open one by one


@dataclass(frozen=True)
class Proof:
    """One claim about an experiment, and what was found."""

    name: str
    passed: bool | None  # None: the claim does not apply to this experiment
    detail: str  # one line, with the numbers


class Refuted(Exception):
    """The claim is false, and why."""


class Exempt(Exception):
    """The claim does not apply, and why."""


class Bench:
    """An experiment at one size: models and tokens for the proofs.

    Args:
        config: without it, TINY.

    Raises:
        UserError: the file has no TINY, or its Config refuses it.
    """

    def __init__(self, experiment: Experiment, config=None):
        if config is None and not experiment.tiny:
            raise UserError(
                f"{experiment.entry.path} has no TINY",
                hint="copy gpt2ish's: Config values at which a check takes seconds",
            )
        self.experiment = experiment
        self._plain = config or experiment.config(**experiment.tiny)
        self.config = self.config_with_dropout(0.0)
        self.scores_itself = scores_itself(experiment.module.Model)

    def config_with_dropout(self, share: float):
        dropouts = {
            key: share
            for key, value in dataclasses.asdict(self._plain).items()
            if "dropout" in key and isinstance(value, int | float)
        }
        return dataclasses.replace(self._plain, **dropouts)

    def model(self, seed: int = 0, dropout: float = 0.0) -> nn.Module:
        return self.experiment.model(self.config_with_dropout(dropout), seed=seed)

    def shaken(self, sign: int = 1, strength: float = 1.0) -> nn.Module:
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

    def shaken_models(self) -> Iterator[tuple[str, nn.Module]]:
        """Two draws of the weights, each in eval and in training mode.

        They are shaken as strongly as leaves them ears: where multipliers multiply multipliers
        and no norm holds the stream, it can run so far off that no token matters any more.
        """
        tokens_BT = self.tokens(B=3)
        others_BT = torch.cat([tokens_BT[:, :-1], self.others(tokens_BT[:, -1:])], dim=1)
        for sign in (1, -1):
            for strength in (1.0, 0.5, 0.25, 0.1):
                model = self.shaken(sign, strength)
                last, other = (self.outputs(model, t)[:, -1] for t in (tokens_BT, others_BT))
                if min(map(how_far, other, last)) > 100 * CLOSE:
                    break
            yield "eval", model
            yield "training", copy.deepcopy(model).train()

    def tokens(self, B: int, T: int | None = None) -> Tensor:
        return torch.randint(self.config.vocab_size, (B, T or self.config.max_len))

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
    def lesson(self) -> "Lesson":
        return Lesson(self)


class Lesson:
    """One batch, learned until its next tokens are known; what three of the proofs look at.

    The rows run through one cycle of different tokens, so that a token tells the next one.
    """

    def __init__(self, bench: Bench):
        config = bench.config
        num_tokens = min(config.vocab_size, 16)
        cycle = torch.randperm(config.vocab_size)[:num_tokens]
        places_BT = torch.arange(config.max_len) + 3 * torch.arange(4)[:, None]
        tokens_BT, targets_BT, after_BT = (cycle[(places_BT + k) % num_tokens] for k in range(3))
        model = bench.model()
        self.parameters = dict(model.named_parameters())
        self.first_size: dict[str, float] = {}  # of the gradients that were there
        self.largest_size = dict.fromkeys(self.parameters, 0.0)
        objective = Objective(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        self.start = self.end = self.evaluate(objective, tokens_BT, targets_BT)
        self.num_steps = 0
        while self.num_steps < MOST_STEPS and not self.learned:
            objective.train()
            optimizer.zero_grad()
            (objective(tokens_BT, targets_BT).objective / targets_BT.numel()).backward()
            if self.num_steps < GRADIENT_STEPS:
                self.note_gradients()
            optimizer.step()
            if has_after_step(model):
                model.after_step()
            self.num_steps += 1
            if self.num_steps >= GRADIENT_STEPS and self.num_steps % 4 == 0:
                self.end = self.evaluate(objective, tokens_BT, targets_BT)
        self.said: dict[str, float] = {}
        if not bench.scores_itself:
            with torch.no_grad():
                guess_BT = model.eval()(tokens_BT).argmax(-1)
            asked = {"t": tokens_BT, "t+1": targets_BT, "t+2": after_BT}
            self.said = {k: (guess_BT == v).double().mean().item() for k, v in asked.items()}

    @property
    def learned(self) -> bool:
        return self.end <= 0.2 * self.start

    @staticmethod
    @torch.no_grad()
    def evaluate(objective: Objective, tokens_BT: Tensor, targets_BT: Tensor) -> float:
        """Nats per target, by the ruler."""
        torch.manual_seed(1)
        sums = objective.eval()(tokens_BT, targets_BT)
        return sums.loss.item() / targets_BT.numel()

    def note_gradients(self) -> None:
        for name, weight in self.parameters.items():
            if weight.grad is not None:
                size = weight.grad.float().square().mean().sqrt().item()
                if self.num_steps < 2:
                    self.first_size.setdefault(name, size)
                self.largest_size[name] = max(size, self.largest_size[name], key=nan_first)


def prove(claims: Mapping[str, Callable[[Bench], str]], bench: Bench) -> list[Proof]:
    """Every claim by its name, whatever the others find; the random state of the CPU is put back.

    A claim returns what was found, or raises Refuted or Exempt; any other error refutes it too.
    """
    proofs = []
    for name, claim in claims.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                proofs.append(Proof(name, True, claim(bench)))
            except Refuted as found:
                proofs.append(Proof(name, False, str(found)))
            except Exempt as reason:
                proofs.append(Proof(name, None, str(reason)))
            except Exception as error:
                if _is_full(error):
                    proofs.append(Proof(name, None, NO_MEMORY))
                else:
                    where = _where(error, bench.experiment.module.__file__)
                    proofs.append(Proof(name, False, where))
    return proofs


def remembered(of: list[object], found: Callable[[], list[Proof]]) -> list[Proof]:
    """What was found of this before, if all of it passed; else what is found now.

    A pass is remembered, in the user's cache, by the hash of `of`, of this file, and the versions
    of lmplay and torch. A failure is never remembered, nor what lacked memory.

    Args:
        of: what the proofs depend on, by its text.
    """
    own = Path(__file__).read_text(encoding="utf-8")
    marks = [*map(str, of), own, version("lmplay"), torch.__version__]
    name = hashlib.sha256("\0".join(marks).encode()).hexdigest()
    path = cache_root() / "checks" / f"{name}.json"
    with suppress(OSError, ValueError, TypeError):
        return [Proof(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    proofs = found()
    if all(proof.passed is not False and proof.detail != NO_MEMORY for proof in proofs):
        with suppress(OSError):  # a cache that cannot be written costs a second next time
            make_folder(path.parent)
            write_json(path, [dataclasses.asdict(proof) for proof in proofs])
    return proofs


def how_far(changed: Tensor, answer: Tensor) -> float:
    """The largest difference, against the largest answer where that is above 1; nan stays nan."""
    scale = max(1.0, answer.abs().max().item())
    return (changed - answer).abs().max().item() / scale


def nan_first(size: float) -> float:
    return math.inf if math.isnan(size) else size


def _is_full(error: Exception) -> bool:
    """Whether a device or the host ran out of memory: not all of torch says so by a type."""
    said = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def _where(error: Exception, file: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"
