"""CONTRIBUTING's table of files is the law: who may import whom, and which files stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lmplay"
HEAVY = ("torch", "accelerate", "datasets", "pandas", "numpy", "matplotlib")


def table():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    text = text.partition("<!-- layers -->")[2].partition("<!-- /layers -->")[0]
    return re.findall(r"^\| `(\S+)` \| (\.?) ", text, re.MULTILINE)


ORDER = [name for name, _ in table()]


def module_of(name):
    return "lmplay." + name.removesuffix(".py").replace("/", ".")


def imported_by(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_table_names_every_file_once():
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    files = {name for name in files if not name.endswith(("__init__.py", "__main__.py"))}

    assert sorted(ORDER) == sorted(files)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_above_it(name):
    above = {module_of(other) for other in ORDER[: ORDER.index(name)]}
    ours = {module_of(other) for other in ORDER}
    used = {module for module in imported_by(PACKAGE / name) if module in ours}

    assert used <= above


def test_packages_hold_no_code():
    for path in PACKAGE.rglob("__init__.py"):
        assert path.read_text() == ""


def test_light_files_load_nothing_heavy():
    light = [module_of(name) for name, dot in table() if dot]
    code = f"import sys, {', '.join(light)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())

    assert len(light) > 10
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
