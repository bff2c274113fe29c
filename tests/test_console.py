"""What all commands share: tables that fit, and text that is safe to show."""

import sys

import pytest
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


def test_an_error_with_brackets_is_shown_as_it_is(monkeypatch, capsys):
    def app(args):
        raise console.UserError("no [bold] key in [a\\", hint="try [red]", code=4)

    monkeypatch.setattr(sys, "argv", ["lmp"])
    with pytest.raises(SystemExit) as left:
        console.run_app(app)

    assert left.value.code == 4
    assert capsys.readouterr().err == "error: no [bold] key in [a\\\ntry [red]\n"
