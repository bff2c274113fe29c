"""What the README tells people to type is understood, and names what exists."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from lmplay.catalog import entries as catalog
from lmplay.generate import cli as generate
from lmplay.plan_file import plan_paths
from lmplay.stats import cli as plot
from lmplay.train import cli as train

ROOT = Path(__file__).parent.parent
APPS = {"lmp-trainer": train.app, "lmp-generator": generate.app, "lmp-plotstats": plot.app}
TEXTS = [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")]


def commands():
    for text in TEXTS:
        blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
        lines = "".join(blocks).replace("\\\n", " ").splitlines()
        spans = re.findall(r"`((?:lmp-\w+) [^`]*)`", text)
        for line in [line.removeprefix("$ ") for line in lines if line.startswith("$ ")] + spans:
            words = shlex.split(line, comments=True)
            if words[0] in APPS:
                yield words


def parsed(words):
    return get_command(APPS[words[0]]).make_context(words[0], words[1:]).params


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_a_command_of_the_readme_parses_and_names_what_exists(words):
    values = parsed(words)

    assert set(values)
    if words[0] == "lmp-trainer":
        named = re.split(
            "[,+]", ",".join(filter(None, [values["exp"], values["greedy"]])) or "list"
        )
        assert set(named) <= {"list", "my_idea", *catalog.entries()}
        assert (values["plan"] or "list") in {"list", "schema", *plan_paths()}


def test_the_readme_shows_all_three_commands():
    assert {words[0] for words in commands()} == set(APPS)


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)

    for target in re.findall(r"\bmake (\w+)", TEXTS[0]):
        assert target in targets


def test_pictures_of_the_readme_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXTS[0]):
        assert (ROOT / path).is_file()


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_(?:TABLE|SECONDS)\b|^RESULTS$", TEXTS[0], re.MULTILINE)
