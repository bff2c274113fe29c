"""Proofs about training: finite at the start, every weight is reached, one batch is learned."""

import copy
import math
import statistics

import torch
from torch import nn

from lmplay.model.abilities import (
    has_groups,
    has_own_objective,
    has_terms,
    scores_itself,
    trains_by_itself,
)
from lmplay.model.objective import IGNORE, Objective
from lmplay.proofs.overfit import GRADIENT_STEPS, MOST_SEEDS
from lmplay.proofs.proof import EXACT, Exempt, Refuted, how_far
from lmplay.proofs.specimen import Specimen

# B rows, T positions, V vocabulary


def starts_finite(specimen: Specimen) -> str:
    model = specimen.model()
    tokens_BT, V = specimen.tokens(B=4), specimen.config.vocab_size
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
    if has_own_objective(model):
        found += f"; what training minimises {trained:.3f}"
    if not (math.isfinite(nats) and math.isfinite(trained)):
        raise Refuted(found)
    return found


def begins_with_the_ruler(specimen: Specimen) -> str:
    """The first term is what is reported, so that a curve of the loss means the same for all."""
    model = specimen.randomised()
    if not has_terms(model):
        raise Exempt("it has no loss_terms")
    tokens_BT = specimen.tokens(B=2)
    targets_BT = tokens_BT.roll(-1, 1)
    Objective(model).train()(tokens_BT, targets_BT)  # which refuses what breaks the contract
    torch.manual_seed(1)
    terms = copy.deepcopy(model).loss_terms(tokens_BT, targets_BT)
    torch.manual_seed(1)
    moved = how_far(terms[0]["x"], model.hidden(tokens_BT))
    if not moved <= EXACT:
        raise Refuted(f"the first term's x differs from hidden by {moved:.1e}", unless=("repeat",))
    return f"{len(terms)} terms, the first as hidden and head give it"


def trains_every_weight(specimen: Specimen) -> str:
    overfit = specimen.overfit
    for name, weight in overfit.parameters.items():
        if not weight.requires_grad:
            raise Refuted(f"{name} does not require a gradient: make it a buffer")
        if name not in overfit.largest_size:
            raise Refuted(f"{name} got no gradient in {GRADIENT_STEPS} steps")
        if not math.isfinite(overfit.largest_size[name]):
            raise Refuted(f"the gradient of {name} is not finite")
        if overfit.largest_size[name] == 0:
            raise Refuted(
                f"the gradient of {name} is zero in each of {GRADIENT_STEPS} steps, with "
                f"{MOST_SEEDS} seeds; if it is an expert that no token reaches, put fewer into TINY"
            )
    usual = statistics.median(overfit.largest_size.values())
    rounding = [name for name, size in overfit.largest_size.items() if size < 1e-6 * usual]
    found = f"{len(overfit.parameters)} gradients, all finite and none zero"
    if rounding:  # such as the bias of attention's keys, which softmax cancels
        found += f"; {len(rounding)} no larger than rounding, such as {rounding[0]}"
    return found


def can_be_optimised(specimen: Specimen) -> str:
    """Its groups name parameters of the model, each once, and what an optimizer takes."""
    model = specimen.model()
    num_claimed = refuse_wrong_groups(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    tokens_BT = specimen.tokens(B=2)
    Objective(model.train())(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
    optimizer.step()
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise Refuted(
                f"{name} is not finite after a step of AdamW", unless=("gradients", "loss at start")
            )
    return f"{num_claimed} parameters in groups of their own; a step of AdamW can be taken"


def refuse_wrong_groups(model: nn.Module) -> int:
    """How many parameters are in groups of their own.

    Raises:
        Refuted: a group is empty, says what nobody knows, never learns, or has what another has.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    claimed: dict[int, str] = {}
    groups = [g | {"params": [*g["params"]]} for g in _groups(model)]
    if [[*map(id, g["params"])] for g in groups] != [
        [*map(id, g["params"])] for g in _groups(model)
    ]:
        raise Refuted("parameter_groups gives others when it is asked again")
    for number, group in enumerate(groups):
        if unknown := group.keys() - {"params", "role", "lr_scale", "weight_decay"}:
            raise Refuted(f"group {number} has an unknown {min(unknown)!r}")
        if not group["params"]:
            raise Refuted(f"group {number} is empty: does a name that it looks for not exist?")
        if not 0 < group.get("lr_scale", 1.0) < math.inf:
            raise Refuted(f"group {number} has lr_scale={group['lr_scale']}: it would never learn")
        if not 0 <= group.get("weight_decay", 0.0) < math.inf:
            raise Refuted(f"group {number} has weight_decay={group['weight_decay']}")
        for weight in group["params"]:
            if id(weight) not in names:
                raise Refuted(f"group {number} has what is no parameter of the model")
            if id(weight) in claimed:
                raise Refuted(f"{names[id(weight)]} is in two groups")
            claimed[id(weight)] = names[id(weight)]
    return len(claimed)


def _groups(model: nn.Module) -> list[dict]:
    return model.parameter_groups() if has_groups(model) else []


def learns_a_batch(specimen: Specimen) -> str:
    overfit = specimen.overfit
    found = (
        f"{overfit.start:.2f} nats fall to {overfit.end:.2f} in {overfit.num_steps} steps of Adam"
    )
    if not overfit.learned:
        raise Refuted(found, unless=("any shape", "gradients"))
    return found


def predicts_the_next_token(specimen: Specimen) -> str:
    if specimen.scores_itself:
        raise Exempt("it has its own log_likelihood")
    said = specimen.overfit.said
    found = "; ".join(f"token {place}: {share:.0%}" for place, share in said.items())
    if said["t+1"] < 0.8:
        raise Refuted(
            f"after one batch was learned, position t says {found}",
            unless=("causal", "learns", "any shape"),
        )
    return f"position t says {found}"
