import shutil

import pytest

from lmplay.proofs import proof_cache
from lmplay.proofs.proof import NO_MEMORY, Proof
from lmplay.proofs.proof_cache import PACKAGE, hash_of_sources, remembered

PASSED = [Proof("causal", True, "")]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of lmplay's files, whose text counts instead; the proof_cache is empty."""
    monkeypatch.setenv("LMP_DATASETS", str(tmp_path / "cache"))
    copy = tmp_path / "lmplay"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(proof_cache, "PACKAGE", copy)
    return copy


def runs(of="a source", proofs=PASSED):
    """Whether the proofs had to be found."""
    hash_of_sources.cache_clear()  # as in the next process
    ran = []
    remembered([of], lambda: ran.append(1) or proofs)
    return bool(ran)


@pytest.mark.parametrize(
    "name",
    ["model/objective.py", "model/cache.py", "proofs/tiny.py", "catalog/entries.py", "errors.py"],
)
def test_a_pass_is_forgotten_when_a_file_that_takes_part_changes(package, name):
    assert runs() and not runs()

    (package / name).write_text((package / name).read_text() + "\n# changed")

    assert runs() and not runs()


def test_a_new_file_of_the_ruler_forgets_too(package):
    assert runs()
    (package / "model" / "another.py").write_text("")

    assert runs()


def test_a_pass_outlives_a_change_of_what_comes_after_the_proofs(package):
    assert runs()
    (package / "train" / "loop.py").write_text("# changed")

    assert not runs()


@pytest.mark.parametrize("proof", [Proof("causal", False, ""), Proof("causal", None, NO_MEMORY)])
def test_neither_a_failure_nor_a_lack_of_memory_is_remembered(package, proof):
    assert runs(proofs=[proof]) and runs(proofs=[proof])
