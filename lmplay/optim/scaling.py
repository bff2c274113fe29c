"""Rates of a plan's optimizer times a factor, by their keys in the plan."""

from lmplay.optim.rules import rule_of
from lmplay.plan import Optimizer


def rates_times(optimizer: Optimizer, factor: float, role: str | None = None) -> dict[str, float]:
    """Every rate that the plan gives times a factor, by its key; with a role, that role's alone."""
    if role is not None:
        return {f"optimizer.roles.{role}.lr": _short(rule_of(optimizer, role).lr * factor)}
    own = {name: rule.lr for name, rule in optimizer.roles.items() if rule.lr is not None}
    of_roles = {f"optimizer.roles.{name}.lr": _short(lr * factor) for name, lr in own.items()}
    return {"optimizer.lr": _short(optimizer.lr * factor)} | of_roles


def _short(value: float) -> float:
    return float(f"{value:.10g}")
