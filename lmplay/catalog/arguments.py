"""Merges what several ideas add to the arguments of one call or of one function's head.

A line `x_BTC = block(x_BTC, turn, cache)` that two ideas hand one thing more each is one line that
both replace. Written with an argument a line, it is two insertions.
"""

import re
from collections.abc import Callable

_WIDTH = 100  # characters of a line
ARGUMENT, _END = "\x01", "\x02"  # begin the lines that a call is taken apart into
_CALL = re.compile(r"(\s*(?:def \w+|return [\w.]+|(?:[\w.]+(?:, [\w.]+)* = )?[\w.]+)\()(.*)(\).*)")
_OPEN, _CLOSE = "([{", ")]}"

Lines = list[str]


def merge_apart(
    base: Lines, ideas: list[Lines], merge: Callable[[Lines, list[Lines]], Lines | None]
) -> Lines | None:
    """The lines of `base` with the edits of every idea, where arguments are lines of their own.

    Args:
        merge: does it with those lines, which begin with ARGUMENT; None where edits collide.
    Returns:
        None where nothing can be taken apart, the edits collide, or two ideas add one name.
    """
    if any(line.startswith(ARGUMENT) for lines in (base, *ideas) for line in lines):
        return None  # these are taken apart
    apart = [_taken_apart(lines) for lines in (base, *ideas)]
    if any(lines is None for lines in apart) or apart[0] == base:
        return None
    merged = merge(apart[0], apart[1:])
    return None if merged is None else _put_together(merged)


def _taken_apart(lines: Lines) -> Lines | None:
    """The statements, those that are calls with an argument a line; None where one is cut."""
    found: Lines = []
    statement = ""
    for line in lines:
        statement += line if not statement else line.lstrip()
        if _depth(statement) > 0:
            statement = statement.rstrip("\n")
            continue
        call = _CALL.fullmatch(statement.rstrip("\n"))
        arguments = _split(call[2]) if call and "#" not in statement else None
        if arguments is not None:
            found += [f"{call[1]}\n", *(f"{ARGUMENT}{a}\n" for a in arguments)]
            found.append(f"{_END}{call[3]}\n")
        else:
            found.append(statement)
        statement = ""
    return None if statement else found


def _put_together(lines: Lines) -> Lines | None:
    """The other way round, as Ruff would format it; None where a name is there twice."""
    made: Lines = []
    arguments: Lines = []
    for line in lines:
        if line.startswith(ARGUMENT):
            arguments.append(line[1:].rstrip("\n"))
        elif line.startswith(_END):
            names = [re.split(r"[:=]", argument)[0] for argument in arguments]
            if len(set(names)) < len(names):
                return None
            made += _formatted(made.pop().rstrip("\n"), arguments, line[1:].rstrip("\n"))
            arguments = []
        else:
            made.append(line)
    return made


def _formatted(head: str, arguments: Lines, end: str) -> Lines:
    one = f"{head}{', '.join(arguments)}{end}"
    if len(one) <= _WIDTH:
        return [f"{one}\n"]
    indent = head[: len(head) - len(head.lstrip())]
    inside = f"{indent}    {', '.join(arguments)}"
    between = [inside] if len(inside) <= _WIDTH else [f"{indent}    {a}," for a in arguments]
    return [f"{line}\n" for line in (head, *between, f"{indent}{end}")]


def _split(text: str) -> Lines | None:
    """What stands between the commas that are in no brackets; None where a bracket is closed."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if depth < 0:
            return None
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _depth(text: str) -> int:
    return sum(text.count(letter) for letter in _OPEN) - sum(text.count(c) for c in _CLOSE)
