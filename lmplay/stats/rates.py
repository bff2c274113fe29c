"""One experiment at several learning rates: its lowest loss, and how much a wrong rate costs."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lowest:
    """What one seed reached over the rates.

    `edge` is -1 or 1 where the best rate is the lowest or the highest, else 0; `fitted` is False
    where the lowest loss is that of a run, since no parabola has its vertex within the rates, or
    one of the three ended above its start.
    """

    loss: float
    sensitivity: float  # mean over rates of min(loss, loss at the start) minus `loss`
    edge: int
    fitted: bool


def lowest(factors: list[float], losses: list[float], start: float) -> Lowest:
    """The vertex of the parabola through (ln rate, loss) at the best rate and its neighbours.

    Args:
        factors: of the plan's rate, rising, three or more.
        losses: nats per token at each; infinite where a run failed.
        start: the loss before training, which a failed run is taken to have kept.
    Source: Wortsman et al. 2023, arXiv:2309.14322, section 2.2, for the sensitivity.
    """
    y = np.asarray(losses)
    best = int(np.argmin(y))
    edge = {0: -1, len(y) - 1: 1}.get(best, 0)
    first = min(max(best - 1, 0), len(y) - 3)
    x, around = np.log(factors[first : first + 3]), y[first : first + 3]
    loss, fitted = float(y[best]), False
    if (around < start).all():  # a run that diverged lies on no parabola
        bend, slope, level = np.polyfit(x - x[1], around, 2)
        if bend > 0 and x[0] <= x[1] - slope / (2 * bend) <= x[2]:
            loss, fitted = float(level - slope**2 / (4 * bend)), True
    sensitivity = float(np.minimum(y, start).mean() - loss)
    return Lowest(loss, sensitivity, edge, fitted)
