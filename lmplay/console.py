"""What a terminal shows: results on stdout, notes on stderr, a UserError as its exit code."""

import json
import os
import sys
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


def table(title: str, columns: list[str], rows: list[list[str]], right: set[str] = frozenset()):
    """A rich table; the columns named in `right` are aligned to the right."""
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left")
    for row in rows:
        made.add_row(*row)
    return made


def print_json(value: object) -> None:
    """Exactly one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def show_version(wanted: bool) -> None:
    """The callback of --version."""
    if wanted:
        sys.stdout.write(f"lmplay {version('lmplay')}\n")
        raise typer.Exit


def run_app(app: typer.Typer) -> None:
    """Run a command as a console script does: exit code from UserError, Ctrl-C is 130.

    Long options may be written with underscores, as in the original lmplay.
    """
    try:
        app(args=[_hyphenated(arg) for arg in sys.argv[1:]])
    except UserError as error:
        err.print(f"[red]error:[/red] {_plain(error.problem)}")
        if error.hint:
            err.print(f"[dim]{_plain(error.hint)}[/dim]")
        sys.exit(error.code)
    except BrokenPipeError:  # the reader of our pipe has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)


def _hyphenated(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else arg


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
