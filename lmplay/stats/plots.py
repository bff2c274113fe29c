"""The figures: loss, accuracy, their differences to the baseline, verdicts, and compute."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullLocator,
    ScalarFormatter,
)

from lmplay.stats.compare import Pair, curve
from lmplay.stats.curve import NO_CURVE, Curve, difference, smooth
from lmplay.stats.style import (
    BASELINE_COLOUR,
    LineStyle,
    amount,
    blank,
    common_range,
    handle,
    lay_out,
    looks,
    say_nothing_to_show,
    sole_of_seed,
    some,
    with_one_ruler,
    with_room,
    write,
)
from lmplay.stats.verdict import mean_interval
from lmplay.stats.verdict_plots import compute, forest

COLUMNS = 1000  # for a line: about as many as the axes have columns of pixels
BAND_COLUMNS = 400  # for a band
MOST_BARS = 4  # of the lines in a figure: more bars at one place would hide one another
SETTLED = 0.15  # share of the axis after which a curve has a say in the range of y

_X_LABELS = {
    "tokens": "tokens trained on",
    "steps": "steps",
    "seconds": "training time",
    "flops": "training compute (FLOP)",
}


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
class Band:
    """The mean of several curves, and the 95 % interval of that mean.

    Of one curve it is that curve, without an interval.
    """

    mean: Curve
    low: np.ndarray | None = None
    high: np.ndarray | None = None


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
class _Group:
    """Finished runs of one label, seed after seed, with one ruler; or one that is not finished."""

    look: LineStyle
    pairs: list[Pair]
    finished: bool


@dataclass(frozen=True)
class _Series:
    """What a group puts into one figure: a curve of each run."""

    group: _Group
    train: list[Curve]
    validation: list[Curve]


@dataclass(frozen=True)
class _Line:
    """A series as it is drawn."""

    series: _Series
    train: Band
    validation: Band

    @property
    def empty(self) -> bool:
        return self.train.mean.empty and self.validation.mean.empty

    @property
    def two_intervals(self) -> bool:
        """True where that of validation can be no band, since that of training is."""
        return self.train.low is not None and self.validation.low is not None


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


def draw(pairs: list[Pair], rows: list[dict], view: View, out_dir: Path) -> list[Path]:
    """Write all figures; the same runs give the same bytes.

    Where a label has several runs, curves are their mean over seeds, with its 95 % t interval as
    a band. A figure that has nothing to show says why.

    Args:
        rows: the verdicts of `judge`, in the order in which the forest plot shows them.
    Returns:
        loss, accuracy, loss_difference, accuracy_difference, verdicts and compute.
    """
    look_of = looks(pairs)
    figures = {}
    for differences in (False, True):
        for metric in _METRICS:
            name = f"{metric.key}_difference" if differences else metric.key
            figures[name] = partial(_figure, pairs, look_of, metric, view, differences)
    figures["verdicts"] = partial(forest, rows)
    figures["compute"] = partial(compute, pairs, look_of)
    return [write(make, out_dir / f"{name}.{view.format}") for name, make in figures.items()]


def mean_over_runs(curves: list[Curve]) -> Band:
    """The mean of curves and its 95 % t interval, where all of them are recorded.

    Curves with other axes are joined by straight lines and read at the points of the one that
    has most of them. Two or more curves are needed for an interval.
    """
    if len(curves) == 1:
        return Band(curves[0])
    x = curves[0].x
    if all(np.array_equal(curve.x, x) for curve in curves[1:]):
        values_RX = np.stack([curve.y for curve in curves])
    else:
        x = _shared_axis(curves)
        values_RX = np.stack([np.interp(x, curve.x, curve.y) for curve in curves if len(x)] or [x])
    if not len(x):
        return Band(NO_CURVE)
    mean, low, high = mean_interval(values_RX)
    return Band(Curve(x, mean), low, high)


def _shared_axis(curves: list[Curve]) -> np.ndarray:
    if not all(len(curve.x) for curve in curves):
        return NO_CURVE.x
    low = max(curve.x[0] for curve in curves)
    high = min(curve.x[-1] for curve in curves)
    if low > high:
        return NO_CURVE.x
    inside = [curve.x[(low < curve.x) & (curve.x < high)] for curve in curves]
    return np.unique(np.concatenate([[low], max(inside, key=len), [high]]))


def _figure(
    pairs: list[Pair], look_of: dict, metric: _Metric, view: View, differences: bool
) -> Figure:
    groups, left_out = _groups(pairs, look_of, differences)
    all_series = list(_all_series(groups, metric, view, differences))
    figure, axes = blank()
    axis = _x_axis(all_series, view)
    notes, entries = [], []
    if axis is None:
        say_nothing_to_show(axes, _why_nothing(pairs, metric, differences))
    else:
        lines = [_line(series, view, axis) for series in all_series]
        lines = [line for line in lines if not line.empty]
        num_bars = sum(line.two_intervals for line in lines)
        for line in lines:
            _draw_line(axes, line, view, axis, len(lines))
            if line.two_intervals and num_bars <= MOST_BARS:
                _draw_bars(axes, line.validation, line.series.group.look)
        _scale_x(axes, axis, view)
        notes = [_smoothing_note(lines, view, axis), _seeds_note(lines, num_bars)]
        notes.append(_scale_y(axes, lines, axis, differences))
        entries = _entries(lines)
    _label_axes(axes, metric, view, differences)
    title = _title(pairs, metric, view, differences)
    lay_out(figure, axes, title, [*notes, left_out], entries)
    return figure


def _groups(pairs: list[Pair], look_of: dict, differences: bool) -> tuple[list[_Group], str]:
    """What is drawn as one line each, and what is left out.

    Unfinished runs are drawn only where none of their label is finished, each by itself, so that
    no mean holds one; runs of one label with other data or another budget are apart likewise.
    """
    groups, unfinished, again = [], {}, {}
    drawn = [pair for pair in pairs if pair.comparable or not differences]
    for members in with_one_ruler(drawn):
        look = look_of[members[0].run.plan, members[0].run.label]
        finished = [pair for pair in members if _finished(pair, differences)]
        together = sole_of_seed(finished)
        if not together:
            groups += [_Group(look, [pair], bool(finished)) for pair in finished or members]
            continue
        groups.append(_Group(look, together, True))
        apart = {pair.run.seed for pair in finished} - {pair.run.seed for pair in together}
        rest = {pair.run.seed for pair in members if not _finished(pair, differences)}
        for left, seeds in ((unfinished, rest), (again, apart)):
            if seeds:
                left.setdefault(look.name, set()).update(seeds)
    notes = [
        f"{why}: {some([f'{name} ({_seeds(seeds)})' for name, seeds in left.items()])}"
        for why, left in (("not finished", unfinished), ("several runs of one seed", again))
        if left
    ]
    if differences:
        names = {look_of[pair.run.plan, pair.run.label].name for pair in pairs if pair.obstacle}
        notes += [f"not comparable, the table says why: {some(sorted(names))}"] if names else []
    return groups, f"left out: {'; '.join(notes)}" if notes else ""


def _seeds(seeds: set[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}"


def _finished(pair: Pair, differences: bool) -> bool:
    return pair.run.finished and (not differences or pair.baseline.finished)


def _all_series(
    groups: list[_Group], metric: _Metric, view: View, differences: bool
) -> Iterator[_Series]:
    for group in groups:
        curves = {}
        for split in ("train", "validation"):
            shown = view.split in (split, "both")
            curves[split] = [
                _curve(pair, split, metric, view, differences) for pair in group.pairs if shown
            ]
            if any(curve.empty for curve in curves[split]):
                curves[split] = []
        if curves["train"] or curves["validation"]:
            yield _Series(group, **curves)


def _curve(pair: Pair, split: str, metric: _Metric, view: View, differences: bool) -> Curve:
    values = curve(pair.run, split, metric.key, view.x)
    if differences:
        values = difference(values, curve(pair.baseline, split, metric.key, view.x))
    if view.log:
        values = Curve(values.x[values.x > 0], values.y[values.x > 0])
    return Curve(values.x, values.y * metric.scale)


def _x_axis(all_series: list[_Series], view: View) -> _XAxis | None:
    bundles = [b for series in all_series for b in (series.train, series.validation) if b]
    if not bundles:
        return None
    low = min(max(float(c.x[0]) for c in bundle) for bundle in bundles) if view.log else 0.0
    high = max(min(float(c.x[-1]) for c in bundle) for bundle in bundles)
    return _XAxis(low, high if high > low else low + 1.0, view.log)


def _line(series: _Series, view: View, axis: _XAxis) -> _Line:
    """Validation is scored on one whole text, so only training is smoothed."""
    train = [_smoothed(curve, view, axis) for curve in series.train]
    bands = [mean_over_runs(curves or [NO_CURVE]) for curves in (train, series.validation)]
    return _Line(series, *bands)


def _smoothed(curve: Curve, view: View, axis: _XAxis) -> Curve:
    if view.half_life is not None:
        return smooth(curve, view.half_life)
    on_paper = Curve(axis.coordinate(curve.x), curve.y)
    return Curve(curve.x, smooth(on_paper, view.half_life_share * axis.width).y)


def _draw_line(axes: Axes, line: _Line, view: View, axis: _XAxis, num_lines: int) -> None:
    look = line.series.group.look
    front = 3 if look.is_baseline else 4
    if view.smooths and len(line.series.train) == 1:
        _draw_faintly(axes, line.series.train[0], axis, look.colour, min(0.15, 0.3 / num_lines))
    style = {"color": look.colour, "linestyle": look.dash, "linewidth": 1.5, "zorder": front}
    axes.plot(*_thin(line.train.mean, axis), **style)
    axes.plot(
        *_thin(line.validation.mean, axis),
        **{**style, "linestyle": look.dash if line.train.mean.empty else "none"},
        marker=look.marker,
        markersize=5.5 if num_lines <= 8 else 4,
        markeredgecolor="white",
        markeredgewidth=0.6,
    )
    alpha = max(0.08, 0.24 - 0.02 * num_lines)
    band = line.validation if line.train.low is None else line.train
    _draw_band(axes, band, axis, look.colour, alpha)


def _draw_faintly(axes: Axes, curve: Curve, axis: _XAxis, colour: str, alpha: float) -> None:
    """Every step, or where they are too many for that, the range they fill."""
    style = {"color": colour, "alpha": alpha, "zorder": 2, "rasterized": True}
    if len(curve.x) <= 2 * BAND_COLUMNS:
        axes.plot(curve.x, curve.y, linewidth=0.5, **style)
    else:
        starts, _, low, high = _columns(curve, axis, BAND_COLUMNS)
        axes.fill_between(curve.x[starts], low, high, linewidth=0, **style)


def _draw_band(axes: Axes, band: Band, axis: _XAxis, colour: str, alpha: float) -> None:
    if band.low is None:
        return
    x, low, high = band.mean.x, band.low, band.high
    if len(x) > 2 * BAND_COLUMNS:
        starts, _, low, _ = _columns(Curve(x, low), axis, BAND_COLUMNS)
        high = _columns(Curve(x, high), axis, BAND_COLUMNS)[3]
        x = x[starts]
    axes.fill_between(x, low, high, color=colour, alpha=alpha, linewidth=0, zorder=2)


def _draw_bars(axes: Axes, band: Band, look: LineStyle) -> None:
    axes.vlines(band.mean.x, band.low, band.high, color=look.colour, linewidth=0.9, zorder=3)


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
        axes.xaxis.set_major_formatter(lambda value, _: amount(value, view.x))


def _every(high: float, unit: float):
    ticks = MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(0, high / unit)
    return MultipleLocator((ticks[1] - ticks[0]) * unit)


def _time_unit(high: float) -> tuple[float, str]:
    if high > 2 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if high > 180 else (1.0, "seconds")


def _scale_y(axes: Axes, lines: list[_Line], axis: _XAxis, differences: bool) -> str:
    """Give y the range of what comes after the steep start; say what that leaves outside."""
    bands = [b for line in lines for b in (line.train, line.validation) if not b.mean.empty]
    low, high = common_range(*_settled_ranges([band.mean for band in bands], axis))
    edges = [
        Curve(band.mean.x, edge) for band in bands if band.low is not None
        for edge in (band.low, band.high)
    ]  # fmt: skip
    if differences:
        low, high = min(low, 0.0), max(high, 0.0)
        axes.axhline(0.0, color=BASELINE_COLOUR, linewidth=1.2, zorder=3)
    if edges:
        low, high = with_room(low, high, *_settled_ranges(edges, axis))
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
    least = min(float(np.nanmin(band.mean.y)) for band in bands)
    most = max(float(np.nanmax(band.mean.y)) for band in bands)
    outside = [f"up to {most:.3g}"] if most > top else []
    outside += [f"down to {least:.3g}"] if least < bottom else []
    text = " and ".join(outside).replace("-", "\N{MINUS SIGN}")
    return f"y is cut: curves go {text}" if outside else ""


def _settled_ranges(curves: list[Curve], axis: _XAxis) -> tuple[np.ndarray, np.ndarray]:
    ranges = np.array([_settled_range(curve, axis) for curve in curves])
    return ranges[:, 0], ranges[:, 1]


def _settled_range(curve: Curve, axis: _XAxis) -> tuple[float, float]:
    """The least and greatest value after the start; a curve that ends before counts by its end."""
    whole = np.flatnonzero(np.isfinite(curve.y))
    settled = whole if axis.log else whole[curve.x[whole] >= SETTLED * axis.high]
    values = curve.y[settled if len(settled) else whole[-1:]]
    return float(values.min()), float(values.max())


def _entries(lines: list[_Line]) -> list[tuple]:
    """A label each, in the order in which the curves end."""
    by_look: dict[LineStyle, list[_Line]] = {}
    for line in lines:
        by_look.setdefault(line.series.group.look, []).append(line)
    ordered = sorted(by_look, key=lambda look: -np.mean([_end(line) for line in by_look[look]]))
    has_markers = any(not line.validation.mean.empty for line in lines)
    return [
        (look, _counted([line.series.group for line in by_look[look]]), handle(look, has_markers))
        for look in ordered
    ]


def _counted(groups: list[_Group]) -> str:
    finished = [len(group.pairs) for group in groups if group.finished]
    running = len(groups) - len(finished)
    parts = []
    if sum(finished) > 1:
        counts = " + ".join(map(str, finished))
        parts.append(f"{counts} seeds" if len(finished) == 1 else f"{counts} runs, apart")
    if running:
        parts.append("not finished" if running == 1 else f"{running} not finished")
    return f" ({', '.join(parts)})" if parts else ""


def _end(line: _Line) -> float:
    band = line.validation if line.train.mean.empty else line.train
    return float(band.mean.y[np.isfinite(band.mean.y)][-1])


def _why_nothing(pairs: list[Pair], metric: _Metric, differences: bool) -> str:
    if not differences or any(pair.comparable for pair in pairs):
        return f"no {metric.key} recorded yet"
    if all(pair.is_baseline for pair in pairs):
        return "only the baseline is here: nothing to compare"
    return "no run can be compared with the baseline;\nthe table says why"


def _smoothing_note(lines: list[_Line], view: View, axis: _XAxis) -> str:
    parts = []
    if any(not line.train.mean.empty for line in lines):
        faint = any(line.train.low is None and not line.train.mean.empty for line in lines)
        parts.append(f"lines: training{_half_life_text(view, axis, faint)}")
    if any(not line.validation.mean.empty for line in lines):
        parts.append("markers: validation")
        if parts[1:] and any(line.train.mean.empty for line in lines):
            parts[-1] += ", joined where training has no loss"
    return "; ".join(parts)


def _half_life_text(view: View, axis: _XAxis, faint: bool) -> str:
    if not view.smooths:
        return ""
    if view.half_life is None and view.log:
        half_life = f"{100 * view.half_life_share:g} % of the axis"
    else:
        half_life = amount(view.half_life or view.half_life_share * axis.high, view.x)
        half_life += " FLOP" if view.x == "flops" else f" {view.x}"
    return f", two-sided mean, half-life {half_life}{', each step faint' if faint else ''}"


def _seeds_note(lines: list[_Line], num_bars: int) -> str:
    if not any(line.train.low is not None or line.validation.low is not None for line in lines):
        return ""
    note = "several seeds: their mean where all are recorded; bands: its 95 % t interval"
    if num_bars > MOST_BARS:
        return f"{note}, of validation only where it is drawn alone"
    return f"{note}, bars at markers" if num_bars else note


def _title(pairs: list[Pair], metric: _Metric, view: View, differences: bool) -> str:
    plans = sorted({pair.run.plan for pair in pairs})
    splits = {"both": "training and validation", "train": "training", "validation": "validation"}
    what = f"{metric.title}: difference to {_baseline_name(pairs)}" if differences else metric.title
    return f"{what}, {splits[view.split]}, plan {', '.join(plans)}"


def _label_axes(axes: Axes, metric: _Metric, view: View, differences: bool) -> None:
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
