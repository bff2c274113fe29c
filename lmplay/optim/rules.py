"""From a plan's optimizer to who trains each parameter, at which rate and decay."""

from dataclasses import dataclass, field

from torch import nn

from lmplay.errors import UserError, nearest
from lmplay.model.roles import ROLES, own_groups
from lmplay.optim.known import REST, KnownOptimizer, find
from lmplay.plan import Optimizer


@dataclass(frozen=True)
class Rule:
    """Who trains the parameters of a role."""

    role: str
    key: str  # of the plan, for messages
    known: KnownOptimizer
    lr: float
    weight_decay: float
    is_for_vectors: bool  # the decay was given for this very role, so it falls on vectors too
    options: dict


@dataclass
class Group:
    """Parameters that are trained alike."""

    rule: Rule
    lr_scale: float  # of the model's own wish
    weight_decay: float
    params: list[nn.Parameter] = field(default_factory=list)

    @property
    def lr(self) -> float:
        """The rate at the top of the schedule."""
        return self.rule.lr * self.lr_scale


def rule_of(wanted: Optimizer, role: str) -> Rule:
    """What a plan's optimizer says of one role.

    A role that the optimizer does not take is trained by the one that it names for the rest.

    Raises:
        UserError: there is no optimizer of that name.
    """
    main, own = find(wanted.name, "optimizer.name"), wanted.roles.get(role)
    key = "optimizer" if own is None else f"optimizer.roles.{role}"
    name = own.name if own is not None else None
    is_rest = name is None and not main.takes_role(role)
    if name is None:
        name = main.rest if is_rest else main.name
    options = REST if is_rest else wanted.options if name == main.name else {}
    if own is not None:
        options = options | own.options
    is_own = own is not None and own.weight_decay is not None
    lr = wanted.lr * (main.rest_lr if is_rest else 1.0)
    return Rule(
        role,
        key,
        find(name, f"{key}.name"),
        lr if own is None or own.lr is None else own.lr,
        own.weight_decay if is_own else wanted.weight_decay,
        is_own,
        options,
    )


def groups_of(wanted: Optimizer, model: nn.Module, roles: dict[str, str]) -> list[Group]:
    """The trained parameters of a model, each in one group; frozen ones are in none.

    Weight decay falls on parameters of two dimensions or more, unless the plan gives one for the
    role, or the model's `parameter_groups` one for the parameter.

    Args:
        roles: of every parameter, by its name.
    Raises:
        UserError: a rule is for a role that no parameter has, or a role that the model itself
            names has no rule.
    """
    _refuse_other_roles(wanted, roles)
    asked = {id(p): group for group in own_groups(model) for p in group["params"]}
    rules = {role: rule_of(wanted, role) for role in roles.values()}
    groups: dict[tuple, Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own, rule = asked.get(id(parameter), {}), rules[roles[name]]
        decays = rule.is_for_vectors or parameter.dim() > 1
        decay = own.get("weight_decay", rule.weight_decay if decays else 0.0)
        key = (rule.role, own.get("lr_scale", 1.0), decay)
        groups.setdefault(key, Group(rule, *key[1:])).params.append(parameter)
    given = sorted(id(p) for group in groups.values() for p in group.params)
    assert given == sorted(id(p) for p in model.parameters() if p.requires_grad)
    return list(groups.values())


def _refuse_other_roles(wanted: Optimizer, roles: dict[str, str]) -> None:
    found = sorted(set(roles.values()))
    for role in wanted.roles:
        if role not in found:
            known = "" if role in ROLES else nearest(role, [*ROLES, *found])
            raise UserError(
                f"optimizer.roles.{role}: the model has no parameter of the role {role!r}",
                hint=f"{known}it has {', '.join(found)}; --describe shows whose each is",
            )
    for name, role in roles.items():
        if role not in ROLES and role not in wanted.roles:
            raise UserError(
                f"the experiment gives {name} the role {role!r}, for which the plan has no rule",
                hint=f"such as --set optimizer.roles.{role}.lr={wanted.lr:g}",
            )
