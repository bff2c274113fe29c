"""One file of several ideas: their edits merged, their words and dimensions put together."""

import ast
import re
import textwrap
from functools import lru_cache

from lmplay.catalog.conflicts import conflicts
from lmplay.catalog.entry import Entry, definitions, section
from lmplay.catalog.merge import Conflict, merge
from lmplay.catalog.pieces import Piece, inner, names_read, statements
from lmplay.errors import UserError

_LINE = 100  # characters


def compose(name: str, base: Entry, parts: list[Entry], variant: dict[str, object]) -> str:
    """The source of a stack: the ancestor's with the edits of all parts.

    The docstring, the legend of dimensions, TINY and VARIANTS are written anew: every idea's words
    and sources, what differs from the ancestor, the dimensions and tiny values of all, and the
    variant's values under the stack's name.

    Raises:
        Conflict: edits collide, or two ideas add one name to one scope.
        UserError: the merged file is not valid Python.
    """
    tiny = composed_tiny(base, parts)
    try:
        merged = merged_body(name, base, parts)
    except Conflict as conflict:
        lines = conflict.merged.splitlines(keepends=True)
        whole = _headed(name, base, parts, lines, tiny, variant)
        raise Conflict(conflict.problem, whole, conflict.kind) from None
    return _headed(name, base, parts, merged, tiny, variant)


def merged_body(name: str, base: Entry, parts: list[Entry]) -> list[str]:
    """The ancestor's lines with the edits of all parts, but for what a stack writes anew.

    Raises:
        Conflict: edits collide, two ideas add one name to one scope, or it is no Python.
    """
    bodies = {part.name: list(_body(part.source).values()) for part in parts}
    numbers, base_body = (list(part) for part in zip(*_body(base.source).items(), strict=True))
    merged = merge(base_body, bodies, f"{base.file}.py", numbers)
    try:
        merged = _put_back("".join(base_body), _once(merged))
    except SyntaxError as error:
        problem = f"{name} merges into what is no Python: line {error.lineno}: {error.msg}"
        raise Conflict(problem, "".join(merged), "syntax") from None
    texts = {part: "".join(body) for part, body in bodies.items()}
    if reports := conflicts("".join(base_body), texts, "".join(merged)):
        raise Conflict("\n".join(reports), "".join(merged), "names")
    return merged


@lru_cache(maxsize=256)
def _body(source: str) -> dict[int, str]:
    """Number and text of the lines that a stack does not write anew.

    It writes the docstring, the legend, TINY and VARIANTS.
    """
    lines = source.splitlines(keepends=True)
    gone = set(_legend_lines(lines))
    for number, (start, piece) in enumerate(statements(source)):
        is_docstring = number == 0 and isinstance(piece.node, ast.Expr)
        targets = piece.node.targets if isinstance(piece.node, ast.Assign) else []
        if is_docstring or {"TINY", "VARIANTS"} & set(map(ast.unparse, targets)):
            end = start + len(piece.text.splitlines())
            gone |= set(range(start, end))
            if is_docstring and not lines[end].strip():
                gone.add(end)
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
    seen: dict[str, list[ast.stmt]] = {}
    gone: set[int] = set()
    for start, piece in statements("".join(merged)):
        node = piece.node
        if not piece.is_named and not isinstance(node, ast.Assign):
            continue
        others = seen.setdefault(node.name if piece.is_named else ast.unparse(node.targets[0]), [])
        if any(ast.unparse(other) == ast.unparse(node) for other in others):
            end = start + len(piece.text.splitlines())
            while end < len(merged) and not merged[end].strip():
                end += 1  # the gap below it
            gone |= set(range(start, end))
        others.append(node)
    return [line for number, line in enumerate(merged) if number not in gone]


def _put_back(base: str, merged: list[str]) -> list[str]:
    """With what one idea takes away, since it has no use for it, and another one reads.

    That is a class, a function, or a member of Config; it stands behind what it stood behind.
    """
    old, new = _members(base), _members("".join(merged))
    missing = [key for key in old if key not in new]
    read = names_read("".join(merged)) if missing else set()
    wanted = [key for key in missing if key[1] in read]
    if not wanted:
        return merged
    lines, order = list(merged), list(old)
    for key in reversed(wanted):  # so that no place moves before it is used
        above = [k for k in order[: order.index(key)] if k[0] == key[0] and k in new]
        if not above:
            return merged  # which is then reported
        start, piece = new[above[-1]]
        end = start + len(piece.text.splitlines())
        gap = 2 if not key[0] else int(isinstance(old[key][1].node, ast.FunctionDef))
        lines[end:end] = ["\n"] * gap + f"{old[key][1].text}\n".splitlines(keepends=True)
    return _put_back(base, lines)  # which may read more


def _members(source: str) -> dict[tuple[str, str], tuple[int, Piece]]:
    """Of classes and functions, and of what is in Config: its line and its statement."""
    found = {}
    for start, piece in statements(source):
        if piece.is_named:
            found["", piece.node.name] = start, piece
        if isinstance(piece.node, ast.ClassDef) and piece.node.name == "Config":
            for part in inner(piece):
                name = getattr(part.node, "name", None) or getattr(
                    getattr(part.node, "target", None), "id", None
                )
                if name:
                    found["Config", name] = start + part.line - piece.line, part
    return found


def composed_tiny(base: Entry, parts: list[Entry]) -> dict[str, object]:
    """The TINY of a stack: the ancestor's, with what its parts change or add.

    Raises:
        UserError: two parts want two values.
    """
    tiny = dict(base.tiny)
    for part in parts:
        for key, value in part.tiny.items():
            changed = tiny.get(key, value) != value
            if changed and value != base.tiny.get(key) and tiny[key] != base.tiny.get(key):
                problem = f"TINY[{key!r}] is {tiny[key]!r} in one idea and {value!r} in {part.name}"
                raise UserError(
                    problem, hint=f"they share the ancestor {base.file}.py: give both one value"
                )
            if key not in tiny or value != base.tiny.get(key):
                tiny[key] = value
    gone = base.fields.keys() - set.intersection(*(set(part.fields) for part in parts))
    return {key: value for key, value in tiny.items() if key not in gone}


def _headed(
    name: str,
    base: Entry,
    parts: list[Entry],
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


def _changed(base: Entry, below: str) -> list[str]:
    try:
        new, old = definitions(below), definitions(base.source)
    except SyntaxError:  # of a file with conflict markers
        return ["to be settled"]
    return [n for n in [*new, *(n for n in old if n not in new)] if old.get(n) != new.get(n)]


def _docstring(name: str, base: Entry, parts: list[Entry], changed: list[str]) -> str:
    names = [part.name for part in parts]
    lines = [f"{' + '.join(name.split('+'))}: stacked on {base.file}.", ""]
    for label, part in zip(["Idea: ", *["    "] * len(parts)], parts, strict=False):
        lines += _wrapped(label + part.docstring.strip().partition("\n")[0])
    if len(parts) > 1:
        order = ", then ".join(f"{name}'s" for name in names)
        lines += _wrapped(f"    Lines that they add at one place stand in this order: {order}.")
    sources = dict.fromkeys(section(part.docstring, "Source") or "its file" for part in parts)
    lines += _wrapped("Source: " + "; ".join(sources) + ".")
    folded = {part.name: part.folds_to for part in parts}
    if any(folded.values()):
        gone = {base.file, base.folds_to}
        left = dict.fromkeys(plain or name for name, plain in folded.items())
        lines.append(f"Folds to: {'+'.join(n for n in left if n not in gone) or base.file}.")
    lines += _wrapped(f"Changed from {base.file}: {', '.join(changed)}.")
    text = "\n".join(lines) + "\n"
    return text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _LINE, subsequent_indent="    ", break_long_words=False)


def _literal(values: dict) -> str:
    text = repr(values).replace("'", '"')
    if len(text) <= _LINE - len("VARIANTS = "):
        return text
    inner = "".join(f"    {key!r}: {value!r},\n" for key, value in values.items())
    return f"{{\n{inner}}}"
