"""What is written appears whole or not at all."""

import json
import os
import stat

import pytest

from lmplay.disk import (
    atomic_file,
    atomic_folder,
    make_folder,
    overwrite_json,
    write_bytes,
    write_json,
    write_text,
)


class Recorded:
    """The calls that decide what a power cut leaves, in their order, by the name of the file."""

    def __init__(self, monkeypatch):
        self.calls = []
        fsync, replace = os.fsync, os.replace

        def recorded_fsync(descriptor):
            self.calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def recorded_replace(old, new):
            self.calls.append(("rename", str(new)))
            replace(old, new)

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "replace", recorded_replace)


def test_until_the_block_ends_readers_see_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()

        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half")
        raise error

    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_what_is_no_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")

    with pytest.raises(PermissionError, match="no file"):
        write_text(tmp_path / "link", "text")

    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 2


def test_an_error_names_the_file_that_was_to_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "full").touch()
    (tmp_path / "link").symlink_to("nowhere/a.txt")
    for path in (tmp_path / "folder", tmp_path / "nowhere" / "a.txt", tmp_path / "link"):
        with pytest.raises(OSError) as caught:
            write_text(path, "text")
        assert caught.value.filename == str(path) and "->" not in str(caught.value)
    with pytest.raises(OSError) as caught, atomic_file(tmp_path / "a.txt"):
        raise OSError(28, "No space left on device")  # as writing says it, without a name
    assert caught.value.filename == str(tmp_path / "a.txt")


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    recorded = Recorded(monkeypatch)

    write_text(tmp_path / "a.txt", "text")

    (first, temporary), second, third = recorded.calls
    assert first == "fsync" and os.path.dirname(temporary) == str(tmp_path)
    assert (second, third) == (("rename", f"{tmp_path}/a.txt"), ("fsync", str(tmp_path)))


def test_a_replaced_file_keeps_its_mode_and_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)

    write_text(link, "new")

    assert link.is_symlink() and real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path):
    (tmp_path / "plain").touch()

    write_bytes(tmp_path / "ours", b"")

    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    path = tmp_path / ("n" * 255)

    write_text(path, "text")

    assert path.read_text() == "text"


def test_json_keeps_what_is_no_text_and_refuses_what_is_no_number(tmp_path):
    path = tmp_path / "a.json"

    write_json(path, {"name": "gr\udcfcn"})

    assert path.read_bytes() == b'{\n  "name": "gr\\udcfcn"\n}\n'
    with pytest.raises(ValueError):
        write_json(path, float("nan"))


def test_a_folder_appears_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    out = tmp_path / "above" / "out"
    recorded = Recorded(monkeypatch)

    with atomic_folder(out) as part:
        for name in ("a", "b"):
            (part / name).write_text(name)

        assert not out.exists()
    assert sorted(p.name for p in out.iterdir()) == ["a", "b"]
    synced = [path for call, path in recorded.calls[: recorded.calls.index(("rename", str(out)))]]
    assert {str(part / "a"), str(part / "b"), str(part)} < set(synced)
    assert recorded.calls[-1] == ("fsync", str(out.parent))


def test_a_folder_that_was_not_finished_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out") as part:
        (part / "a").write_text("a")
        _ = 1 / 0

    assert not list(tmp_path.iterdir())


def test_a_folder_never_replaces_one_that_holds_something(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")

    with pytest.raises(OSError), atomic_folder(tmp_path / "out") as part:
        (part / "a").write_text("a")

    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_every_new_folder_is_on_the_disk_in_the_one_above(tmp_path, monkeypatch):
    recorded = Recorded(monkeypatch)

    make_folder(tmp_path / "a" / "b")

    assert {path for _, path in recorded.calls} == {str(tmp_path), str(tmp_path / "a")}


def test_where_there_is_no_room_for_a_second_file_the_first_takes_what_it_can_hold(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"status": "running", "reason": None})
    room = path.stat().st_size

    overwrite_json(path, {"status": "failed", "reason": "full"})
    with pytest.raises(OSError, match="No space left"):
        overwrite_json(path, {"status": "failed", "reason": "x" * room})

    assert json.loads(path.read_bytes()) == {"status": "failed", "reason": "full"}
    assert path.stat().st_size == room
