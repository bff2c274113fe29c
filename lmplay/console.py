"""What a terminal shows: results on stdout, notes on stderr, a UserError as its exit code."""

import atexit
import errno
import gc
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import copy
from types import FrameType
from typing import Annotated, TypeVar, get_args

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Option
from typer.exceptions import TyperException

from lmplay.errors import UserError
from lmplay.machine import DEVICES, PRECISIONS, known_device, known_precision
from lmplay.streams import UNWRITABLE, Stderr, flush_streams, open_streams

out = Console(soft_wrap=True, highlight=False)
err = Console(file=Stderr(), stderr=True, soft_wrap=True, highlight=False)

_OF_A_NAME = (  # what may be wrong with a path that a user chose
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM,
)  # fmt: skip
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # as of some network file systems
Command = TypeVar("Command", bound=Callable[..., None])

_TEXT_COLUMN = 8  # characters, where the terminal is narrow
# a terminal obeys control characters, and a model may write any
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


Device = Annotated[
    str,
    Option(
        help="auto, cpu, cuda, cuda:N or mps.",
        metavar="NAME",
        callback=known_device,
        autocompletion=lambda: list(DEVICES),
    ),
]


def in_panels(**panels: str) -> Callable[[Command], Command]:
    """Sort a command's options under headings in its help; what is not named stays above them.

    Args:
        panels: under each heading (its underscores are spaces) the names of parameters.
    """

    def sort(command: Command) -> Command:
        for heading, names in panels.items():
            for name in names.split():
                kind, option = get_args(command.__annotations__[name])
                option = copy(option)  # other commands have it too
                option.rich_help_panel = heading.replace("_", " ")
                command.__annotations__[name] = Annotated[kind, option]
        return command

    return sort


Weights = Annotated[
    str | None,
    Option(
        help="An average of the weights that the plan keeps, ema, lawa or tail_ema, instead of the "
        "newest.",
        metavar="NAME",
    ),
]


def precision_option(without: str) -> object:
    """The option --precision; `without` says what holds where it is not given."""
    return Option(
        help="fp32, bf16, fp16, or amp: the fastest that the device has in hardware; without it, "
        f"{without}.",
        metavar="NAME",
        callback=lambda name: name and known_precision(name),
        autocompletion=lambda: list(PRECISIONS),
    )


def _known_margin(text: str | None) -> float | str | None:
    """The callback of --margin: nats as a number, a share of the compute as it is."""
    if text is None:
        return None
    with suppress(ValueError):
        share = float(text.removesuffix("%"))
        if 0 < share < float("inf"):
            return text if text.endswith("%") else share
    raise UserError(
        f"--margin {text}: no margin", hint="above 0: nats such as 0.01, or a share such as 5%"
    )


Margin = Annotated[
    str | None,
    Option(
        help="Within which two final losses count as equal: nats per token, or with a % what "
        "that much more compute is worth. Without it, the plan's, if it has one.",
        metavar="NATS|SHARE%",
        callback=_known_margin,
    ),
]


def note(text: str) -> None:
    """One line on stderr."""
    err.print(harmless(text), markup=False)


def table(
    title: str | None,
    columns: list[str],
    rows: list[list[str]],
    right: Iterable[str] = (),
    cut: str | None = None,
) -> Table:
    """A rich table; the columns named in `right` hold numbers: to the right and never wrapped.

    Args:
        cut: the column of which a narrow terminal shows what fits: then each row is one line.
    """
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        justify = "right" if column in right else "left"
        is_whole = cut is not None or column in right
        overflow = "ellipsis" if column == cut else "fold"
        made.add_column(column, justify=justify, no_wrap=is_whole, overflow=overflow)
    for row in rows:
        made.add_row(*row)
    return made


def fits(made: Table) -> bool:
    """Whether `show` can print the table with nothing wrapped."""
    return not out.is_terminal or _most(made) <= out.width


def show(made: Table) -> None:
    """Print a table on stdout: text wraps at the terminal's width, numbers are never cut.

    Off a terminal every row is one line.
    """
    if out.is_terminal:
        width = max(out.width, _least(made))
        for column in made.columns:
            if column.overflow == "ellipsis":
                column.max_width = _TEXT_COLUMN + width - _least(made)
        return Console(width=width, highlight=False).print(made)
    title = [] if made.title is None else Text.from_markup(made.title).plain.split("\n")
    sys.stdout.write("\n".join([*title, *_plain_lines(made), ""]))


def harmless(text: str) -> str:
    """The text without control characters but for tabs and newlines, safe for a terminal."""
    return text.translate(_HARMLESS)


def print_json(value: object) -> None:
    """Exactly one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def show_version(wanted: bool) -> None:
    """The callback of --version."""
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"lmplay {version('lmplay')}\n")
        raise typer.Exit


Version = Annotated[
    bool | None,
    typer.Option(
        "--version", metavar="", help="Print the version.", callback=show_version, is_eager=True
    ),
]


def run_app(app: typer.Typer) -> None:
    """Run a command as a console script does: the exit code of a UserError is its own.

    Typer ends a Ctrl-C with 130, and with 1 and no word when the reader of our pipe has left; what
    it refuses is told as all errors are (code 2), and so is a name that no file can have. A disk
    that is full or fails is told in words (code 1). Long options may be written with underscores,
    as in the original lmplay.
    """
    gc.freeze()  # what is loaded stays: it is not searched for garbage again
    open_streams()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        try:
            sys.exit(app(args=list(map(_hyphenated, sys.argv[1:])), standalone_mode=False) or 0)
        except SystemExit as end:
            if not end.code:  # else that says more
                _flush()
            raise
    except TyperException as error:
        if message := error.format_message():  # else it was help that was shown
            _tell(UserError(_plainly(message), hint="-h shows the options"))
        sys.exit(error.exit_code)
    except UserError as error:
        _tell(error)
        sys.exit(error.code)
    except OSError as error:
        if (told := in_words(error)) is None:
            raise
        _tell(told)
        sys.exit(told.code)
    finally:
        flush_streams()
        # what is left to do is no work: a Ctrl-C ends it, without a traceback
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


def leave(number: int, frame: FrameType | None) -> None:
    """A signal's handler where there is nothing to save yet: end with the code that tells of it."""
    _leave_an_import(number, frame)
    sys.exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _leave_an_import(number, frame)
    raise KeyboardInterrupt


def _leave_an_import(number: int, frame: FrameType | None) -> None:
    """End at once where a module is being imported.

    Libraries catch what is raised there, and what was imported by half fails later, with a
    traceback and another code.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(128 + number)
        frame = frame.f_back


def in_words(error: OSError) -> UserError | None:
    """What an error of the operating system is to the user; None where it is our mistake."""
    name = error.filename and str(error.filename)
    if error.errno in _OF_A_NAME and name:
        return UserError(f"{name!r}: {error.strerror}", hint="choose another name or place")
    if error.errno == errno.ENOENT and name and os.path.islink(name):
        return UserError(f"{name!r} is a link that leads nowhere", hint="take it out of there")
    if error.errno in _NO_LOCKS:
        hint = "choose a local disk: --out-dir for runs, LMP_DATASETS for the cache of text"
        return UserError(f"this file system has no locks: {error.strerror}", hint, code=1)
    if error.errno in UNWRITABLE:
        problem = f"cannot write {name or 'the output'}: {error.strerror}"
        return UserError(problem, "make room; nothing that was saved is lost", code=1)
    return None


def _flush() -> None:
    if error := flush_streams():
        raise error


def _plainly(message: str) -> str:
    """Typer's words without those of what it is made of: "--seed should be less than 9"."""
    message = re.sub(r"^Invalid value for '([^']+)': Input should be ", r"\1 should be ", message)
    message = re.sub(r"^Invalid value for '([^']+)': (Value error, )?", r"\1: ", message)
    return (message[0].lower() + message[1:]).removesuffix(".")


def _tell(error: UserError) -> None:
    err.quiet = False  # also where another process of the group does the talking
    err.print(Text.assemble(("error:", "red"), f" {harmless(error.problem)}"))
    if error.hint:
        err.print(Text(harmless(error.hint), style="dim"))


def _plain_lines(made: Table) -> list[str]:
    """The header and the rows, with nothing wrapped; rich takes ten times as long."""
    columns = []
    for column in made.columns:
        texts = [_without_markup(str(cell)) for cell in [column.header, *column.cells]]
        texts = [text.replace("\n", " ") for text in texts]
        most = max(map(cell_len, texts))
        gaps = [" " * (most - cell_len(text)) for text in texts]
        is_right = column.justify == "right"
        columns.append([g + t if is_right else t + g for t, g in zip(texts, gaps, strict=True)])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _without_markup(cell: str) -> str:
    return Text.from_markup(cell, emoji=False).plain if "[" in cell else cell


def _most(made: Table) -> int:
    return Console(width=10_000).measure(made).maximum


def _least(made: Table) -> int:
    """The width of the numbers with a little text beside them."""
    widths = [
        max(cell_len(_without_markup(str(cell))) for cell in [column.header, *column.cells])
        if column.no_wrap and column.overflow != "ellipsis"
        else _TEXT_COLUMN
        for column in made.columns
    ]
    return sum(widths) + 2 * len(widths)


def _hyphenated(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else arg
