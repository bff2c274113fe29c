"""Packages stand in the order in which data flows: who may import whom, what stays light."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lmplay"
HEAVY = ("torch", "accelerate", "datasets", "pandas", "numpy", "matplotlib")
# "" is what everything stands on: the files beside the packages
ORDER = ["", "catalog", "model", "proofs", "data", "run", "optim", "train", "grid", "generate"]
ORDER += ["export", "stats"]
LIGHT = [
    *(
        "errors",
        "fault_points",
        "roots",
        "disk",
        "streams",
        "network",
        "machine",
        "memory",
        "seeds",
        "console",
        "plan",
        "plan_file",
        "cli",
    ),
    *("catalog.entry", "catalog.entries", "catalog.stack"),
    *("data.gaps", "data.tokenizers", "data.local_files"),
    *(
        "run.changes",
        "run.facts",
        "run.folder",
        "run.labels",
        "run.lock",
        "run.records",
        "run.request",
        "grid.launch",
        "grid.search",
        "train.listing",
        "train.cli",
    ),
    *("generate.cli", "export.cli", "stats.table", "stats.board", "stats.cli"),
]
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def package_of(name):
    return name.rpartition("/")[0]


def is_command(name):
    """A command stands behind everything: it may use what it needs."""
    return name.endswith(("cli.py", "__main__.py", "listing.py"))


def imported_by(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", [name for name in FILES if not is_command(name)])
def test_a_file_imports_only_its_own_package_and_those_before_it(name):
    behind = ORDER[ORDER.index(package_of(name)) + 1 :]
    used = {tuple(module.split(".")) for module in imported_by(PACKAGE / name)}
    wrong = {parts for parts in used if parts[0] == "lmplay" and parts[1:2] and parts[1] in behind}

    assert not wrong


def test_packages_hold_no_code():
    for path in PACKAGE.rglob("__init__.py"):
        assert path.read_text() == ""


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in PACKAGE.rglob("*.py"))
    of_each_package = {"__init__.py", "__main__.py", "cli.py"}

    assert not [name for name, n in names.items() if n > 1 and name not in of_each_package]


def test_no_two_classes_have_one_name():
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    classes = Counter(n.name for tree in trees for n in tree.body if isinstance(n, ast.ClassDef))

    assert not [name for name, n in classes.items() if n > 1]


def test_light_files_load_nothing_heavy():
    code = f"import sys, {', '.join(f'lmplay.{name}' for name in LIGHT)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())

    assert not loaded & set(HEAVY)


COMMANDS = [
    ["lmplay.train", "--help"],
    ["lmplay.train", "--exp", "list"],
    ["lmplay.train", "--plan", "list"],
    ["lmplay.train", "--plan", "quick", "--describe"],
    ["lmplay.train", "--exp", "no_such_idea"],
    ["lmplay.train", "--tokns", "3"],
    ["lmplay.generate", "--help"],
    ["lmplay.stats", "--help"],
    ["lmplay.export", "--help"],
    ["lmplay", "--help"],
    ["lmplay", "--version"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_listings_and_mistakes_answer_without_torch(command):
    module, *args = command
    code = (
        "import runpy, sys\n"
        f"sys.argv = {['lmplay', *args]!r}\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('code', end.code, file=sys.stderr)\n"
        "print('modules', *sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    loaded = set(done.stderr.partition("\nmodules ")[2].split())
    wrong = "no_such_idea" in args or "--tokns" in args

    assert "typer" in loaded and not loaded & set(HEAVY)
    assert "pydantic" not in loaded or "--help" not in args  # a third of the time of --help
    assert f"code {2 if wrong else 0}" in done.stderr or (not wrong and "code" not in done.stderr)
