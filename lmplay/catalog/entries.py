"""What a name means: lists and finds experiments, and what each was copied from."""

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lmplay.catalog.entry import Entry, below_docstring, read_file, read_source
from lmplay.errors import UserError, nearest
from lmplay.roots import files, looks_like_path


def entries(refused: Callable[[UserError], None] = lambda error: None) -> dict[str, Entry]:
    """Every experiment and variant that can be found, by name; files come before their variants.

    A name that two files give a variant means that of the file which the other was copied from, as
    its docstring says, else neither: a copy has the variants too, and must not take their names
    away. A file's own name comes before a variant's.

    Args:
        refused: gets the error of each file, and of variants, that cannot be listed: its head is
            not Python, or a name means two things or cannot be typed. The rest is listed.
    """
    claims = _claims(refused)
    parents = {entry.file: entry.parent for claimed in claims.values() for entry in claimed}
    found, twice = {}, {}
    for name, claimed in claims.items():
        if meant := _meant(name, claimed, parents):
            found[name] = meant
        if len(claimed) > 1:
            twice.setdefault((claimed[0].path, claimed[1].path), []).append(name)
    for paths, names in twice.items():
        refused(_both_name(*paths, names))
    return found


def _claims(refused: Callable[[UserError], None]) -> dict[str, list[Entry]]:
    """What each name may mean."""
    claims: dict[str, list[Entry]] = {}
    for path in files("experiments", ".py").values():
        try:
            _refuse_unsayable(path)
            new = read_file(path, head_only=True)
        except UserError as error:
            refused(error)
        else:
            for entry in new:
                claims.setdefault(entry.name, []).append(entry)
    return claims


def _meant(name: str, claimed: list[Entry], parents: dict[str, str | None]) -> Entry | None:
    """The file itself, else the variant of the file that the others were copied from, if any."""
    named = [entry for entry in claimed if entry.file == name]
    for entry in named or claimed:
        if named or all(entry.file in _line(other.file, parents) for other in claimed):
            return entry
    return None


def _line(file: str, parents: dict[str, str | None]) -> list[str]:
    """A file, what it was copied from, and so on."""
    line = [file]
    while (file := parents.get(file)) and file not in line:
        line.append(file)
    return line


def _both_name(one: Path, other: Path, names: list[str]) -> UserError:
    problem = f"{one} and {other} both name {', '.join(names)}"
    return UserError(problem, hint="rename what the copy has in its VARIANTS")


def _refuse_unsayable(path: Path) -> None:
    """Raise a UserError where --exp, a list of names, cannot mean the file by its name."""
    stem = path.stem
    if "," in stem or stem.partition(":")[0] == "list" or not stem.isprintable():
        raise UserError(f"--exp cannot name {str(path)!a}", hint="rename the file")


def resolve(text: str) -> Entry:
    """The experiment that `text` means: a name, a variant's name, a path to a file, or a stack.

    A stack is several names with + between them: one file with the edits of all.

    Raises:
        UserError: there is none (with the nearest name), the file is not Python, or the parts of a
            stack do not stack (`merge.Conflict` where their edits collide).
    """
    if looks_like_path(text, ".py"):
        path = Path(text)
        if not path.is_file():
            hint = "try --exp list"
            if "+" in text:
                hint = "a stack joins names: put the file into experiments/ and name it without .py"
            raise UserError(f"there is no experiment file {text}", hint)
        return read_file(path.resolve())[0]
    known = entries()
    if "+" in text and text not in known:
        return stacked([_named(part, known) for part in text.split("+")])
    return _named(text, known)


def _named(text: str, known: dict[str, Entry]) -> Entry:
    if text in known:
        return next(entry for entry in read_file(known[text].path) if entry.name == text)
    there = files("experiments", ".py")
    if text in there:
        return read_file(there[text])[0]  # which says what is wrong with it
    claimed = _claims(lambda error: None).get(text, [])
    if len(claimed) > 1:
        raise _both_name(claimed[0].path, claimed[1].path, [text])
    hint = nearest(text, known) + "--exp list shows them all"
    raise UserError(f"no experiment called {text!r}", hint=hint)


def family_of(entry: Entry, known: dict[str, Entry]) -> str | None:
    """The family of an experiment: its own word, else that of what it was copied from.

    Args:
        known: experiments by name, as `entries` gives them.
    """
    seen = set()
    while not entry.family and entry.parent in known and entry.file not in seen:
        seen.add(entry.file)
        entry = known[entry.parent]
    return entry.family


def listed(word: str, known: dict[str, Entry]) -> dict[str, Entry]:
    """Those of `known` in the family called `word`; or this experiment and all copied from it.

    Raises:
        UserError: there is neither.
    """
    families = {name: family_of(entry, known) for name, entry in known.items()}
    if word in families.values():
        return {name: entry for name, entry in known.items() if families[name] == word}
    if word not in known:
        words = sorted({family for family in families.values() if family})
        hint = nearest(word, [*words, *known]) + f"families: {', '.join(words)}"
        raise UserError(f"--exp list:{word}: no family and no experiment", hint)
    below = {known[word].file}
    while more := {e.file for e in known.values() if e.parent in below} - below:
        below |= more
    return {name: entry for name, entry in known.items() if entry.file in below}


def canonical_name(entry: Entry) -> str:
    """One name for one setting: the first in the file that means the same Config values."""
    if entry.ideas:
        return "+".join(canonical_name(idea) for idea in entry.ideas)
    named = {entry.file: {}, **entry.variants}
    return next(name for name, values in named.items() if values == entry.variant)


def stacked(ideas: list[Entry]) -> Entry:
    """The stack of these experiments; of a single one, itself.

    Raises:
        UserError: they do not stack; `merge.Conflict` where their edits collide.
    """
    if len(ideas) == 1:
        return ideas[0]
    from lmplay.catalog.stack import compose  # here: no list needs it

    name = "+".join(idea.name for idea in ideas)
    lines = [line_of(idea) for idea in ideas]
    base = shared_ancestor(lines)
    if base is None:
        roots = ", ".join(sorted({line[-1].file for line in lines}))
        raise UserError(f"{name}: no common ancestor ({roots})", hint="stack ideas of one family")
    variant: dict[str, object] = {}
    for i, (idea, line) in enumerate(zip(ideas, lines, strict=True)):
        others = lines[:i] + lines[i + 1 :]
        if any(other[0].path == idea.path for other in others):
            raise UserError(f"{name}: {idea.file} is in it twice", hint="name each file once")
        if not idea.variant and any(_is_in(line[0], other) for other in others):
            hint = f"leave {idea.name} out: another idea of the stack contains it"
            raise UserError(f"{name}: {idea.name} adds nothing", hint=hint)
        for key, value in idea.variant.items():
            if variant.setdefault(key, value) != value:
                problem = f"{name}: {key} is {variant[key]!r} in one idea and {value!r} in another"
                raise UserError(problem, hint="take another variant of one of them")
    parts = [replace(e, name=canonical_name(e)) for e in ideas if e.path != base.path]
    source = compose("+".join(map(canonical_name, ideas)), base, parts, variant)
    entry = read_source(source, Path(f"{name}.py"))[0]
    for key in variant.keys() - entry.fields.keys():
        hint = "an idea takes it away that a variant of another one sets"
        raise UserError(f"{name}: Config has no {key!r} any more", hint=hint)
    return replace(entry, name=name, variant=variant, variants={}, ideas=tuple(ideas))


def with_one_more(stack: str, idea: str) -> Entry:
    """An experiment with one more idea: the idea alone, where it was copied from the experiment.

    Raises:
        UserError: they do not stack.
    """
    base, more = resolve(stack), resolve(idea)
    contains = not base.variant and _is_in(base, line_of(more))
    return more if contains else resolve(f"{stack}+{idea}")


def shared_ancestor(lines: list[list[Entry]]) -> Entry | None:
    """The nearest experiment that is in all of these lines, as `line_of` gives them."""
    shared = [entry for entry in lines[0] if all(_is_in(entry, line) for line in lines[1:])]
    return shared[0] if shared else None


def line_of(entry: Entry) -> list[Entry]:
    """The experiment, its parent, and so on up to the root."""
    line = [entry]
    while parent := parent_of(line[-1]):
        if _is_in(parent, line):
            raise UserError(f"{parent.path} is copied from its own copy", hint="see Changed from")
        line.append(parent)
    return line


def _is_in(entry: Entry, line: list[Entry]) -> bool:
    return any(entry.path == other.path for other in line)


def parent_of(entry: Entry) -> Entry | None:
    """The entry of the file that this one was copied from; None for a root.

    That of a stack is the common ancestor that it was made from.
    """
    return None if entry.parent is None else named_in(entry, entry.parent)


def named_in(entry: Entry, name: str) -> Entry:
    """The experiment that the docstring of `entry` calls `name`.

    It is looked for beside the file first, then by name. A stack lies in no folder: its ideas and
    what they are copied from come first.
    """
    for idea in entry.ideas:
        for known in line_of(idea):
            if known.file == name:
                return replace(known, name=name, variant={})
    beside = entry.path.with_name(f"{name}.py")
    return read_file(beside)[0] if not entry.ideas and beside.is_file() else resolve(name)


def diff(entry: Entry) -> str:
    """The unified diff against the parent's file, both below their docstrings; "" for a root."""
    parent = parent_of(entry)
    if parent is None:
        return ""
    old, new = (below_docstring(one.source) for one in (parent, entry))
    lines = difflib.unified_diff(old, new, f"{parent.file}.py", f"{entry.file}.py")
    return "".join(lines)
