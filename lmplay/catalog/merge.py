"""Merges the edits that several texts make to one ancestor, line by line."""

from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache

from lmplay.catalog.parts import in_turn, indent_of, merge_parts
from lmplay.errors import UserError


class Conflict(UserError):
    """Ideas that change the same lines, or give one name to two things.

    Attributes:
        merged: the whole file with conflict markers.
        kind: what collides: "lines"; "names", of which one is given twice or taken away; or
            "syntax", where the lines merge into what is no Python.
    """

    def __init__(self, problem: str, merged: str, kind: str):
        super().__init__(problem, hint="--write experiments/mine.py gives the file to settle it in")
        self.merged = merged
        self.kind = kind


@dataclass(frozen=True)
class Edit:
    """Lines of the ancestor, from `start` up to `stop`, and what an idea puts in their place."""

    idea: int  # its place among the ideas
    start: int
    stop: int
    lines: tuple[str, ...]

    @property
    def is_insertion(self) -> bool:
        return self.start == self.stop

    def same_as(self, other: "Edit") -> bool:
        """Two ideas want one thing: the same replacement, or the same new classes or imports."""
        same = (self.start, self.stop, self.lines) == (
            other.start,
            other.stop,
            other.lines,
        )
        return same and not (self.is_insertion and self.lines[0].startswith(" "))

    def collides(self, other: "Edit") -> bool:
        """Replaced lines are shared, or an insertion falls strictly inside replaced lines."""
        if self.same_as(other) or (self.is_insertion and other.is_insertion):
            return False
        return max(self.start, other.start) < min(self.stop, other.stop) or any(
            b.start < a.start < b.stop for a, b in ((self, other), (other, self)) if a.is_insertion
        )


def edits_of(base: list[str], new: list[str], idea: int = 0) -> list[Edit]:
    """What turns the lines `base` into `new`, from top to bottom."""
    return [replace(edit, idea=idea) for edit in _edits(tuple(base), tuple(new))]


@lru_cache(maxsize=256)  # a file is stacked with many others
def _edits(base: tuple[str, ...], new: tuple[str, ...]) -> list[Edit]:
    blocks = SequenceMatcher(None, base, new, autojunk=False).get_opcodes()
    edits = [Edit(0, i, j, new[k:m]) for tag, i, j, k, m in blocks if tag != "equal"]
    slid: list[Edit] = []
    for number, edit in enumerate(edits, 1):
        top = slid[-1].stop + 1 if slid else 0
        bottom = edits[number].start - 1 if number < len(edits) else len(base)
        slid.append(_slid(edit, top, bottom, base))
    return slid


def _slid(edit: Edit, top: int, bottom: int, base: tuple[str, ...]) -> Edit:
    """An insertion or removal where it begins furthest out, of the places that come to the same.

    A method added between two that end alike is, line by line, as well the end of the first one
    and all of the method but its end. Taken so, what another idea adds before that end would land
    behind a `return`.
    """
    if edit.lines and not edit.is_insertion:
        return edit
    old = base[edit.start : edit.stop]
    around = [*base[top : edit.start], *(edit.lines or old), *base[edit.stop : bottom]]
    size = len(edit.lines or old)
    first = last = edit.start - top
    while first > 0 and around[first - 1] == around[first - 1 + size]:
        first -= 1
    while last + size < len(around) and around[last] == around[last + size]:
        last += 1

    def inwardness(place: int) -> tuple[int, bool]:
        begins = next((line for line in around[place : place + size] if line.strip()), "")
        return indent_of(begins), place > 0 and bool(around[place - 1].strip())

    place = min(range(last, first - 1, -1), key=inwardness)
    start, lines = top + place, tuple(around[place : place + size])
    if edit.is_insertion:
        return Edit(edit.idea, start, start, lines)
    return Edit(edit.idea, start, start + size, ())


def merge(
    base: list[str],
    ideas: dict[str, list[str]],
    file: str = "the ancestor",
    numbers: list[int] | None = None,
) -> list[str]:
    """The lines of `base` with the edits of every idea.

    Where they change one line, they may change different parts of it. Insertions at one place
    keep the order of the ideas; equal replacements, and equal insertions of whole classes,
    functions or imports, count once.

    Args:
        ideas: the changed lines, by name.
        file: what the ancestor is called in a report.
        numbers: of the lines of `base` in that file; without them they are counted from 1.
    Raises:
        Conflict: two edits collide; the report shows both.
    """
    names = list(ideas)
    if numbers is None:
        numbers = list(range(1, len(base) + 1))
    numbers = [numbers[at] for at, _ in _docstrings_joined(base)]
    base, *changed = (
        [text for _, text in _docstrings_joined(new)] for new in (base, *ideas.values())
    )
    groups = _groups([e for i, new in enumerate(changed) for e in edits_of(base, new, i)])
    merged: list[str] = []
    reports: list[str] = []
    at = 0
    for group in groups:
        start, stop = group[0].start, max(edit.stop for edit in group)
        merged += base[at:start]
        versions = _versions(base, group, start, stop) if _collide(group) else {}
        apart = merge_parts(base[start:stop], list(versions.values())) if versions else None
        if apart is not None:
            merged += apart
        elif versions:
            where = numbers[min(start, len(base) - 1)]
            reports.append(_report(base, group, names, f"{file}, line {where}"))
            merged += _marked({names[idea]: lines for idea, lines in versions.items()})
        else:
            merged += _applied(base, group, start, stop)
        at = stop
    merged += base[at:]
    if reports:
        raise Conflict("\n".join(reports), "".join(merged), "lines")
    return "".join(merged).splitlines(keepends=True)


def _docstrings_joined(lines: list[str]) -> list[tuple[int, str]]:
    """The lines, those of a docstring as one, with the place of the first."""
    found: list[tuple[int, str]] = []
    is_inside = False
    for at, line in enumerate(lines):
        if is_inside:
            found[-1] = (found[-1][0], found[-1][1] + line)
        else:
            found.append((at, line))
        is_inside ^= (is_inside or line.lstrip().startswith('"""')) and line.count('"""') % 2 == 1
    return found


def _groups(edits: list[Edit]) -> list[list[Edit]]:
    """Edits in the order of their places; those that collide or meet at one place together."""
    groups: list[list[Edit]] = []
    # an insertion stands before a replacement that begins at its place
    for edit in sorted(edits, key=lambda e: (e.start, not e.is_insertion, e.idea)):
        together = groups and any(
            edit.collides(other)
            or edit.same_as(other)
            or (edit.is_insertion and other.is_insertion and edit.start == other.start)
            for other in groups[-1]
        )
        if together:
            groups[-1].append(edit)
        else:
            groups.append([edit])
    return groups


def _collide(group: list[Edit]) -> bool:
    return any(a.collides(b) for i, a in enumerate(group) for b in group[:i])


def _applied(base: list[str], edits: list[Edit], start: int, stop: int) -> list[str]:
    """The ancestor's lines from `start` to `stop` with edits that do not collide."""
    distinct = [e for i, e in enumerate(edits) if not any(e.same_as(o) for o in edits[:i])]
    lines: list[str] = []
    at = start
    for place in sorted({(edit.start, edit.stop) for edit in distinct}):
        here = [edit for edit in distinct if (edit.start, edit.stop) == place]
        lines += base[at : place[0]]
        lines += here[0].lines if len(here) == 1 else in_turn([list(e.lines) for e in here])
        at = place[1]
    return lines + base[at:stop]


def _versions(base: list[str], group: list[Edit], start: int, stop: int) -> dict[int, list[str]]:
    ideas = sorted({edit.idea for edit in group})
    return {
        idea: _applied(base, [edit for edit in group if edit.idea == idea], start, stop)
        for idea in ideas
    }


def _report(base: list[str], group: list[Edit], names: list[str], where: str) -> str:
    who = list(dict.fromkeys(names[edit.idea] for edit in group))
    hunks = [
        hunk(names[edit.idea], base[edit.start : edit.stop], list(edit.lines)) for edit in group
    ]
    return "\n".join([f"{' and '.join(who)} change one place of {where}:", *hunks])


def hunk(name: str, old: list[str], new: list[str]) -> str:
    """An edit as a report shows it: who makes it, what goes, what comes."""
    lines = [f"  - {line.rstrip()}" for line in old] + [f"  + {line.rstrip()}" for line in new]
    return "\n".join([f"{name}:", *lines])


def _marked(versions: dict[str, list[str]]) -> list[str]:
    (first, lines), *others = versions.items()
    marked = [f"<<<<<<< {first}\n", *lines]
    for _, more in others:
        marked += ["=======\n", *more]
    return [*marked, f">>>>>>> {others[-1][0] if others else first}\n"]
