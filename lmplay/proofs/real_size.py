"""Proofs at a run's own size besides those of leaks: once, of a model that is not trained yet."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lmplay.model.abilities import (
    any_folds,
    has_groups,
    has_hidden,
    scores_itself,
    set_progress,
    takes_cache,
    trains_by_itself,
)
from lmplay.model.cache import Cache
from lmplay.model.folding import folded
from lmplay.model.objective import IGNORE, Objective
from lmplay.proofs.dependence import refuse_not_finite
from lmplay.proofs.leaks import is_finite, keeps_rows_apart
from lmplay.proofs.learning import refuse_wrong_groups
from lmplay.proofs.passes import MOST_LOGITS, SOME_ROWS, Passes
from lmplay.proofs.proof import CLOSE, EXACT, Exempt, Refuted, how_far
from lmplay.proofs.specimen import randomise, unchanged, without_dropout
from lmplay.proofs.state import marks_of, refuse_changes
from lmplay.proofs.weights import refuse_wrong_weights

# B rows, T positions

STEPS, MANY_STEPS = 6, 64  # behind a cached prompt
SHORT = 32  # tokens of a row whose gradients are compared
ROUNDED = 1e-5  # of the largest gradient: less may be of a weight that norms take back
ROUNDING = 1e-6  # of a sum in fp32, against its size
TRIES = 3  # of other models, where a weight gets no gradient


def trains_at_its_length(passes: Passes) -> str:
    """All gradients are finite, and what short rows give more than rounding, long ones move too.

    Every weight has one.
    """
    T = passes.tokens_BT.shape[1]
    long, short = (passes.gradients(2, length) for length in (T, min(T, SHORT)))
    least = ROUNDED * max(size or 0.0 for size in short.values())
    for name, size in long.items():
        if size is not None and not math.isfinite(size):
            raise Refuted(f"the gradient of {name} is not finite", unless=("any shape",))
        if not size and (short[name] or 0.0) > least:
            raise Refuted(f"{name} gets a gradient from {SHORT} tokens in a row, but not from {T}")
    if missing := _without_gradient(passes, [name for name, size in long.items() if size is None]):
        raise Refuted(f"{missing[0]} gets no gradient at this size", unless=("any shape",))
    return f"{len(long)} gradients of rows of {T} tokens are finite"


def _without_gradient(passes: Passes, names: list[str]) -> list[str]:
    """Of these weights, those that have none in another model either, wherever in a run."""
    for number in range(2, 2 + TRIES if names else 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            model = passes.experiment.model(passes.config, seed=number)
            randomise(model.to(passes.device))
        set_progress(model, (number % 3) / 2)
        B, T = passes.tokens_BT.shape
        sizes = passes.again(model=model).gradients(B, T)
        names = [name for name in names if sizes[name] is None]
    return names


def folds_without_a_trace(passes: Passes) -> str:
    if not any_folds(passes.model):
        raise Exempt("nothing folds")
    tokens_BT = passes.tokens_BT[:1]
    with torch.no_grad(), unchanged(passes.model):
        models = passes.model.eval(), folded(passes.model).eval()
        answer, plain = (model(tokens_BT).float() for model in models)
    moved = how_far(plain, answer)
    if not passes.is_close(moved):
        raise Refuted(f"folding moves the logits by {moved:.1e}", unless=("any shape", "repeat"))
    return f"folding moves the logits by {moved:.0e}"


def takes_shorter_rows(passes: Passes) -> str:
    """Some lengths up to the whole; finite in eval mode too."""
    is_finite(passes)
    tokens_BT = passes.tokens_BT[:1]
    T = tokens_BT.shape[1]
    if scores_itself(passes.model):
        return "all positions are finite"
    refuse_not_finite(passes.plain)
    answer = passes.plain[:1]
    largest = 0.0
    lengths = {T // 2, T // 2 + 1, T // 3, 5}
    for length in sorted(length for length in lengths if 0 < length <= T):
        moved = how_far(passes.read_plainly(tokens_BT[:, :length]), answer[:, :length])
        largest = max(largest, moved)
        if not passes.is_close(moved):
            raise Refuted(
                f"the first {length} of {T} tokens alone give another answer, by {moved:.1e}",
                unless=("causal", "rows apart", "repeat", "modes"),
            )
    return f"some prefixes of {T} tokens agree to {largest:.0e}"


def generates_as_it_reads(passes: Passes) -> str:
    """A long prompt, then one token at a time."""
    model = passes.model
    if scores_itself(model) or not takes_cache(model):
        raise Exempt("it takes no cache, so generation reads from the start")
    tokens_BT = passes.tokens_BT[:2]
    T = tokens_BT.shape[1]
    largest = 0.0
    # across a border of chunks, to the end, from a border on, and a long way
    prompts = {T // 2 - STEPS // 2: STEPS, T - STEPS: STEPS, T // 2: 2, 4: MANY_STEPS}
    prompts = {prompt: steps for prompt, steps in prompts.items() if 0 < prompt < T}
    for prompt, steps in prompts.items():
        cache, start = Cache(), 0
        for end in range(prompt, min(T, prompt + steps) + 1):
            x_BTC = passes.read_plainly(tokens_BT[:, start:end], cache)
            if not cache.used:
                raise Exempt("it keeps nothing in the cache: generation reads from the start")
            cache.advance(end - start)
            moved = how_far(x_BTC, passes.plain[:, start:end])
            largest = max(largest, moved)
            if not passes.is_close(moved):
                raise Refuted(
                    f"a prompt of {prompt}, then one by one: position {end - 1} differs from the "
                    f"full pass by {moved:.1e}",
                    unless=("causal", "rows apart", "modes", "any shape"),
                )
            start = end
    said = ", ".join(map(str, sorted(prompts)))
    return f"prompts of {said} tokens, then one by one: to {largest:.0e}"


def keeps_rows_and_their_objective_apart(passes: Passes) -> str:
    """What training minimises for some rows is the same beside others and without them."""
    found = keeps_rows_apart(passes)
    if passes.minimises_what_is_reported:
        return found
    tokens_BT = passes.tokens_BT[:SOME_ROWS]
    B = len(tokens_BT)
    kept = B // 2
    kept_BT = tokens_BT[:kept]
    mixed_BT = torch.cat([kept_BT, passes.mixed_BT[kept - B :]])
    is_kept_B1 = torch.arange(B, device=passes.device)[:, None] < kept

    def minimised(rows_BT: Tensor, scored_B1: Tensor | None = None, seed: int = 0) -> Tensor:
        """All of it, and what the ruler does not know."""
        targets_BT = rows_BT.roll(-1, 1)
        if scored_B1 is not None:
            targets_BT = targets_BT.masked_fill(~scored_B1, IGNORE)
        whole, rulers = passes.again(seed=seed).minimised(rows_BT, targets_BT)
        return torch.tensor([whole, whole - rulers], dtype=torch.float64)

    first, rest = minimised(tokens_BT, is_kept_B1), minimised(tokens_BT, ~is_kept_B1)
    pairs = {
        "beside other rows": (minimised(mixed_BT, is_kept_B1), first),
        "where all are scored": (minimised(tokens_BT), first + rest),
    }
    alone = minimised(kept_BT)
    if torch.equal(alone, minimised(kept_BT, seed=1)):  # else by how many rows it draws
        pairs["alone"] = (alone, first)
    for how, (here, wanted) in pairs.items():
        most = CLOSE * wanted[1].abs() + ROUNDING * wanted[0].abs()
        if not (here[1] - wanted[1]).abs() <= most:
            raise Refuted(
                f"what training minimises for {kept} of {B} rows is {here[0]:.4f} {how}, "
                f"not {wanted[0]:.4f}",
                unless=("any shape",),
            )
    return f"{found}; so does what training minimises"


def asks_for_the_first_target(passes: Passes) -> str:
    """A loss of its own looks at the first target of long rows, if it does so in short ones."""
    if not trains_by_itself(passes.model):
        raise Exempt("it has no training_loss")
    T = passes.tokens_BT.shape[1]

    def moves(length: int) -> bool:
        tokens_BT = passes.tokens_BT[:, :length]
        targets_BT = tokens_BT.roll(-1, 1)
        others_BT = targets_BT.clone()
        others_BT[:, 0] = (others_BT[:, 0] + 1) % passes.vocab_size
        asked = (targets_BT, others_BT)
        before, after = (passes.minimised(tokens_BT, targets)[0] for targets in asked)
        return before != after

    if moves(min(T, SHORT)) and not moves(T):
        raise Refuted(f"the first target counts in rows of {SHORT} tokens, but not of {T}")
    return f"the first target counts in rows of {T} tokens"


def keeps_nothing(passes: Passes) -> str:
    """As at tiny size, of one pass in each mode."""
    model, module = passes.model, passes.experiment.module
    for training, where in ((False, "in eval mode"), (True, "in training mode")):
        with unchanged(model), torch.set_grad_enabled(training):
            buffers = {} if training else dict(model.named_buffers())
            kept = {name: buffer.clone() for name, buffer in buffers.items()}
            objective = Objective(model).train(training)
            before = marks_of(model, module, with_state=False)
            objective(passes.tokens_BT[:1], passes.tokens_BT[:1].roll(-1, 1))
            refuse_changes(before, marks_of(model, module, with_state=False), where)
            for name, buffer in kept.items():
                if not torch.equal(buffers[name], buffer):
                    raise Refuted(f"{name} is not the same after a pass {where}")
    return f"{len(before)} attributes and globals stay the same"


def trains_as_it_is_tested(passes: Passes) -> str:
    """No random numbers in eval mode, and without any, training is the same but for buffers."""
    if scores_itself(passes.model):
        raise Exempt("it has its own log_likelihood")
    tokens_BT, other = passes.tokens_BT[:1], passes.again(seed=passes.seed + 1)
    tested, again = (p.read(tokens_BT, False)[0] for p in (passes, other))
    if not (moved := how_far(again, tested)) <= EXACT:
        unless = ("any shape",) if math.isnan(moved) else ()
        raise Refuted(f"random numbers move it by {moved:.1e} in eval mode", unless=unless)
    with without_dropout(passes.model):
        trained, again = (p.read(tokens_BT, True)[0] for p in (passes, other))
    if not torch.equal(trained, again) or next(passes.model.buffers(), None) is not None:
        return "no random numbers are drawn in eval mode"
    if not passes.is_close(moved := how_far(trained, tested)):
        raise Refuted(
            f"training mode differs from eval mode by {moved:.1e}",
            unless=("causal", "rows apart", "any shape"),
        )
    return f"training without dropout is eval, to {moved:.0e}"


def has_one_head(passes: Passes) -> str:
    """forward gives what the head gives of hidden."""
    model, tokens_BT = passes.model, passes.tokens_BT[:1]
    if not has_hidden(model):
        raise Exempt("it has no hidden")
    if tokens_BT.numel() * passes.vocab_size > MOST_LOGITS:
        raise Exempt("the logits of a row are too many")
    with torch.no_grad(), unchanged(model):
        model.eval()
        answer = model(tokens_BT)
        moved = how_far(model.head(model.hidden(tokens_BT)), answer)
    if not passes.is_close(moved):
        raise Refuted(
            f"head(hidden(t)) differs from forward(t) by {moved:.1e}",
            unless=("modes", "any shape"),
        )
    return f"head(hidden(t)) is forward(t) to {moved:.0e}"


def holds_sound_weights(passes: Passes) -> str:
    refuse_wrong_weights(passes.model)
    return "no two share their numbers"


def is_grouped_soundly(passes: Passes) -> str:
    if not has_groups(passes.model):
        raise Exempt("it has no groups of its own")
    return f"{refuse_wrong_groups(passes.model)} parameters in groups of their own"


def _watched(name: str, found: str) -> Callable[[Passes], str]:
    def is_not_caught(passes: Passes) -> str:
        if why := passes.watched[name]:
            raise Refuted(f"in a pass of training, {why}")
        return found

    return is_not_caught


REAL_SIZE = {
    "imports": _watched("imports", "no file is opened"),
    "only weights": holds_sound_weights,
    "no float64": _watched("no float64", "none in a pass of training"),
    "placement": _watched("placement", "all tensors are made where the tokens are"),
    "any shape": takes_shorter_rows,
    "rows apart": keeps_rows_and_their_objective_apart,
    "repeat": keeps_nothing,
    "modes": trains_as_it_is_tested,
    "head": has_one_head,
    "cache": generates_as_it_reads,
    "gradients": trains_at_its_length,
    "shift": asks_for_the_first_target,
    "optimizer": is_grouped_soundly,
    "fold": folds_without_a_trace,
}
