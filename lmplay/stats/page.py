"""A board as one page that needs no network: the rows of the Markdown board, with figures."""

import difflib
from html import escape
from pathlib import Path

import numpy as np

from lmplay.disk import write_text
from lmplay.errors import UserError
from lmplay.run.folder import RunFolder
from lmplay.stats.board import COLUMNS, how_to_repeat
from lmplay.stats.compare import Pair, curve, unsized
from lmplay.stats.curve import Curve, difference
from lmplay.stats.table import TEXTS, by_plan, cells_of, legend

_POINTS = 200  # of a curve, at most
_DIFF = 400  # lines of a diff, at most
_REFRESH = '<meta http-equiv="refresh" content="20">'
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1b;--paper:#fff;--faint:#8a8a8a;--line:#ddd;
--better:#0072b2;--worse:#d55e00;--equal:#009e73}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--paper:#161616;--faint:#909090;
--line:#383838;--better:#56b4e9;--worse:#f0843c;--equal:#2fcf9f}}
body{font:14px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:2rem}
.scroll{overflow-x:auto}table{border-collapse:collapse}
th,td{padding:.2rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap;text-align:right}
th{cursor:pointer}.text{text-align:left}td.notes{white-space:normal;min-width:16rem}
.better{color:var(--better)}.worse{color:var(--worse)}.equal{color:var(--equal)}
svg{display:block}svg .faint{stroke:var(--faint)}svg text{fill:var(--ink);font-size:11px}
pre{overflow-x:auto;border:1px solid var(--line);padding:.5rem}details{margin:.4rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}dd{margin:0}
"""
_SORT = """
document.querySelectorAll('th').forEach(th=>th.onclick=()=>{
const body=th.closest('table').tBodies[0],at=[...th.parentNode.children].indexOf(th);
const up=th.dataset.up=th.dataset.up==='1'?'0':'1';
const key=row=>row.children[at].dataset.key??row.children[at].textContent;
body.append(...[...body.rows].sort((a,b)=>{const x=key(a),y=key(b);
if(x===''||y==='')return (x==='')-(y==='');
const n=x-y;return (up==='1'?1:-1)*(isNaN(n)?x.localeCompare(y):n)}));});
"""
# what the cells of a column are sorted by, where it is not their text
_KEYS = {
    "difference": "difference", "loss": "mean", "p (Holm)": "p_holm", "trained": "trained",
    "matmul": "matmul", "look-up": "lookup", "folded": "folded", "tokens/s": "tokens_per_second",
}  # fmt: skip


def write_page(path: Path, rows: list[dict], pairs: list[Pair], is_running: bool = False) -> None:
    """Write the page in one step.

    Args:
        rows: the verdict rows of `judge`.
        pairs: what they were made from.
        is_running: whether more is to come, so that a browser looks again.
    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_text(path, page(rows, pairs, is_running))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def page(rows: list[dict], pairs: list[Pair], is_running: bool = False) -> str:
    """The whole of the HTML; nothing in it is loaded from elsewhere."""
    parts = [_of_plan(plan, of_plan, pairs) for plan, of_plan in by_plan(rows).items()]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{_REFRESH if is_running else ""}'
        '<meta name="viewport" content="width=device-width"><title>lmplay board</title>'
        f"<style>{_STYLE}</style><h1>Board</h1>{''.join(parts)}<script>{_SORT}</script></html>\n"
    )


def _of_plan(plan: str, rows: list[dict], pairs: list[Pair]) -> str:
    cells = cells_of(rows)
    titles = [title for title in COLUMNS if title in cells]
    heads = [f'<th class="{_kind(title)}">{escape(title)}</th>' for title in titles]
    reach = max([abs(end) for row in rows for end in _ends(row)], default=0.0)
    lines = []
    for number, row in enumerate(rows):
        shown = [_cell(title, cells[title][number], row) for title in titles]
        lines.append(f"<tr>{''.join(shown)}<td>{_bar(row, reach)}</td></tr>")
    signs = [f"<dt>{escape(a)}<dd>{escape(b)}" for a, b in legend(rows, titles)]
    by_label: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.run.plan == plan:
            by_label.setdefault(pair.run.label, []).append(pair)
    curves = {label: _mean_difference(those) for label, those in by_label.items()}
    top = max([float(np.nanmax(np.abs(c.y))) for c in curves.values() if not c.empty], default=0)
    kin: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.run.plan == plan:
            kin.setdefault(unsized(pair.run), []).append(pair)
    details = []
    for row in rows:
        those = by_label[row["experiment"]]
        of_all_sizes = kin[unsized(those[0].run)]
        details.append(_details(row, those, of_all_sizes, curves[row["experiment"]], top))
    return (
        f"<h2>Plan {escape(plan)}</h2><p>Validation loss in nats per token; a difference below 0 "
        'is better.</p><div class="scroll"><table>'
        f"<thead><tr>{''.join(heads)}<th>interval</th></tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table></div><dl>{''.join(signs)}</dl>"
        + "".join(details)
    )


def _kind(title: str) -> str:
    return f"text {title}" if title in TEXTS else "number"


def _cell(title: str, text: str, row: dict) -> str:
    value = row[_KEYS[title]] if title in _KEYS else None
    key = "" if value is None else f' data-key="{value!r}"'
    word = f" {(row['verdict'] or '').partition(' ')[0]}" if title == "verdict" else ""
    return f'<td class="{_kind(title)}{word}"{key}>{escape(text)}</td>'


def _ends(row: dict) -> list[float]:
    return [] if row["difference"] is None else [row["difference"], *(row["interval"] or [])]


def _bar(row: dict, reach: float) -> str:
    """The difference and its interval, on the scale of the whole table."""
    if not _ends(row) or not reach:
        return ""
    place, *ends = (f"{100 + 95 * end / reach:.1f}" for end in _ends(row))
    colour = f"var(--{row['verdict'].partition(' ')[0]}, var(--faint))"
    line = f'<path d="M{ends[0]} 8H{ends[1]}" stroke="{colour}" stroke-width="2"/>' if ends else ""
    return (
        f'<svg width="200" height="16"><path class="faint" d="M100 0V16"/>{line}'
        f'<circle cx="{place}" cy="8" r="4" fill="{colour}"/></svg>'
    )


def _mean_difference(pairs: list[Pair]) -> Curve:
    """Of the validation loss to the baseline's over tokens: the mean over seeds."""
    drawn = [pair for pair in pairs if pair.comparable]
    both = [[curve(r, "validation", "loss", "tokens") for r in (p.run, p.baseline)] for p in drawn]
    curves = [one for one in (difference(*pair) for pair in both) if not one.empty]
    if not curves:
        return Curve(np.empty(0), np.empty(0))
    shared = [one for one in curves if np.array_equal(one.x, curves[0].x)]
    return Curve(curves[0].x, np.mean([one.y for one in shared], axis=0))


def _drawing(shown: Curve, top: float) -> str:
    if shown.empty or not top or not shown.x[-1]:
        return ""
    every = -(-len(shown.x) // _POINTS)
    points = [
        f"{600 * x / shown.x[-1]:.1f},{80 - 75 * y / top:.1f}"
        for x, y in zip(shown.x[::every], shown.y[::every], strict=True)
        if np.isfinite(y)
    ]
    return (
        '<svg viewBox="0 0 680 170" width="680" role="img"><title>mean difference to the baseline '
        'over tokens</title><path class="faint" d="M0 80H600"/>'
        f'<polyline points="{" ".join(points)}" fill="none" stroke="var(--better)" '
        f'stroke-width="2"/><text x="605" y="84">0</text><text x="605" y="14">{top:+.3f}</text>'
        f'<text x="605" y="158">{-top:+.3f}</text><text x="500" y="168">{shown.x[-1]:,.0f} tokens'
        "</text></svg>"
    )


def _details(row: dict, pairs: list[Pair], kin: list[Pair], shown: Curve, top: float) -> str:
    """What one experiment is, what it took, and what repeats it.

    Args:
        kin: the pairs of the experiment at all sizes.
    """
    told, commands = how_to_repeat([pair.run.facts for pair in pairs])
    sizes = sorted({float(pair.run.facts.changes.get("size", 1)) for pair in kin})
    told |= {"sizes tried": ", ".join(f"{size:g}" for size in sizes)}
    told |= {"rates tried": ", ".join(f"{rate:g}" for rate in row["rates"] or [1.0])}
    told |= {"runs": f"{len(pairs)}, of which {row['failures']} failed"}
    lines = [f"<dt>{escape(name)}<dd>{escape(value)}" for name, value in told.items()]
    text = "".join(f"<pre>{escape(command)}</pre>" for command in commands)
    diff = _diff(pairs)
    text += f"<details><summary>diff</summary><pre>{escape(diff)}</pre></details>" if diff else ""
    return (
        f"<details><summary>{escape(row['experiment'])}</summary>{_drawing(shown, top)}"
        f"<dl>{''.join(lines)}</dl>{text}</details>"
    )


def _diff(pairs: list[Pair]) -> str:
    """The experiment's file against its baseline's, as their runs have them."""
    for pair in pairs:
        if pair.baseline is None or pair.is_baseline:
            continue
        files = [RunFolder(run.path).experiment_py for run in (pair.baseline, pair.run)]
        if all(file.is_file() for file in files):
            old, new = (file.read_text("utf-8", "replace").splitlines() for file in files)
            names = pair.baseline.label, pair.run.label
            return "\n".join([*difflib.unified_diff(old, new, *names, lineterm="")][:_DIFF])
    return ""
