"""Proofs about a stack: each of its ideas is in it."""

from collections.abc import Iterable
from operator import methodcaller

import torch
from torch import Tensor, nn

from lmplay.catalog import entries as catalog
from lmplay.model.abilities import has_after_step, has_groups
from lmplay.model.experiment import load_experiment
from lmplay.model.objective import Objective
from lmplay.proofs.proof import Refuted
from lmplay.proofs.specimen import Specimen

# B rows, T positions


def holds_every_idea(specimen: Specimen) -> str:
    """A merge that swallowed an idea would be the stack of the others under a wrong name."""
    entry = specimen.experiment.entry
    before = Specimen.tiny(load_experiment(catalog.parent_of(entry))).model().state_dict().keys()
    tokens_BT = specimen.tokens(B=3)
    fresh = specimen.model().state_dict()
    # opened too: an idea may be turned off by numbers far from zero, such as shares of 0 and 1
    draws = [specimen.randomised().state_dict(), next(specimen.opened()).state_dict()]
    for idea in entry.ideas:
        own = Specimen.tiny(load_experiment(idea)).model().state_dict().keys()
        missing = {key for key in own - before - fresh.keys() if not _is_gone(key, before, fresh)}
        if missing:
            raise Refuted(f"{idea.name}'s {min(missing)} is not in the stack")
        rest = catalog.stacked([other for other in entry.ideas if other is not idea])
        without = Specimen.tiny(load_experiment(rest))
        if not any(_tells_apart(specimen, without, weights, tokens_BT) for weights in draws):
            raise Refuted(f"without {idea.name} it would do the same")
    names = ", ".join(idea.name for idea in entry.ideas)
    return f"{names}: their parameters are there, and without any of them it does something else"


def _is_gone(key: str, before: Iterable[str], fresh: Iterable[str]) -> bool:
    """Whether another idea took away where the parameter is, or what it is, or moved it.

    Such as one of the blocks, a gate of the MLP that the experts are copies of, or that MLP.
    """
    names = key.split(".")
    own = methodcaller("endswith", "." + ".".join(names[-2:]))
    if any(map(own, fresh)) and not any(map(own, before)):
        return True  # it is there, in a module that another idea put around its own
    modules = tuple(".".join(names[:depth]) + "." for depth in range(1, len(names)))
    layers = tuple("." + ".".join(names[depth:]) for depth in range(1, len(names) - 1))
    return any(
        any(map(is_of, before)) and not any(map(is_of, fresh))
        for is_of in (
            *(methodcaller("startswith", module) for module in modules),
            *(methodcaller("endswith", layer) for layer in layers),
        )
    )


def _tells_apart(stack: Specimen, without: Specimen, weights: dict, tokens_BT: Tensor) -> bool:
    """Whether the two differ with the same weights, or in how a weight starts or is trained.

    New parameters move the start of no other.
    """
    acts = [_acts(specimen, weights, tokens_BT) for specimen in (stack, without)]
    if any(not torch.equal(a, b) for a, b in zip(*acts, strict=True)):
        return True
    models = [specimen.model() for specimen in (stack, without)]
    mine, theirs = (_settings(model) for model in models)
    starts = [model.state_dict() for model in models]
    shared = starts[0].keys() & starts[1].keys()
    if any(mine.get(name) != theirs.get(name) for name in shared):
        return True
    return any(not torch.equal(starts[0][name], starts[1][name]) for name in shared)


def _settings(model: nn.Module) -> dict[str, dict]:
    """What a model asks the optimizer to do with its parameters."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = model.parameter_groups() if has_groups(model) else []
    return {
        names[id(weight)]: {key: value for key, value in group.items() if key != "params"}
        for group in groups
        for weight in group["params"]
    }


def _acts(specimen: Specimen, weights: dict, tokens_BT: Tensor) -> list[Tensor]:
    """Outputs, what training minimises, and outputs after an update, with the weights that fit."""
    model = specimen.model(dropout=0.3).eval()
    own = model.state_dict()
    fitting = {k: w for k, w in weights.items() if k in own and own[k].shape == w.shape}
    model.load_state_dict(fitting, strict=False)
    outputs = specimen.outputs(model, tokens_BT)
    torch.manual_seed(1)
    loss = Objective(model.train())(tokens_BT, tokens_BT.roll(-1, 1)).objective.detach()
    if has_after_step(model):
        model.after_step()
    return [outputs, loss, specimen.outputs(model.eval(), tokens_BT)]
