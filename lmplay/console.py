"""What a terminal shows: results on stdout, notes on stderr, a UserError as its exit code."""

import json
import sys
from collections.abc import Iterable
from importlib.metadata import version

import typer
from rich.console import Console
from rich.table import Table

from lmplay.errors import UserError

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def note(text: str) -> None:
    """One line on stderr."""
    err.print(text, markup=False)


def table(
    title: str, columns: list[str], rows: list[list[str]], right: Iterable[str] = ()
) -> Table:
    """A rich table; the columns named in `right` hold numbers: to the right and never wrapped."""
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        is_number = column in right
        made.add_column(column, justify="right" if is_number else "left", no_wrap=is_number)
    for row in rows:
        made.add_row(*row)
    return made


def show(made: Table) -> None:
    """Print a table on stdout: words wrap at the terminal's width, numbers are never cut.

    Off a terminal every row is one line.
    """
    asked = Console(width=10_000).measure(made)
    width = max(out.width, asked.minimum) if out.is_terminal else asked.maximum
    Console(width=width, highlight=False).print(made)


def print_json(value: object) -> None:
    """Exactly one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def show_version(wanted: bool) -> None:
    """The callback of --version."""
    if wanted:
        sys.stdout.write(f"lmplay {version('lmplay')}\n")
        raise typer.Exit


def run_app(app: typer.Typer) -> None:
    """Run a command as a console script does: the exit code of a UserError is its own.

    Typer ends a Ctrl-C with 130, and with 1 and no word when the reader of our pipe has left. Long
    options may be written with underscores, as in the original lmplay.
    """
    try:
        app(args=[_hyphenated(arg) for arg in sys.argv[1:]])
    except UserError as error:
        err.print(f"[red]error:[/red] {_plain(error.problem)}")
        if error.hint:
            err.print(f"[dim]{_plain(error.hint)}[/dim]")
        sys.exit(error.code)


def _hyphenated(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else arg


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
