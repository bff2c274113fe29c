"""The role of each parameter, found from what the forward pass does with it, never from names."""

from torch import nn

from lmplay.errors import UserError
from lmplay.model.abilities import has_groups
from lmplay.model.counts import traced
from lmplay.model.experiment import Experiment

ROLES = {
    "matrix": "multiplied with every position",
    "table": "of which rows are looked up",
    "head": "makes the logits; a tied table is one",
    "conv": "slides over positions",
    "vector": "all else: biases, gains, gates",
}


def roles_of(experiment: Experiment, config) -> dict[str, str]:
    """The role of every parameter by its name, each parameter once, as in `named_parameters`.

    A matrix has two dimensions above 1 at least: what maps to one number is a vector. What
    `Model.parameter_groups` says of a role goes first. A model that changes with progress is looked
    at where it begins, half way and at the end.

    Raises:
        UserError: `parameter_groups` has a key that it cannot have, or gives a parameter twice.
    """
    model, traces = traced(experiment, config, config.max_len)
    named = own_roles(model)
    return {
        name: named.get(id(parameter)) or _role(parameter, traces)
        for name, parameter in model.named_parameters()
    }


def looked_up(experiment: Experiment, config) -> set[str]:
    """Names of the parameters of which rows are looked up, those of a tied head among them."""
    model, traces = traced(experiment, config, config.max_len)
    tables = {number for trace in traces for number in trace.looked_up}
    return {name for name, parameter in model.named_parameters() if id(parameter) in tables}


def own_groups(model: nn.Module) -> list[dict]:
    """What the model's `parameter_groups` says, with only the parameters that are trained.

    Raises:
        UserError: a group has a key that it cannot have, or a parameter is in two of them.
    """
    groups, seen = [], set()
    for group in model.parameter_groups() if has_groups(model) else []:
        unknown = set(group) - {"params", "lr_scale", "weight_decay", "role"}
        if unknown:
            raise UserError(f"parameter_groups: unknown {sorted(unknown)}")
        params = [p for p in group["params"] if p.requires_grad]
        if seen & {id(p) for p in params}:
            raise UserError("parameter_groups: a parameter is in two groups", "give it once")
        seen |= {id(p) for p in params}
        groups.append({**group, "params": params})
    return groups


def own_roles(model: nn.Module) -> dict[int, str]:
    """Roles that the model itself names, by the parameter's id."""
    return {
        id(p): group["role"] for group in own_groups(model) if "role" in group
        for p in group["params"]
    }  # fmt: skip


def _role(parameter: nn.Parameter, traces: list) -> str:
    def is_in(name: str) -> bool:
        return any(id(parameter) in getattr(trace, name) for trace in traces)

    is_matrix = sum(size > 1 for size in parameter.shape) > 1
    if is_matrix and is_in("makes_logits"):
        return "head"
    if is_in("looked_up"):
        return "table"
    if is_in("convolved"):
        return "conv"
    return "matrix" if is_matrix and is_in("multiplied") else "vector"
