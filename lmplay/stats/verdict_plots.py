"""The figures of results: the forest of verdicts, and loss against compute."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from lmplay.stats.compare import Pair
from lmplay.stats.style import (
    BASELINE_COLOUR,
    LEFT,
    WIDTH,
    LineStyle,
    amount,
    blank,
    broken,
    drawable,
    family,
    handle,
    headline,
    lay_out,
    say_nothing_to_show,
    sole_of_seed,
    some,
    verdict_style,
    with_one_ruler,
    with_room,
    wrapped,
)
from lmplay.stats.verdict import mean_interval

LINE = 0.16  # inches that a line of text takes in a table or a list of names
MUCH = 2.0  # the ratio of losses from which their axis is logarithmic
CUT = 6  # times the usual reach of a difference: what goes further ends in an arrow
NEAR = 0.015  # share of the axis: points of compute that are nearer stand side by side
BESIDE = 0.11  # inches between them

# inches from the right edge of the paper, and the side of the column that stands there
_COLUMNS = {
    "seeds": (3.4, "right"),
    "difference ± 95 %": (1.85, "right"),
    "p (Holm)": (1.1, "right"),
}
_COLUMNS["verdict"] = (0.95, "left")
_NO_RUN = "no run can be compared with the baseline;\nthe table says why"
_ONLY_BASELINE = "only the baseline is here: nothing to compare"


@dataclass(frozen=True)
class _Point:
    """What the finished runs of one label reached: nats per token after so many FLOP."""

    look: LineStyle
    line: tuple  # plan, family and data: points that share them are joined
    num_seeds: int
    flops: float
    mean: float
    low: float
    high: float


def forest(rows: list[dict]) -> Figure:
    """A line for each verdict with a difference: the difference, its interval and the numbers.

    Args:
        rows: the verdicts of `judge`, shown in this order below a heading for each plan.
    """
    others = [row for row in rows if row["experiment"] != row["baseline"]]
    shown = [row for row in others if row["difference"] is not None]
    left_out = [row["experiment"] for row in others if row["difference"] is None]
    baselines = {row["baseline"] for row in shown}
    to = baselines.pop() if len(baselines) == 1 else ""
    plans = ", ".join(dict.fromkeys(row["plan"] for row in rows))
    notes = [f"left out, the table says why: {some(left_out)}"] if left_out else []
    figure, axes = blank()
    if not shown:
        say_nothing_to_show(axes, _NO_RUN if others else _ONLY_BASELINE)
        lay_out(figure, axes, f"Verdicts, plan {plans}", notes, [])
        return figure
    title = f"Verdicts against {to or 'the baseline of each'}, plan {plans}"
    note = "points: mean of the paired differences over seeds; bars: its 95 % t interval"
    if any(row["interval"] is None for row in shown):
        note += "; hollow: one seed, no evidence"
    header = headline(figure, title, [note, *_baseline_notes(rows), *notes])
    _lay_out_forest(figure, axes, header, shown, to)
    return figure


def _lay_out_forest(figure: Figure, axes: Axes, header: float, rows: list[dict], to: str) -> None:
    """A table around axes whose y is inches from their top."""
    marks = list(dict.fromkeys(mark for row in rows for mark in _marks(row)))
    place = {
        "transform": blended_transform_factory(figure.dpi_scale_trans, axes.transData),
        "va": "center",
        "fontsize": 9,
    }
    for name, (right, side) in _COLUMNS.items():
        figure.text(WIDTH - right, -0.12, name, ha=side, color="0.35", **place)
    _scale_differences(axes, rows)
    y, names = 0.0, []
    plans = list(dict.fromkeys(row["plan"] for row in rows))
    for plan in plans:
        if len(plans) > 1:
            heading = drawable(f"plan {plan}")
            names.append(figure.text(LEFT, y + 0.2, heading, fontweight="bold", **place))
            y += 0.32
        for row in (row for row in rows if row["plan"] == plan):
            text = wrapped(row["experiment"]) + _references(row, marks)
            text += "" if to else f"\n  to {wrapped(row['baseline'])}"
            height = 0.14 + LINE * (text.count("\n") + 1)
            names.append(figure.text(LEFT, y + height / 2, text, linespacing=1.2, **place))
            _draw_verdict(axes, row, y + height / 2)
            _write_numbers(figure, row, y + height / 2, place)
            y += height
    axes.axvline(0.0, color=BASELINE_COLOUR, linewidth=1.2, zorder=3)
    axes.set_ylim(y, 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(
        "difference of the final validation loss\n"
        f"to {drawable(to) or 'its baseline'} (nats per token); "
        "left is better"
    )
    header, footer = header + 0.2, 0.7 + _footnotes(figure, marks)
    height = header + y + footer
    figure.set_size_inches(WIDTH, height)
    left = max(name.get_window_extent().x1 for name in names) / figure.dpi + 0.15
    right = WIDTH - _COLUMNS["seeds"][0] - 0.45
    axes.xaxis.set_major_locator(MaxNLocator(int((right - left) / 0.6), steps=[1, 2, 2.5, 5, 10]))
    axes.set_position((left / WIDTH, footer / height, (right - left) / WIDTH, y / height))


def _draw_verdict(axes: Axes, row: dict, y: float) -> None:
    colour, marker = verdict_style(row)
    if row["interval"] is not None:
        axes.hlines(y, *row["interval"], color=colour, linewidth=1.6, zorder=4)
    axes.plot(
        [row["difference"]],
        [y],
        linestyle="none",
        marker=marker,
        markersize=6,
        color=colour,
        markerfacecolor=colour if row["interval"] is not None else "white",
        zorder=5,
    )
    left, right = axes.get_xlim()
    least, most = row["interval"] or [row["difference"]] * 2
    for beyond, edge, arrow in ((least < left, left, "<"), (most > right, right, ">")):
        if beyond:
            axes.plot([edge], [y], arrow, color=colour, markersize=6, clip_on=False, zorder=5)


def _write_numbers(figure: Figure, row: dict, y: float, place: dict) -> None:
    colour, _ = verdict_style(row)
    difference, verdict = (
        f"{row['difference']:+.4f}",
        (row["verdict"] or "").partition(" within")[0],
    )
    if row["interval"] is not None:
        low, high = row["interval"]
        difference += f" ± {(high - low) / 2:.4f}"
    elif row["seeds"] == 1:
        verdict = "one seed"
    p = "" if row["p_holm"] is None else f"{row['p_holm']:.3f}"
    cells = {
        "seeds": str(row["seeds"]),
        "difference ± 95 %": difference.replace("-", "\N{MINUS SIGN}"),
        "p (Holm)": "<0.001" if p == "0.000" else p,
        "verdict": verdict,
    }
    for name, text in cells.items():
        right, side = _COLUMNS[name]
        shown = {"color": colour} if name == "verdict" else {}
        figure.text(WIDTH - right, y, text, ha=side, **shown, **place)


def _scale_differences(axes: Axes, rows: list[dict]) -> None:
    """Give x the range of most rows; what lies beyond it ends in an arrow."""
    ends = np.array([[row["difference"], *(row["interval"] or [])] for row in rows], dtype=object)
    largest = np.array([max(map(abs, row)) for row in ends])
    reach = CUT * float(np.median(largest)) or float(largest.max())
    shown = [0.0, *(end for row in ends for end in row if abs(end) <= reach)]
    low, high = min(shown), max(shown)
    pad = 0.06 * (high - low) or 0.01
    axes.set_xlim(low - pad, high + pad)


def _marks(row: dict) -> list[str]:
    """What a reader has to know besides what the figure shows anyhow."""
    return [mark for mark in row["marks"] if not mark.startswith("one seed")]


def _references(row: dict, marks: list[str]) -> str:
    numbers = ",".join(str(marks.index(mark) + 1) for mark in _marks(row))
    return f" [{numbers}]" if numbers else ""


def _footnotes(figure: Figure, marks: list[str]) -> float:
    """Write the marks at the bottom of the paper.

    Returns:
        The height that they take.
    """
    if not marks:
        return 0.0
    text = figure.text(
        LEFT,
        0.12,
        drawable("\n".join(f"[{number}] {mark}" for number, mark in enumerate(marks, start=1))),
        transform=figure.dpi_scale_trans,
        fontsize=8,
        color="0.35",
        linespacing=1.4,
    )
    return broken(text).height / figure.dpi + 0.12


def _baseline_notes(rows: list[dict]) -> list[str]:
    several = len({row["plan"] for row in rows}) > 1
    notes = []
    for row in rows:
        if row["experiment"] == row["baseline"] and row["mean"] is not None:
            name = f"{row['plan']}/{row['experiment']}" if several else row["experiment"]
            sd = "" if row["sd"] is None else f", sd {row['sd']:.4f}"
            notes.append(f"{name} {row['mean']:.4f}{sd}{_seeds(row['seeds'])}")
    return [f"baseline, nats per token: {', '.join(notes)}"] if 0 < len(notes) <= 2 else []


def _seeds(count: int) -> str:
    return f" ({count} seeds)" if count > 1 else ""


def compute(pairs: list[Pair], look_of: dict[tuple[str, str], LineStyle]) -> Figure:
    """The final validation loss of each label over the FLOP that it took; finished runs only."""
    points = sorted(_points(pairs, look_of), key=lambda point: point.flops)
    figure, axes = blank()
    plans = ", ".join(sorted({pair.run.plan for pair in pairs}))
    title = f"Final validation loss against training compute, plan {plans}"
    axes.set_xlabel("training compute (FLOP)")
    axes.set_ylabel("final validation loss (nats per token)")
    if not points:
        say_nothing_to_show(axes, "no run is finished and validated")
        lay_out(figure, axes, title, [], [])
        return figure
    joined: dict[tuple, list[_Point]] = {}
    _scale_compute(axes, points)
    for point, aside in zip(points, _asides(axes, points), strict=True):
        joined.setdefault(point.line, []).append(point)
        _draw_point(figure, axes, point, aside)
    several = [line for line in joined.values() if len(line) > 1]
    for line in several:
        x, y = zip(*[(point.flops, point.mean) for point in line], strict=True)
        axes.plot(x, y, color=line[0].look.colour, linewidth=1.2, alpha=0.6, zorder=3)
    notes = ["finished runs only"]
    if any(point.num_seeds > 1 for point in points):
        notes.append("bars: 95 % t interval of the mean over seeds")
    if several:
        notes.append("lines: one experiment at several budgets")
    if any(_asides(axes, points)):
        notes.append("nearly equal compute: side by side")
    entries = [
        (point.look, _seeds(point.num_seeds), handle(point.look, marker=True, line=False))
        for point in sorted(points, key=lambda point: -point.mean)
    ]
    lay_out(figure, axes, title, ["; ".join(notes)], entries)
    return figure


def _points(pairs: list[Pair], look_of: dict[tuple[str, str], LineStyle]) -> Iterator[_Point]:
    for group in with_one_ruler([pair for pair in pairs if pair.run.final is not None]):
        runs = [pair.run for pair in sole_of_seed(group)]
        if not runs:
            continue
        plan, label, data = runs[0].plan, runs[0].label, runs[0].facts.data
        texts = [data.fingerprint, data.validation_fingerprint, data.tokenizer]
        flops = fmean(run.final["tokens"] * run.facts.flops_per_token for run in runs)
        losses = np.array([run.final["loss"] for run in runs])
        interval = mean_interval(losses) if len(losses) > 1 else [losses[0]] * 3
        line = plan, family(label), *texts
        yield _Point(look_of[plan, label], line, len(losses), flops, *interval)


def _asides(axes: Axes, points: list[_Point]) -> list[float]:
    """How far beside its place each point is drawn, in inches, lest one hides another.

    Args:
        points: sorted by their FLOP.
    """
    low, high = np.log(axes.get_xlim())
    clusters: list[list[float]] = []
    for point in points:
        at = (np.log(point.flops) - low) / (high - low)
        if clusters and at - clusters[-1][-1] < NEAR:
            clusters[-1].append(at)
        else:
            clusters.append([at])
    return [BESIDE * (i - (len(c) - 1) / 2) for c in clusters for i in range(len(c))]


def _draw_point(figure: Figure, axes: Axes, point: _Point, aside: float) -> None:
    place = axes.transData + ScaledTranslation(aside, 0, figure.dpi_scale_trans)
    style = {"color": point.look.colour, "transform": place}
    axes.plot([point.flops] * 2, [point.low, point.high], linewidth=1.2, zorder=4, **style)
    edge = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.7, "zorder": 5}
    axes.plot([point.flops], [point.mean], point.look.marker, **edge, **style)


def _scale_compute(axes: Axes, points: list[_Point]) -> None:
    flops, means, lows, highs = np.array([(p.flops, p.mean, p.low, p.high) for p in points]).T
    ratio = float(flops.max() / flops.min())
    pad = max(ratio**0.06, 1.02)
    axes.set_xscale("log")
    axes.set_xlim(flops.min() / pad, flops.max() * pad)
    if ratio < 10:  # a log locator would find one tick, or none
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if ratio > 300 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: amount(value, "flops"))
    low, high = with_room(float(means.min()), float(means.max()), lows, highs)
    pad = 0.06 * (high - low) or 0.02 * high
    if low > 0 and high > MUCH * low:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
    else:
        axes.set_ylim(low - pad, high + pad)
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
