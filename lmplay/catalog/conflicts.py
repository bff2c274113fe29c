"""Names that a merge of lines leaves wrong: defined twice, mistaken for another, taken away."""

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator

from lmplay.catalog.merge import hunk


def conflicts(base: str, ideas: dict[str, str], merged: str) -> list[str]:
    """A report on each name that the merged file gets wrong, though its lines merge.

    Args:
        base: the ancestor, as the others without what a stack writes anew.
        ideas: the changed files, by name.
    """
    checks = (_doubled, _mistaken, _orphaned)
    return [report for check in checks for report in check(base, ideas, merged)]


@functools.lru_cache(maxsize=64)
def parsed(source: str) -> ast.Module:
    """The tree of a source, which several checks look at and none changes."""
    return ast.parse(source)


def is_named(node: ast.stmt) -> bool:
    """Whether a statement defines a class or a function."""
    return isinstance(node, ast.ClassDef | ast.FunctionDef)


@functools.lru_cache(maxsize=256)  # a file is stacked with many others
def _names(source: str) -> list[tuple[tuple[str, str], str]]:
    """((scope, name), source) of what a file defines; scopes are the file, classes, their self."""
    return list(_defined(source))


def _defined(source: str) -> Iterator[tuple[tuple[str, str], str]]:
    for node in parsed(source).body:
        if is_named(node):
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
    before = _names(base)
    named = {name: _names(source) for name, source in ideas.items()}
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
    removed = [hunk(name, text.splitlines()[:1], []) for name in takers]
    return "\n".join([who, *removed, *(hunk(name, [], lines) for name, lines in readers.items())])


@functools.lru_cache(maxsize=256)
def _reads(source: str) -> dict[str, tuple[dict[str, str], set[tuple[str, str, str]]]]:
    """Of each function: its local names, each with a statement that stores it, and its reads.

    A read is a name, the statement that reads it, and the one before it that stored it.
    """
    found = {}
    for node in parsed(source).body:
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
    hunks = [hunk(name, [], "\n".join(texts).splitlines()) for name, texts in added.items()]
    return "\n".join([f"{' and '.join(added)} {do}:", *hunks])
