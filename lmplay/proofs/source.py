"""Proofs about the file itself: what it imports, and what it says of itself."""

import ast
import sys

from lmplay.catalog import entries as catalog
from lmplay.catalog.entry import definitions
from lmplay.proofs.proof import Exempt, Refuted
from lmplay.proofs.specimen import Specimen


def imports_torch_only(specimen: Specimen) -> str:
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(specimen.experiment.source)):
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
    return ", ".join(sorted(found))


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
