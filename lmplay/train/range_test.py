"""The learning-rate range test: train while the rate rises, and see where that learns and breaks.

Source: Smith 2015, arXiv:1506.01186, section 3.3.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from lmplay.errors import UserError
from lmplay.model.freezing import freeze
from lmplay.model.roles import roles_of
from lmplay.plan import Plan
from lmplay.run.request import Request
from lmplay.train.curves import NotFinite
from lmplay.train.display import Display
from lmplay.train.loop import Session, take_step
from lmplay.train.prepared import Prepared, prepare, prove
from lmplay.train.trial import trial_session

FIRST, LAST = 1e-3, 1e2  # rates that are tried, in rates of the plan
STEPS_A_DECADE = 28
WARM_STEPS = 20  # at the first rate, for moments that begin empty
SPREAD = 0.1  # decades; of the bell that losses are smoothed by
RISE = 1.02  # times the lowest loss: a rate that does harm
BLOWN_UP = 2.0  # times the lowest loss so far: a rate that diverges,
LOST = 1.1  # as is one at which the loss is so many times the first one
SAFETY = 3.0  # the rate that is proposed, below the first that does harm


@dataclass(frozen=True)
class RangeTest:
    """Losses after steps at rising rates; rates are in rates of the plan.

    Attributes:
        factors: of the steps.
        losses: after each of them.
        broke: the rate after whose step the loss was not finite, if there was one.
        smoothed: the losses without their noise; marks are read off it.
    """

    factors: list[float]
    losses: list[float]
    broke: float | None = None

    @property
    def smoothed(self) -> list[float]:
        """Means of logarithms under a bell over the decades."""
        reach = 3 * SPREAD
        logs = [math.log(max(loss, 1e-300)) for loss in self.losses]
        places = [math.log10(factor) for factor in self.factors]
        made = []
        for here in places:
            near = [(place - here, log) for place, log in zip(places, logs, strict=True)
                    if abs(place - here) <= reach]  # fmt: skip
            weights = [math.exp(-((far / SPREAD) ** 2) / 2) for far, _ in near]
            total = sum(weight * log for weight, (_, log) in zip(weights, near, strict=True))
            made.append(math.exp(total / sum(weights)))
        return made

    @property
    def steepest(self) -> float | None:
        """Where the loss falls fastest over the logarithm of the rate; None if it never falls."""
        end = self.factors.index(self.elbow) + 1
        values = self.smoothed
        falls = [values[i - 1] - values[i + 1] for i in range(1, min(end, len(values) - 1))]
        if not falls or max(falls) <= 0:
            return None
        return self.factors[falls.index(max(falls)) + 1]

    @property
    def elbow(self) -> float:
        """The last rate before the loss rises from its lowest; the last of all if it never does."""
        values = self.smoothed
        lowest = min(values)
        end = values.index(lowest)
        while end + 1 < len(values) and values[end + 1] <= RISE * lowest:
            end += 1
        return self.factors[end]

    @property
    def divergence(self) -> float | None:
        """The first rate from which on the loss has blown up; None if none of them does that."""
        values, lowest = self.smoothed, math.inf
        found = None
        for factor, value in zip(self.factors, values, strict=True):
            lowest = min(lowest, value)
            is_bad = value > min(BLOWN_UP * lowest, LOST * values[0])
            found = (found or factor) if is_bad else None
        return found or self.broke

    @property
    def suggestion(self) -> float:
        """A rate to begin with: the elbow is the largest that does no harm for a few steps."""
        return self.elbow / SAFETY


def range_test(step: Callable[[float], float]) -> RangeTest:
    """Take steps at rising rates until the loss has blown up for good.

    Args:
        step: takes one at a rate, in rates of the plan; gives the loss before it.
    Raises:
        UserError: not even the first steps were finite.
    """
    num_steps = round(STEPS_A_DECADE * math.log10(LAST / FIRST))
    for _ in range(WARM_STEPS):
        step(FIRST)
    made = RangeTest([], [])
    tried = broke = None
    for number in range(num_steps + 2):  # the last of them only tells of the one before
        factor = FIRST * (LAST / FIRST) ** (min(number, num_steps) / num_steps)
        loss = step(factor)
        if not math.isfinite(loss):
            broke = tried
            break
        if tried is not None:
            made.factors.append(tried)
            made.losses.append(loss)
            if made.divergence and factor > made.divergence * 10 ** (3 * SPREAD):
                break
        tried = factor
    if len(made.factors) < 3:
        raise UserError(
            f"not even {FIRST:g} times the plan's rate keeps the loss finite",
            hint="begin with a lower one: --set optimizer.lr=...",
        )
    return replace(made, broke=broke)


def find_rate(request: Request, role: str | None, display: Display) -> RangeTest:
    """The range test of a request's optimizer on its plan; no run is begun.

    Args:
        role: raise the rate of its parameters alone; the others stay as they are drawn.
    Raises:
        UserError: as training would, or no parameter has the role.
    """
    with ExitStack() as stack:
        prepared = prepare(request, None, stack, display)
        session = trial_session(
            request,
            prepared.experiment,
            _of_role(prepared, role),
            prepared.config,
            prepared.data,
            prepared.clock,
        )
        accelerator = session.run.accelerator
        mixed = accelerator.mixed_precision
        prove(prepared, accelerator, "fp32" if mixed == "no" else mixed, display)
        return range_test(lambda factor: _step(session, factor, display))


def _of_role(prepared: Prepared, role: str | None) -> Plan:
    plan = prepared.plan
    if role is None:
        return plan
    roles = roles_of(prepared.experiment, prepared.config)
    if role not in roles.values():
        known = ", ".join(sorted(set(roles.values())))
        raise UserError(f"--role {role}: no parameter has it", hint=f"there are {known}")
    others = [name for name, other in roles.items() if other != role]
    made = plan.model_copy(update={"freeze": [*plan.freeze, *others]})
    freeze(prepared.experiment.model(prepared.config, device="meta"), made.freeze)
    return made


def _step(session: Session, factor: float, display: Display) -> float:
    run, clock, curves = session.run, session.clock, session.curves
    now = clock.at(run.step % clock.num_steps)
    batch = session.data.rows(now.first_row, now.num_rows, now.row_length)
    norm = None
    while norm is None:
        norm = take_step(session, batch, factor)
    run.step += 1
    curves.close_step(batch.num_targets, factor, norm, session.update.healthy)
    try:
        _, (row,) = curves.look(now=True)
    except NotFinite:
        return math.nan
    loss = row["objective"] if row["loss"] is None else row["loss"]
    if run.step % STEPS_A_DECADE == 0:
        display.note(f"rate x {factor:.3g}: loss {loss:.4f}")
    return loss
