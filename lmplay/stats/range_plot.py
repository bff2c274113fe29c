"""The figure of a range test: the loss over the rate, and what was read off it."""

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from lmplay.stats.style import BASELINE_COLOUR, COLOURS, blank, lay_out, write
from lmplay.train.range_test import RangeTest


def draw_range(test: RangeTest, lr: float, title: str, path: Path) -> Path:
    """Write the figure.

    Args:
        lr: the rate that the test's are shares of.
        path: its suffix is the format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(partial(_figure, test, lr, title), path)


def _figure(test: RangeTest, lr: float, title: str) -> Figure:
    figure, axes = blank()
    rates, smoothed = [lr * factor for factor in test.factors], test.smoothed
    axes.plot(rates, test.losses, ".", color="0.7", markersize=4, zorder=2)
    axes.plot(rates, smoothed, color=BASELINE_COLOUR, linewidth=1.5, zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    low, first = min(smoothed), smoothed[0]
    room = 0.1 * (first - low) or 0.1 * abs(first)
    bottom, top = low - room, max(first, low) + 4 * room
    axes.set_ylim(bottom, top)
    marks = {
        "steepest": test.steepest,
        "suggestion": test.suggestion,
        "elbow": test.elbow,
        "divergence": test.divergence,
    }
    shown = [(name, factor) for name, factor in marks.items() if factor is not None]
    for number, (name, factor) in enumerate(shown):
        colour = COLOURS[number]
        axes.axvline(lr * factor, color=colour, linewidth=1.2, zorder=1)
        height = 0.98 - 0.06 * number  # two marks may be close to each other
        axes.text(
            lr * factor, height, f" {name} {lr * factor:.2g}", color=colour, va="top",
            transform=axes.get_xaxis_transform(), fontsize=9,
        )  # fmt: skip
    axes.axvline(lr, color="0.5", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    axes.set_xlabel("learning rate (dotted: the plan's)")
    axes.set_ylabel("loss after the step (nats per token)")
    lay_out(figure, axes, title, ["dots are single steps, the line is their smoothed course"], [])
    return figure
