"""Merges what several ideas change in different parts of one statement.

A line `x_BTC = block(x_BTC, turn, cache)` that two ideas hand one thing more each, or of which one
changes the target and the other an argument, is one line that both replace. Taken apart into its
targets, its arguments and what those are made of, each part is changed by one idea alone.
"""

import ast
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache

_WIDTH = 100  # characters of a line
_ALIKE = 0.5  # how like each other an old and a new line are, from 0 to 1, where one became it
_OPEN, _CLOSE = "([{", ")]}"
_HEAD = re.compile(r"(def \w+)\((.*)\)(?: -> (.+))?:")
_CALL = re.compile(r"(\s*(?:def \w+|(?:return |[\w.]+(?:, [\w.]+)* = )?[\w.]+)\()(.*)(\).*)")

Texts = list[str]
Part = tuple[str, ast.AST]  # a node, and the statement that its columns are counted in


@dataclass(frozen=True)
class _Plan:
    """What an idea makes of a list: of each item, before each and behind the last one."""

    became: list[str | None]  # None: gone
    added: list[Texts]
    anew: set[int]  # items for which it wrote others
    closed: set[int]  # gaps inside what it wrote: nobody else adds there


def merge_parts(base: Texts, ideas: list[Texts]) -> Texts | None:
    """The lines of `base` with the edits of every idea, statement by statement and part by part.

    Args:
        base: lines, where the text in three quotation marks is one.
    Returns:
        None where two ideas change one part, give one name to two arguments, or take away what
        another one changes, and where a statement is cut or is no Python.
    """
    whole = [_statements(lines) for lines in (base, *ideas)]
    if not all(lines is not None and all(map(_is_python, lines)) for lines in whole):
        return None
    plans = [_plan(whole[0], new, _by_likeness) for new in whole[1:]]
    merged = _merged(whole[0], plans, _statement, in_turn)
    return None if merged is None else [line for text in merged for line in _wrapped(text)]


def in_turn(added: list[Texts]) -> Texts:
    """Lines that are added at one place, in order; what continues a block before what ends it.

    Two ideas may both add to the end of a method, and one of them a method after it: its method
    comes after the other's lines, which would else become part of it. Equal classes, functions and
    imports count once.
    """
    distinct = [
        lines for i, lines in enumerate(added) if lines[0].startswith(" ") or lines not in added[:i]
    ]
    pieces = [piece for lines in distinct for piece in _by_dedent(lines)]
    return [line for _, lines in sorted(pieces, key=lambda p: -p[0]) for line in lines]


def _by_dedent(lines: Texts) -> list[tuple[int, Texts]]:
    """The lines cut where they go further out than before, each piece with its indentation."""
    pieces: list[tuple[int, Texts]] = []
    blank: Texts = []
    for line in lines:
        if not line.strip():
            blank.append(line)
            continue
        indent = indent_of(line)
        if not pieces or indent < pieces[-1][0]:
            pieces.append((indent, []))
        pieces[-1][1].extend([*blank, line])
        blank = []
    if pieces:
        pieces[-1][1].extend(blank)
    return pieces or [(0, blank)]


def indent_of(line: str) -> int:
    """The number of spaces that a line begins with."""
    return len(line) - len(line.lstrip())


def _statements(lines: Texts) -> Texts | None:
    """Each statement on a line of its own; None where one is cut."""
    found: Texts = []
    statement = ""
    for line in lines:
        statement += line.lstrip() if statement else line
        if _depth(statement) > 0:
            statement = statement.rstrip() + ("" if statement.rstrip()[-1] in _OPEN else " ")
            continue
        is_long = statement != line
        found.append(re.sub(r",? (?=[)\]}])", "", statement) if is_long else statement)
        statement = ""
    return None if statement else found


@lru_cache(maxsize=4096)
def _is_python(statement: str) -> bool:
    text = statement.strip()
    if text.startswith(("else:", "elif ", "except", "finally:")):
        return True
    try:
        ast.parse(f"{text}\ndef f(): pass" if text.startswith("@") else _closed(text))
    except SyntaxError:
        return False
    return True


def _closed(text: str) -> str:
    """A statement that can be parsed, with a body if it needs one."""
    return f"{text} pass" if text.endswith(":") else text


def _depth(text: str) -> int:
    return sum(text.count(letter) for letter in _OPEN) - sum(text.count(c) for c in _CLOSE)


def _wrapped(text: str) -> Texts:
    """A statement as Ruff would format it, if it is a call or a function's head."""
    call = _CALL.fullmatch(text.rstrip("\n"))
    arguments = _split(call[2]) if call else None
    if len(text.rstrip("\n")) <= _WIDTH or arguments is None or "#" in text:
        return [text]
    indent = " " * indent_of(text)
    inside = f"{indent}    {', '.join(arguments)}"
    between = [inside] if len(inside) <= _WIDTH else [f"{indent}    {a}," for a in arguments]
    return [f"{line}\n" for line in (call[1], *between, f"{indent}{call[3]}")]


def _plan(base: Texts, new: Texts, pair: Callable[[Texts, Texts], dict[int, int]]) -> _Plan:
    """How `new` came of `base`.

    Args:
        pair: says which of the old items became which of the new ones, in order.
    """
    plan = _Plan(list(base), [[] for _ in range(len(base) + 1)], set(), set())
    for tag, i, j, k, m in SequenceMatcher(None, base, new, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        pairs, at = pair(base[i:j], new[k:m]), k
        for old in range(i, j):
            if old - i in pairs:
                became = k + pairs[old - i]
                plan.added[old] += new[at:became]
                plan.became[old], at = new[became], became + 1
            else:
                plan.became[old] = None
                plan.anew.update({old} if tag == "replace" else ())
        plan.added[j] += new[at:m]
        plan.closed.update(g for g in range(i + 1, j) if not _is_open(plan, base, g))
    return plan


def _is_open(plan: _Plan, base: Texts, gap: int) -> bool:
    """Whether both neighbours of a gap are still there, one of them as far in as it was."""
    around = [(base[at], plan.became[at]) for at in (gap - 1, gap)]
    return all(new is not None for _, new in around) and any(
        indent_of(old) == indent_of(new) for old, new in around
    )


def _by_likeness(old: Texts, new: Texts) -> dict[int, int]:
    """The pairs of lines, in order, that are the most like each other in all.

    By how much they are above what counts, or two doubtful pairs would be as good as a sure one.
    A single line in place of another is that one, changed.
    """
    if len(old) == len(new) == 1:
        return {0: 0}
    best: list[list[tuple[float, tuple]]] = [[(0.0, ())] * (len(new) + 1)]
    for i, line in enumerate(old):
        row = [(0.0, ())]
        for j, other in enumerate(new):
            excess = _likeness(line.strip(), other.strip()) - _ALIKE
            sum_, pairs = best[i][j]
            paired = (sum_ + excess, (*pairs, (i, j))) if excess > 0 else (0.0, ())
            row.append(max(best[i][j + 1], row[j], paired, key=lambda b: b[0]))
        best.append(row)
    return dict(best[-1][-1][1])


@lru_cache(maxsize=4096)
def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()


def _by_place(old: Texts, new: Texts) -> dict[int, int]:
    return dict(enumerate(range(len(new)))) if len(old) == len(new) else {}


def _merged(
    base: Texts,
    plans: list[_Plan],
    settle: Callable[[str, Texts], str | None],
    join: Callable[[list[Texts]], Texts],
) -> Texts | None:
    """The list with all plans; None where they collide.

    Args:
        settle: what becomes of an item that several ideas change, each in its way.
        join: what several ideas add at one place.
    """
    merged: Texts = []
    for place in range(len(base) + 1):
        adding = [plan for plan in plans if plan.added[place]]
        if any(p is not q and place in p.closed for p in plans for q in adding):
            return None
        added = sorted((plan.added[place] for plan in adding), key=_begins_block)
        if sum(map(_begins_block, added)) > 1:
            return None
        merged += added[0] if len(added) == 1 else join(added)
        if place == len(base):
            break
        changing = [plan for plan in plans if plan.became[place] != base[place]]
        if len(changing) > 1 and any(place in plan.anew for plan in changing):
            return None
        became = dict.fromkeys(plan.became[place] for plan in changing)
        if not became:
            merged.append(base[place])
            continue
        text = next(iter(became)) if len(became) == 1 else None
        if len(became) > 1 and None not in became:
            text = settle(base[place], list(became))
        if text is not None:
            merged.append(text)
        elif len(became) > 1:
            return None
    return merged


def _begins_block(added: Texts) -> bool:
    """Whether what is added goes on in the item that it stands before."""
    return added[-1].rstrip().endswith(":")


def _statement(base: str, ideas: Texts) -> str | None:
    """One statement with what several ideas change in it."""
    texts = [text.strip() for text in (base, *ideas)]
    indents = dict.fromkeys(indent_of(text) for text in ideas if indent_of(text) != indent_of(base))
    if len(indents) > 1:
        return None
    indent = " " * next(iter(indents), indent_of(base))
    if all(text.startswith('"""') for text in texts):
        return _docstring(indent, texts[1:])
    if any("#" in text or not text.isascii() for text in texts):
        return None
    heads = [_HEAD.fullmatch(text) for text in texts]
    if all(heads):
        merged = _head(heads)
    else:
        try:
            nodes = [ast.parse(_closed(text)).body[0] for text in texts]
        except SyntaxError:  # such as else:
            return None
        merged = _part(*zip(texts, nodes, strict=True))
    return merged and f"{indent}{merged}\n"


def _docstring(indent: str, texts: Texts) -> str:
    """The first idea's docstring, and below it what the others say instead."""
    words = [text.strip('"').strip() for text in texts]
    return f'{indent}"""' + f"\n\n{indent}".join(words) + f'\n{indent}"""\n'


def _head(heads: list[re.Match]) -> str | None:
    """A function's head, of one name: arguments and what it gives back."""
    if len({head[1] for head in heads}) > 1:
        return None
    arguments = _list([_split(head[2]) for head in heads], lambda base, ideas: None)
    given = [head[3] or "" for head in heads]
    returned = given[0] if len(set(given)) == 1 else None
    if returned is None and all(given):
        nodes = [ast.parse(text, mode="eval").body for text in given]
        returned = _sequence(list(zip(given, nodes, strict=True)), "tuple[", "]")
    if arguments is None or returned is None:
        return None
    return f"{heads[0][1]}({', '.join(arguments)}){returned and f' -> {returned}'}:"


def _part(base: Part, *ideas: Part) -> str | None:
    """A node with what several ideas change inside it."""
    text, texts = _text(base), list(dict.fromkeys(map(_text, ideas)))
    if changed := [t for t in texts if t != text]:
        if len(changed) == 1:
            return changed[0]
    else:
        return text
    if wrapped := _wrapping(text, ideas, changed):
        return wrapped
    nodes = [node for _, node in (base, *ideas)]
    if len({type(node) for node in nodes}) > 1 or isinstance(nodes[0], ast.JoinedStr):
        return None
    parts = [base, *ideas]
    if isinstance(nodes[0], ast.Call) and not any(_is_generator(node) for node in nodes):
        function = _part(*((source, node.func) for source, node in parts))
        arguments = _list([_arguments(part) for part in parts], _argument)
        if function is None or arguments is None:
            return None
        return f"{function}({', '.join(arguments)})"
    if isinstance(nodes[0], ast.Return) and all(node.value for node in nodes):
        value = _sequence([(source, node.value) for source, node in parts])
        return value and f"return {value}"
    if isinstance(nodes[0], ast.Assign) and all(len(node.targets) == 1 for node in nodes):
        target = _sequence([(source, node.targets[0]) for source, node in parts])
        value = _sequence([(source, node.value) for source, node in parts])
        return target and value and f"{target} = {value}"
    inner = [list(_nodes_in(node)) for node in nodes]
    between = [_between(part, there) for part, there in zip(parts, inner, strict=True)]
    if any(texts != between[0] for texts in between):
        return None
    sources = [source for source, _ in parts]
    merged = [_part(*zip(sources, each, strict=True)) for each in zip(*inner, strict=True)]
    if None in merged or not merged:
        return None
    return between[0][0] + "".join(m + t for m, t in zip(merged, between[0][1:], strict=True))


def _wrapping(text: str, ideas: tuple[Part, ...], changed: Texts) -> str | None:
    """What one idea puts around an expression that one other idea changes."""
    if len(changed) != 2:
        return None
    for (source, node), other in itertools.permutations(
        [next(part for part in ideas if _text(part) == new) for new in changed], 2
    ):
        inside = [n for n in ast.walk(node) if n is not node and hasattr(n, "col_offset")]
        places = [n for n in inside if _text((source, n)) == text and isinstance(n, ast.expr)]
        if len(places) == 1 and text not in _text(other):
            new = _text(other)
            is_one = isinstance(other[1], ast.Name | ast.Call | ast.Attribute | ast.Constant)
            new = new if is_one else f"({new})"
            before = source[node.col_offset : places[0].col_offset]
            return before + new + source[places[0].end_col_offset : node.end_col_offset]
    return None


def _text(part: Part) -> str:
    source, node = part
    return source[node.col_offset : node.end_col_offset]


def _nodes_in(node: ast.AST) -> Iterator[ast.AST]:
    """The nearest nodes inside that have a place, from left to right."""
    found = []
    for child in ast.iter_child_nodes(node):
        found += [child] if hasattr(child, "col_offset") else _nodes_in(child)
    return iter(sorted(found, key=lambda child: child.col_offset))


def _between(part: Part, inner: list[ast.AST]) -> Texts:
    source, node = part
    starts = [node.col_offset, *(child.end_col_offset for child in inner)]
    stops = [*(child.col_offset for child in inner), node.end_col_offset]
    return [source[start:stop] for start, stop in zip(starts, stops, strict=True)]


def _is_generator(call: ast.Call) -> bool:
    """Whether its brackets are those of its only argument."""
    return len(call.args) == 1 and isinstance(call.args[0], ast.GeneratorExp)


def _arguments(part: Part) -> Texts:
    source, call = part
    nodes = sorted([*call.args, *call.keywords], key=lambda node: node.col_offset)
    return [_text((source, node)) for node in nodes]


def _argument(base: str, ideas: Texts) -> str | None:
    """An argument that several ideas change, if they leave its keyword alone."""
    names = {_keyword(text) for text in (base, *ideas)}
    if len(names) > 1:
        return None
    name = names.pop()
    texts = [text.removeprefix(name) for text in (base, *ideas)]
    try:
        nodes = [ast.parse(text, mode="eval").body for text in texts]
    except SyntaxError:  # a starred one
        return None
    value = _part(*zip(texts, nodes, strict=True))
    return value and name + value


def _keyword(argument: str) -> str:
    found = re.match(r"\w+=(?!=)", argument)
    return found[0] if found else ""


def _sequence(parts: list[Part], before: str = "", behind: str = "") -> str | None:
    """Of values that some ideas give back or store several of: each idea's, in order."""
    items = [_elements(part) for part in parts]
    if all(len(texts) == 1 for texts in items):
        return _part(*parts)
    merged = _list(items, _argument)
    return merged and f"{before}{', '.join(merged)}{behind}"


def _elements(part: Part) -> Texts:
    source, node = part
    if isinstance(node, ast.Subscript) and _text((source, node.value)) == "tuple":
        node = node.slice
    nodes = node.elts if isinstance(node, ast.Tuple) else [node]
    return [_text((source, element)) for element in nodes]


def _list(lists: list[Texts], settle: Callable[[str, Texts], str | None]) -> Texts | None:
    """Arguments, targets or values; None too where two of them have one name."""
    base, *ideas = lists
    plans = []
    for new in ideas:
        is_as_long = len(new) == len(base)
        plan = _Plan(list(new), [[] for _ in range(len(base) + 1)], set(), set())
        plans.append(plan if is_as_long else _plan(base, new, _by_place))
    merged = _merged(
        base, plans, settle, lambda added: list(dict.fromkeys(itertools.chain(*added)))
    )
    names = [re.split(r"[:=]", text)[0] for text in merged or []]
    is_repeated = any(names.count(n) > max(map(_names(n), lists)) for n in names)
    return None if is_repeated else merged


def _each_once(added: list[Texts]) -> Texts:
    return list(dict.fromkeys(itertools.chain(*added)))


def _names(name: str) -> Callable[[Texts], int]:
    """Counts how often a list has a name."""
    return lambda texts: [re.split(r"[:=]", text)[0] for text in texts].count(name)


def _split(text: str) -> Texts | None:
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
