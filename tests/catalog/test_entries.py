"""Listing reads files and never runs them."""

import os
import shlex

import pytest

from lmplay.catalog import entries as catalog
from lmplay.catalog.entry import definitions, read_file
from lmplay.errors import UserError
from lmplay.roots import bundled_root

IDEA = '''"""Idea: one line.

Changed from gpt2ish: Config, Model.
"""

raise RuntimeError("a listing must not run this")

VARIANTS = {"idea_wide": {"width": 8}, "idea_same": {}}
TINY = {"width": 4}


class Config:
    vocab_size: int
    width: int = 4


@staticmethod
def helper():
    return 1
'''


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(root, name, source=IDEA):
    path = root / "experiments" / f"{name}.py"
    path.write_text(source)
    return path


def test_a_file_in_the_working_directory_joins_the_list_without_being_run(root):
    path = write(root, "idea")
    entries = catalog.entries()

    assert {"idea", "idea_wide", "gpt2ish", "ue16x"} <= set(entries)
    assert entries["idea_wide"].path == path.resolve()
    assert entries["idea_wide"].variant == {"width": 8}
    assert entries["idea"].parent == "gpt2ish" and entries["idea"].changed == ("Config", "Model")
    assert entries["idea"].fields == {"vocab_size": "int", "width": "int"}
    assert entries["idea"].summary == "Idea: one line."


def test_the_working_directory_wins_over_lmplay_path_and_that_over_the_bundled(root, monkeypatch):
    other = root / "other"
    (other / "experiments").mkdir(parents=True)
    theirs = write(other, "ue")
    monkeypatch.setenv("LMPLAY_PATH", str(other))

    assert catalog.resolve("ue").path == theirs.resolve()
    assert catalog.resolve("ue").path != write(root, "ue").resolve()
    assert catalog.resolve("ue").path == (root / "experiments" / "ue.py").resolve()


def test_names_with_an_underscore_in_front_are_skipped(root):
    write(root, "_draft")

    assert "_draft" not in catalog.entries()


def test_two_names_for_one_setting_have_one_canonical_name(root):
    write(root, "idea")
    names = {name: catalog.canonical_name(e) for name, e in catalog.entries().items()}

    assert names["idea_same"] == names["idea"] == "idea"
    assert names["idea_wide"] == "idea_wide"
    assert names["ue8x"] == "ue"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("x = (", "line 1"),
        ("x = 1\n", "no docstring"),
        ('"""Doc."""\nVARIANTS = {"a": dict(b=1)}\n', "line 2"),
        ('"""Doc."""\nTINY = make()\n', "TINY"),
    ],
)
def test_a_file_that_cannot_be_listed_is_named_with_its_line(root, source, told):
    path = write(root, "broken", source)
    with pytest.raises(UserError) as raised:
        catalog.resolve(str(path))

    assert "broken.py" in raised.value.problem and told in raised.value.problem


def test_a_broken_file_is_reported_and_hides_no_other(root):
    write(root, "broken", "x = (")
    errors = []
    entries = catalog.entries(errors.append)

    assert "gpt2ish" in entries and "broken" not in entries
    assert ["broken.py" in error.problem for error in errors] == [True]
    with pytest.raises(UserError, match="not valid Python"):
        catalog.resolve("broken")


def test_a_mistake_below_config_is_told_once_the_file_is_named(root):
    write(root, "late", IDEA + "x = (")

    assert "late" in catalog.entries()
    with pytest.raises(UserError, match="not valid Python"):
        catalog.resolve("late")


@pytest.mark.parametrize(
    "source",
    [
        IDEA.replace("width: int = 4\n", "width: int = 4\n# a comment\n\n    depth: int = 2\n"),
        IDEA.replace("VARIANTS", "UNUSED").replace("TINY", "SMALL") + "VARIANTS = {'late': {}}\n",
        IDEA.replace("Idea: one", "Idea: class Config\nclass Config: one"),
        IDEA.replace("class Config", "class Other"),
    ],
)
def test_a_list_says_what_the_whole_file_says(root, source):
    path = write(root, "idea", source)

    assert read_file(path, head_only=True) == read_file(path)


def test_a_list_of_the_bundled_files_says_what_they_say():
    listed = list(catalog.entries().values())
    paths = dict.fromkeys(entry.path for entry in listed)

    assert listed == [entry for path in paths for entry in read_file(path)]


def test_a_name_that_two_files_give_a_variant_means_neither(root):
    write(root, "one")
    write(root, "two")
    errors = []
    entries = catalog.entries(errors.append)

    assert entries["one"].variants == entries["two"].variants
    assert not {"idea_wide", "idea_same"} & entries.keys()
    assert [e.problem.endswith("both name idea_wide, idea_same") for e in errors] == [True]
    with pytest.raises(UserError, match=r"one\.py and .*two\.py both name idea_wide"):
        catalog.resolve("idea_wide")


def test_a_copy_of_a_bundled_experiment_takes_no_name_away(root):
    write(root, "mine", read_file(bundled_root() / "experiments" / "gpt2ish.py")[0].source)

    entries = catalog.entries()
    assert entries["gpt2ish"].path.parent == bundled_root() / "experiments"
    assert entries["mine"].path.parent == root / "experiments"
    with pytest.raises(UserError, match="both name gpt2ish_med"):
        catalog.resolve("gpt2ish_med")


def test_variants_of_a_copy_that_says_so_are_those_of_its_parent(root):
    source = read_file(bundled_root() / "experiments" / "gpt2ish.py")[0].source
    said = source.replace('"""\n\n', 'Changed from gpt2ish: MLP.\n"""\n\n', 1)
    write(root, "mine", said)
    errors = []
    entries = catalog.entries(errors.append)

    assert entries["gpt2ish_med"].file == catalog.resolve("gpt2ish_med").file == "gpt2ish"
    assert entries["mine"].parent == "gpt2ish" and len(errors) == 1


@pytest.mark.parametrize("name", ["a,b", "list", "list:mine", "a\nb"])
def test_a_file_that_no_exp_can_name_is_told(root, name):
    write(root, name)
    errors = []

    assert name not in catalog.entries(errors.append)
    assert "--exp cannot name" in errors[0].problem and "rename" in errors[0].hint


def test_what_a_hint_spells_is_the_experiment_that_was_meant(root):
    (root / "my idea.py").write_text(IDEA)
    write(root, "idea")

    for name in ("my idea.py", "idea_wide", "ue+value_norm"):
        meant = catalog.resolve(name)
        (spelled,) = shlex.split(meant.spelling)
        assert catalog.resolve(spelled) == meant


def test_an_unknown_name_gets_the_nearest(root):
    with pytest.raises(UserError) as raised:
        catalog.resolve("valu_norm")

    assert "value_norm" in raised.value.hint


def test_definitions_are_whole_with_their_decorators(root):
    found = definitions(IDEA)

    assert set(found) == {"Config", "helper"}
    assert found["helper"].startswith("@staticmethod")


def test_the_diff_against_the_parent_names_what_differs(root):
    diff = catalog.diff(catalog.resolve("value_norm"))

    assert "--- gpt2ish.py" in diff and "+++ value_norm.py" in diff
    assert "Changed from" not in diff  # the docstring stands above it
    assert catalog.diff(catalog.resolve("gpt2ish")) == ""


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ('"""x."""\nVARIANTS = {"a": 3}\n', "VARIANTS is no literal dict of names to dicts"),
        ('"""x."""\nVARIANTS = {3: {}}\n', "VARIANTS is no literal dict of names to dicts"),
        ('"""x."""\nVARIANTS = {"a": {3: 4}}\n', "VARIANTS is no literal dict of names to dicts"),
        ('"""x."""\nVARIANTS = {[]: 1}\n', "VARIANTS is no literal dict of names to dicts"),
        ('"""x."""\nTINY = [1]\n', "TINY is no literal dict of Config values"),
        ('"""x."""\nTINY = ' + "[" * 400 + "]" * 400, "not valid Python"),
        ('"""x."""\ndef f(:\n', "line 2: not valid Python: invalid syntax"),
        ('"""x."""\n\0', "not valid Python: source code string cannot contain null bytes"),
        ("", "has no docstring"),
    ],
)
def test_a_broken_file_costs_its_neighbours_nothing(tmp_path, monkeypatch, source, why):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "broken.py").write_text(source)
    (tmp_path / "experiments" / "loop.py").symlink_to("loop.py")
    monkeypatch.chdir(tmp_path)
    refused = []

    assert "gpt2ish" in catalog.entries(refused.append)
    assert [why in error.problem for error in refused] == [True, False]
    assert "loop.py cannot be read" in refused[1].problem


def test_odd_neighbours_are_named_once_and_passed_over(tmp_path, monkeypatch):
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "mine.py").write_bytes(b"\xef\xbb\xbf" + IDEA.encode())  # a mark, as editors write
    (folder / ".#mine.py").symlink_to("user@host.12345:1700000000")  # the lock of one
    (folder / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (folder / "folder.py").mkdir()
    os.mkfifo(folder / "pipe.py")  # which nobody writes to
    (folder / "latin.py").write_bytes(b'"""caf\xe9."""')
    monkeypatch.chdir(tmp_path)
    refused = []

    found = catalog.entries(refused.append)

    assert found["mine"].source == IDEA and catalog.resolve("mine").path == folder / "mine.py"
    why = ["is no file", "cannot be read", "is not UTF-8", "is no file"]  # by name
    assert all(part in e.problem for part, e in zip(why, refused, strict=True))
    with pytest.raises(UserError, match="is no file"):
        catalog.resolve("folder")


OTHER = IDEA.replace("Idea: one line.", "Other: one line.").replace("idea_", "other_")


def test_a_file_is_of_the_family_that_it_names_or_else_of_its_parents(root):
    write(root, "idea", IDEA.replace("Changed", "Family: inventions.\nChanged"))
    write(root, "other", OTHER.replace("Changed from gpt2ish", "Changed from idea"))
    known = catalog.entries()

    assert [catalog.family_of(known[name], known) for name in ("idea", "idea_wide", "other")] == [
        "inventions"
    ] * 3
    assert catalog.family_of(known["gpt2ish"], known) is None
    assert set(catalog.listed("inventions", known)) == {
        *("idea", "idea_wide", "idea_same", "other", "other_wide", "other_same"),
    }


def test_a_list_may_begin_at_an_experiment(root):
    write(root, "idea")
    write(root, "other", OTHER.replace("Changed from gpt2ish", "Changed from idea"))
    known = catalog.entries()

    assert {known[name].file for name in catalog.listed("idea", known)} == {"idea", "other"}
    assert catalog.listed("idea_wide", known) == catalog.listed("idea", known)
    assert "other" in catalog.listed("gpt2ish", known)
    with pytest.raises(UserError) as raised:
        catalog.listed("atention", known)
    assert "did you mean 'attention'" in raised.value.hint and "positions" in raised.value.hint


def test_files_that_are_copied_from_each_other_are_listed_all_the_same(root):
    write(root, "idea", IDEA.replace("from gpt2ish", "from other"))
    write(root, "other", OTHER.replace("Changed from gpt2ish", "Changed from idea"))
    known = catalog.entries()

    assert catalog.family_of(known["idea"], known) is None
    assert {known[name].file for name in catalog.listed("idea", known)} == {"idea", "other"}


@pytest.mark.parametrize(
    "stack, idea, name",
    [
        ("gpt2ish", "ue", "ue"),
        ("llama", "z_loss", "z_loss"),
        ("gpt2ish", "z_loss", "z_loss"),
        ("qk_norm", "qk_gain", "qk_gain"),
        ("z_loss", "qk_norm", "z_loss+qk_norm"),
        ("llama_tied", "z_loss", "llama_tied+z_loss"),
        ("z_loss+qk_norm", "canon", "z_loss+qk_norm+canon"),
    ],
)
def test_one_more_idea_is_the_idea_alone_where_it_was_copied_from_the_rest(stack, idea, name):
    assert catalog.with_one_more(stack, idea).name == name


def test_an_idea_that_the_stack_was_copied_from_is_not_one_more():
    with pytest.raises(UserError, match="adds nothing"):
        catalog.with_one_more("z_loss+qk_gain", "qk_norm")
