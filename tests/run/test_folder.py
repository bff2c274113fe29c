import os
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmplay.errors import UserError
from lmplay.run.folder import RunFolder, find_runs, resolve_run, run_path

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = SCALARS | st.lists(SCALARS) | st.lists(st.lists(SCALARS))
KEYS = st.text(st.characters(codec="utf-8"), min_size=1)
CHANGES = st.dictionaries(KEYS, VALUES, max_size=3)


@pytest.fixture
def new_run(make_facts):
    """Writes a run's folder that holds a run.json."""

    def write(path: Path, **values) -> RunFolder:
        run = RunFolder(path)
        run.write(make_facts(**values))
        return run

    return write


def test_a_runs_folder_is_named_after_what_makes_the_run():
    changes = {"width": 512, "optimizer.lr": 1e-3, "optimizer.options.betas": [0.9, 0.95]}

    path = run_path(Path("runs"), "quick", "value_norm+ue16x", changes, seed=3)

    name = "value_norm+ue16x,optimizer.lr=0.001,optimizer.options.betas=0.9+0.95,width=512"
    assert path == Path("runs") / "quick" / name / "seed-3"


def test_without_changes_the_folder_bears_the_experiments_name_alone():
    assert run_path(Path("out"), "quick", "ue", {}, 0) == Path("out/quick/ue/seed-0")


@pytest.mark.parametrize(("one", "other"), [(512, 512.0), (1e-3, 0.001), ([1, 2.0], (1.0, 2))])
def test_two_spellings_of_one_setting_make_one_folder(one, other):
    assert run_path(Path(), "p", "e", {"k": one}, 0) == run_path(Path(), "p", "e", {"k": other}, 0)


@given(changes=CHANGES, seed=st.integers(0), name=KEYS, plan=KEYS)
def test_no_setting_makes_a_name_that_a_file_system_refuses(changes, seed, name, plan):
    path = run_path(Path("runs"), plan, name, changes, seed)

    assert len(path.parts) == 4
    for part in path.parts:
        assert len(part.encode()) <= 120
        assert not part.startswith(".")
        assert all(c.isascii() and (c.isalnum() or c in "_.-~%+,=") for c in part)


def settings(value):
    """What tells two settings apart: their type too, but 1 is 1.0."""
    if isinstance(value, list):
        return tuple(map(settings, value))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return "number" if is_number else type(value).__name__, value


@given(one=VALUES, other=VALUES)
def test_different_settings_make_different_folders(one, other):
    same = run_path(Path(), "p", "e", {"k": one}, 0) == run_path(Path(), "p", "e", {"k": other}, 0)

    assert same == (settings(one) == settings(other))


def test_the_order_of_changes_is_no_part_of_the_name():
    forth, back = {"a": 1, "b": "x/y"}, {"b": "x/y", "a": 1}

    assert run_path(Path(), "p", "e", forth, 0) == run_path(Path(), "p", "e", back, 0)


def test_what_is_written_is_read_back(new_run, make_facts, tmp_path):
    values = {"label": "ue,lr=0.001", "command": [os.fsdecode(b"\xff"), "é"]}
    run = new_run(tmp_path / "a" / "b", **values)

    assert run.read() == make_facts(**values)
    assert os.listdir(run.path) == ["run.json"]


def test_the_mode_of_run_json_follows_the_umask(new_run, tmp_path):
    previous = os.umask(0o027)
    try:
        run = new_run(tmp_path)
    finally:
        os.umask(previous)

    assert run.run_json.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("victim", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_run_json_and_no_rubbish(
    new_run, tmp_path, monkeypatch, victim
):
    run = new_run(tmp_path / "run", status="running")

    def fail(*args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, victim, fail)
        with pytest.raises(OSError):
            run.write(run.read().finished(9))

    assert run.read().status == "running"
    assert os.listdir(run.path) == ["run.json"]


def test_on_a_full_disk_a_run_that_has_ended_is_not_called_running(new_run, tmp_path, monkeypatch):
    run = new_run(tmp_path / "run", status="running")

    def no_room(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_room)
    run.write(run.read().failed("cannot save step 3: No space left on device"))

    assert run.read().status == "failed" and "step 3" in run.read().exit_reason
    assert os.listdir(run.path) == ["run.json"]


def test_a_run_json_that_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.json")

    with pytest.raises(UserError, match=r"run\.json is no file"):
        RunFolder(tmp_path).read()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"nonsense"])
def test_a_damaged_run_json_is_named(new_run, tmp_path, text):
    run = new_run(tmp_path)
    run.run_json.write_bytes(text)

    with pytest.raises(UserError, match=r"run\.json"):
        run.read()


def test_a_folder_without_run_json_is_no_run(tmp_path):
    with pytest.raises(UserError, match="not a run"):
        RunFolder(tmp_path).read()


def test_runs_are_found_once_each_in_natural_order(new_run, tmp_path):
    for name in ["quick/ue/seed-10", "quick/ue/seed-2", "quick/gpt2ish/seed-0", ".hidden/seed-0"]:
        new_run(tmp_path / "runs" / name)
    one = tmp_path / "runs" / "quick" / "ue" / "seed-2"

    runs = find_runs([one, tmp_path / "runs", one])

    names = [str(run.path.relative_to(tmp_path / "runs")) for run in runs]
    assert names == ["quick/gpt2ish/seed-0", "quick/ue/seed-2", "quick/ue/seed-10"]


def test_runs_in_a_linked_folder_are_found_and_a_loop_ends(new_run, tmp_path):
    run = new_run(tmp_path / "elsewhere" / "a" / "seed-0")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quick").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "runs")

    (found,) = find_runs([tmp_path / "runs"])

    assert found.path.samefile(run.path)


def test_a_path_without_a_run_is_an_error_beside_good_ones(new_run, tmp_path):
    run = new_run(tmp_path / "run")

    for path in (tmp_path / "nowhere", tmp_path / "run" / "run.json"):
        with pytest.raises(UserError) as caught:
            find_runs([run.path, path])
        assert str(path) in caught.value.problem
        assert caught.value.hint


def test_a_run_is_resolved_by_folder_checkpoint_and_name(new_run, tmp_path):
    run = new_run(tmp_path / "quick" / "ue" / "seed-0")
    step = run.checkpoints / "step-70"
    step.mkdir(parents=True)

    assert resolve_run(str(run.path), Path("elsewhere")) == (run, None)
    assert resolve_run(str(step), Path("elsewhere")) == (run, 70)
    assert resolve_run(str(run.checkpoints), Path("elsewhere")) == (run, None)
    assert resolve_run("quick/ue/seed-0", tmp_path) == (run, None)
    assert resolve_run("quick/ue/seed-0/checkpoints/step-70", tmp_path) == (run, 70)
    assert resolve_run("quick/ue", tmp_path) == (run, None)


def test_a_folder_above_several_runs_does_not_mean_one_of_them(new_run, tmp_path):
    for seed in range(2):
        new_run(tmp_path / "quick" / "ue" / f"seed-{seed}")

    with pytest.raises(UserError, match="holds 2 runs"):
        resolve_run("quick/ue", tmp_path)


def test_an_unknown_run_is_answered_with_the_nearest(new_run, tmp_path):
    new_run(tmp_path / "quick" / "gpt2ish" / "seed-0")

    with pytest.raises(UserError) as caught:
        resolve_run("quick/gtp2ish/seed-0", tmp_path)
    assert "quick/gpt2ish/seed-0" in caught.value.hint


def test_the_newest_run_started_last_whatever_the_file_times_say(new_run, tmp_path):
    start = datetime(2026, 11, 21, tzinfo=UTC)
    order = list(range(5))
    random.Random(0).shuffle(order)
    for number in order:
        began = (start + timedelta(seconds=number)).isoformat()
        run = new_run(tmp_path / f"run-{number}", started=began)
        os.utime(run.run_json, (5 - number, 5 - number))
    new_run(tmp_path / "no-start", started="")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")

    assert resolve_run(None, tmp_path)[0].path.name == "run-4"


def test_of_runs_that_started_together_the_one_with_more_steps_is_newest(new_run, tmp_path):
    for name, step in [("a", 9), ("b", 10), ("c", 2)]:
        run = new_run(tmp_path / name, started="2026-11-21T00:00:00+00:00")
        (run.checkpoints / f"step-{step}").mkdir(parents=True)

    assert resolve_run(None, tmp_path)[0].path.name == "b"


def test_no_run_at_all_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError) as caught:
        resolve_run(None, tmp_path)
    assert "lmp-trainer" in caught.value.hint


def test_a_place_that_cannot_hold_a_run_is_an_error_with_a_hint(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError) as caught, RunFolder(tmp_path / "file" / "run").lock():
        pytest.fail("a run inside a file")
    assert "--out-dir" in caught.value.hint
