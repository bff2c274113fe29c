"""Schedules: the share of its full rate that a parameter is trained at, over a run's tokens."""

import math

from lmplay.plan import Schedule

START = 0.04  # of a cycle, as a share of its full rate


def factor(schedule: Schedule, before: int, after: int, num_tokens: int) -> float:
    """The share of the full rate in a step, a pure function of the tokens trained on and planned.

    After a linear warm-up that reaches the full rate with its last step, `constant` stays; `linear`
    and `cosine` fall to `final` at the end of the run; `wsd` stays and falls over its last `decay`
    share, evenly or as one minus the root of time (warm-up, stable, decay: Hu et al. 2024,
    arXiv:2404.06395, section 4; Haegele et al. 2024, arXiv:2405.18392); `one_cycle` rises from
    START and falls by half waves of a cosine (Smith and Topin 2017, arXiv:1708.07120);
    `inverse_sqrt` falls with the root of the tokens (Vaswani et al. 2017, arXiv:1706.03762).
    A phase lasts whole steps of this step's size, so that the first step is above 0 and the one
    after the last would have `final`.

    Args:
        before: tokens of all steps before this one.
        after: those and this step's; more than `before`.
        num_tokens: of the whole run; at least `after`.
    """
    size = after - before
    num_steps, done, left = num_tokens / size, after / size, (num_tokens - before) / size
    warmup = math.ceil(schedule.warmup * num_steps)
    if done <= warmup:
        rise = done / warmup
        is_wave = schedule.name == "one_cycle"
        return START + (1 - START) * _half_wave(rise) if is_wave else rise
    if schedule.name == "inverse_sqrt":
        return math.sqrt(max(warmup, 1) / done)
    falling = num_steps - warmup
    if schedule.name == "wsd":
        falling = min(falling, math.ceil(schedule.decay * num_steps))
    if schedule.name == "constant" or left > falling:
        return 1.0
    share = left / falling  # from 1 down to 1 / falling
    if schedule.name in ("cosine", "one_cycle"):
        share = _half_wave(share)
    elif schedule.name == "wsd" and schedule.cooldown == "1-sqrt":
        share = 1 - math.sqrt(1 - share)
    return schedule.final + (1 - schedule.final) * share


def decay_left(schedule: str, progress: float) -> float:
    """The share of its full weight decay in a step before which `progress` was trained on, 0 to 1.

    It falls beside the rate, with which decoupled decay falls already: evenly by `linear`, by half
    a wave by `cosine`.
    """
    left = 1 - progress
    return {"constant": 1.0, "linear": left, "cosine": _half_wave(left)}[schedule]


def _half_wave(share: float) -> float:
    return (1 - math.cos(math.pi * share)) / 2
