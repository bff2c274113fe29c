"""One experiment as its file describes it: read, never run."""

import ast
import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from lmplay.catalog.pieces import statements
from lmplay.errors import UserError

_HEAD = re.compile(r".*?(?=^(?:@dataclass\b[^\n]*\n)?class Config\b)", re.DOTALL | re.MULTILINE)
_MOST_BYTES = 1_000_000  # fifty times the largest so far
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
    def spelling(self) -> str:
        """What --exp takes for it in a shell."""
        return shlex.quote(self.name if self.ideas or self.variant else str(self.path))

    @property
    def summary(self) -> str:
        """The docstring's first line."""
        return self.docstring.strip().partition("\n")[0]

    @property
    def family(self) -> str | None:
        """What its docstring says that it belongs to; what is copied from it does so too."""
        return section(self.docstring, "Family") or None

    @cached_property
    def fields(self) -> dict[str, str]:
        """The names in Config, each with its annotation."""
        return _config_fields([piece.node for _, piece in statements(self.source)])

    @property
    def folds_to(self) -> str | None:
        """What its docstring says that the folded whole computes: an experiment or a stack."""
        return section(self.docstring, "Folds to") or None


def read_file(path: Path, head_only: bool = False) -> list[Entry]:
    """The experiment in a file and its variants; the file is parsed, not run.

    Args:
        head_only: parse what stands above Config, which is enough for a list.
    Raises:
        UserError: it is not Python, has no docstring, or VARIANTS or TINY is not a literal.
    """
    if path.exists() and not path.is_file():  # a folder; or a pipe, which one would wait for
        raise UserError(f"{path} is no file")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is too large: an experiment has {_MOST_BYTES:,} bytes at most")
        source = path.read_text(encoding="utf-8-sig")  # some editors write a mark
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:  # such as of a link that leads nowhere
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return read_source(source, path, head_only)


def read_source(source: str, path: Path, head_only: bool = False) -> list[Entry]:
    """As `read_file`, for source that is already at hand; `path` gives the name."""
    found = _read_or_refused(source, path, head_only)
    if isinstance(found, UserError):
        raise UserError(found.problem, found.hint)
    return list(found)


@lru_cache(maxsize=512)  # a stack looks at the same few files again and again, broken ones too
def _read_or_refused(source: str, path: Path, head_only: bool) -> tuple[Entry, ...] | UserError:
    try:
        return _read(source, path, head_only)
    except UserError as error:
        return error


def _read(source: str, path: Path, head_only: bool) -> tuple[Entry, ...]:
    try:
        tree = _parsed_head(source) if head_only else ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f"{path}, line {line}" if line else str(path)
        why = getattr(error, "msg", None) or error or "nested too deeply"
        raise UserError(f"{where}: not valid Python: {why}") from None
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
    return tuple(Entry(name=name, variant=values, **common) for name, values in named.items())


def is_of(value: object, annotation: str) -> bool:
    """Whether a JSON value is of this type; true where the annotation is none of JSON's."""
    known = {"int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None)}
    words = annotation.split(" | ")
    if not set(words) <= known.keys():
        return True
    if isinstance(value, bool):
        return "bool" in words
    return any(isinstance(value, known[word]) for word in words)


def definitions(source: str) -> dict[str, str]:
    """Name to source of every top-level class and function, decorators included."""
    named = [piece for _, piece in statements(source) if piece.is_named]
    return {piece.node.name: piece.text for piece in named}


def below_docstring(source: str) -> list[str]:
    """The lines of an experiment behind its docstring, with their ends."""
    docstring = ast.parse(source).body[0]
    return source.splitlines(keepends=True)[docstring.end_lineno :]


def section(docstring: str, name: str) -> str:
    """What follows `name:`, on that line and the indented ones below; empty if it is not there."""
    found = re.search(rf"^{name}: (.+(?:\n[ \t]+\S.*)*)", docstring, re.MULTILINE)
    return " ".join(found[1].split()).removesuffix(".") if found else ""


def _parsed_head(source: str) -> ast.Module:
    """The file up to Config; all of it where more than that may say what it offers."""
    head = _HEAD.match(source)
    if head and not _OFFERS.search(source, head.end()):
        try:
            return ast.parse(head[0])
        except SyntaxError:
            pass  # "class Config" in a text, or a mistake, of which the whole tells more
    return ast.parse(source)


def _config_fields(top: list[ast.stmt]) -> dict[str, str]:
    configs = [node for node in top if isinstance(node, ast.ClassDef) and node.name == "Config"]
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
            except (ValueError, TypeError, RecursionError, MemoryError):
                value = None
            parts = value.values() if isinstance(value, dict) and name == "VARIANTS" else []
            if not all(_is_named(part) for part in [value, *parts]):
                of = "names to dicts of " if name == "VARIANTS" else ""
                raise UserError(
                    f"{path}, line {node.lineno}: {name} is no literal dict of {of}Config values",
                    hint="write its values out: listing never runs code",
                )
            return value
    return {}


def _is_named(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _changed_from(docstring: str) -> tuple[str | None, tuple[str, ...]]:
    found = re.search(r"^Changed from (\w+): (.+?)\.\s*$", docstring, re.MULTILINE | re.DOTALL)
    if not found:
        return None, ()
    return found[1], tuple(name.strip() for name in found[2].split(","))
