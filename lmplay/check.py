"""What can be proved of an experiment in seconds, at the size of its TINY."""

import ast
import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmplay import catalog
from lmplay.errors import UserError
from lmplay.experiment import Experiment, folded, load_experiment
from lmplay.objective import IGNORE, Objective
from lmplay.roots import cache_root

# B rows, T positions, N positions in a line, C model width, V vocabulary

EXACT = 1e-5  # how far logits may move, against the largest, where only rounding may move them
CLOSE = 1e-4  # the same where the shapes differ too, and with them the order of additions
MOST_STEPS = 200  # of Adam, to learn one batch
GRADIENT_STEPS = 4  # until each gradient was non-zero: zero-initialised layers open one by one


@dataclass(frozen=True)
class Proof:
    """One claim about an experiment, and what was found."""

    name: str
    passed: bool | None  # None: the claim does not apply to this experiment
    detail: str  # one line, with the numbers


class _Refuted(Exception):
    """The claim is false, and why."""


class _Exempt(Exception):
    """The claim does not apply, and why."""


def checked(experiment: Experiment) -> list[Proof]:
    """The proofs of `check`, from memory where this very experiment has passed them all before.

    A pass is remembered, in the user's cache, by the hash of the source, the Config values, this
    file, and the versions of lmplay and torch. A failure is never remembered.
    """
    path = _memory(experiment)
    with suppress(OSError, ValueError, TypeError):
        return [Proof(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    proofs = check(experiment)
    if all(proof.passed is not False for proof in proofs):
        with suppress(OSError):  # a cache that cannot be written costs a second next time
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}")
            part.write_text(json.dumps([dataclasses.asdict(p) for p in proofs]), encoding="utf-8")
            part.replace(path)
    return proofs


def check(experiment: Experiment) -> list[Proof]:
    """Every proof, at tiny size on the CPU, whatever the others find.

    The Config is the file's own with the variant's values, then TINY's over them, so that a
    variant cannot bring back a large scale; every value with "dropout" in its name is 0. Nothing
    outside is touched: torch's random state is put back.

    Raises:
        UserError: the file has no TINY, or its Config refuses it.
    """
    bench = _Bench(experiment)
    proofs = []
    of_stack = {"ideas": _holds_every_idea} if experiment.entry.ideas else {}
    for name, prove in (_PROOFS | of_stack).items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                proofs.append(Proof(name, True, prove(bench)))
            except _Refuted as found:
                proofs.append(Proof(name, False, str(found)))
            except _Exempt as reason:
                proofs.append(Proof(name, None, str(reason)))
            except Exception as error:
                proofs.append(Proof(name, False, _where(error, experiment.entry.path)))
    return proofs


class _Bench:
    """An experiment at tiny size: models and tokens for the proofs."""

    def __init__(self, experiment: Experiment):
        if not experiment.tiny:
            raise UserError(
                f"{experiment.entry.path} has no TINY",
                hint="copy gpt2ish's: Config values at which a check takes seconds",
            )
        self.experiment = experiment
        self.config = self.config_with_dropout(0.0)
        self.scores_itself = hasattr(experiment.module.Model, "log_likelihood")

    def config_with_dropout(self, share: float):
        plain = self.experiment.config(**self.experiment.tiny)
        dropouts = {
            key: share
            for key, value in dataclasses.asdict(plain).items()
            if "dropout" in key and isinstance(value, int | float)
        }
        return dataclasses.replace(plain, **dropouts)

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
                if min(map(_moved, other, last)) > 100 * CLOSE:
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
    def lesson(self) -> "_Lesson":
        return _Lesson(self)


class _Lesson:
    """One batch, learned until its next tokens are known; what three of the proofs look at.

    The rows run through one cycle of different tokens, so that a token tells the next one.
    """

    def __init__(self, bench: _Bench):
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
            if hasattr(model, "after_step"):
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
                self.largest_size[name] = max(size, self.largest_size[name], key=_nan_first)


def _holds_every_idea(bench: _Bench) -> str:
    """A merge that swallowed an idea would be the stack of the others under a wrong name."""
    entry = bench.experiment.entry
    before = _Bench(load_experiment(catalog.parent_of(entry))).model().state_dict().keys()
    tokens_BT = bench.tokens(B=3)
    fresh, weights = bench.model().state_dict(), bench.shaken().state_dict()
    for idea in entry.ideas:
        own = _Bench(load_experiment(idea)).model().state_dict().keys()
        if missing := own - before - fresh.keys():
            raise _Refuted(f"{idea.name}'s {min(missing)} is not in the stack")
        rest = catalog.stacked([other for other in entry.ideas if other is not idea])
        without = _Bench(load_experiment(rest))
        if not _tells_apart(bench, without, weights, tokens_BT):
            raise _Refuted(f"without {idea.name} it would do the same")
    names = ", ".join(idea.name for idea in entry.ideas)
    return f"{names}: their parameters are there, and without any of them it does something else"


def _tells_apart(stack: _Bench, without: _Bench, weights: dict, tokens_BT: Tensor) -> bool:
    """Whether the two differ with the same weights or, where their weights are alike, at start.

    New parameters alone shift the random numbers of all others, so that models that do the same
    start apart: only where no parameter is new does the start tell anything.
    """
    acts = [_acts(bench, weights, tokens_BT) for bench in (stack, without)]
    if any(not torch.equal(a, b) for a, b in zip(*acts, strict=True)):
        return True
    models = [bench.model() for bench in (stack, without)]
    mine, theirs = (_settings(model) for model in models)
    starts = [model.state_dict() for model in models]
    shared = starts[0].keys() & starts[1].keys()
    if any(mine.get(name) != theirs.get(name) for name in shared):
        return True
    alike = [{name: tensor.shape for name, tensor in start.items()} for start in starts]
    return alike[0] == alike[1] and any(
        not torch.equal(starts[0][name], starts[1][name]) for name in shared
    )


def _settings(model: nn.Module) -> dict[str, dict]:
    """What a model asks the optimizer to do with its parameters."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = model.parameter_groups() if hasattr(model, "parameter_groups") else []
    return {
        names[id(weight)]: {key: value for key, value in group.items() if key != "params"}
        for group in groups
        for weight in group["params"]
    }


def _acts(bench: _Bench, weights: dict, tokens_BT: Tensor) -> list[Tensor]:
    """Outputs, what training minimises, and outputs after an update, with the weights that fit."""
    model = bench.model(dropout=0.3).eval()
    own = model.state_dict()
    fitting = {k: w for k, w in weights.items() if k in own and own[k].shape == w.shape}
    model.load_state_dict(fitting, strict=False)
    outputs = bench.outputs(model, tokens_BT)
    torch.manual_seed(1)
    loss = Objective(model.train())(tokens_BT, tokens_BT.roll(-1, 1)).objective.detach()
    if hasattr(model, "after_step"):
        model.after_step()
    return [outputs, loss, bench.outputs(model.eval(), tokens_BT)]


def _imports_torch_only(bench: _Bench) -> str:
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(bench.experiment.source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        found |= {name.partition(".")[0]: node.lineno for name in names}
    for name, line in found.items():
        if name != "torch" and name not in sys.stdlib_module_names:
            raise _Refuted(f"line {line} imports {name or 'a neighbour'}")
    return ", ".join(sorted(found))


def _says_what_changed(bench: _Bench) -> str:
    entry = bench.experiment.entry
    parent = catalog.parent_of(entry)
    if parent is None:
        raise _Exempt("its docstring names no parent")
    mine, theirs = catalog.definitions(entry.source), catalog.definitions(parent.source)
    differ = [
        name for name in [*mine, *(theirs.keys() - mine)] if mine.get(name) != theirs.get(name)
    ]
    if set(differ) != set(entry.changed):
        raise _Refuted(f"should be: Changed from {parent.file}: {', '.join(differ)}.")
    return f"{', '.join(differ)} differ from {parent.file}"


def _holds_only_weights(bench: _Bench) -> str:
    model, shapes = bench.model(), bench.experiment.model(bench.config, device="meta")
    for name, module in model.named_modules():
        where = name or "Model"
        for key in module._non_persistent_buffers_set:
            raise _Refuted(f"{where}.{key} is a buffer that no checkpoint keeps")
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules") and _holds_tensor(value):
                raise _Refuted(f"{where}.{key} is a tensor but neither parameter nor buffer")
    for name, tensor in shapes.state_dict().items():
        if tensor.device.type != "meta":
            raise _Refuted(f"{name} is made on {tensor.device} when it is asked for on another")
        if tensor.shape != model.state_dict()[name].shape:
            raise _Refuted(f"{name} has another shape on the meta device")
    return f"{sum(p.numel() for p in model.parameters()):,} parameters here"


def _has_no_float64(bench: _Bench) -> str:
    model = bench.model().train()
    for name, tensor in model.state_dict().items():
        if tensor.dtype in _DOUBLES:
            raise _Refuted(f"{name} is {tensor.dtype}")
    tokens_BT = bench.tokens(B=2)
    doubles = _Doubles()
    with doubles:
        Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
    if doubles.found:
        raise _Refuted(f"{doubles.found} gives double precision, which MPS has not")
    return f"none among {doubles.num_ops} operations of a step"


def _starts_finite(bench: _Bench) -> str:
    model = bench.model()
    tokens_BT, V = bench.tokens(B=4), bench.config.vocab_size
    targets_BT = tokens_BT.roll(-1, 1)
    for method in ("training_loss", "log_likelihood"):
        if hasattr(model, method):
            shape = tuple(getattr(model, method)(tokens_BT, targets_BT).shape)
            if shape != tuple(tokens_BT.shape):
                raise _Refuted(f"{method} has shape {shape}, not one loss for each target")
    targets_BT = targets_BT.masked_fill(torch.rand(targets_BT.shape) < 0.3, IGNORE)
    num_targets = (targets_BT != IGNORE).sum().item()
    trained = Objective(model).train()(tokens_BT, targets_BT).objective.item() / num_targets
    nats = Objective(model).eval()(tokens_BT, targets_BT).loss.item() / num_targets
    found = f"{nats:.3f} nats per token; ln V is {math.log(V):.3f}"
    if hasattr(model, "training_loss"):
        found += f"; what training minimises {trained:.3f}"
    if not (math.isfinite(nats) and math.isfinite(trained)):
        raise _Refuted(found)
    return found


def _repeats_by_seed(bench: _Bench) -> str:
    tokens_BT = bench.tokens(B=2)
    losses, states = [], []
    for _ in range(2):
        model = bench.model(seed=5, dropout=0.3).train()
        states.append(copy.deepcopy(model.state_dict()))
        torch.manual_seed(6)
        losses.append(Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.item())
    for name, tensor in states[0].items():
        if not torch.equal(tensor, states[1][name]):
            raise _Refuted(f"{name} starts with other numbers for the same seed")
    if losses[0] != losses[1]:
        raise _Refuted(f"the training loss is {losses[0]}, then {losses[1]} for the same seed")
    return f"{len(states[0])} tensors and the training loss"


def _is_its_state(bench: _Bench) -> str:
    model = bench.shaken()
    other = bench.model(seed=7).eval()
    other.load_state_dict(model.state_dict())
    tokens_BT = bench.tokens(B=2)
    moved = _moved(bench.outputs(other, tokens_BT), bench.outputs(model, tokens_BT))
    if not moved <= EXACT:
        raise _Refuted(f"a model with the same state dict answers otherwise, by {moved:.1e}")
    return f"another model with it answers the same ({moved:.0e})"


def _trains_as_it_is_tested(bench: _Bench) -> str:
    model = bench.shaken()
    tokens_BT = bench.tokens(B=2)
    answer = bench.outputs(model, tokens_BT)
    training = copy.deepcopy(model).train()
    moved = _moved(bench.outputs(training, tokens_BT), answer)
    if not moved <= EXACT:
        raise _Refuted(
            f"training mode differs from eval mode by {moved:.1e} with every *dropout* at 0"
        )
    dropping = bench.model(dropout=0.3).eval()
    dropping.load_state_dict(model.state_dict())
    moved = _moved(bench.outputs(dropping, tokens_BT), answer)
    if not moved <= EXACT:
        raise _Refuted(f"dropout acts in eval mode, by {moved:.1e}")
    return "training without dropout is eval; eval is without dropout"


def _takes_any_shape(bench: _Bench) -> str:
    model = bench.shaken()
    tokens_BT = bench.tokens(B=5)
    answer = bench.outputs(model, tokens_BT)
    largest = 0.0
    for T in bench.lengths():
        B = 1 + T % 5
        shorter = bench.outputs(model, tokens_BT[:B, :T])
        if shorter.shape[:2] != (B, T):
            raise _Refuted(f"{B} x {T} tokens give {tuple(shorter.shape)}")
        if bench.scores_itself:
            if not shorter.isfinite().all():
                raise _Refuted(f"not finite for {B} x {T} tokens")
            continue
        moved = _moved(shorter, answer[:B, :T])
        largest = max(largest, moved, key=_nan_first)
        if not moved <= CLOSE:
            raise _Refuted(f"the first {T} tokens alone give other logits, by {moved:.1e}")
    return f"T from 1 to {bench.config.max_len}, B from 1 to 5; prefixes agree to {largest:.0e}"


def _keeps_rows_apart(bench: _Bench) -> str:
    tokens_BT = bench.tokens(B=3)
    others_BT = bench.others(tokens_BT)
    largest = 0.0
    for mode, model in bench.shaken_models():
        answer = bench.outputs(model, tokens_BT)
        for row in range(3):
            here = torch.arange(3)[:, None] == row
            mixed = bench.outputs(model, torch.where(here, tokens_BT, others_BT))
            cases = {"with other rows": (_moved(mixed[row], answer[row]), EXACT)}
            if not bench.scores_itself:  # its random numbers depend on the number of rows
                alone = bench.outputs(model, tokens_BT[row : row + 1])
                cases["alone"] = (_moved(alone[0], answer[row]), CLOSE)
            for case, (moved, allowed) in cases.items():
                largest = max(largest, moved, key=_nan_first)
                if not moved <= allowed:
                    raise _Refuted(f"row {row} {case} moves by {moved:.1e} in {mode} mode")
    return f"each of 3 rows with other rows and alone moves by {largest:.0e}"


def _sees_no_later_token(bench: _Bench) -> str:
    if bench.scores_itself:
        raise _Exempt("it has its own log_likelihood")
    tokens_BT = bench.tokens(B=3)
    cuts = bench.lengths()[:-1]
    largest, least = 0.0, math.inf
    for mode, model in bench.shaken_models():
        answer = bench.outputs(model, tokens_BT)
        for cut in cuts:
            others_BT = torch.cat([tokens_BT[:, :cut], bench.others(tokens_BT[:, cut:])], dim=1)
            changed = bench.outputs(model, others_BT)
            for t in range(cut):
                moved = _moved(changed[:, t], answer[:, t])
                largest = max(largest, moved, key=_nan_first)
                if not moved <= EXACT:
                    raise _Refuted(
                        f"position {t} moves by {moved:.1e} with the tokens from {cut} on, "
                        f"in {mode} mode"
                    )
            moved = _moved(changed[:, cut:], answer[:, cut:])
            least = min(least, moved)
            if not moved > CLOSE:
                raise _Refuted(f"the tokens from {cut} on move nothing: the proof would be empty")
    return (
        f"{len(cuts)} cuts, 2 draws of weights, both modes: earlier positions move by "
        f"{largest:.0e}, later ones by {least:.0e} or more"
    )


def _has_one_head(bench: _Bench) -> str:
    model = bench.shaken()
    if not hasattr(model, "hidden"):
        raise _Exempt("it has no hidden")
    if not isinstance(getattr(model, "head", None), nn.Module):
        raise _Refuted("hidden is there, but head is not a module")
    tokens_BT = bench.tokens(B=3)
    for mode in (model, copy.deepcopy(model).train()):
        with torch.no_grad():
            torch.manual_seed(1)
            answer = mode(tokens_BT)
            torch.manual_seed(1)
            x_BTC = mode.hidden(tokens_BT)
            moved = _moved(mode.head(x_BTC), answer)
            if not moved <= CLOSE:
                raise _Refuted(f"head(hidden(t)) differs from forward(t) by {moved:.1e}")
            some_NC = x_BTC.flatten(0, 1)[1::3]
            alone = _moved(mode.head(some_NC), answer.flatten(0, 1)[1::3])
            if not alone <= CLOSE:
                raise _Refuted(f"head does not map each position alone: {alone:.1e}")
    return f"head(hidden(t)) is forward(t) to {moved:.0e}; some rows alone to {alone:.0e}"


def _generates_as_it_reads(bench: _Bench) -> str:
    from lmplay.generate.cache import Cache

    model = bench.shaken()
    passes = {"forward": model}
    if hasattr(model, "hidden"):  # what generation runs
        passes["head of hidden"] = lambda tokens_BT, cache: model.head(
            model.hidden(tokens_BT, cache)
        )
    reader = model.hidden if hasattr(model, "hidden") else model.forward
    if bench.scores_itself or "cache" not in inspect.signature(reader).parameters:
        raise _Exempt("it takes no cache, so generation reads from the start")
    tokens_BT = bench.tokens(B=2)
    T = bench.config.max_len
    answer = bench.outputs(model, tokens_BT)
    largest = 0.0
    for name, run in passes.items():
        for prompt in sorted({1, min(2, T), (T + 1) // 2, T}):
            cache, start = Cache(), 0
            for end in range(prompt, T + 1):
                with torch.no_grad():
                    logits_BTV = run(tokens_BT[:, start:end], cache)
                if not cache.used:
                    raise _Exempt("it keeps nothing in the cache: generation reads from the start")
                cache.advance(end - start)
                moved = _moved(logits_BTV, answer[:, start:end])
                largest = max(largest, moved, key=_nan_first)
                if not moved <= CLOSE:
                    raise _Refuted(
                        f"{name} on a prompt of {prompt}, then one by one: position {end - 1} "
                        f"differs from the full pass by {moved:.1e}"
                    )
                start = end
    return f"prompts of 1 to {T} tokens, then one by one: as the full pass, to {largest:.0e}"


def _folds_without_a_trace(bench: _Bench) -> str:
    model = bench.shaken()
    if not any(hasattr(module, "fold") for module in model.modules()):
        raise _Exempt("nothing folds")
    tokens_BT = bench.tokens(B=3)
    answer = bench.outputs(model, tokens_BT)
    plain = folded(model).eval()
    moved = _moved(bench.outputs(plain, tokens_BT), answer)
    if not moved <= EXACT:
        raise _Refuted(f"folding moves the logits by {moved:.1e}")
    target = load_experiment(_folds_to(bench.experiment.entry))
    values = dataclasses.asdict(bench.config)
    shared = {key: values[key] for key in target.fields if key in values}
    deployed = target.model(target.config(**shared)).eval()
    deployed.load_state_dict(plain.state_dict())
    moved = _moved(bench.outputs(deployed, tokens_BT), answer)
    if not moved <= EXACT:
        raise _Refuted(f"{target.name} with the folded weights moves the logits by {moved:.1e}")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, deployed))
    return f"{before:,} parameters become {target.name}'s {after:,}; logits move by {moved:.0e}"


def _folds_to(entry: catalog.Entry) -> catalog.Entry:
    """What the docstring says; for a stack, the stack of what its ideas fold to.

    A file may fold in some of its variants only, which the docstring of a stack cannot know.
    """
    named = re.search(r"^Folds to: ([\w+]+)\.$", entry.docstring, re.MULTILINE)
    if named is None:
        raise _Refuted("its docstring has no line 'Folds to: <experiment>.'")
    if not entry.ideas:
        return catalog.named_in(entry, named[1])
    left = {}
    for idea in entry.ideas:
        modules = _Bench(load_experiment(idea)).model().modules()
        plain = _folds_to(idea) if any(hasattr(module, "fold") for module in modules) else idea
        left[plain.path] = plain
    shared = catalog.parent_of(entry).path
    more = [e for e in left.values() if e.variant or (e.parent and e.path != shared)]
    return catalog.stacked(more or list(left.values())[:1])


def _trains_every_weight(bench: _Bench) -> str:
    lesson = bench.lesson
    for name, weight in lesson.parameters.items():
        if not weight.requires_grad:
            raise _Refuted(f"{name} does not require a gradient: make it a buffer")
        if name not in lesson.first_size:
            raise _Refuted(f"{name} got no gradient in two steps")
        if not math.isfinite(lesson.largest_size[name]):
            raise _Refuted(f"the gradient of {name} is not finite")
        if lesson.largest_size[name] == 0:
            raise _Refuted(f"the gradient of {name} is zero in each of {GRADIENT_STEPS} steps")
    usual = statistics.median(lesson.largest_size.values())
    rounding = [name for name, size in lesson.largest_size.items() if size < 1e-6 * usual]
    found = f"{len(lesson.parameters)} gradients, all finite and none zero"
    if rounding:  # such as the bias of attention's keys, which softmax cancels
        found += f"; {len(rounding)} no larger than rounding, such as {rounding[0]}"
    return found


def _learns_a_batch(bench: _Bench) -> str:
    lesson = bench.lesson
    found = f"{lesson.start:.2f} nats fall to {lesson.end:.2f} in {lesson.num_steps} steps of Adam"
    if not lesson.learned:
        raise _Refuted(found)
    return found


def _predicts_the_next_token(bench: _Bench) -> str:
    if bench.scores_itself:
        raise _Exempt("it has its own log_likelihood")
    said = bench.lesson.said
    found = "; ".join(f"token {place}: {share:.0%}" for place, share in said.items())
    if said["t+1"] < 0.8:
        raise _Refuted(f"after one batch was learned, position t says {found}")
    return f"position t says {found}"


_PROOFS: dict[str, Callable[[_Bench], str]] = {
    "imports": _imports_torch_only,
    "changed from": _says_what_changed,
    "only weights": _holds_only_weights,
    "no float64": _has_no_float64,
    "loss at start": _starts_finite,
    "seed": _repeats_by_seed,
    "state dict": _is_its_state,
    "modes": _trains_as_it_is_tested,
    "any shape": _takes_any_shape,
    "rows apart": _keeps_rows_apart,
    "causal": _sees_no_later_token,
    "head": _has_one_head,
    "cache": _generates_as_it_reads,
    "fold": _folds_without_a_trace,
    "gradients": _trains_every_weight,
    "learns": _learns_a_batch,
    "shift": _predicts_the_next_token,
}

_DOUBLES = (torch.float64, torch.complex128)


class _Doubles(TorchDispatchMode):
    """Names the first operation that gives double precision."""

    def __init__(self):
        super().__init__()
        self.found = ""
        self.num_ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        self.num_ops += 1
        outputs = given if isinstance(given, tuple | list) else (given,)
        if any(isinstance(out, Tensor) and out.dtype in _DOUBLES for out in outputs):
            self.found = self.found or str(func)
        return given


def _moved(changed: Tensor, answer: Tensor) -> float:
    """The largest difference, against the largest answer where that is above 1; nan stays nan."""
    scale = max(1.0, answer.abs().max().item())
    return (changed - answer).abs().max().item() / scale


def _nan_first(size: float) -> float:
    return math.inf if math.isnan(size) else size


def _holds_tensor(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds_tensor(part) for part in value)
    return isinstance(value, Tensor)


def _where(error: Exception, path: Path) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"


def _memory(experiment: Experiment) -> Path:
    parts = [
        *(f"{idea.source}\0{idea.variant}" for idea in experiment.entry.ideas),
        experiment.source,
        repr(experiment.config(**experiment.tiny)),
        Path(__file__).read_text(encoding="utf-8"),
        version("lmplay"),
        torch.__version__,
    ]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return cache_root() / "checks" / f"{name}.json"
