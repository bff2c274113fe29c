"""Several optimizers behind one object with the interface of one of torch's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmplay.model.roles import roles_of
from lmplay.optim.known import KNOWN
from lmplay.optim.momentum import momentum_at, set_momentum
from lmplay.optim.registry import build, is_maskable
from lmplay.optim.rules import Group, groups_of
from lmplay.optim.schedules import decay_left
from lmplay.plan import Optimizer
from lmplay.run.run import Run


class JointOptimizer:
    """Optimizers that take their steps together, each over some of the parameters.

    Each of its groups has `full_lr`, its rate at the top of the schedule but for `lr_scale`; the
    rate of a step is set by `set_factor`, what else changes over a run by `set_progress`. What
    unscales gradients, as a GradScaler, sees one optimizer, so that there is one decision whether a
    step is taken.

    Args:
        members: of torch's kind; no parameter is in two of them.
        decay_schedule: of the plan.
    """

    def __init__(self, members: list[torch.optim.Optimizer], decay_schedule: str = "constant"):
        self.members = members
        self.decay_schedule = decay_schedule
        self._maskable = [is_maskable(member) for member in members]

    @property
    def param_groups(self) -> list[dict]:
        """The groups of all members, one behind the other."""
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> dict[Tensor, dict]:
        """What each parameter's optimizer remembers of it."""
        return {p: state for member in self.members for p, state in member.state.items()}

    def set_factor(self, factor: float) -> None:
        """Give every group its own rate times the schedule's factor."""
        for group in self.param_groups:
            group["lr"] = group["full_lr"] * factor * group["lr_scale"]

    def set_progress(self, progress: float) -> None:
        """Tell every group the share of the run's tokens that was trained on before the step."""
        left = decay_left(self.decay_schedule, progress)
        for group in self.param_groups:
            group["progress"] = progress
            if "weight_decay" in group:
                group["weight_decay"] = group["full_decay"] * left
            if "momentum_ramp" in group:
                set_momentum(group, momentum_at(group["momentum_ramp"], progress))

    @property
    def local_parameters(self) -> set[Tensor]:
        """Those whose optimizer wants each process's own gradient, which nobody has averaged."""
        groups = [g for g in self.param_groups if KNOWN[g["optimizer"]].local_gradients]
        return {p for group in groups for p in group["params"]}

    @property
    def needs_curvature(self) -> bool:
        """Whether the next step needs an estimate of the curvature."""
        return any(each.needs_curvature for each in self._curved())

    def take_curvature(self, of_each: dict[Tensor, Tensor]) -> None:
        """An estimate of the curvature's diagonal for the next step, by parameter."""
        for each in self._curved():
            each.take_curvature(of_each)

    def _curved(self) -> list:
        plain = [getattr(member, "base", member) for member in self.members]
        return [each for each in plain if hasattr(each, "take_curvature")]

    def step(self) -> None:
        """Take one step of all members."""
        for member in self.members:
            member.step()

    def step_if(self, wanted: Tensor) -> None:
        """Take a step where `wanted`, a flag on the device, is true; else nothing changes.

        Members with fused kernels read the flag on the device; for the others the host waits.
        """
        for member, heeds in zip(self.members, self._maskable, strict=True):
            # fused SGD leaves its momentum unset where the very first step is masked
            is_unset = member.defaults.get("momentum") and not member.state
            if heeds and not is_unset:
                member.found_inf = (~wanted).float()  # read by the fused kernels
                member.step()
            elif wanted:
                member.step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While entered, parameters have the values that their optimizer would be judged by.

        Those of Schedule-Free are an average of what training leaves, to the bit, when this ends.
        """
        members = [member for member in self.members if hasattr(member, "eval")]
        for member in members:
            member.eval()
        try:
            yield
        finally:
            for member in members:
                member.train()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        for member in self.members:
            member.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """The state in the shape of torch's: parameters are numbered through all members."""
        state, groups, first = {}, [], 0
        for member in self.members:
            own = member.state_dict()
            state |= {first + index: values for index, values in own["state"].items()}
            for group in own["param_groups"]:
                groups.append({**group, "params": [first + index for index in group["params"]]})
            first += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up a state that `state_dict` made of the same groups; the parameters are loaded.

        Raises:
            ValueError: the groups are others.
        """
        mine, theirs = self.param_groups, state_dict["param_groups"]
        if list(map(_signature, mine)) != list(map(_signature, theirs)):
            raise ValueError("the state belongs to other groups of parameters")
        groups, first = iter(state_dict["param_groups"]), 0
        for member in self.members:
            own = [next(groups) for _ in member.param_groups]
            last = first + sum(len(group["params"]) for group in own)
            member.load_state_dict(
                {
                    "state": {
                        index - first: values
                        for index, values in state_dict["state"].items()
                        if first <= index < last
                    },
                    "param_groups": [
                        {**group, "params": [index - first for index in group["params"]]}
                        for group in own
                    ],
                }
            )
            first = last
            if hasattr(member, "train"):
                member.train()  # it was saved with the values that it is judged by


def _signature(group: dict) -> tuple:
    return len(group["params"]), group["role"], group["optimizer"]


def make_optimizer(
    wanted: Optimizer,
    model: nn.Module,
    roles: dict[str, str],
    num_steps: int | None = None,
    spread: bool = False,
) -> JointOptimizer:
    """The optimizer of a plan over the trained parameters of a model.

    Args:
        roles: of every parameter, by its name.
        num_steps: of the run, for an optimizer that changes over it.
        spread: as `build` says; all processes must take part.
    Raises:
        UserError: as `groups_of` and `registry.build` do.
    """
    alike: dict[tuple, list[Group]] = {}
    for group in groups_of(wanted, model, roles):
        rule = group.rule
        own_role = rule.role if rule.known.by_role else None
        key = (rule.known.name, own_role, repr(sorted(rule.options.items())))
        alike.setdefault(key, []).append(group)
    names = {id(p): name for name, p in model.named_parameters()}
    members = [_member(groups, num_steps, names, spread) for groups in alike.values()]
    return JointOptimizer(members, wanted.decay_schedule)


def optimizer_of(run: Run, num_steps: int) -> JointOptimizer:
    """The optimizer of a run's plan over its model, for a run of this many steps."""
    roles = roles_of(run.experiment, run.config)
    spread = run.world_size > 1 and not run.fsdp
    return make_optimizer(run.plan.optimizer, run.model, roles, num_steps, spread)


def _member(
    groups: list[Group], num_steps: int | None, names: dict[int, str], spread: bool
) -> torch.optim.Optimizer:
    rule = groups[0].rule
    given = [
        {
            "params": group.params,
            "lr": group.lr,
            "full_lr": group.rule.lr,
            "lr_scale": group.lr_scale,
            "weight_decay": group.weight_decay,
            "full_decay": group.weight_decay,
            "role": group.rule.role,
            "optimizer": rule.known.name,
            "progress": 0.0,
        }
        for group in groups
    ]
    for one, group in zip(given, groups, strict=True) if rule.known.needs_names else []:
        one["names"] = [names[id(p)] for p in group.params]
    options = rule.options
    if rule.known.steps_option and num_steps is not None:
        options = {rule.known.steps_option: num_steps} | options
    return build(rule.known, options, given, rule.key, spread)
