"""Verdict rows as tables: for a terminal, for Markdown."""

import re
from collections.abc import Callable, Container, Iterable

from rich.markup import escape
from rich.table import Table

from lmplay.console import fits, note, show, table

_NOTES = "notes"
_NAME = 24  # characters of a name on a line, where the terminal is narrow
TEXTS = ("experiment", "verdict", "next", _NOTES)  # the columns that are no numbers
_COLOURS = {"better": "green", "worse": "red", "equal": "cyan"}
_NEXT = (
    "what asks for a valid further look; fresh seeds are judged alone, and would show a difference "
    "of this size in 80 % of cases"
)
_PAIRS = "correlation of the two losses over seeds: the nearer to 1, the fewer seeds it takes"
# what a narrow terminal has room for is decided from the left
_BY_IMPORTANCE = (
    "difference", "95 % interval", "seeds", "next", "loss", "p (Holm)", "sd of diff", "pairs r",
    "sensitivity", "tokens x", "seconds x", "bits/byte", "tokens/s", "memory", "trained", "matmul",
    "look-up", "folded",
)  # fmt: skip


def print_verdicts(rows: list[dict]) -> None:
    """Print the verdict rows of `judge` on stdout: a table for each plan, then what marks mean.

    A narrow terminal gets the columns that fit, the verdict always; a note says what has no room.
    """
    numbers: dict[str, int] = {}  # of the marks that stand below the tables
    shown: set[str] = set()
    left_out: dict[str, None] = {}
    for plan, of_plan in by_plan(rows).items():
        title, cells = _title(plan, of_plan), cells_of(of_plan)
        kept = cells if fits(_table(title, cells)) else _fitting(title, cells, of_plan, numbers)
        show(_table(title, kept))
        shown |= kept.keys()
        left_out |= dict.fromkeys(name for name in cells if name not in kept)
    lines = [[str(number), mark] for mark, number in numbers.items()]
    lines += [[sign, text] for sign, text in legend(rows, shown)]
    if lines:
        show(table(None, ["", ""], [[escape(cell) for cell in line] for line in lines]))
    if left_out:
        note(f"no room for {', '.join(left_out)}; lmp-plotstats --csv has every column")


def print_ladder(rows: list[dict]) -> None:
    """Print the rows of `ladder_rows` on stdout, if there are any."""
    columns = ["plan", "experiment", "size", "FLOP", "worth", "95 % interval", "in seconds"]
    cells = []
    for row in rows:
        words = set(row["trend"].values())
        told = words.pop() if len(words) == 1 else _pinned(row["trend"])
        for rung in row["sizes"]:
            ends = "[{:.2f}, {:.2f}]".format(*rung["interval"])
            line = [row["plan"], row["experiment"], f"{rung['size']:g}", f"{rung['flops']:.2e}"]
            line += [f"{rung['worth']:.2f}", ends, _form("{:.2f}", rung["worth_in_seconds"]), told]
            cells.append([escape(cell) for cell in line])
            told = ""
        if not row["sizes"]:
            note(f"{row['experiment']}: no law fits the baseline above {row['floor']:.2f}")
    if cells:
        title = "worth: the compute that the baseline needs for an idea's loss, over the idea's"
        show(table(title, [*columns, "with size"], cells, right=columns[2:]))


def _pinned(trend: dict[str, str]) -> str:
    """What is told where the loss that no model saves is taken lower or higher."""
    return "; ".join(f"floor x {pin}: {word}" for pin, word in trend.items())


def by_plan(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each plan, in their order."""
    plans: dict[str, list[dict]] = {}
    for row in rows:
        plans.setdefault(row["plan"], []).append(row)
    return plans


def cells_of(rows: list[dict]) -> dict[str, list[str]]:
    """Title to cells of every column that says something about one of these rows."""
    forms: dict[str, Callable[[dict], str]] = {
        "experiment": lambda row: row["experiment"],
        "seeds": lambda row: str(row["seeds"]),
        "loss": _loss,
        "difference": _difference,
        "sd of diff": lambda row: _form("{:.4f}", row["difference_sd"]),
        "pairs r": lambda row: _form("{:.2f}", row["correlation"]),
        "95 % interval": _interval,
        "p (Holm)": _p,
        "verdict": lambda row: row["verdict"] or "",
        "next": lambda row: row["next"] or "",
        "sensitivity": lambda row: _form("{:.4f}", row["sensitivity"]),
        "tokens x": lambda row: _ratio(row["tokens_ratio"]),
        "seconds x": lambda row: _ratio(row["seconds_ratio"]),
        "bits/byte": lambda row: _form("{:.4f}", row["bits_per_byte"]),
        "tokens/s": lambda row: _form("{:,.0f}", row["tokens_per_second"]),
        "memory": lambda row: _memory(row["memory"]),
        "trained": lambda row: _short(row["trained"]),
        "matmul": lambda row: _short(row["matmul"]),
        "look-up": lambda row: _short(row["lookup"]),
        "folded": lambda row: _short(row["folded"]),
        _NOTES: lambda row: "; ".join(row["marks"]),
    }
    cells = {title: [form(row) for row in rows] for title, form in forms.items()}
    return {title: column for title, column in cells.items() if any(column)}


def flat(row: dict) -> dict:
    """A verdict row with a column for each number."""
    flat = {}
    for key, value in row.items():
        if key == "interval":
            flat["interval_low"], flat["interval_high"] = value or (None, None)
        elif key.endswith("_ratio"):
            low, high = (value and value["interval"]) or (None, None)
            flat[key], flat[f"{key}_bound"] = value and value["value"], value and value["bound"]
            flat[f"{key}_low"], flat[f"{key}_high"] = low, high
        elif key == "look":
            for part in ("number", "of", "level"):
                flat[f"look_{part}"] = value and value[part]
        else:
            flat[key] = "; ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def legend(rows: list[dict], columns: Container[str]) -> list[tuple[str, str]]:
    """What the signs in these columns of the rows mean, those that are there."""
    keys = [f"{name}_ratio" for name in ("tokens", "seconds") if f"{name} x" in columns]
    ratios = [row[key] for row in rows for key in keys if row[key] is not None]
    bounds = {ratio["bound"] for ratio in ratios}
    lines = []
    if "next" in columns and any(row["next"] for row in rows):
        lines.append(("next", _NEXT))
    if "pairs r" in columns and any(row["correlation"] is not None for row in rows):
        lines.append(("pairs r", _PAIRS))
    if "sensitivity" in columns and any(row["sensitivity"] is not None for row in rows):
        lines.append(
            ("sensitivity", "what a wrong rate costs: mean loss over the rates, above the lowest")
        )
    if ratios:
        what = "of the baseline's budget, what it took to come to the baseline's final loss"
        lines.append(
            ("x", what + (", [95 % interval]" if any(r["interval"] for r in ratios) else ""))
        )
    if "<=" in bounds:
        lines.append(("<=", "at most: with a schedule that ends there it might take less"))
    if ">=" in bounds:
        lines.append((">=", "a seed did not come to that loss: its whole budget stands in"))
    return lines


def markdown(rows: list[dict], columns: Iterable[str] | None = None) -> str:
    """The rows of one plan as a table in GitHub's Markdown, with the legend below it.

    Args:
        columns: titles, in order; without it, every column that says something.
    """
    cells = cells_of(rows)
    titles = [title for title in columns or cells if title in cells]
    lines = [titles, ["---" if title in TEXTS else "---:" for title in titles]]
    lines += zip(*([plain(cell) for cell in cells[title]] for title in titles), strict=True)
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    signs = "".join(
        f"- {plain(sign)}: {plain(meaning)}\n" for sign, meaning in legend(rows, titles)
    )
    return f"{text}\n{signs}" if signs else text


def plain(text: str) -> str:
    """The text as it is, with what Markdown would read as a sign escaped."""
    for sign in "\\`*|<>~":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _title(plan: str, rows: list[dict]) -> str:
    baselines = {row["baseline"] for row in rows if row["baseline"] is not None}
    against = f" against {baselines.pop()}" if len(baselines) == 1 else ""
    what = "validation loss in nats per token; a difference below 0 is better"
    return f"plan {plan}{against}: {what}"


def _fitting(
    title: str, cells: dict[str, list[str]], rows: list[dict], numbers: dict[str, int]
) -> dict[str, list[str]]:
    """The columns that fit, the more important ones first, with numbers in place of the marks."""
    for mark in (mark for row in rows for mark in row["marks"]):
        numbers.setdefault(mark, len(numbers) + 1)
    short = [" ".join(str(numbers[mark]) for mark in row["marks"]) for row in rows]
    narrow = {"experiment": [_broken(name) for name in cells["experiment"]], _NOTES: short}
    kept = {name: narrow.get(name, cells[name]) for name in TEXTS if name in cells}
    for name in (name for name in _BY_IMPORTANCE if name in cells):
        more = kept | {name: cells[name]}
        if fits(_table(title, more)):
            kept = more
    return {name: kept[name] for name in cells if name in kept}


def _broken(name: str) -> str:
    """A long name on several lines, which end where an idea or a change does."""
    lines = [""]
    for part in re.findall("[^,+]*[,+]?", name):
        if lines[-1] and len(lines[-1]) + len(part) > _NAME:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _table(title: str, cells: dict[str, list[str]]) -> Table:
    shown = {name: [escape(cell) for cell in column] for name, column in cells.items()}
    if "verdict" in shown:
        shown["verdict"] = [_coloured(word) for word in shown["verdict"]]
    return table(
        escape(title),
        ["" if name == _NOTES else name for name in shown],
        [list(row) for row in zip(*shown.values(), strict=True)],
        right=shown.keys() - set(TEXTS),
    )


def _coloured(word: str) -> str:
    colour = _COLOURS.get(word.partition(" ")[0])
    return f"[{colour}]{word}[/]" if colour else word


def _loss(row: dict) -> str:
    sd = "" if row["sd"] is None else f" ± {row['sd']:.4f}"
    return _form("{:.4f}", row["mean"]) + sd


def _difference(row: dict) -> str:
    if row["experiment"] == row["baseline"]:
        return "baseline"
    return _form("{:+.4f}", row["difference"])


def _interval(row: dict) -> str:
    return "" if row["interval"] is None else "[{:+.4f}, {:+.4f}]".format(*row["interval"])


def _p(row: dict) -> str:
    if row["p_holm"] is not None and row["p_holm"] < 1e-4:
        return "<0.0001"
    return _form("{:.4f}", row["p_holm"])


def _ratio(ratio: dict | None) -> str:
    if ratio is None:
        return ""
    ends = "" if ratio["interval"] is None else " [{:.3g}, {:.3g}]".format(*ratio["interval"])
    return f"{ratio['bound']}{ratio['value']:.3g}{ends}"


def _memory(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f} GiB"


def _short(count: int | None) -> str:
    """1,234,567 as 1.23 M."""
    if count is None:
        return ""
    for power, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * power:  # else it would be 1e+03 of the next smaller one
            return f"{count / power:.3g} {letter}"
    return str(count)


def _form(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)
