"""What all commands share: tables that fit, and text that is safe to show."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from rich.console import Console

from lmplay import console
from lmplay.console import fits, harmless, show, table


@pytest.fixture
def terminal(monkeypatch):
    def make(width):
        monkeypatch.setattr(console, "out", Console(force_terminal=True, width=width))

    return make


WIDE = ["the/folder/of/" + "long_name" * 9 + ".py", "some words " * 9, "1,234"]


def wide_table():
    return table("Title", ["file", "what it is", "tokens"], [WIDE], right={"tokens"})


def test_a_terminals_table_folds_what_has_no_blank_and_loses_no_character(terminal, capsys):
    terminal(80)

    show(wide_table())

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    letters = "".join("".join(lines[2:]).split())
    assert sorted(letters) == sorted("".join("".join(WIDE).split()))
    assert any("1,234" in line for line in lines)


def test_a_table_may_show_what_fits_of_one_column_and_keep_each_row_on_a_line(terminal, capsys):
    terminal(80)
    rows = [["idea", "some words " * 20, "here.py"], ["other", "few", ""]]

    show(table("T", ["name", "what it is", "file"], rows, cut="what it is"))

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 80
    assert lines[2].startswith("idea   some words") and lines[2].rstrip().endswith("…  here.py")


def test_off_a_terminal_every_row_is_one_line_without_blanks_at_its_end(capsys):
    show(table("T", ["a", "b"], [WIDE[:2], ["x", ""]]))

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith(WIDE[0]) and lines[3] == "x"


def test_off_a_terminal_markup_is_gone_and_all_else_stays(capsys):
    show(table(None, ["a"], [["[bold]idea[/bold]"], [r"loss \[nats]"], ["a:rocket:b"]]))

    assert capsys.readouterr().out.splitlines() == ["a", "idea", "loss [nats]", "a:rocket:b"]


def test_a_table_fits_where_nothing_of_it_wraps(terminal):
    terminal(80)
    assert not fits(wide_table()) and fits(table("T", ["a"], [["b"]]))
    terminal(300)
    assert fits(wide_table())


def test_harmless_text_keeps_tabs_newlines_and_letters():
    assert harmless("a\tb\nc\x1b\r\x00ü日") == "a\tb\nc\ufffd\ufffd\ufffdü日"


def refused_by(app, args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lmp", *args])
    with pytest.raises(SystemExit) as left:
        console.run_app(app)
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--seed", "-1"], "--seed should be greater than or equal to 0"),
        (["--seed", "1e3"], "--seed should be a valid integer"),
        (["--kind", "c"], "--kind: 'c' is not one of 'a', 'b'"),
        (["--kin", "a"], "no such option: --kin (Possible options: --kind)"),
        (["--kind"], "option '--kind' requires an argument"),
        (["x"], "got unexpected extra argument(s) (x)"),
    ],
)
def test_what_typer_refuses_is_told_as_any_other_error(args, told, monkeypatch, capsys):
    app = typer.Typer()

    @app.command()
    def main(
        seed: Annotated[int, typer.Option(min=0)] = 0,
        kind: Annotated[Literal["a", "b"], typer.Option()] = "a",
    ):
        pass

    code, said = refused_by(app, args, monkeypatch, capsys)

    assert code == 2 and said.startswith(f"error: {told}")
    assert said.endswith("\n-h shows the options\n") and "Value error" not in said


def test_a_name_that_no_file_can_have_is_a_mistake_of_the_users(monkeypatch, capsys, tmp_path):
    def app(**_):
        (tmp_path / ("a" * 300)).exists()

    code, said = refused_by(app, [], monkeypatch, capsys)

    assert code == 2 and said.count("\n") == 2 and "aaa': File name too long" in said


def test_a_file_system_without_locks_says_what_to_do(monkeypatch, capsys):
    def app(**_):
        raise OSError(errno.ENOLCK, "No locks available")

    code, said = refused_by(app, [], monkeypatch, capsys)

    assert code == 1 and "no locks" in said and "LMP_DATASETS" in said and "--out-dir" in said


def test_a_link_that_leads_nowhere_is_named_and_a_missing_file_of_ours_is_our_mistake(
    monkeypatch, capsys, tmp_path
):
    (tmp_path / "link").symlink_to("nowhere")
    code, said = refused_by(lambda **_: (tmp_path / "link").read_text(), [], monkeypatch, capsys)

    assert code == 2 and "link' is a link that leads nowhere" in said
    with pytest.raises(FileNotFoundError):
        refused_by(lambda **_: (tmp_path / "ours").read_text(), [], monkeypatch, capsys)


def test_control_characters_of_a_damaged_file_never_reach_the_terminal(monkeypatch, capsys):
    def app(**_):
        raise console.UserError("it begins with \x1b[2J", hint="see a\x07")

    assert refused_by(app, [], monkeypatch, capsys)[1] == (
        "error: it begins with \ufffd[2J\nsee a\ufffd\n"
    )


def test_an_error_with_brackets_is_shown_as_it_is(monkeypatch, capsys):
    def app(**_):
        raise console.UserError("no [bold] key in [a\\", hint="try [red]", code=4)

    assert refused_by(app, [], monkeypatch, capsys) == (
        4, "error: no [bold] key in [a\\\ntry [red]\n"
    )  # fmt: skip


SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
    for _ in range(100):
        pass
except BaseException:
    pass
"""


@pytest.mark.parametrize(("name", "handler"), [("SIGTERM", "leave"), ("SIGINT", "_interrupt")])
def test_a_signal_within_an_import_ends_the_process_whatever_the_module_catches(
    tmp_path, name, handler
):
    (tmp_path / "swallows.py").write_text(SWALLOWS.format(name=name))
    set_handler = f"signal.signal(signal.{name}, console.{handler})"
    code = f"import signal; from lmplay import console; {set_handler}; import swallows; print(1)"
    root = Path(console.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"},
    )  # fmt: skip

    number = getattr(signal, name)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")
