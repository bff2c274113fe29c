"""Names that a merge of lines leaves wrong: defined twice, mistaken for another, taken away."""

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator

from lmplay.catalog.merge import hunk
from lmplay.catalog.pieces import Piece, inner, names_read, statements


def conflicts(base: str, ideas: dict[str, str], merged: str) -> list[str]:
    """A report on each name that the merged file gets wrong, though its lines merge.

    Args:
        base: the ancestor, as the others without what a stack writes anew.
        ideas: the changed files, by name.
    """
    checks = (_doubled, _mistaken, _orphaned, _unread)
    return [report for check in checks for report in check(base, ideas, merged)]


Key = tuple[str, str]  # of a name: its scope, which is the file, a class or its self; the name


@functools.lru_cache(maxsize=256)  # a file is stacked with many others
def _names(source: str) -> tuple[tuple[Key, ast.stmt], ...]:
    """What a file defines, each with the statement that does."""
    return tuple(name for _, piece in statements(source) for name in _defined(piece))


@functools.lru_cache(maxsize=2048)
def _defined(piece: Piece) -> tuple[tuple[Key, ast.stmt], ...]:
    node = piece.node
    if isinstance(node, ast.Assign):
        return tuple((("the file", ast.unparse(t)), node) for t in node.targets)
    found = [(("the file", node.name), node)] if piece.is_named else []
    if isinstance(node, ast.ClassDef):
        for part in inner(piece):
            if isinstance(part.node, ast.FunctionDef):
                found.append(((node.name, part.node.name), part.node))
            elif isinstance(part.node, ast.AnnAssign) and isinstance(part.node.target, ast.Name):
                found.append(((node.name, part.node.target.id), part.node))
        for part in inner(piece):
            found += [((f"{node.name}, self", name), set_) for name, set_ in _set_on_self(part)]
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _set_on_self(piece: Piece) -> tuple[tuple[str, ast.stmt], ...]:
    """The attributes of self that a method sets, each with the statement that does."""
    if "self." not in piece.text:
        return ()
    return tuple(
        (target.attr, node)
        for node in ast.walk(piece.node)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)
        if target.value.id == "self"
    )


def _doubled(base: str, ideas: dict[str, str], merged: str) -> list[str]:
    """Reports on names that the merged file defines more often than any of the files does."""
    counts = [_counts(source) for source in (base, *ideas.values())]
    reports = []
    for key, count in _counts(merged).items():
        is_set_again = key[0].endswith(", self") and key in counts[0]
        if is_set_again or count <= max(each[key] for each in counts):
            continue
        before = _texts(base, key)
        added = {
            name: [text for text in _texts(source, key) if text not in before]
            for name, source in ideas.items()
        }
        reports.append(_all_do(added, f"define {key[1]} in {key[0]}"))
    return reports


@functools.lru_cache(maxsize=256)
def _counts(source: str) -> Counter[Key]:
    return Counter(key for key, _ in _names(source))


def _texts(source: str, key: Key) -> list[str]:
    return [ast.unparse(node) for k, node in _names(source) if k == key]


def _mistaken(base: str, ideas: dict[str, str], merged: str) -> list[str]:
    """Reports on local names, new in two ideas, of which one would read what the other stored."""
    before = _functions(base)
    found = {name: _functions(source) for name, source in ideas.items()}
    reports = []
    for place, function in _functions(merged).items():
        here = {name: there[place] for name, there in found.items() if place in there}
        if sum(version != before.get(place) for version in here.values()) < 2:
            continue  # what one idea alone makes of a function reads what it stored
        known = dict(_reads(before[place])[0]) if place in before else {}
        wanted = {read for version in here.values() for read in _reads(version)[1]}
        lost = {local for local, _, _ in wanted - _reads(function)[1]}
        for local in sorted(lost - known.keys()):
            stored = {name: dict(_reads(version)[0]) for name, version in here.items()}
            added = {name: [texts[local]] for name, texts in stored.items() if local in texts}
            if len(added) > 1:
                reports.append(
                    _all_do(added, f"use the name {local} in {place}, one inside another")
                )
    return reports


def _orphaned(base: str, ideas: dict[str, str], merged: str) -> list[str]:
    """Reports on what one idea takes away and another one reads: locals, then other names."""
    reports = []
    if unstored := _unstored(base, ideas, merged):
        reads = {name: _all_reads(source) for name, source in ideas.items()}
        known = _all_reads(base).union(*reads.values())
        stored = {read[:2]: read[2] for read in sorted(known)}  # by name and reader
        for local, reader, _ in sorted(unstored - known):
            if stored.get((local, reader)):
                readers = {
                    name: [reader]
                    for name, found in reads.items()
                    if any(read[:2] == (local, reader) for read in found)
                }
                takers = [name for name in ideas if name not in readers]
                reports.append(_taken(local, stored[local, reader], takers, readers))
    old = set(base.splitlines())
    for what, node in _gone_but_read(base, merged).items():
        word = re.compile(rf"\b{re.escape(what)}\b")
        takers = [name for name, source in ideas.items() if what not in names_read(source)]
        readers = {}
        for name, source in ideas.items():
            new = [line for line in source.splitlines() if line not in old]
            if lines := [ln.strip() for ln in new if word.search(ln.partition("#")[0])]:
                readers[name] = lines
        if takers and readers:
            reports.append(_taken(what, ast.unparse(node), takers, readers))
    return reports


def _gone_but_read(base: str, merged: str) -> dict[str, ast.stmt]:
    """Names that the merged file reads but defines nowhere, as the ancestor does."""
    kept = {what for (_, what), _ in _names(merged)}
    gone = {what: node for (_, what), node in _names(base) if what not in kept}
    read = names_read(merged) if gone else set()
    return {what: node for what, node in gone.items() if what in read}


def _taken(what: str, text: str, takers: list[str], readers: dict[str, list[str]]) -> str:
    who = f"{' and '.join(takers)} takes away {what}, which {' and '.join(readers)} reads:"
    removed = [hunk(name, text.splitlines()[:1], []) for name in takers]
    return "\n".join([who, *removed, *(hunk(name, [], lines) for name, lines in readers.items())])


def _unstored(base: str, ideas: dict[str, str], merged: str) -> set[tuple[str, str, str]]:
    """Reads in functions of the merged file, as no other has them there, that nothing stored."""
    others = [_functions(source) for source in (base, *ideas.values())]
    found: set[tuple[str, str, str]] = set()
    for place, function in _functions(merged).items():
        versions = [there[place] for there in others if place in there]
        if function not in versions:
            known = set().union(*(_reads(version)[1] for version in versions))
            found |= {read for read in _reads(function)[1] - known if not read[2]}
    return found


@functools.lru_cache(maxsize=256)
def _functions(source: str) -> dict[str, Piece]:
    """The functions of a file and of its classes, by name."""
    found = {}
    for _, piece in statements(source):
        node = piece.node
        for part in inner(piece) if isinstance(node, ast.ClassDef) else [piece]:
            if isinstance(part.node, ast.FunctionDef):
                found[part.node.name if part is piece else f"{node.name}.{part.node.name}"] = part
    return found


def _unread(base: str, ideas: dict[str, str], merged: str) -> list[str]:
    """Reports on what one idea stores and reads, which no statement reads where all are in."""
    before = _functions(base)
    versions = {name: _functions(source) for name, source in ideas.items()}
    reports = []
    for place, function in _functions(merged).items():
        plain = before.get(place)
        own = {name: there[place] for name, there in versions.items() if place in there}
        changed = {name: v for name, v in own.items() if v not in (function, plain)}
        if not changed:
            continue
        stores, reads = _reads(function)
        unread = set(stores) - {(local, stored) for local, _, stored in reads}
        unread -= set(_reads(plain)[0]) if plain else set()
        for name, version in changed.items():
            wanted = {(local, stored) for local, _, stored in _reads(version)[1]}
            for local, stored in sorted(wanted & unread):
                head = f"{name} stores {local} in {place}, which nothing reads there any more:"
                reports.append("\n".join([head, hunk(name, [], [stored])]))
    return reports


@functools.lru_cache(maxsize=4096)
def _reads(function: Piece) -> tuple[list[tuple[str, str]], set[tuple[str, str, str]]]:
    """The local names of a function, with each statement that stores one, and its reads.

    A read is a name, the statement that reads it, and one further up that may have stored it.
    """
    stores: list[tuple[str, str]] = []
    reads: set[tuple[str, str, str]] = set()
    lines = function.text.splitlines()

    def follow(body: list[ast.stmt], stored: dict[str, set[str]]) -> dict[str, set[str]]:
        """What may be stored behind these statements, of what is before them."""
        for statement in body:
            text = _in_one_line(statement, lines, function.line)
            names = [n for n in _own_nodes(statement) if isinstance(n, ast.Name)]
            for name in names:
                if isinstance(name.ctx, ast.Load) or isinstance(statement, ast.AugAssign):
                    reads.update((name.id, text, by) for by in stored.get(name.id, [""]))
            new = [name.id for name in names if isinstance(name.ctx, ast.Store)]
            stores.extend((name, text) for name in new)
            stored = stored | {name: {text} for name in new}
            blocks = [getattr(statement, block, []) for block in _BLOCKS]
            if any(blocks):
                ends = [follow(block, stored) for block in blocks if block]
                ends += [] if isinstance(statement, ast.If) and statement.orelse else [stored]
                names = set().union(*ends)
                stored = {name: set().union(*(end.get(name, ()) for end in ends)) for name in names}
        return stored

    follow(function.node.body, {})
    return stores, reads


_BLOCKS = ("body", "handlers", "orelse", "finalbody")


def _all_reads(source: str) -> set[tuple[str, str, str]]:
    return {read for function in _functions(source).values() for read in _reads(function)[1]}


def _in_one_line(node: ast.stmt, lines: list[str], first: int) -> str:
    """A statement without those inside it, however it is wrapped."""
    start = node.lineno - 1 - first
    stop = node.end_lineno - first
    if body := getattr(node, "body", []):
        stop = max(start + 1, body[0].lineno - 1 - first)
    text = " ".join(line.strip() for line in lines[start:stop])
    if "#" in text or getattr(node, "decorator_list", []):
        return ast.unparse(node).partition("\n")[0]
    return re.sub(r"(?<=[(\[{]) |,? (?=[)\]}])", "", text)


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
    hunks = [hunk(name, [], "\n".join(texts).splitlines()) for name, texts in added.items()]
    return "\n".join([f"{' and '.join(added)} {do}:", *hunks])
