"""What all figures share: what one line stands for, how it looks, headline, legend, paper."""

import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox, ScaledTranslation, Transform

from lmplay.disk import atomic_file
from lmplay.stats.compare import Pair, why_not_comparable

# Okabe and Ito's colours without the yellow, which is too light for a line on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.4, 1.4, 1.4)))
MARKERS = ("o", "s", "^", "D")
BASELINE_COLOUR = "#1A1A1A"
VERDICTS = {  # shape as well as colour: a copy in black and white says the same
    "better": ("#0072B2", "o"),
    "worse": ("#D55E00", "s"),
    "equal": ("#009E73", "^"),
    "not confirmed": ("#6E6E6E", "v"),
    "cannot tell": ("#6E6E6E", "D"),
}

WIDTH = 9.0  # inches, as are all lengths here
BODY = 4.17  # what is below the headline of a figure of curves
BOTTOM = 0.65  # of that, what is below the axes
LEFT = 0.18
DPI = 160
INTERVAL_ROOM = 0.75

_FONT = "DejaVu Sans"
_RC = {
    "font.size": 10,
    "font.family": _FONT,
    "text.parse_math": False,  # a label may hold any character
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.unicode_minus": True,
    "path.simplify": True,
    "svg.hashsalt": "lmplay",
    "pdf.fonttype": 42,
}
_SAVED = {
    "png": {"pil_kwargs": {"compress_level": 3}},  # a third faster than 6, a tenth larger
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}


def verdict_style(row: dict) -> tuple[str, str]:
    """The colour and the marker of a verdict row."""
    word = row["verdict"] or "cannot tell"
    return VERDICTS["equal" if word.startswith("equal") else word]


@dataclass(frozen=True)
class LineStyle:
    """How one label looks in all figures of one call."""

    name: str
    colour: str
    dash: str | tuple
    marker: str
    is_baseline: bool


def write(make: Callable[[], Figure], path: Path) -> Path:
    """Write the figure that `make` draws; the suffix is the format, and the bytes repeat."""
    kind = path.suffix[1:]
    with matplotlib.rc_context(_RC), atomic_file(path) as file:
        make().savefig(file, format=kind, dpi=DPI, **_SAVED[kind])
    return path


def blank() -> tuple[Figure, Axes]:
    """A figure with one pair of axes and a faint grid; `lay_out` gives them their places."""
    figure = Figure(figsize=(WIDTH, BODY), dpi=DPI)  # what is measured is what is drawn
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.2, 0.8, 0.7))
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def family(label: str) -> str:
    """A label without its budget: "ue,lr=0.001" of "ue,budget=flops,lr=0.001,tokens=2000000"."""
    name, *changes = label.split(",")
    kept = [part for part in changes if not part.startswith(("budget=", "size=", "tokens="))]
    return ",".join([name, *kept])


def with_one_ruler(pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs of each (plan, label), apart where data or budget differ: no mean mixes those."""
    groups: list[list[Pair]] = []
    for pair in pairs:
        run = pair.run
        for group in groups:
            first = group[0].run
            if (run.plan, run.label) != (first.plan, first.label):
                continue
            if not why_not_comparable(run, first):
                group.append(pair)
                break
        else:
            groups.append([pair])
    return groups


def sole_of_seed(pairs: list[Pair]) -> list[Pair]:
    """The pairs whose seed no other has, by seed: a seed that ran twice is not two seeds."""
    count = Counter(pair.run.seed for pair in pairs)
    return sorted((p for p in pairs if count[p.run.seed] == 1), key=lambda p: p.run.seed)


def looks(pairs: list[Pair]) -> dict[tuple[str, str], LineStyle]:
    """A look for each (plan, label).

    The runs of one idea at several budgets, or on several plans, share its colour as long as
    there are colours enough; the baseline is black where there is only one.
    """
    keys = sorted({(pair.run.plan, pair.run.label) for pair in pairs})
    one_plan = len({plan for plan, _ in keys}) == 1
    baselines = {family(pair.run.label) for pair in pairs if pair.is_baseline}
    black = baselines.pop() if len(baselines) == 1 else None
    members: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(keys, key=lambda key: (key[1] != family(key[1]), *key)):
        members.setdefault(family(key[1]), []).append(key)
    coloured = [name for name in sorted(members) if name != black]
    by_family = len(coloured) <= len(COLOURS) and max(map(len, members.values())) <= len(DASHES)
    singles = [key for name in coloured for key in members[name]]
    found = {}
    for plan, label in keys:
        own = family(label)
        member = members[own].index((plan, label))
        if own == black:
            colour, style = BASELINE_COLOUR, member
        elif by_family:
            colour, style = COLOURS[coloured.index(own)], member
        else:
            index = singles.index((plan, label))
            colour, style = COLOURS[index % len(COLOURS)], index // len(COLOURS)
        name = label if one_plan else f"{plan}/{label}"
        again, style = divmod(style, len(DASHES))  # past 24 lines a dash has another marker
        marker = MARKERS[(style + again) % len(MARKERS)]
        found[plan, label] = LineStyle(name, colour, DASHES[style], marker, own == black)
    return found


def handle(look: LineStyle, marker: bool, line: bool = True) -> Line2D:
    """What stands for a label in a legend."""
    return Line2D(
        [],
        [],
        color=look.colour,
        linestyle=look.dash if line else "none",
        linewidth=1.6,
        marker=look.marker if marker else None,
        markeredgecolor="white",
    )


def lay_out(
    figure: Figure,
    axes: Axes,
    title: str,
    notes: list[str],
    entries: list[tuple[LineStyle, str, Line2D]],
) -> None:
    """Give a figure of curves its headline, its legend and its places on the paper.

    Args:
        entries: of the legend, from its top: a look, what follows its name, what stands for it.
    """
    header = headline(figure, title, notes)
    body, right = _legend(figure, entries, header) if entries else (BODY, 0.97)
    height = header + body
    figure.set_size_inches(WIDTH, height)
    top = 1 - header / height
    bottom = BOTTOM / height
    axes.set_position((0.1, bottom, 0.8, top - bottom))
    labels = axes.yaxis.get_tightbbox(figure.canvas.get_renderer())
    left = 0.1 + 0.012 - (0.0 if labels is None else labels.x0 / figure.bbox.width)
    axes.set_position((left, bottom, max(right - 0.012 - left, 0.3), top - bottom))


def headline(figure: Figure, title: str, notes: list[str]) -> float:
    """Write a title and notes at the top of the paper, broken at its edge.

    Returns:
        The height that they take, with a margin above and below.
    """
    height = 0.18
    looks = {"fontsize": 12, "fontweight": "bold"}, {"fontsize": 8, "color": "0.35"}
    for text, look in zip((title, "\n".join(filter(None, notes))), looks, strict=True):
        written = figure.text(LEFT, -height, drawable(text), va="top", linespacing=1.4, **look)
        written.set_transform(from_top_left(figure))
        height += broken(written).height / figure.dpi + 0.08
    return height + 0.08


def broken(text: Text) -> Bbox:
    """Break the lines that are too long for the paper; matplotlib measures every word for that.

    Returns:
        The place that the text takes then, in pixels.
    """
    lines = text.get_text().split("\n")
    room = text.figure.bbox.width - 2 * LEFT * text.figure.dpi
    most = max(map(len, lines))  # characters on a line
    while (place := text.get_window_extent()).width > room:
        most = int(most * room / place.width)
        text.set_text("\n".join(part for line in lines for part in textwrap.wrap(line, most)))
    return place


def from_top_left(figure: Figure) -> Transform:
    """Inches from the top left corner, whatever the height of the paper will be."""
    return figure.dpi_scale_trans + ScaledTranslation(0, 1, figure.transFigure)


def _legend(
    figure: Figure, entries: list[tuple[LineStyle, str, Line2D]], header: float
) -> tuple[float, float]:
    """Outside on the right, as large as there is room for; a very long one makes the paper longer.

    Args:
        header: what stands above it.
    Returns:
        The height of what is below the header, and the legend's left edge as a share of the figure.
    """
    for size in (9, 8, 7, 6):
        legend = figure.legend(
            handles=[line for _, _, line in entries],
            labels=[f"{wrapped(look.name)}{text}" for look, text, _ in entries],
            loc="upper right",
            bbox_to_anchor=(0.995 * WIDTH, -header),
            bbox_transform=from_top_left(figure),
            fontsize=size,
            frameon=False,
            handlelength=2.6,
            labelspacing=0.45,
            borderaxespad=0.0,
        )
        box = legend.get_window_extent()
        height = box.height / figure.dpi + 0.1
        if height <= BODY or size == 6:
            break
        legend.remove()
    return max(BODY, height), box.x0 / figure.bbox.width


def drawable(text: str) -> str:
    """The text with what the font of figures lacks spelled out, as in \\u4e2d."""
    known = _glyphs()
    return "".join(
        letter
        if ord(letter) in known or letter == "\n"
        else letter.encode("ascii", "backslashreplace").decode()
        for letter in text
    )


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(FT2Font(findfont(_FONT)).get_charmap())


def say_nothing_to_show(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color="0.4", transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def common_range(lows: np.ndarray, highs: np.ndarray) -> tuple[float, float]:
    """A range for all of these, in which one that ran away does not flatten the others."""
    middle_low, middle_high = float(np.median(lows)), float(np.median(highs))
    room = 2 * max(middle_high - middle_low, float(np.ptp(lows[lows <= middle_low])))
    low, high = float(lows.min()), float(highs.max())
    if room > 0:
        low, high = max(low, middle_low - room), min(high, middle_high + room)
    return low, high


def with_room(low: float, high: float, lows: np.ndarray, highs: np.ndarray) -> tuple[float, float]:
    """The range low to high, widened for intervals, which two seeds can make very long.

    On each side they get what they need, and at most INTERVAL_ROOM of the range.
    """
    least, most = float(lows.min()), float(highs.max())
    if low == high:
        return min(low, least), max(high, most)
    room = INTERVAL_ROOM * (high - low)
    return min(low, max(least, low - room)), max(high, min(most, high + room))


def wrapped(name: str) -> str:
    """A long label on several lines, broken where a part or a changed setting begins."""
    lines = [""]
    for part in drawable(name).replace(",", ",\0").replace("+", "+\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > 26:
            lines.append("")
        lines[-1] += part
    short = (line if len(line) <= 120 else f"{line[:60]}…{line[-59:]}" for line in lines)
    return "\n  ".join(line[at : at + 40] for line in short for at in range(0, len(line), 40))


def amount(value: float, x: str) -> str:
    """1,200,000 as 1.2 M; a milliard is B where tokens are counted and G where SI rules."""
    text = EngFormatter(sep=" ")(float(f"{value:.3g}"))
    return text if x == "flops" else text.replace("G", "B")


def some(names: list[str], most: int = 4) -> str:
    """The first of the names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
