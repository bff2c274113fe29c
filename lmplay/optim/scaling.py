"""What rates, decay and batch become where a plan's rates, model or tokens are multiplied."""

import math

from lmplay.errors import UserError
from lmplay.optim.rules import Rule, rule_of
from lmplay.plan import Optimizer, Plan

HIDDEN = ("matrix", "head")  # multiplied with vectors that are as long as the model is wide
BATCH_POWER = 0.383  # of the tokens
_BY_GRADIENT = ("SGD", "ASGD", "BiClip")  # steps as long as the gradient: other rules hold
_BY_LENGTH = ("Adafactor", "LAMB")  # steps in units of the weight, which starts as its width asks
_ORTHOGONAL = ("Muon", "MuonPolar", "MuonPlus", "NorMuon", "AdaMuon", "TEON", "KMaxwell", "MuonH")


def rates_times(optimizer: Optimizer, factor: float, role: str | None = None) -> dict[str, float]:
    """Every rate that the plan gives times a factor, by its key; with a role, that role's alone."""
    if role is not None:
        return {f"optimizer.roles.{role}.lr": _short(rule_of(optimizer, role).lr * factor)}
    own = {name: rule.lr for name, rule in optimizer.roles.items() if rule.lr is not None}
    of_roles = {f"optimizer.roles.{name}.lr": _short(lr * factor) for name, lr in own.items()}
    return {"optimizer.lr": _short(optimizer.lr * factor)} | of_roles


def scaled(plan: Plan, wider: float, longer: float) -> dict[str, object]:
    """What of a plan changes, by its key, for a model so many times as wide on so many more tokens.

    By `mup`, rates of matrices and head are as one over the width and their decay is as the width,
    so that every layer's change of its output keeps its size (Yang et al. 2022, arXiv:2203.03466,
    table 3); of steps that are orthogonal or go by the weight's own length, as one over its root or
    not at all; the spread at the start is the model's own affair. By `power`, the batch grows with
    the tokens to the power of 0.383, as a power of two, rates with its root, and decay such that
    weights forget over the same share of the run (Bergsma et al. 2025, arXiv:2505.13738). By `sde`,
    the batch stays, rates and decay are as one over the root of the tokens, and averages last as
    long in shares of the run (Mlodozeniec et al. 2025, arXiv:2512.22382).

    Raises:
        UserError: the rules do not hold for the optimizer.
    """
    rule, optimizer = plan.scaling, plan.optimizer
    changed: dict[str, object] = {}
    rate = decay = 1.0
    if rule.by_tokens == "power":
        batch = 2.0 ** round(BATCH_POWER * math.log2(longer))
        changed["batch_size"] = _times(plan.batch_size, batch)
        batch = changed["batch_size"][0][1] / plan.batch_sizes[0][1]  # as it was rounded
        if isinstance(plan.batch_size, int):
            changed["batch_size"] = changed["batch_size"][0][1]
        rate, decay = math.sqrt(batch), math.sqrt(batch) / longer
    elif rule.by_tokens == "sde":
        rate = decay = 1 / math.sqrt(longer)
        changed |= _betas(optimizer, 1 / longer)
    changed |= rates_times(optimizer, rate if rule.by_width == "mup" else rate / wider)
    if decay != 1:
        changed |= _decays(optimizer, decay)
    if rule.by_width == "mup":
        for role in HIDDEN:
            changed |= _by_width(rule_of(optimizer, role), rate, decay, wider)
    return changed


def _by_width(rule: Rule, rate: float, decay: float, wider: float) -> dict[str, float]:
    name = rule.known.name
    if name in _BY_GRADIENT:
        raise UserError(
            f"scaling.by_width=mup does not hold for {name}: its steps are as long as gradients",
            hint="--set scaling.by_width=all, or another optimizer",
        )
    wider **= _width_power(rule)
    key = f"optimizer.roles.{rule.role}"
    return {
        f"{key}.lr": _short(rule.lr * rate / wider),
        f"{key}.weight_decay": _short(rule.weight_decay * decay * wider),
    }


def _width_power(rule: Rule) -> float:
    """Of the width by which a matrix's rate is divided so that its layer's output changes alike.

    A step whose numbers are of one size, and most of which tell the same, changes it by width times
    rate. A step of orthogonal rows or columns changes it by its own spectral norm, which is as the
    root of the width where its numbers are of one size. A step in units of the weight's length has
    numbers as the weight has: as one over the root of the width, in a head over the width.
    """
    name, scale = rule.known.name, rule.options.get("scale", "rms")
    is_on_ball = rule.options.get("hyperball") or rule.known.fixed.get("hyperball")
    if name == "Scion" or (is_on_ball and name in _ORTHOGONAL):
        return 0.0
    if is_on_ball or name in _BY_LENGTH:
        return 0.0 if rule.role == "head" else 0.5
    if name in _ORTHOGONAL:
        return 0.5 if scale == "rms" else 0.0
    return 0.5 if name == "RMNP" and scale != "rms" else 1.0  # its rows are of one length


def _times(batch: int | list, factor: float) -> list[tuple[float, int]]:
    points = [(0.0, batch)] if isinstance(batch, int) else batch
    return [(share, max(1, round(rows * factor))) for share, rows in points]


def _betas(optimizer: Optimizer, factor: float) -> dict[str, list[float]]:
    """Averages whose distance from 1 is times a factor, wherever the plan gives them."""
    given = {"optimizer.options.betas": optimizer.options.get("betas")}
    for name, rule in optimizer.roles.items():
        given[f"optimizer.roles.{name}.options.betas"] = rule.options.get("betas")
    return {
        key: [_short(max(0.0, 1 - (1 - beta) * factor)) for beta in betas]
        for key, betas in given.items()
        if betas
    }


def _decays(optimizer: Optimizer, factor: float) -> dict[str, float]:
    """Every decay that the plan gives times a factor, by its key."""
    own = {name: rule.weight_decay for name, rule in optimizer.roles.items()}
    of_roles = {
        f"optimizer.roles.{name}.weight_decay": _short(decay * factor)
        for name, decay in own.items()
        if decay is not None
    }
    return {"optimizer.weight_decay": _short(optimizer.weight_decay * factor)} | of_roles


def _short(value: float) -> float:
    return float(f"{value:.10g}")
