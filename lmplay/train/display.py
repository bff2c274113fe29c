"""What training shows on stderr: a live panel on a terminal, timestamped lines elsewhere."""

import time

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from lmplay.console import err, harmless
from lmplay.run.records import averages_told
from lmplay.train.clock import Clock

LINE_SECONDS = 10  # between two plain lines


class Display:
    """Shows preparation, then the rows of one run.

    Args:
        title: what is trained on what.
        console: where to; a live panel is drawn only on a terminal.
    """

    def __init__(self, title: str, console: Console = err):
        self.title = title
        self.console = console
        self.clock: Clock | None = None  # of the run under way
        self.fastest: float | None = None
        self.live: Live | None = None
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(None),
            TextColumn("{task.percentage:.0f} %"),
        )
        self._task = self._bar.add_task("", total=None)
        self._train: dict = {}
        self._validation: dict = {}
        self._is_validating = False
        self._printed = 0.0
        self._began: dict | None = None  # the first row: before it there is no speed to speak of

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.live is not None:
            self.live.stop()

    def note(self, text: str) -> None:
        """One line above the panel."""
        self._print(escape(text))

    def preparing(self, name: str, done: int, tokens: int, total: int | None) -> None:
        """Text is being turned into tokens: `done` of `total` bytes, so far `tokens` of them."""
        share = f" ({done / total:.0%})" if total else ""
        text = f"preparing {name}: {done / 1e6:,.1f} MB{share}, {tokens:,} tokens"
        if self.console.is_terminal:
            self._draw(escape(text))
        elif self._is_time():
            self.note(text)

    def start(self, clock: Clock, step: int, fastest: float | None = None) -> None:
        """Training begins at `step`.

        Args:
            fastest: tokens per second, were training nothing but matrix products at the speed of
                the largest: an MFU of 100 %.
        """
        self.clock = clock
        self.fastest = fastest
        self._bar.update(self._task, total=clock.num_steps, completed=step)

    def row(self, kind: str, row: dict) -> None:
        """A row of train.csv or validation.csv, or the step of a checkpoint or of "validating"."""
        self._is_validating = kind == "validating"
        if kind == "train":
            self._train = row
            self._began = self._began or row
            self._bar.update(self._task, completed=row["step"])
            if not self.console.is_terminal and self._is_time():
                self._print(escape(self._line()))
        elif kind == "validation":
            self._validation = row
            self._print(f"[bold]step {row['step']:,}[/bold]: validation {_scores(row)}")
        if self.console.is_terminal:
            self._draw(self._state())

    def example(self, prompt: str, truth: str, said: str) -> None:
        """What the model says after a stretch of the validation text."""
        for name, text in (("prompt", prompt), ("truth", truth), ("model", said)):
            self._print(f"  [dim]{name:>6}[/dim] {escape(self._one_line(text))}")

    def _is_time(self) -> bool:
        if time.monotonic() - self._printed < LINE_SECONDS:
            return False
        self._printed = time.monotonic()
        return True

    def _print(self, markup: str) -> None:
        stamp = "" if self.console.is_terminal else time.strftime("%H:%M:%S ")
        self.console.print(f"{stamp}{markup}", soft_wrap=True)

    def _draw(self, inside: RenderableType) -> None:
        """Show the panel; before there is something to show, it takes no line."""
        if self.live is None:
            self.live = Live(console=self.console, refresh_per_second=4)
            self.live.start()
        self.live.update(Panel(inside, title=escape(self.title), title_align="left"))

    def _one_line(self, text: str) -> str:
        """A text as one line of the terminal, or of a log."""
        shown = harmless(text.replace("\n", "⏎").replace("\t", " "))
        room = self.console.width - len("  prompt ") if self.console.is_terminal else 160
        return shown if cell_len(shown) <= room else f"{set_cell_size(shown, room - 1)}…"

    def _speed(self) -> tuple[float, str, str]:
        """Tokens per second, the time left and the MFU, all from the mean since the first row."""
        first, now = self._began, self._train
        seconds = now["seconds"] - first["seconds"]
        if not seconds:
            return now["tokens_per_second"], "?", "?"
        start, end = (self.clock.at(row["step"]) for row in (first, now))
        left = seconds * (1 - end.progress) / (end.progress - start.progress)
        places = (end.tokens_before - start.tokens_before) / seconds
        share = "?" if self.fastest is None else f"{places / self.fastest:.1%}"
        return (now["tokens"] - first["tokens"]) / seconds, as_time(left), share

    def _line(self) -> str:
        row = self._train
        speed, left, share = self._speed()
        mfu = "" if self.fastest is None else f"  MFU {share}"
        return (
            f"step {row['step']:,}/{self.clock.num_steps:,}  {row['tokens']:,} tokens  "
            f"{as_time(row['seconds'])}  "
            f"{_loss(row)}  lr {row['learning_rate']:.2e}  |grad| {row['grad_norm']:.2f}  "
            f"{speed:,.0f} tokens/s{mfu}  {row['memory'] / 2**30:.2f} GiB  {left} left"
        )

    def _state(self) -> RenderableType:
        lines: list[RenderableType] = [self._bar]
        if self._train:
            row = self._train
            speed, left, share = self._speed()
            accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
            grid = Table.grid(padding=(0, 2))  # fits into 80 columns
            grid.add_row(
                f"tokens [bold]{row['tokens']:,}[/bold]",
                f"[bold]{speed:,.0f}[/bold] tokens/s",
                f"time left [bold]{left}[/bold]",
                f"memory [bold]{row['memory'] / 2**30:.2f}[/bold] GiB",
            )
            grid.add_row(
                f"train [bold]{_loss(row)}[/bold]",
                f"accuracy [bold]{accuracy}[/bold]",
                f"lr [bold]{row['learning_rate']:.2e}[/bold]",
                f"gradient norm [bold]{row['grad_norm']:.2f}[/bold]",
            )
            mfu = "" if self.fastest is None else f"MFU [bold]{share}[/bold]"
            grid.add_row(f"trained [bold]{as_time(row['seconds'])}[/bold]", mfu)
            lines.append(grid)
        if self._is_validating:
            lines.append("[dim]validating[/dim]")
        elif self._validation:
            lines.append(f"validation {_scores(self._validation)}")
        return Group(*lines)


def _loss(row: dict) -> str:
    if row["loss"] is None:
        return f"objective {row['objective']:.4f}"
    return f"loss {row['loss']:.4f}"


def _scores(row: dict) -> str:
    accuracy = "" if row["accuracy"] is None else f", accuracy {row['accuracy']:.1%}"
    per_byte = "" if row["bits_per_byte"] is None else f", {row['bits_per_byte']:.4f} bits per byte"
    error = "" if row["loss_error"] is None else f" ± {row['loss_error']:.1g}"
    told = f"{per_byte}{accuracy}{averages_told(row)}"
    return f"[bold]{row['loss']:.4f}[/bold]{error} nats per token{told}"


def as_time(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
