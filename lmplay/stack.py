"""Merges the edits that several experiments make to one ancestor into one file."""

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from lmplay.errors import UserError

_LINE = 100  # characters


class Conflict(UserError):
    """Ideas that change the same lines, or give one name to two things.

    Attributes:
        merged: the whole file with conflict markers.
    """

    def __init__(self, problem: str, merged: str):
        super().__init__(problem, hint="--write experiments/mine.py gives the file to settle it in")
        self.merged = merged


@dataclass(frozen=True)
class Part:
    """One file of a stack, or the ancestor of all."""

    name: str
    source: str
    docstring: str
    tiny: dict[str, object]


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
        same = (self.start, self.stop, self.lines) == (other.start, other.stop, other.lines)
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
    blocks = SequenceMatcher(None, base, new, autojunk=False).get_opcodes()
    return [Edit(idea, i, j, tuple(new[k:m])) for tag, i, j, k, m in blocks if tag != "equal"]


def merge(
    base: list[str],
    ideas: dict[str, list[str]],
    file: str = "the ancestor",
    numbers: list[int] | None = None,
) -> list[str]:
    """The lines of `base` with the edits of every idea.

    Insertions at one place keep the order of the ideas; equal replacements, and equal insertions
    of whole classes, functions or imports, count once.

    Args:
        ideas: the changed lines, by name.
        file: what the ancestor is called in a report.
        numbers: of the lines of `base` in that file; without them they are counted from 1.
    Raises:
        Conflict: two edits collide; the report shows both.
    """
    names = list(ideas)
    groups = _groups([e for i, new in enumerate(ideas.values()) for e in edits_of(base, new, i)])
    merged: list[str] = []
    reports: list[str] = []
    at = 0
    for group in groups:
        start, stop = group[0].start, max(edit.stop for edit in group)
        merged += base[at:start]
        if _collide(group):
            versions = _versions(base, group, start, stop)
            where = (numbers or range(1, len(base) + 1))[min(start, len(base) - 1)]
            reports.append(_report(base, group, names, f"{file}, line {where}"))
            merged += _marked({names[idea]: lines for idea, lines in versions.items()})
        else:
            merged += _applied(base, group, start, stop)
        at = stop
    merged += base[at:]
    if reports:
        raise Conflict("\n".join(reports), "".join(merged))
    return merged


def compose(name: str, base: Part, parts: list[Part], variant: dict[str, object]) -> str:
    """The source of a stack: the ancestor's with the edits of all parts.

    The docstring, the legend of dimensions, TINY and VARIANTS are written anew: every idea's words
    and sources, what differs from the ancestor, the dimensions and tiny values of all, and the
    variant's values under the stack's name.

    Raises:
        Conflict: edits collide, or two ideas add one name to one scope.
        UserError: the merged file is not valid Python.
    """
    bodies = {part.name: list(_body(part.source).values()) for part in parts}
    numbers, base_body = (list(part) for part in zip(*_body(base.source).items(), strict=True))
    file = f"{base.name}.py"
    tiny = _composed_tiny(base, parts, file)
    try:
        merged = merge(base_body, bodies, file, numbers)
    except Conflict as conflict:
        lines = conflict.merged.splitlines(keepends=True)
        raise Conflict(conflict.problem, _headed(name, base, parts, lines, tiny, variant)) from None
    if shared := _shared_names(base_body, bodies):
        raise Conflict(shared, _headed(name, base, parts, merged, tiny, variant))
    try:
        ast.parse("".join(merged))
    except SyntaxError as error:
        problem = f"{name} merges into what is no Python: line {error.lineno}: {error.msg}"
        raise Conflict(problem, _headed(name, base, parts, merged, tiny, variant)) from None
    return _headed(name, base, parts, _once(merged), tiny, variant)


def added_names(base: str, source: str) -> dict[tuple[str, str], str]:
    """What a file defines that the ancestor does not: (scope, name) to its source.

    Scopes are the file, each class, and each class's attributes of self.
    """
    before = dict(_names(base))
    return {key: text for key, text in _names(source) if key not in before}


def _names(source: str) -> Iterator[tuple[tuple[str, str], str]]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield ("the file", node.name), ast.unparse(node)
        if not isinstance(node, ast.ClassDef):
            continue
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef):
                yield (node.name, inner.name), ast.unparse(inner)
            elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                yield (node.name, inner.target.id), ast.unparse(inner)
        for inner in ast.walk(node):
            targets = inner.targets if isinstance(inner, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    yield (f"{node.name}, self", target.attr), ast.unparse(inner)


def _shared_names(base: list[str], bodies: dict[str, list[str]]) -> str:
    """A report on the names that two ideas give to two things: one would overwrite the other."""
    owners: dict[tuple[str, str], tuple[str, str]] = {}
    reports = []
    for name, body in bodies.items():
        once: set[str] = set()  # classes that another idea adds just so
        for (scope, what), text in added_names("".join(base), "".join(body)).items():
            other, theirs = owners.setdefault((scope, what), (name, text))
            if scope == "the file" and other != name and theirs == text:
                once.add(what)
            if other == name or what in once or scope.partition(",")[0] in once:
                continue
            hunks = [
                _hunk(who, [], says.splitlines()) for who, says in ((other, theirs), (name, text))
            ]
            reports.append("\n".join([f"{other} and {name} both add {what} to {scope}:", *hunks]))
    return "\n".join(reports)


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
        lines += here[0].lines if len(here) == 1 else _in_turn(here)
        at = place[1]
    return lines + base[at:stop]


def _in_turn(insertions: list[Edit]) -> list[str]:
    """Insertions at one place, in order; what continues a block before what begins an outer one.

    Two ideas may both add to the end of a method, and one of them a method after it: its method
    comes after the other's lines, which would else become part of it.
    """
    pieces = [piece for edit in insertions for piece in _by_dedent(edit.lines)]
    return [line for _, lines in sorted(pieces, key=lambda p: -p[0]) for line in lines]


def _by_dedent(lines: tuple[str, ...]) -> list[tuple[int, list[str]]]:
    """The lines cut where they go further out than before, each piece with its indentation."""
    pieces: list[tuple[int, list[str]]] = []
    blank: list[str] = []
    for line in lines:
        if not line.strip():
            blank.append(line)
            continue
        indent = len(line) - len(line.lstrip())
        if not pieces or indent < pieces[-1][0]:
            pieces.append((indent, []))
        pieces[-1][1].extend([*blank, line])
        blank = []
    if pieces:
        pieces[-1][1].extend(blank)
    return pieces or [(0, blank)]


def _versions(base: list[str], group: list[Edit], start: int, stop: int) -> dict[int, list[str]]:
    ideas = sorted({edit.idea for edit in group})
    return {
        idea: _applied(base, [edit for edit in group if edit.idea == idea], start, stop)
        for idea in ideas
    }


def _report(base: list[str], group: list[Edit], names: list[str], where: str) -> str:
    who = list(dict.fromkeys(names[edit.idea] for edit in group))
    hunks = [
        _hunk(names[edit.idea], base[edit.start : edit.stop], list(edit.lines)) for edit in group
    ]
    return "\n".join([f"{' and '.join(who)} change one place of {where}:", *hunks])


def _hunk(name: str, old: list[str], new: list[str]) -> str:
    lines = [f"  - {line.rstrip()}" for line in old] + [f"  + {line.rstrip()}" for line in new]
    return "\n".join([f"{name}:", *lines])


def _marked(versions: dict[str, list[str]]) -> list[str]:
    (first, lines), *others = versions.items()
    marked = [f"<<<<<<< {first}\n", *lines]
    for _, more in others:
        marked += ["=======\n", *more]
    return [*marked, f">>>>>>> {others[-1][0] if others else first}\n"]


def _body(source: str) -> dict[int, str]:
    """Number and text of the lines that a stack does not write anew.

    It writes the docstring, the legend, TINY and VARIANTS.
    """
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    gone = set(_legend_lines(lines))
    for node in tree.body:
        is_docstring = node is tree.body[0] and isinstance(node, ast.Expr)
        names = [ast.unparse(t) for t in node.targets] if isinstance(node, ast.Assign) else []
        if is_docstring or {"TINY", "VARIANTS"} & set(names):
            gone |= set(range(node.lineno - 1, node.end_lineno))
            if is_docstring and not lines[node.end_lineno].strip():
                gone.add(node.end_lineno)
    return {number + 1: line for number, line in enumerate(lines) if number not in gone}


def _legend_lines(lines: list[str]) -> range:
    """Where the comment stands that names the dimensions, with the blank line below it."""
    start = next((i for i, line in enumerate(lines) if line.startswith("# B rows")), None)
    if start is None:
        return range(0)
    stop = start
    while stop < len(lines) and lines[stop].startswith("#"):
        stop += 1
    return range(start, stop + 1)


def _legend(sources: list[str]) -> str:
    """The dimensions of all sources, each meaning once, as one comment."""
    entries: dict[str, None] = {}
    for source in sources:
        lines = source.splitlines()
        text = " ".join(lines[i].removeprefix("#").strip() for i in _legend_lines(lines))
        entries |= dict.fromkeys(re.split(r", (?=[A-Z]\b)", text.strip()))
    text = ", ".join(entry for entry in entries if entry)
    return "\n".join(f"# {line}" for line in textwrap.wrap(text, _LINE - 2))


def _once(merged: list[str]) -> list[str]:
    """Without the second of two equal top-level classes or functions."""
    seen: set[str] = set()
    gone: set[int] = set()
    for node in ast.parse("".join(merged)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            text = ast.unparse(node)
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if text in seen:
                gone |= set(range(first - 1, node.end_lineno))
                gone |= {n for n in range(node.end_lineno, len(merged)) if _is_gap(merged, node, n)}
            seen.add(text)
    return [line for number, line in enumerate(merged) if number not in gone]


def _is_gap(lines: list[str], node: ast.stmt, number: int) -> bool:
    return not "".join(lines[node.end_lineno : number + 1]).strip()


def _composed_tiny(base: Part, parts: list[Part], file: str) -> dict[str, object]:
    tiny = dict(base.tiny)
    for part in parts:
        for key, value in part.tiny.items():
            changed = tiny.get(key, value) != value
            if changed and value != base.tiny.get(key) and tiny[key] != base.tiny.get(key):
                problem = f"TINY[{key!r}] is {tiny[key]!r} in one idea and {value!r} in {part.name}"
                raise UserError(
                    problem, hint=f"they share the ancestor {file}: give both one value"
                )
            if key not in tiny or value != base.tiny.get(key):
                tiny[key] = value
    return tiny


def _headed(
    name: str,
    base: Part,
    parts: list[Part],
    body: list[str],
    tiny: dict[str, object],
    variant: dict[str, object],
) -> str:
    """The body with a docstring, VARIANTS and TINY above its first class or function."""
    first = next(i for i, line in enumerate(body) if re.match(r"@|class |def |<<<<<<<", line))
    above = "".join(body[:first]).strip("\n")
    below = "".join(body[first:])
    legend = _legend([base.source, *(part.source for part in parts)])
    literals = f"VARIANTS = {_literal({name: variant})}\n" if variant else ""
    literals += f"TINY = {_literal(tiny)}\n"
    changed = _changed(base, below)
    docstring = _docstring(name, base, parts, changed)
    return f'"""{docstring}"""\n\n{above}\n\n{legend}\n\n{literals}\n\n{below}'


def _changed(base: Part, below: str) -> list[str]:
    try:
        new = {node.name: ast.unparse(node) for node in ast.parse(below).body if _is_named(node)}
    except SyntaxError:  # of a file with conflict markers
        return ["to be settled"]
    old = {node.name: ast.unparse(node) for node in ast.parse(base.source).body if _is_named(node)}
    return [n for n in [*new, *(old.keys() - new.keys())] if old.get(n) != new.get(n)]


def _is_named(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef | ast.FunctionDef)


def _docstring(name: str, base: Part, parts: list[Part], changed: list[str]) -> str:
    names = [part.name for part in parts]
    lines = [f"{' + '.join(name.split('+'))}: stacked on {base.name}.", ""]
    for label, part in zip(["Idea: ", *["    "] * len(parts)], parts, strict=False):
        lines += _wrapped(label + part.docstring.strip().partition("\n")[0])
    if len(parts) > 1:
        order = ", then ".join(f"{name}'s" for name in names)
        lines += _wrapped(f"    Lines that they add at one place stand in this order: {order}.")
    sources = dict.fromkeys(_field(part.docstring, "Source") or "its file" for part in parts)
    lines += _wrapped("Source: " + "; ".join(sources) + ".")
    kept = [part.name for part in parts if not _field(part.docstring, "Folds to")]
    if len(kept) < len(parts):
        lines.append(f"Folds to: {'+'.join(kept) or base.name}.")
    lines += _wrapped(f"Changed from {base.name}: {', '.join(changed)}.")
    return "\n".join(lines) + "\n"


def _field(docstring: str, name: str) -> str:
    found = re.search(rf"^{name}: (.+?)\.?\s*$", docstring, re.MULTILINE)
    return found[1] if found else ""


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _LINE, subsequent_indent="    ", break_long_words=False)


def _literal(values: dict) -> str:
    text = repr(values).replace("'", '"')
    if len(text) <= _LINE - len("VARIANTS = "):
        return text
    inner = "".join(f"    {key!r}: {value!r},\n" for key, value in values.items())
    return f"{{\n{inner}}}"
