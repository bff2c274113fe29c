"""Proofs that two ways give one answer: by hidden and head, by cache, without dropout, folded."""

import copy
import dataclasses

import torch
from torch import nn

from lmplay.catalog import entries as catalog
from lmplay.catalog.entry import Entry
from lmplay.model.abilities import any_folds, has_hidden, takes_cache
from lmplay.model.cache import Cache
from lmplay.model.experiment import load_experiment
from lmplay.model.folding import folded
from lmplay.proofs.proof import CLOSE, EXACT, Exempt, Refuted, how_far, nan_first
from lmplay.proofs.specimen import Specimen

# B rows, T positions, N positions in a line, C model width


def trains_as_it_is_tested(specimen: Specimen) -> str:
    model = specimen.randomised()
    tokens_BT = specimen.tokens(B=2)
    answer = specimen.outputs(model, tokens_BT)
    training = copy.deepcopy(model).train()
    trained = specimen.outputs(training, tokens_BT, moves_buffers=True)
    after = specimen.outputs(training.eval(), tokens_BT)  # by the buffers that the pass has moved
    moved = min(how_far(trained, answer), how_far(trained, after))
    if not moved <= EXACT:
        names = ", ".join(specimen.dropouts) or "no field of Config"
        raise Refuted(
            f"training mode differs from eval mode by {moved:.1e} with dropout ({names}) at 0",
            unless=("repeat", "any shape"),
        )
    if not specimen.scores_itself and specimen.draws(model, tokens_BT):
        raise Refuted("it draws random numbers in eval mode")
    dropping = specimen.model(dropout=0.3).eval()
    dropping.load_state_dict(model.state_dict())
    moved = how_far(specimen.outputs(dropping, tokens_BT), answer)
    if not moved <= EXACT:
        raise Refuted(f"dropout acts in eval mode, by {moved:.1e}", unless=("repeat", "any shape"))
    return "training without dropout is eval; eval is without dropout"


def has_one_head(specimen: Specimen) -> str:
    model = specimen.randomised()
    if not has_hidden(model):
        raise Exempt("it has no hidden")
    if not isinstance(model._modules.get("head"), nn.Module):
        raise Refuted("hidden is there, but head is not a module")
    tokens_BT = specimen.tokens(B=3)
    for mode in (model, copy.deepcopy(model).train()):
        with torch.no_grad():
            torch.manual_seed(1)
            answer = copy.deepcopy(mode)(tokens_BT)  # a pass may move buffers
            torch.manual_seed(1)
            x_BTC = mode.hidden(tokens_BT)
            moved = how_far(copy.deepcopy(mode).head(x_BTC), answer)
            if not moved <= CLOSE:
                raise Refuted(f"head(hidden(t)) differs from forward(t) by {moved:.1e}")
            some_NC = x_BTC.flatten(0, 1)[1::3]
            alone = how_far(mode.head(some_NC), answer.flatten(0, 1)[1::3])
            if not alone <= CLOSE:
                raise Refuted(f"head does not map each position alone: {alone:.1e}")
    return f"head(hidden(t)) is forward(t) to {moved:.0e}; some rows alone to {alone:.0e}"


def generates_as_it_reads(specimen: Specimen) -> str:
    model = specimen.randomised()
    passes = {"forward": model}
    if has_hidden(model):  # what generation runs
        passes["head of hidden"] = lambda tokens_BT, cache: model.head(
            model.hidden(tokens_BT, cache)
        )
    if specimen.scores_itself or not takes_cache(model):
        raise Exempt("it takes no cache, so generation reads from the start")
    tokens_BT = specimen.tokens(B=2)
    T = specimen.config.max_len
    answer = specimen.outputs(model, tokens_BT)
    largest = 0.0
    for prompt in range(1, T + 1):
        name, run = list(passes.items())[prompt % len(passes)]
        cache, start = Cache(), 0
        last = T if prompt <= 2 else min(T, prompt + 2)
        for end in range(prompt, last + 1):
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
                    f"differs from the full pass by {moved:.1e}",
                    unless=("causal", "repeat", "modes", "any shape"),
                )
            start = end
    return f"prompts of 1 to {T} tokens, then one by one: as the full pass, to {largest:.0e}"


def folds_without_a_trace(specimen: Specimen) -> str:
    model = specimen.randomised()
    if not any_folds(model):
        raise Exempt("nothing folds")
    tokens_BT = specimen.tokens(B=3)
    answer = specimen.outputs(model, tokens_BT)
    plain = folded(model).eval()
    moved = how_far(specimen.outputs(plain, tokens_BT), answer)
    if not moved <= EXACT:
        raise Refuted(f"folding moves the logits by {moved:.1e}")
    target = load_experiment(folds_to(specimen.experiment.entry))
    values = dataclasses.asdict(specimen.config)
    shared = {key: values[key] for key in target.fields if key in values}
    deployed = target.model(target.config(**shared)).eval()
    deployed.load_state_dict(plain.state_dict())
    moved = how_far(specimen.outputs(deployed, tokens_BT), answer)
    if not moved <= EXACT:
        raise Refuted(f"{target.name} with the folded weights moves the logits by {moved:.1e}")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, deployed))
    return f"{before:,} parameters become {target.name}'s {after:,}; logits move by {moved:.0e}"


def folds_to(entry: Entry) -> Entry:
    """What the docstring says; for a stack, the stack of what its ideas fold to.

    A file may fold in some of its variants only, which the docstring of a stack cannot know.
    """
    if entry.folds_to is None:
        raise Refuted("its docstring has no line 'Folds to: <experiment>.'")
    if not entry.ideas:
        return catalog.named_in(entry, entry.folds_to)
    left = {}
    for idea in entry.ideas:
        model = Specimen.tiny(load_experiment(idea)).model()
        plain = folds_to(idea) if any_folds(model) else idea
        left[plain.path] = plain
    shared = catalog.parent_of(entry).path
    more = [e for e in left.values() if e.variant or (e.parent and e.path != shared)]
    return catalog.stacked(more or list(left.values())[:1])
