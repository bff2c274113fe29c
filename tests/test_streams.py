"""Output that cannot be written stops no work, and ends in words."""

import errno
import os
import subprocess
import sys

import pytest
from rich.console import Console
from rich.live import Live

from lmplay.streams import Stderr


class Broken:
    """A stream that fails as a closed terminal, a full disk or a closed file does."""

    encoding, errors = "utf-8", "backslashreplace"

    def __init__(self, error):
        self.error = error

    def write(self, text=""):
        raise self.error

    flush = isatty = write


BROKEN = [OSError(errno.EIO, "x"), OSError(errno.ENOSPC, "x"), BrokenPipeError(), ValueError("x")]


@pytest.mark.parametrize("error", BROKEN, ids=repr)
@pytest.mark.parametrize("terminal", [True, False])
def test_what_cannot_be_told_stops_nothing(monkeypatch, error, terminal):
    broken = Broken(error)
    monkeypatch.setattr(broken, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", broken)
    console = Console(file=Stderr(), stderr=True, force_terminal=terminal)

    console.print("a line")
    if terminal:
        with Live(console=console, refresh_per_second=100) as live:
            live.update("a panel")
            console.print("a line above it")
    Stderr().flush()


def run(code, tail="", **streams):
    """What a command of one line does: its exit code and what it said on stderr."""
    program = f"""
import sys, typer
from lmplay.console import *
from lmplay.errors import UserError
app = typer.Typer()
@app.command()
def main():
    {code}
run_app(app)
"""
    command = ["bash", "-c", f'"$0" -c "$1" {tail}', sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, **streams)
    return done.returncode, done.stderr


def test_a_full_disk_behind_stdout_is_told_in_words():
    code, said = run("print_json({})", "> /dev/full")

    assert code == 1 and "cannot write the output: No space left on device" in said
    assert "Traceback" not in said and "Exception" not in said


def test_a_full_disk_behind_stderr_changes_no_exit_code():
    for line, expected in (("note('x')", 0), ("sys.exit(143)", 143)):
        assert run(line, "2> /dev/full")[0] == expected


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_runs_with_streams_closed(closed, tmp_path):
    line = f"note('told'); print('said'); open('{tmp_path}/a', 'w').write('file')"
    code, said = run(line, closed)

    assert code == 0 and "Traceback" not in said
    assert (tmp_path / "a").read_text() == "file"  # and nothing that was meant for a stream


def test_what_an_encoding_lacks_is_spelled_out():
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run("print(chr(0x4e2d)); note(chr(0x4e2d) + chr(0xdce9))", "", env=env)

    assert done == (0, "\\u4e2d\\udce9\n")


def test_a_disk_that_fails_below_a_command_is_told_in_words():
    code, said = run("raise OSError(28, 'No space left on device', 'a/train.csv')")

    assert code == 1 and said.startswith("error: cannot write a/train.csv: No space left")


def test_a_mistake_of_ours_keeps_its_traceback():
    code, said = run("raise OSError(2, 'No such file', 'a')")

    assert code == 1 and "FileNotFoundError" in said
