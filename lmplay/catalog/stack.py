"""Merges the edits that several experiments make to one ancestor into one file."""

import ast
import re
import textwrap
from collections import Counter
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
    blocks = SequenceMatcher(None, base, new, autojunk=False).get_opcodes()
    edits = [Edit(idea, i, j, tuple(new[k:m])) for tag, i, j, k, m in blocks if tag != "equal"]
    slid: list[Edit] = []
    for number, edit in enumerate(edits, 1):
        top = slid[-1].stop + 1 if slid else 0
        bottom = edits[number].start - 1 if number < len(edits) else len(base)
        slid.append(_slid(edit, top, bottom, base))
    return slid


def _slid(edit: Edit, top: int, bottom: int, base: list[str]) -> Edit:
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
        return _indent(begins), place > 0 and bool(around[place - 1].strip())

    place = min(range(last, first - 1, -1), key=inwardness)
    start, lines = top + place, tuple(around[place : place + size])
    if edit.is_insertion:
        return Edit(edit.idea, start, start, lines)
    return Edit(edit.idea, start, start + size, ())


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


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
    try:
        merged = _once(merged)
    except SyntaxError as error:
        problem = f"{name} merges into what is no Python: line {error.lineno}: {error.msg}"
        raise Conflict(problem, _headed(name, base, parts, merged, tiny, variant)) from None
    texts = {part: "".join(body) for part, body in bodies.items()}
    reports = _doubled("".join(base_body), texts, "".join(merged))
    reports += _mistaken("".join(base_body), texts, "".join(merged))
    reports += _orphaned("".join(base_body), texts, "".join(merged))
    if reports:
        problem = "\n".join(reports)
        raise Conflict(problem, _headed(name, base, parts, merged, tiny, variant))
    return _headed(name, base, parts, merged, tiny, variant)


def _names(source: str) -> Iterator[tuple[tuple[str, str], str]]:
    """((scope, name), source) of what a file defines; scopes are the file, classes, their self."""
    for node in ast.parse(source).body:
        if _is_named(node):
            yield ("the file", node.name), ast.unparse(node)
        elif isinstance(node, ast.Assign):
            yield from ((("the file", ast.unparse(t)), ast.unparse(node)) for t in node.targets)
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


def _doubled(base: str, ideas: dict[str, str], merged: str) -> list[str]:
    """Reports on names that the merged file defines more often than any of the files does."""
    before = list(_names(base))
    named = {name: list(_names(source)) for name, source in ideas.items()}
    counts = [Counter(key for key, _ in found) for found in (before, *named.values())]
    reports = []
    for key, count in Counter(key for key, _ in _names(merged)).items():
        is_set_again = key[0].endswith(", self") and key in counts[0]
        if is_set_again or count <= max(each[key] for each in counts):
            continue
        added = {
            name: [text for k, text in found if k == key and (k, text) not in before]
            for name, found in named.items()
        }
        reports.append(_all_do(added, f"define {key[1]} in {key[0]}"))
    return reports


def _mistaken(base: str, ideas: dict[str, str], merged: str) -> list[str]:
    """Reports on local names, new in two ideas, of which one would read what the other stored."""
    before, after = _reads(base), _reads(merged)
    found = {name: _reads(source) for name, source in ideas.items()}
    reports = []
    for place, (_, merged_reads) in after.items():
        here = {name: there[place] for name, there in found.items() if place in there}
        known = before[place][0] if place in before else {}
        wanted = {read for _, reads in here.values() for read in reads}
        lost = {local for local, _, _ in wanted - merged_reads}
        for local in sorted(lost - known.keys()):
            added = {name: [stored[local]] for name, (stored, _) in here.items() if local in stored}
            if len(added) > 1:
                reports.append(
                    _all_do(added, f"use the name {local} in {place}, one inside another")
                )
    return reports


def _orphaned(base: str, ideas: dict[str, str], merged: str) -> list[str]:
    """Reports on what one idea takes away and another one reads: locals, then other names."""
    reports = []
    reads = {name: _all_reads(source) for name, source in ideas.items()}
    known = _all_reads(base).union(*reads.values())
    stored = {read[:2]: read[2] for read in sorted(known)}  # by name and reader
    for local, reader, text in sorted(_all_reads(merged) - known):
        if not text and stored.get((local, reader)):
            readers = {
                name: [reader]
                for name, found in reads.items()
                if any(read[:2] == (local, reader) for read in found)
            }
            takers = [name for name in ideas if name not in readers]
            reports.append(_taken(local, stored[local, reader], takers, readers))
    kept = {what for (_, what), _ in _names(merged)}
    old = set(base.splitlines())
    for what, text in {w: text for (_, w), text in _names(base) if w not in kept}.items():
        word = re.compile(rf"\b{re.escape(what)}\b")
        takers = [name for name, source in ideas.items() if not word.search(source)]
        readers = {}
        for name, source in ideas.items():
            new = [line for line in source.splitlines() if line not in old]
            if lines := [ln.strip() for ln in new if word.search(ln.partition("#")[0])]:
                readers[name] = lines
        if takers and readers:
            reports.append(_taken(what, text, takers, readers))
    return reports


def _taken(what: str, text: str, takers: list[str], readers: dict[str, list[str]]) -> str:
    who = f"{' and '.join(takers)} takes away {what}, which {' and '.join(readers)} reads:"
    removed = [_hunk(name, text.splitlines()[:1], []) for name in takers]
    return "\n".join([who, *removed, *(_hunk(name, [], lines) for name, lines in readers.items())])


def _reads(source: str) -> dict[str, tuple[dict[str, str], set[tuple[str, str, str]]]]:
    """Of each function: its local names, each with a statement that stores it, and its reads.

    A read is a name, the statement that reads it, and the one before it that stored it.
    """
    found = {}
    for node in ast.parse(source).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in inner:
            if isinstance(function, ast.FunctionDef):
                place = f"{node.name}.{function.name}" if node is not function else node.name
                found[place] = _reads_of(function)
    return found


def _reads_of(
    function: ast.FunctionDef,
) -> tuple[dict[str, str], set[tuple[str, str, str]]]:
    stored: dict[str, str] = {}
    reads: set[tuple[str, str, str]] = set()
    for statement in _statements(function.body):
        text = ast.unparse(statement).partition("\n")[0]
        names = [n for n in _own_nodes(statement) if isinstance(n, ast.Name)]
        for name in names:
            if isinstance(name.ctx, ast.Load) or isinstance(statement, ast.AugAssign):
                reads.add((name.id, text, stored.get(name.id, "")))
        stored |= {name.id: text for name in names if isinstance(name.ctx, ast.Store)}
    return stored, reads


def _all_reads(source: str) -> set[tuple[str, str, str]]:
    return {read for _, reads in _reads(source).values() for read in reads}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements in the order of the file, a compound one before those inside it."""
    for statement in body:
        yield statement
        for block in ("body", "handlers", "orelse", "finalbody"):
            yield from _statements(getattr(statement, block, []))


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What a statement holds, but for statements inside it and names of its comprehensions."""
    for child in ast.iter_child_nodes(node):
        is_bound_inside = isinstance(node, ast.comprehension) and child is node.target
        if not isinstance(child, ast.stmt | ast.ExceptHandler) and not is_bound_inside:
            yield child
            yield from _own_nodes(child)


def _all_do(added: dict[str, list[str]], do: str) -> str:
    """A report on ideas that do the same thing, each with its statements."""
    added = {name: texts for name, texts in added.items() if texts}
    hunks = [_hunk(name, [], "\n".join(texts).splitlines()) for name, texts in added.items()]
    return "\n".join([f"{' and '.join(added)} {do}:", *hunks])


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
        indent = _indent(line)
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
    """Without the second of two equal top-level classes, functions or constants."""
    seen: set[str] = set()
    gone: set[int] = set()
    for node in ast.parse("".join(merged)).body:
        if _is_named(node) or isinstance(node, ast.Assign):
            text = ast.unparse(node)
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
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
    folded = {part.name: _field(part.docstring, "Folds to") for part in parts}
    if any(folded.values()):
        gone = {base.name, _field(base.docstring, "Folds to")}
        left = dict.fromkeys(plain or name for name, plain in folded.items())
        lines.append(f"Folds to: {'+'.join(n for n in left if n not in gone) or base.name}.")
    lines += _wrapped(f"Changed from {base.name}: {', '.join(changed)}.")
    text = "\n".join(lines) + "\n"
    return text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')


def _field(docstring: str, name: str) -> str:
    """What follows `name:`, on that line and the indented ones below; empty if it is not there."""
    found = re.search(rf"^{name}: (.+(?:\n[ \t]+\S.*)*)", docstring, re.MULTILINE)
    return " ".join(found[1].split()).rstrip(".") if found else ""


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _LINE, subsequent_indent="    ", break_long_words=False)


def _literal(values: dict) -> str:
    text = repr(values).replace("'", '"')
    if len(text) <= _LINE - len("VARIANTS = "):
        return text
    inner = "".join(f"    {key!r}: {value!r},\n" for key, value in values.items())
    return f"{{\n{inner}}}"
