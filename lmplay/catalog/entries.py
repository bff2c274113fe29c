"""Lists and describes experiments by reading their files, never by running them."""

import ast
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lmplay.errors import UserError, nearest
from lmplay.roots import files, looks_like_path

_HEAD = re.compile(r".*?(?=^(?:@dataclass\b[^\n]*\n)?class Config\b)", re.DOTALL | re.MULTILINE)
_OFFERS = re.compile(r"^(?:VARIANTS|TINY)\b", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """A name that `--exp` takes: a file, or one of the variants inside a file."""

    name: str
    path: Path
    source: str = field(repr=False)
    docstring: str = field(repr=False)
    variant: dict[str, object]  # Config values of this name
    variants: dict[str, dict[str, object]] = field(repr=False)  # all that the file offers
    tiny: dict[str, object] = field(repr=False)  # Config values for checks and tests
    parent: str | None  # the file it was copied from
    changed: tuple[str, ...]  # what its docstring says differs from the parent
    ideas: tuple["Entry", ...] = ()  # of a stack, the experiments that it joins

    @property
    def file(self) -> str:
        """The stem of the file: the experiment without its variant."""
        return self.path.stem

    @property
    def summary(self) -> str:
        """The docstring's first line."""
        return self.docstring.strip().partition("\n")[0]

    @cached_property
    def fields(self) -> dict[str, str]:
        """The names in Config, each with its annotation."""
        return _config_fields(ast.parse(self.source))


def entries(refused: Callable[[UserError], None] = lambda error: None) -> dict[str, Entry]:
    """Every experiment and variant that can be found, by name; files come before their variants.

    Args:
        refused: gets the error of each file that cannot be listed: its head is not Python, or it
            claims a name that an earlier file has. The others are listed all the same.
    """
    found: dict[str, Entry] = {}
    for path in files("experiments", ".py").values():
        try:
            new = {entry.name: entry for entry in read_file(path, head_only=True)}
            for name in new.keys() & found.keys():
                raise UserError(f"{path} names {name!r}, as {found[name].path} does", "rename one")
        except UserError as error:
            refused(error)
        else:
            found.update(new)
    return found


def resolve(text: str) -> Entry:
    """The experiment that `text` means: a name, a variant's name, a path to a file, or a stack.

    A stack is several names with + between them: one file with the edits of all.

    Raises:
        UserError: there is none (with the nearest name), the file is not Python, or the parts of a
            stack do not stack (`stack.Conflict` where their edits collide).
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
    unlisted = files("experiments", ".py")
    if text in unlisted:
        return read_file(unlisted[text])[0]  # which says what is wrong with it
    hint = nearest(text, known) + "--exp list shows them all"
    raise UserError(f"no experiment called {text!r}", hint=hint)


def canonical_name(entry: Entry) -> str:
    """One name for one setting: the first in the file that means the same Config values."""
    if entry.ideas:
        return "+".join(canonical_name(idea) for idea in entry.ideas)
    named = {entry.file: {}, **entry.variants}
    return next(name for name, values in named.items() if values == entry.variant)


def stacked(ideas: list[Entry]) -> Entry:
    """The stack of these experiments; of a single one, itself.

    Raises:
        UserError: they do not stack; `stack.Conflict` where their edits collide.
    """
    if len(ideas) == 1:
        return ideas[0]
    from lmplay.catalog.stack import Part, compose  # here: no list needs it

    name = "+".join(idea.name for idea in ideas)
    lines = [_line_of(idea) for idea in ideas]
    shared = [entry for entry in lines[0] if all(_is_in(entry, line) for line in lines[1:])]
    if not shared:
        roots = ", ".join(sorted({line[-1].file for line in lines}))
        raise UserError(f"{name}: no common ancestor ({roots})", hint="stack ideas of one family")
    base = shared[0]
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
    changed = [e for e in ideas if e.path != base.path]
    parts = [Part(canonical_name(e), e.source, e.docstring, e.tiny) for e in changed]
    root = Part(base.file, base.source, base.docstring, base.tiny)
    source = compose("+".join(map(canonical_name, ideas)), root, parts, variant)
    entry = read_source(source, Path(f"{name}.py"))[0]
    for key in variant.keys() - entry.fields.keys():
        hint = "an idea takes it away that a variant of another one sets"
        raise UserError(f"{name}: Config has no {key!r} any more", hint=hint)
    return replace(entry, name=name, variant=variant, variants={}, ideas=tuple(ideas))


def _line_of(entry: Entry) -> list[Entry]:
    """The experiment, its parent, and so on up to the root."""
    line = [entry]
    while parent := parent_of(line[-1]):
        if _is_in(parent, line):
            raise UserError(f"{parent.path} is copied from its own copy", hint="see Changed from")
        line.append(parent)
    return line


def _is_in(entry: Entry, line: list[Entry]) -> bool:
    return any(entry.path == other.path for other in line)


def read_file(path: Path, head_only: bool = False) -> list[Entry]:
    """The experiment in a file and its variants; the file is parsed, not run.

    Args:
        head_only: parse what stands above Config, which is enough for a list.
    Raises:
        UserError: it is not Python, has no docstring, or VARIANTS or TINY is not a literal.
    """
    try:
        return read_source(path.read_text(encoding="utf-8"), path, head_only)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def read_source(source: str, path: Path, head_only: bool = False) -> list[Entry]:
    """As `read_file`, for source that is already at hand; `path` gives the name."""
    try:
        tree = _parsed_head(source) if head_only else ast.parse(source)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise UserError(f"{path}, line {line}: not valid Python: {error}") from None
    docstring = ast.get_docstring(tree)
    if not docstring:
        raise UserError(f"{path} has no docstring", hint="its first line is what --exp list shows")
    variants = _literal(tree, "VARIANTS", path)
    parent, changed = _changed_from(docstring)
    common = {
        "path": path,
        "source": source,
        "docstring": docstring,
        "variants": variants,
        "tiny": _literal(tree, "TINY", path),
        "parent": parent,
        "changed": changed,
    }
    named = {path.stem: {}, **variants}
    return [Entry(name=name, variant=values, **common) for name, values in named.items()]


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
        for known in _line_of(idea):
            if known.file == name:
                return replace(known, name=name, variant={})
    beside = entry.path.with_name(f"{name}.py")
    return read_file(beside)[0] if not entry.ideas and beside.is_file() else resolve(name)


def diff(entry: Entry) -> str:
    """The unified diff against the parent's file; empty for a root."""
    parent = parent_of(entry)
    if parent is None:
        return ""
    lines = difflib.unified_diff(
        parent.source.splitlines(keepends=True),
        entry.source.splitlines(keepends=True),
        f"{parent.file}.py",
        f"{entry.file}.py",
    )
    return "".join(lines)


def definitions(source: str) -> dict[str, str]:
    """Name to source of every top-level class and function, decorators included."""
    found = {}
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def _parsed_head(source: str) -> ast.Module:
    """The file up to Config; all of it where more than that may say what it offers."""
    head = _HEAD.match(source)
    if head and not _OFFERS.search(source, head.end()):
        try:
            return ast.parse(head[0])
        except SyntaxError:
            pass  # "class Config" in a text, or a mistake, of which the whole tells more
    return ast.parse(source)


def _config_fields(tree: ast.Module) -> dict[str, str]:
    configs = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"]
    body = configs[0].body if configs else []
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _literal(tree: ast.Module, name: str, path: Path) -> dict:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise UserError(
                    f"{path}, line {node.lineno}: {name} is not a literal dict",
                    hint="write its values out: listing never runs code",
                )
            return value
    return {}


def _changed_from(docstring: str) -> tuple[str | None, tuple[str, ...]]:
    found = re.search(r"^Changed from (\w+): (.+?)\.\s*$", docstring, re.MULTILINE | re.DOTALL)
    if not found:
        return None, ()
    return found[1], tuple(name.strip() for name in found[2].split(","))
