"""Sources cut into the statements that many files share, so that each is parsed and read once."""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BEGINS = re.compile(r"@|class\b|def\b")


@dataclass(frozen=True)
class Piece:
    """A statement with its decorators. Two of one text are equal, wherever they stand."""

    text: str
    line: int = field(compare=False)  # it begins at, from 0, in what it was parsed with
    node: ast.stmt = field(compare=False, repr=False)

    @property
    def is_named(self) -> bool:
        """Whether it defines a class or a function."""
        return isinstance(self.node, ast.ClassDef | ast.FunctionDef)


@functools.lru_cache(maxsize=256)
def statements(source: str) -> tuple[tuple[int, Piece], ...]:
    """The top-level statements of a source, each with the line that it begins at, from 0.

    Raises:
        SyntaxError: it is not Python.
    """
    try:
        return tuple(_cut(source))
    except SyntaxError:  # whose line would be counted from the cut, which may be in a text
        return tuple((piece.line, piece) for piece in _parsed(source))


def _cut(source: str) -> Iterator[tuple[int, Piece]]:
    lines = source.splitlines(keepends=True)
    begins = [bool(_BEGINS.match(line)) for line in lines]
    is_decorated = [False, *(line.startswith("@") for line in lines)]
    starts = [n for n, begin in enumerate(begins) if begin and not is_decorated[n]]
    for start, stop in zip([0, *starts], [*starts, len(lines)], strict=True):
        for piece in _parsed("".join(lines[start:stop])):
            yield start + piece.line, piece


@functools.lru_cache(maxsize=2048)
def _parsed(source: str) -> tuple[Piece, ...]:
    return tuple(_pieces(ast.parse(source).body, source.splitlines(), 0))


@functools.lru_cache(maxsize=2048)
def inner(piece: Piece) -> tuple[Piece, ...]:
    """The statements in the body of a class."""
    return tuple(_pieces(piece.node.body, piece.text.splitlines(), piece.line))


def _pieces(body: list[ast.stmt], lines: list[str], first: int) -> Iterator[Piece]:
    """Of a body in these lines, the first of which has this number where it was parsed."""
    for node in body:
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        text = "\n".join(lines[start - first : node.end_lineno - first])
        yield Piece(text, start, node)


def names_read(source: str) -> set[str]:
    """The names and attributes that a source reads."""
    return set().union(*(_read_in(piece) for _, piece in statements(source)))


@functools.lru_cache(maxsize=2048)
def _read_in(piece: Piece) -> frozenset[str]:
    nodes = [n for n in ast.walk(piece.node) if isinstance(n, ast.Name | ast.Attribute)]
    return frozenset(
        node.id if isinstance(node, ast.Name) else node.attr
        for node in nodes
        if isinstance(node.ctx, ast.Load)
    )
