"""Proofs about the file itself: what it imports, and what it says of itself."""

import ast
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lmplay.catalog import entries as catalog
from lmplay.catalog.entry import definitions
from lmplay.model.abilities import has_after_step
from lmplay.model.objective import Objective
from lmplay.proofs.proof import Exempt, Refuted
from lmplay.proofs.specimen import Specimen

# B rows, T positions


def imports_torch_only(specimen: Specimen) -> str:
    found: dict[str, int] = {}
    tree = ast.parse(specimen.experiment.source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        found |= {name.partition(".")[0]: node.lineno for name in names}
    for name, line in found.items():
        if name != "torch" and name not in sys.stdlib_module_names:
            raise Refuted(f"line {line} imports {name or 'a neighbour'}")
    for node in ast.walk(tree):
        if (reached := _reached(node)) is not None:
            raise Refuted(f"line {node.lineno} reaches into {reached}")
    if opened := _opened_by_loading(specimen):
        raise Refuted(f"while it is loaded, {opened}")
    if opened := _opened_by_running(specimen):
        raise Refuted(f"while its model is made or run, {opened}")
    return ", ".join(sorted(found))


# what a run's folder does not keep, or what is not the experiment's
_OUTSIDE = ("sys.modules", "sys.argv", "os.environ", "os.getenv", "builtins.__import__")
_OUTSIDE += ("torch.save", "torch.load", "torch.hub", "torch.from_file")


def _reached(node: ast.AST) -> str | None:
    """What of other modules it gets hold of without importing it."""
    if isinstance(node, ast.Attribute) and ast.unparse(node) in _OUTSIDE:
        return ast.unparse(node)
    if isinstance(node, ast.ImportFrom):
        found = [f"{node.module}.{alias.name}" for alias in node.names]
        if outside := [name for name in found if name in _OUTSIDE]:
            return outside[0]
    if isinstance(node, ast.Name | ast.Attribute | ast.Import | ast.ImportFrom):
        words = ast.unparse(node).replace(".", " ").split()
        found = [word for word in words if word in ("importlib", "__import__")]
        return found[0] if found else None
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    is_name = is_text and re.fullmatch(r"lmplay(\.\w+)*", node.value)
    return node.value if is_name else None


def _opened_by_loading(specimen: Specimen) -> str:
    """What it opens while it is run once more; what an import or a traceback reads is no matter."""
    path = specimen.experiment.module.__file__
    module = types.ModuleType(f"{specimen.experiment.module.__name__}_again")
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        with watching(path):
            exec(compile(specimen.experiment.source, path, "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return what_was_opened()


def _opened_by_running(specimen: Specimen) -> str:
    with watching(specimen.experiment.module.__file__), suppress(Exception):  # for other proofs
        model, tokens_BT = specimen.model(), specimen.tokens(B=2)
        for training in (True, False):
            Objective(model).train(training)(tokens_BT, tokens_BT.roll(-1, 1))
        if has_after_step(model):
            model.train().after_step()
        specimen.cached(model.eval(), tokens_BT)
    return what_was_opened()


def what_was_opened() -> str:
    """Where a file was last watched: the first thing that it opened."""
    return _seen[0] if _seen else ""


@contextmanager
def watching(path: str) -> Iterator[None]:
    """Note what the file at `path` opens."""
    _watched.append(path)
    _seen.clear()
    try:
        yield
    finally:
        _watched.pop()


_watched: list[str] = []  # the files that are loaded now
_seen: list[str] = []
_OPENING = {
    "open": "opens {}",
    "socket.connect": "connects to {1}",
    "socket.getaddrinfo": "asks for the address of {}",
    "subprocess.Popen": "starts {}",
    "os.system": "starts {}",
    "os.mkdir": "makes {}",
    "os.listdir": "lists {}",
    "os.remove": "removes {}",
    "os.rename": "renames {}",
}


def _see(event: str, given: tuple) -> None:
    """An audit hook, which cannot be taken away: it looks only while a file is watched."""
    if not _watched or event not in _OPENING:
        return
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _watched[-1]:
        if "importlib" in frame.f_code.co_filename or frame.f_code.co_name == "updatecache":
            return
        frame = frame.f_back
    if frame is not None:
        _seen.append(f"line {frame.f_lineno} {_OPENING[event].format(*given)}")


sys.addaudithook(_see)


def says_what_changed(specimen: Specimen) -> str:
    entry = specimen.experiment.entry
    parent = catalog.parent_of(entry)
    if parent is None:
        raise Exempt("its docstring names no parent")
    mine, theirs = definitions(entry.source), definitions(parent.source)
    differ = [
        name for name in [*mine, *(theirs.keys() - mine)] if mine.get(name) != theirs.get(name)
    ]
    if set(differ) != set(entry.changed):
        raise Refuted(f"should be: Changed from {parent.file}: {', '.join(differ)}.")
    return f"{', '.join(differ)} differ from {parent.file}"
