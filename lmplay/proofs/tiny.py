"""What can be proved of an experiment in seconds, at the size of its TINY."""

import ast
import copy
import dataclasses
import math
import re
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmplay.catalog import entries as catalog
from lmplay.model.abilities import (
    any_folds,
    has_after_step,
    has_groups,
    has_hidden,
    scores_itself,
    takes_cache,
    trains_by_itself,
)
from lmplay.model.experiment import Experiment, folded, load_experiment
from lmplay.model.objective import IGNORE, Objective
from lmplay.proofs.proof import (
    CLOSE,
    GRADIENT_STEPS,
    Bench,
    Exempt,
    Proof,
    Refuted,
    how_far,
    nan_first,
    prove,
    remembered,
)

# B rows, T positions, N positions in a line, C model width, V vocabulary

EXACT = 1e-5  # how far logits may move, against the largest, where only rounding may move them


def checked(experiment: Experiment) -> list[Proof]:
    """The proofs of `check`, from memory where this very experiment has passed them all before."""
    of = [
        *(f"{idea.source}\0{idea.variant}" for idea in experiment.entry.ideas),
        experiment.source,
        experiment.config(**experiment.tiny),
        Path(__file__).read_text(encoding="utf-8"),
    ]
    return remembered(of, lambda: check(experiment))


def check(experiment: Experiment) -> list[Proof]:
    """Every proof, at tiny size on the CPU, whatever the others find.

    The Config is the file's own with the variant's values, then TINY's over them, so that a
    variant cannot bring back a large scale; every value with "dropout" in its name is 0. Nothing
    outside is touched: torch's random state is put back.

    Raises:
        UserError: the file has no TINY, or its Config refuses it.
    """
    of_stack = {"ideas": _holds_every_idea} if experiment.entry.ideas else {}
    return prove(_PROOFS | of_stack, Bench(experiment))


def _holds_every_idea(bench: Bench) -> str:
    """A merge that swallowed an idea would be the stack of the others under a wrong name."""
    entry = bench.experiment.entry
    before = Bench(load_experiment(catalog.parent_of(entry))).model().state_dict().keys()
    tokens_BT = bench.tokens(B=3)
    fresh, weights = bench.model().state_dict(), bench.shaken().state_dict()
    for idea in entry.ideas:
        own = Bench(load_experiment(idea)).model().state_dict().keys()
        if missing := own - before - fresh.keys():
            raise Refuted(f"{idea.name}'s {min(missing)} is not in the stack")
        rest = catalog.stacked([other for other in entry.ideas if other is not idea])
        without = Bench(load_experiment(rest))
        if not _tells_apart(bench, without, weights, tokens_BT):
            raise Refuted(f"without {idea.name} it would do the same")
    names = ", ".join(idea.name for idea in entry.ideas)
    return f"{names}: their parameters are there, and without any of them it does something else"


def _tells_apart(stack: Bench, without: Bench, weights: dict, tokens_BT: Tensor) -> bool:
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
    groups = model.parameter_groups() if has_groups(model) else []
    return {
        names[id(weight)]: {key: value for key, value in group.items() if key != "params"}
        for group in groups
        for weight in group["params"]
    }


def _acts(bench: Bench, weights: dict, tokens_BT: Tensor) -> list[Tensor]:
    """Outputs, what training minimises, and outputs after an update, with the weights that fit."""
    model = bench.model(dropout=0.3).eval()
    own = model.state_dict()
    fitting = {k: w for k, w in weights.items() if k in own and own[k].shape == w.shape}
    model.load_state_dict(fitting, strict=False)
    outputs = bench.outputs(model, tokens_BT)
    torch.manual_seed(1)
    loss = Objective(model.train())(tokens_BT, tokens_BT.roll(-1, 1)).objective.detach()
    if has_after_step(model):
        model.after_step()
    return [outputs, loss, bench.outputs(model.eval(), tokens_BT)]


def _imports_torch_only(bench: Bench) -> str:
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
            raise Refuted(f"line {line} imports {name or 'a neighbour'}")
    return ", ".join(sorted(found))


def _says_what_changed(bench: Bench) -> str:
    entry = bench.experiment.entry
    parent = catalog.parent_of(entry)
    if parent is None:
        raise Exempt("its docstring names no parent")
    mine, theirs = catalog.definitions(entry.source), catalog.definitions(parent.source)
    differ = [
        name for name in [*mine, *(theirs.keys() - mine)] if mine.get(name) != theirs.get(name)
    ]
    if set(differ) != set(entry.changed):
        raise Refuted(f"should be: Changed from {parent.file}: {', '.join(differ)}.")
    return f"{', '.join(differ)} differ from {parent.file}"


def _holds_only_weights(bench: Bench) -> str:
    model, shapes = bench.model(), bench.experiment.model(bench.config, device="meta")
    for name, module in model.named_modules():
        where = name or "Model"
        for key in module._non_persistent_buffers_set:
            raise Refuted(f"{where}.{key} is a buffer that no checkpoint keeps")
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules") and _holds_tensor(value):
                raise Refuted(f"{where}.{key} is a tensor but neither parameter nor buffer")
    for name, tensor in shapes.state_dict().items():
        if tensor.device.type != "meta":
            raise Refuted(f"{name} is made on {tensor.device} when it is asked for on another")
        if tensor.shape != model.state_dict()[name].shape:
            raise Refuted(f"{name} has another shape on the meta device")
    return f"{sum(p.numel() for p in model.parameters()):,} parameters here"


def _has_no_float64(bench: Bench) -> str:
    model = bench.model().train()
    for name, tensor in model.state_dict().items():
        if tensor.dtype in _DOUBLES:
            raise Refuted(f"{name} is {tensor.dtype}")
    tokens_BT = bench.tokens(B=2)
    doubles = _Doubles()
    with doubles:
        Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
    if doubles.found:
        raise Refuted(f"{doubles.found} gives double precision, which MPS has not")
    return f"none among {doubles.num_ops} operations of a step"


def _follows_its_tokens(bench: Bench) -> str:
    """Runs on the CPU while meta is the default device: a tensor made without a device is there."""
    from lmplay.model.cache import Cache

    model = bench.model().train()
    tokens_BT, cache = bench.tokens(B=2), Cache()
    makers = _Makers(bench.experiment.module.__file__)
    with torch.device("meta"), makers:
        Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
        if has_after_step(model):
            model.after_step()
        bench.outputs(model.eval(), tokens_BT)
        if not bench.scores_itself and takes_cache(model):
            for t in range(2):
                model(tokens_BT[:, t : t + 1], cache=cache)
                cache.advance(1)
    waits = ", ".join(sorted(makers.waits)) or "nothing"
    return f"{makers.num_ops} operations; the host has to wait for {waits}"


def _starts_finite(bench: Bench) -> str:
    model = bench.model()
    tokens_BT, V = bench.tokens(B=4), bench.config.vocab_size
    targets_BT = tokens_BT.roll(-1, 1)
    losses = [model.training_loss] if trains_by_itself(model) else []
    losses += [model.log_likelihood] if scores_itself(model) else []
    for loss in losses:
        shape = tuple(loss(tokens_BT, targets_BT).shape)
        if shape != tuple(tokens_BT.shape):
            raise Refuted(f"{loss.__name__} has shape {shape}, not one loss for each target")
    targets_BT = targets_BT.masked_fill(torch.rand(targets_BT.shape) < 0.3, IGNORE)
    num_targets = (targets_BT != IGNORE).sum().item()
    trained = Objective(model).train()(tokens_BT, targets_BT).objective.item() / num_targets
    nats = Objective(model).eval()(tokens_BT, targets_BT).loss.item() / num_targets
    found = f"{nats:.3f} nats per token; ln V is {math.log(V):.3f}"
    if trains_by_itself(model):
        found += f"; what training minimises {trained:.3f}"
    if not (math.isfinite(nats) and math.isfinite(trained)):
        raise Refuted(found)
    return found


def _repeats_by_seed(bench: Bench) -> str:
    tokens_BT = bench.tokens(B=2)
    losses, states = [], []
    for _ in range(2):
        model = bench.model(seed=5, dropout=0.3).train()
        states.append(copy.deepcopy(model.state_dict()))
        torch.manual_seed(6)
        losses.append(Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.item())
    for name, tensor in states[0].items():
        if not torch.equal(tensor, states[1][name]):
            raise Refuted(f"{name} starts with other numbers for the same seed")
    if losses[0] != losses[1]:
        raise Refuted(f"the training loss is {losses[0]}, then {losses[1]} for the same seed")
    return f"{len(states[0])} tensors and the training loss"


def _is_its_state(bench: Bench) -> str:
    model = bench.shaken()
    other = bench.model(seed=7).eval()
    other.load_state_dict(model.state_dict())
    tokens_BT = bench.tokens(B=2)
    moved = how_far(bench.outputs(other, tokens_BT), bench.outputs(model, tokens_BT))
    if not moved <= EXACT:
        raise Refuted(f"a model with the same state dict answers otherwise, by {moved:.1e}")
    return f"another model with it answers the same ({moved:.0e})"


def _trains_as_it_is_tested(bench: Bench) -> str:
    model = bench.shaken()
    tokens_BT = bench.tokens(B=2)
    answer = bench.outputs(model, tokens_BT)
    training = copy.deepcopy(model).train()
    moved = how_far(bench.outputs(training, tokens_BT), answer)
    if not moved <= EXACT:
        raise Refuted(
            f"training mode differs from eval mode by {moved:.1e} with every *dropout* at 0"
        )
    dropping = bench.model(dropout=0.3).eval()
    dropping.load_state_dict(model.state_dict())
    moved = how_far(bench.outputs(dropping, tokens_BT), answer)
    if not moved <= EXACT:
        raise Refuted(f"dropout acts in eval mode, by {moved:.1e}")
    return "training without dropout is eval; eval is without dropout"


def _takes_any_shape(bench: Bench) -> str:
    model = bench.shaken()
    tokens_BT = bench.tokens(B=5)
    answer = bench.outputs(model, tokens_BT)
    largest = 0.0
    for T in bench.lengths():
        B = 1 + T % 5
        shorter = bench.outputs(model, tokens_BT[:B, :T])
        if shorter.shape[:2] != (B, T):
            raise Refuted(f"{B} x {T} tokens give {tuple(shorter.shape)}")
        if bench.scores_itself:
            if not shorter.isfinite().all():
                raise Refuted(f"not finite for {B} x {T} tokens")
            continue
        moved = how_far(shorter, answer[:B, :T])
        largest = max(largest, moved, key=nan_first)
        if not moved <= CLOSE:
            raise Refuted(f"the first {T} tokens alone give other logits, by {moved:.1e}")
    return f"T from 1 to {bench.config.max_len}, B from 1 to 5; prefixes agree to {largest:.0e}"


def _keeps_rows_apart(bench: Bench) -> str:
    tokens_BT = bench.tokens(B=3)
    others_BT = bench.others(tokens_BT)
    largest = 0.0
    for mode, model in bench.shaken_models():
        answer = bench.outputs(model, tokens_BT)
        for row in range(3):
            here = torch.arange(3)[:, None] == row
            mixed = bench.outputs(model, torch.where(here, tokens_BT, others_BT))
            cases = {"with other rows": (how_far(mixed[row], answer[row]), EXACT)}
            if not bench.scores_itself:  # its random numbers depend on the number of rows
                alone = bench.outputs(model, tokens_BT[row : row + 1])
                cases["alone"] = (how_far(alone[0], answer[row]), CLOSE)
            for case, (moved, allowed) in cases.items():
                largest = max(largest, moved, key=nan_first)
                if not moved <= allowed:
                    raise Refuted(f"row {row} {case} moves by {moved:.1e} in {mode} mode")
    return f"each of 3 rows with other rows and alone moves by {largest:.0e}"


def _sees_no_later_token(bench: Bench) -> str:
    if bench.scores_itself:
        raise Exempt("it has its own log_likelihood")
    tokens_BT = bench.tokens(B=3)
    cuts = bench.lengths()[:-1]
    largest, least = 0.0, math.inf
    for mode, model in bench.shaken_models():
        answer = bench.outputs(model, tokens_BT)
        for cut in cuts:
            others_BT = torch.cat([tokens_BT[:, :cut], bench.others(tokens_BT[:, cut:])], dim=1)
            changed = bench.outputs(model, others_BT)
            for t in range(cut):
                moved = how_far(changed[:, t], answer[:, t])
                largest = max(largest, moved, key=nan_first)
                if not moved <= EXACT:
                    raise Refuted(
                        f"position {t} moves by {moved:.1e} with the tokens from {cut} on, "
                        f"in {mode} mode"
                    )
            moved = how_far(changed[:, cut:], answer[:, cut:])
            least = min(least, moved)
            if not moved > CLOSE:
                raise Refuted(f"the tokens from {cut} on move nothing: the proof would be empty")
    return (
        f"{len(cuts)} cuts, 2 draws of weights, both modes: earlier positions move by "
        f"{largest:.0e}, later ones by {least:.0e} or more"
    )


def _has_one_head(bench: Bench) -> str:
    model = bench.shaken()
    if not has_hidden(model):
        raise Exempt("it has no hidden")
    if not isinstance(model._modules.get("head"), nn.Module):
        raise Refuted("hidden is there, but head is not a module")
    tokens_BT = bench.tokens(B=3)
    for mode in (model, copy.deepcopy(model).train()):
        with torch.no_grad():
            torch.manual_seed(1)
            answer = mode(tokens_BT)
            torch.manual_seed(1)
            x_BTC = mode.hidden(tokens_BT)
            moved = how_far(mode.head(x_BTC), answer)
            if not moved <= CLOSE:
                raise Refuted(f"head(hidden(t)) differs from forward(t) by {moved:.1e}")
            some_NC = x_BTC.flatten(0, 1)[1::3]
            alone = how_far(mode.head(some_NC), answer.flatten(0, 1)[1::3])
            if not alone <= CLOSE:
                raise Refuted(f"head does not map each position alone: {alone:.1e}")
    return f"head(hidden(t)) is forward(t) to {moved:.0e}; some rows alone to {alone:.0e}"


def _generates_as_it_reads(bench: Bench) -> str:
    from lmplay.model.cache import Cache

    model = bench.shaken()
    passes = {"forward": model}
    if has_hidden(model):  # what generation runs
        passes["head of hidden"] = lambda tokens_BT, cache: model.head(
            model.hidden(tokens_BT, cache)
        )
    if bench.scores_itself or not takes_cache(model):
        raise Exempt("it takes no cache, so generation reads from the start")
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
                    raise Exempt("it keeps nothing in the cache: generation reads from the start")
                cache.advance(end - start)
                moved = how_far(logits_BTV, answer[:, start:end])
                largest = max(largest, moved, key=nan_first)
                if not moved <= CLOSE:
                    raise Refuted(
                        f"{name} on a prompt of {prompt}, then one by one: position {end - 1} "
                        f"differs from the full pass by {moved:.1e}"
                    )
                start = end
    return f"prompts of 1 to {T} tokens, then one by one: as the full pass, to {largest:.0e}"


def _folds_without_a_trace(bench: Bench) -> str:
    model = bench.shaken()
    if not any_folds(model):
        raise Exempt("nothing folds")
    tokens_BT = bench.tokens(B=3)
    answer = bench.outputs(model, tokens_BT)
    plain = folded(model).eval()
    moved = how_far(bench.outputs(plain, tokens_BT), answer)
    if not moved <= EXACT:
        raise Refuted(f"folding moves the logits by {moved:.1e}")
    target = load_experiment(_folds_to(bench.experiment.entry))
    values = dataclasses.asdict(bench.config)
    shared = {key: values[key] for key in target.fields if key in values}
    deployed = target.model(target.config(**shared)).eval()
    deployed.load_state_dict(plain.state_dict())
    moved = how_far(bench.outputs(deployed, tokens_BT), answer)
    if not moved <= EXACT:
        raise Refuted(f"{target.name} with the folded weights moves the logits by {moved:.1e}")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, deployed))
    return f"{before:,} parameters become {target.name}'s {after:,}; logits move by {moved:.0e}"


def _folds_to(entry: catalog.Entry) -> catalog.Entry:
    """What the docstring says; for a stack, the stack of what its ideas fold to.

    A file may fold in some of its variants only, which the docstring of a stack cannot know.
    """
    named = re.search(r"^Folds to: ([\w+]+)\.$", entry.docstring, re.MULTILINE)
    if named is None:
        raise Refuted("its docstring has no line 'Folds to: <experiment>.'")
    if not entry.ideas:
        return catalog.named_in(entry, named[1])
    left = {}
    for idea in entry.ideas:
        model = Bench(load_experiment(idea)).model()
        plain = _folds_to(idea) if any_folds(model) else idea
        left[plain.path] = plain
    shared = catalog.parent_of(entry).path
    more = [e for e in left.values() if e.variant or (e.parent and e.path != shared)]
    return catalog.stacked(more or list(left.values())[:1])


def _trains_every_weight(bench: Bench) -> str:
    lesson = bench.lesson
    for name, weight in lesson.parameters.items():
        if not weight.requires_grad:
            raise Refuted(f"{name} does not require a gradient: make it a buffer")
        if name not in lesson.first_size:
            raise Refuted(f"{name} got no gradient in two steps")
        if not math.isfinite(lesson.largest_size[name]):
            raise Refuted(f"the gradient of {name} is not finite")
        if lesson.largest_size[name] == 0:
            raise Refuted(f"the gradient of {name} is zero in each of {GRADIENT_STEPS} steps")
    usual = statistics.median(lesson.largest_size.values())
    rounding = [name for name, size in lesson.largest_size.items() if size < 1e-6 * usual]
    found = f"{len(lesson.parameters)} gradients, all finite and none zero"
    if rounding:  # such as the bias of attention's keys, which softmax cancels
        found += f"; {len(rounding)} no larger than rounding, such as {rounding[0]}"
    return found


def _learns_a_batch(bench: Bench) -> str:
    lesson = bench.lesson
    found = f"{lesson.start:.2f} nats fall to {lesson.end:.2f} in {lesson.num_steps} steps of Adam"
    if not lesson.learned:
        raise Refuted(found)
    return found


def _predicts_the_next_token(bench: Bench) -> str:
    if bench.scores_itself:
        raise Exempt("it has its own log_likelihood")
    said = bench.lesson.said
    found = "; ".join(f"token {place}: {share:.0%}" for place, share in said.items())
    if said["t+1"] < 0.8:
        raise Refuted(f"after one batch was learned, position t says {found}")
    return f"position t says {found}"


_PROOFS: dict[str, Callable[[Bench], str]] = {
    "imports": _imports_torch_only,
    "changed from": _says_what_changed,
    "only weights": _holds_only_weights,
    "no float64": _has_no_float64,
    "placement": _follows_its_tokens,
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
_SAID = {"_local_scalar_dense": "item", "_unique2": "unique"}


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


class _Makers(TorchDispatchMode):
    """Refutes the first operation that makes a tensor on meta; notes what a GPU's host waits for.

    Args:
        file: the experiment's, whose line is named.
    """

    def __init__(self, file: str):
        super().__init__()
        self.file = file
        self.num_ops = 0
        self.waits: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.num_ops += 1
        name = func.overloadpacket.__name__
        name = _SAID.get(name, name)
        if any(isinstance(out, Tensor) and out.is_meta for out in tree_leaves(made)):
            lines = [f.lineno for f in traceback.extract_stack() if f.filename == self.file]
            where = f"line {lines[-1]}: " if lines else ""
            raise Refuted(f"{where}{name} makes a tensor on the CPU; give it device=x.device")
        has_mask = any(isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(args))
        is_read = torch.Tag.data_dependent_output in func.tags
        is_sized = torch.Tag.dynamic_output_shape in func.tags
        if is_read or (is_sized and (has_mask or name != "index")):
            self.waits.add(name)
        return made


def _holds_tensor(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds_tensor(part) for part in value)
    return isinstance(value, Tensor)
