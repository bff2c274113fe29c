"""One file of several ideas: their edits merged, their words and dimensions put together."""

import ast
import re
import textwrap
from functools import lru_cache

from lmplay.catalog.conflicts import conflicts, is_named, parsed
from lmplay.catalog.entry import Entry, section
from lmplay.catalog.merge import Conflict, merge
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
        merged = _once(merged)
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
    tree = parsed(source)
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
    for node in parsed("".join(merged)).body:
        if is_named(node) or isinstance(node, ast.Assign):
            text = ast.unparse(node)
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            if text in seen:
                gone |= set(range(first - 1, node.end_lineno))
                gone |= {n for n in range(node.end_lineno, len(merged)) if _is_gap(merged, node, n)}
            seen.add(text)
    return [line for number, line in enumerate(merged) if number not in gone]


def _is_gap(lines: list[str], node: ast.stmt, number: int) -> bool:
    return not "".join(lines[node.end_lineno : number + 1]).strip()


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
        new = {node.name: ast.unparse(node) for node in ast.parse(below).body if is_named(node)}
    except SyntaxError:  # of a file with conflict markers
        return ["to be settled"]
    old = {node.name: ast.unparse(node) for node in ast.parse(base.source).body if is_named(node)}
    return [n for n in [*new, *(old.keys() - new.keys())] if old.get(n) != new.get(n)]


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
