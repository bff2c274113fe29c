"""The four figures: loss, accuracy, and the difference of each to the baseline."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullLocator,
    ScalarFormatter,
)

from lmplay.stats.compare import NO_CURVE, Curve, Pair, curve, difference, smooth

# Okabe and Ito's colours without the yellow, which is too light for a line on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.4, 1.4, 1.4)))
MARKERS = ("o", "s", "^", "D")
BASELINE_COLOUR = "#1A1A1A"

COLUMNS = 1000  # for a line: about as many as the axes have columns of pixels
BAND_COLUMNS = 400  # for the faint band of single steps
SETTLED = 0.15  # share of the axis after which a curve has a say in the range of y
SIZE_INCHES = (9.0, 5.0)
DPI = 160
TOP = 0.83  # of the axes, as a share of the figure

_X_LABELS = {
    "tokens": "tokens trained on",
    "steps": "steps",
    "seconds": "training time",
    "flops": "training compute (FLOP)",
}
_LOOKS = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.unicode_minus": True,
    "path.simplify": True,
    "svg.hashsalt": "lmplay",
    "pdf.fonttype": 42,
}
_METADATA = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


@dataclass(frozen=True)
class View:
    """What the figures show, and how.

    `half_life` is in units of x; `half_life_share`, used where that is None, is a share of the
    axis as it is drawn, so on a logarithmic one the curves are smoothed over its decades.
    """

    x: str = "tokens"
    split: str = "both"
    half_life: float | None = None
    half_life_share: float = 0.02
    log: bool = False
    format: str = "png"

    @property
    def smooths(self) -> bool:
        return bool(self.half_life_share if self.half_life is None else self.half_life)


@dataclass(frozen=True)
class _Metric:
    key: str
    title: str
    unit: str
    scale: float
    better: str  # than the baseline: "below" or "above" it


_METRICS = (
    _Metric("loss", "Loss", "nats per token", 1.0, "below"),
    _Metric("accuracy", "Next-token accuracy", "%", 100.0, "above"),
)


@dataclass(frozen=True)
class _Look:
    name: str
    colour: str
    dash: str | tuple
    marker: str
    is_baseline: bool


@dataclass(frozen=True)
class _Lines:
    """What one run puts into one figure."""

    look: _Look
    train: Curve
    validation: Curve


@dataclass(frozen=True)
class _XAxis:
    low: float
    high: float
    log: bool

    def coordinate(self, x: np.ndarray) -> np.ndarray:
        """Where x lies on the paper, up to scale."""
        return np.log10(x) if self.log else x

    @property
    def width(self) -> float:
        low, high = self.coordinate(np.array([self.low, self.high]))
        return float(high - low)


def draw(pairs: list[Pair], view: View, out_dir: Path) -> list[Path]:
    """Write loss, accuracy, loss_difference and accuracy_difference, in that order.

    The same runs give the same bytes. A figure that has nothing to show says why.

    Returns:
        The four files.
    """
    looks = _looks(pairs)
    files = []
    with matplotlib.rc_context(_LOOKS):
        for differences in (False, True):
            for metric in _METRICS:
                name = f"{metric.key}_difference" if differences else metric.key
                figure = _figure(pairs, looks, metric, view, differences)
                path = out_dir / f"{name}.{view.format}"
                figure.savefig(path, dpi=DPI, metadata=_METADATA[view.format])
                files.append(path)
    return files


def _figure(
    pairs: list[Pair], looks: dict, metric: _Metric, view: View, differences: bool
) -> Figure:
    all_lines = list(_all_lines(pairs, looks, metric, view, differences))
    figure = Figure(figsize=SIZE_INCHES)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.13, 0.85, TOP - 0.13))
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axis = _x_axis(all_lines, view)
    notes, right = [], 0.97
    if axis is None:
        _say_nothing_to_show(axes, pairs, metric, differences)
    else:
        smoothed = [_smoothed(lines, view, axis) for lines in all_lines]
        for raw, line in zip(all_lines, smoothed, strict=True):
            _draw_lines(axes, raw, line, view, axis, len(all_lines))
        _scale_x(axes, axis, view)
        notes = [_smoothing_note(all_lines, view, axis)]
        notes.append(_scale_y(axes, smoothed, axis, differences))
        right = _legend(figure, smoothed)
    _label(figure, axes, pairs, metric, view, differences, [note for note in notes if note])
    _fit(figure, axes, right)
    return figure


def _looks(pairs: list[Pair]) -> dict[tuple[str, str], _Look]:
    """A colour, a dash and a marker for each (plan, label); the baseline is black."""
    plans = {pair.run.plan for pair in pairs}
    keys = sorted({(pair.run.plan, pair.run.label) for pair in pairs})
    baselines = {(pair.run.plan, pair.run.label) for pair in pairs if pair.is_baseline}
    looks, index = {}, 0
    for plan, label in keys:
        name = label if len(plans) == 1 else f"{plan}/{label}"
        if len(baselines) == 1 and (plan, label) in baselines:
            looks[plan, label] = _Look(name, BASELINE_COLOUR, "solid", "o", True)
            continue
        style = index // len(COLOURS) % len(DASHES)
        colour = COLOURS[index % len(COLOURS)]
        looks[plan, label] = _Look(name, colour, DASHES[style], MARKERS[style], False)
        index += 1
    return looks


def _all_lines(
    pairs: list[Pair], looks: dict, metric: _Metric, view: View, differences: bool
) -> Iterator[_Lines]:
    for pair in pairs:
        if differences and not pair.comparable:
            continue
        curves = {}
        for split in ("train", "validation"):
            if view.split not in (split, "both"):
                curves[split] = NO_CURVE
                continue
            values = curve(pair.run, split, metric.key, view.x)
            if differences:
                values = difference(values, curve(pair.baseline, split, metric.key, view.x))
            if view.log:
                values = Curve(values.x[values.x > 0], values.y[values.x > 0])
            curves[split] = Curve(values.x, values.y * metric.scale)
        if not (curves["train"].empty and curves["validation"].empty):
            yield _Lines(looks[pair.run.plan, pair.run.label], **curves)


def _x_axis(all_lines: list[_Lines], view: View) -> _XAxis | None:
    curves = [c for lines in all_lines for c in (lines.train, lines.validation) if len(c.x)]
    if not curves:
        return None
    low = min(float(c.x[0]) for c in curves) if view.log else 0.0
    high = max(float(c.x[-1]) for c in curves)
    return _XAxis(low, high if high > low else low + 1.0, view.log)


def _smoothed(lines: _Lines, view: View, axis: _XAxis) -> _Lines:
    """Validation is scored on one whole text, so only training is smoothed."""
    if view.half_life is not None:
        train = smooth(lines.train, view.half_life)
    else:
        on_paper = Curve(axis.coordinate(lines.train.x), lines.train.y)
        train = Curve(lines.train.x, smooth(on_paper, view.half_life_share * axis.width).y)
    return _Lines(lines.look, train, lines.validation)


def _draw_lines(
    axes: Axes, raw: _Lines, line: _Lines, view: View, axis: _XAxis, num_runs: int
) -> None:
    look = line.look
    front = 3 if look.is_baseline else 4
    if view.smooths:
        _draw_faintly(axes, raw.train, axis, look.colour, min(0.15, 0.3 / num_runs))
    style = {"color": look.colour, "linestyle": look.dash, "linewidth": 1.5, "zorder": front}
    axes.plot(*_thin(line.train, axis), **style)
    axes.plot(
        *_thin(line.validation, axis),
        **{**style, "linestyle": look.dash if line.train.empty else "none"},
        marker=look.marker,
        markersize=5.5 if num_runs <= 8 else 4,
        markeredgecolor="white",
        markeredgewidth=0.6,
    )


def _draw_faintly(axes: Axes, curve: Curve, axis: _XAxis, colour: str, alpha: float) -> None:
    """Every step, or where they are too many for that, the range they fill."""
    style = {"color": colour, "alpha": alpha, "zorder": 2, "rasterized": True}
    if len(curve.x) <= 2 * BAND_COLUMNS:
        axes.plot(curve.x, curve.y, linewidth=0.5, **style)
    else:
        starts, _, low, high = _columns(curve, axis, BAND_COLUMNS)
        axes.fill_between(curve.x[starts], low, high, linewidth=0, **style)


def _thin(curve: Curve, axis: _XAxis) -> tuple[np.ndarray, np.ndarray]:
    """The same picture from fewer points: the lowest and the highest of each column of pixels."""
    if len(curve.x) <= 2 * COLUMNS:
        return curve.x, curve.y
    starts, stops, low, high = _columns(curve, axis, COLUMNS)
    falls = curve.y[starts] > curve.y[stops - 1]
    x = np.stack([curve.x[starts], curve.x[stops - 1]], axis=1)
    y = np.stack([np.where(falls, high, low), np.where(falls, low, high)], axis=1)
    return x.ravel(), y.ravel()


def _columns(curve: Curve, axis: _XAxis, number: int) -> tuple[np.ndarray, ...]:
    """Where each column of the paper starts and stops in the curve; its least and greatest y."""
    at = (axis.coordinate(curve.x) - axis.coordinate(np.float64(axis.low))) / axis.width
    starts = np.flatnonzero(np.diff((at * number).astype(np.int64), prepend=-1))
    low = np.fmin.reduceat(curve.y, starts)
    high = np.fmax.reduceat(curve.y, starts)
    return starts, np.append(starts[1:], len(at)), low, high


def _scale_x(axes: Axes, axis: _XAxis, view: View) -> None:
    margin = 0.01
    if axis.log:
        axes.set_xscale("log")
        subs = (1.0,) if axis.width > 2 else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(
            axis.low / 10 ** (margin * axis.width), axis.high * 10 ** (margin * axis.width)
        )
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlim(-margin * axis.high, (1 + margin) * axis.high)
    if view.x == "seconds":
        seconds, _ = _time_unit(axis.high)
        if not axis.log:
            axes.xaxis.set_major_locator(_every(axis.high, seconds))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / seconds:g}")
    else:
        axes.xaxis.set_major_formatter(lambda value, _: _amount(value, view.x))


def _every(high: float, unit: float):
    ticks = MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(0, high / unit)
    return MultipleLocator((ticks[1] - ticks[0]) * unit)


def _time_unit(high: float) -> tuple[float, str]:
    if high > 2 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if high > 180 else (1.0, "seconds")


def _scale_y(axes: Axes, all_lines: list[_Lines], axis: _XAxis, differences: bool) -> str:
    """Give y the range of what comes after the steep start; say what that leaves outside."""
    curves = [c for lines in all_lines for c in (lines.train, lines.validation) if not c.empty]
    ranges = np.array([_settled_range(c, axis) for c in curves])
    low, high = _common_range(ranges[:, 0], ranges[:, 1])
    if differences:
        low, high = min(low, 0.0), max(high, 0.0)
        axes.axhline(0.0, color=BASELINE_COLOUR, linewidth=1.2, zorder=3)
    if axis.log and not differences and low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        pad = (high / low) ** 0.05 if high > low else 1.05
        bottom, top = low / pad, high * pad
    else:
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        bottom, top = low - pad, high + pad
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylim(bottom, top)
    least = min(float(np.nanmin(c.y)) for c in curves)
    most = max(float(np.nanmax(c.y)) for c in curves)
    outside = [f"up to {most:.3g}"] if most > top else []
    outside += [f"down to {least:.3g}"] if least < bottom else []
    return f"y is cut: curves go {' and '.join(outside)}" if outside else ""


def _settled_range(curve: Curve, axis: _XAxis) -> tuple[float, float]:
    """The least and greatest value after the start; a curve that ends before counts by its end."""
    whole = np.flatnonzero(np.isfinite(curve.y))
    settled = whole if axis.log else whole[curve.x[whole] >= SETTLED * axis.high]
    values = curve.y[settled if len(settled) else whole[-1:]]
    return float(values.min()), float(values.max())


def _common_range(lows: np.ndarray, highs: np.ndarray) -> tuple[float, float]:
    """A range for all curves, in which one that ran away does not flatten the others."""
    middle_low, middle_high = float(np.median(lows)), float(np.median(highs))
    room = 2 * max(middle_high - middle_low, float(np.ptp(lows[lows <= middle_low])))
    low, high = float(lows.min()), float(highs.max())
    if room > 0:
        low, high = max(low, middle_low - room), min(high, middle_high + room)
    return low, high


def _legend(figure: Figure, all_lines: list[_Lines]) -> float:
    """Outside on the right, in the order in which the curves end; as large as there is room for.

    Returns:
        Its left edge, as a share of the figure.
    """
    ends: dict[_Look, list[float]] = {}
    for lines in all_lines:
        ends.setdefault(lines.look, []).append(_end(lines))
    looks = sorted(ends, key=lambda look: -float(np.mean(ends[look])))
    has_markers = any(not lines.validation.empty for lines in all_lines)
    for size, wrap in ((9, True), (8, True), (7, True), (6, True), (5, False)):
        legend = figure.legend(
            handles=[_handle(look, len(ends[look]), has_markers, wrap) for look in looks],
            loc="upper right",
            bbox_to_anchor=(0.995, TOP),
            fontsize=size,
            frameon=False,
            handlelength=2.6,
            labelspacing=0.45,
            borderaxespad=0.0,
        )
        box = legend.get_window_extent()
        if box.y0 >= 0 or not wrap:
            break
        legend.remove()
    return box.x0 / figure.bbox.width


def _handle(look: _Look, num_runs: int, has_markers: bool, wrap: bool) -> Line2D:
    name = _wrapped(look.name) if wrap else _shortened(look.name)
    return Line2D(
        [],
        [],
        color=look.colour,
        linestyle=look.dash,
        linewidth=1.6,
        marker=look.marker if has_markers else None,
        markeredgecolor="white",
        label=f"{name} ({num_runs} runs)" if num_runs > 1 else name,
    )


def _fit(figure: Figure, axes: Axes, right: float) -> None:
    """Let the axes reach from their labels, whatever the width of those, to `right`."""
    labels = axes.yaxis.get_tightbbox(figure.canvas.get_renderer())
    place = axes.get_position()
    left = place.x0 - labels.x0 / figure.bbox.width + 0.012
    axes.set_position((left, place.y0, max(right - 0.012 - left, 0.3), place.height))


def _wrapped(name: str) -> str:
    """A long label on several lines, broken where a changed setting begins."""
    lines = [""]
    for part in name.replace(",", ",\0").replace("+", "+\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > 26:
            lines.append("")
        lines[-1] += part
    return "\n  ".join(line[:40] for line in lines)


def _shortened(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:20]}…{name[-27:]}"


def _end(lines: _Lines) -> float:
    values = lines.validation.y if lines.train.empty else lines.train.y
    return float(values[np.isfinite(values)][-1])


def _say_nothing_to_show(axes: Axes, pairs: list[Pair], metric: _Metric, differences: bool) -> None:
    text = f"no {metric.key} recorded yet"
    if differences and not any(pair.comparable for pair in pairs):
        others = [pair for pair in pairs if not pair.is_baseline]
        text = "only the baseline is here: nothing to compare"
        if others:
            text = "no run can be compared with the baseline;\nthe table says why"
    axes.text(0.5, 0.5, text, ha="center", va="center", color="0.4", transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def _smoothing_note(all_lines: list[_Lines], view: View, axis: _XAxis) -> str:
    parts = []
    if any(not lines.train.empty for lines in all_lines):
        parts.append(f"lines: training{_half_life_text(view, axis)}")
    if any(not lines.validation.empty for lines in all_lines):
        parts.append("markers: validation")
        if parts[1:] and any(lines.train.empty for lines in all_lines):
            parts[-1] += ", joined where training has no loss"
    return "; ".join(parts)


def _half_life_text(view: View, axis: _XAxis) -> str:
    if not view.smooths:
        return ""
    if view.half_life is None and view.log:
        half_life = f"{100 * view.half_life_share:g} % of the axis"
    else:
        half_life = _amount(view.half_life or view.half_life_share * axis.high, view.x)
        half_life += " FLOP" if view.x == "flops" else f" {view.x}"
    return f", two-sided mean, half-life {half_life}, each step faint"


def _amount(value: float, x: str) -> str:
    """1,200,000 as 1.2 M; a milliard is B where tokens are counted and G where SI rules."""
    text = EngFormatter(sep=" ")(float(f"{value:.3g}"))
    return text if x == "flops" else text.replace("G", "B")


def _label(
    figure: Figure,
    axes: Axes,
    pairs: list[Pair],
    metric: _Metric,
    view: View,
    differences: bool,
    notes: list[str],
) -> None:
    plans = sorted({pair.run.plan for pair in pairs})
    splits = {"both": "training and validation", "train": "training", "validation": "validation"}
    what = f"{metric.title}: difference to {_baseline_name(pairs)}" if differences else metric.title
    title = f"{what}, {splits[view.split]}, plan {', '.join(plans)}"
    figure.text(0.02, 0.965, title, fontsize=12, fontweight="bold", va="top")
    figure.text(0.02, 0.915, "\n".join(notes), fontsize=8, color="0.35", va="top", linespacing=1.4)
    x_label = _X_LABELS[view.x]
    if view.x == "seconds":
        x_label += f" ({_time_unit(axes.get_xlim()[1])[1]})"
    axes.set_xlabel(x_label)
    y_label = f"{metric.key} ({metric.unit})"
    if differences:
        unit = "percentage points" if metric.unit == "%" else metric.unit
        worse = "above" if metric.better == "below" else "below"
        y_label = (
            f"{metric.key} minus the baseline's ({unit})\n"
            f"{metric.better} 0: better, {worse} 0: worse"
        )
    axes.set_ylabel(y_label)


def _baseline_name(pairs: list[Pair]) -> str:
    names = {pair.baseline.label for pair in pairs if pair.baseline is not None}
    return names.pop() if len(names) == 1 else "the baseline"
