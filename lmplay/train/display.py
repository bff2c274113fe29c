"""What training shows on stderr: a live panel on a terminal, timestamped lines elsewhere."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from lmplay.console import err

LINE_SECONDS = 10  # between two plain lines


class Display:
    """Shows preparation, then the rows of one run.

    Args:
        title: what is trained on what.
        console: where to; a live panel is drawn only if it is a terminal.
    """

    def __init__(self, title: str, console: Console = err):
        self.title = title
        self.console = console
        self.num_steps = 0
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
        self._printed = 0.0
        self._began: dict | None = None  # the first row: before it there is no speed to speak of

    def __enter__(self):
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=False)
            self.live.start()
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
        if self.live is not None:
            self.live.update(Panel(escape(text), title=escape(self.title), title_align="left"))
        elif self._is_time():
            self.note(text)

    def start(self, num_steps: int, step: int) -> None:
        """Training begins at `step`."""
        self.num_steps = num_steps
        self._bar.update(self._task, total=num_steps, completed=step)

    def row(self, kind: str, row: dict) -> None:
        """A row of train.csv or validation.csv, or the step of a checkpoint."""
        if kind == "train":
            self._train = row
            self._began = self._began or row
            self._bar.update(self._task, completed=row["step"])
            if self.live is None and self._is_time():
                self._print(escape(self._line()))
        elif kind == "validation":
            self._validation = row
            self._print(f"[bold]step {row['step']:,}[/bold]: {_scores(row)}")
        if self.live is not None:
            self.live.update(self._panel())

    def example(self, prompt: str, truth: str, said: str) -> None:
        """What the model says after a stretch of the validation text."""
        for name, text in (("prompt", prompt), ("truth", truth), ("model", said)):
            self._print(f"  [dim]{name:>6}[/dim] {escape(_one_line(text))}")

    def _is_time(self) -> bool:
        if time.monotonic() - self._printed < LINE_SECONDS:
            return False
        self._printed = time.monotonic()
        return True

    def _print(self, markup: str) -> None:
        stamp = "" if self.live is not None else time.strftime("%H:%M:%S ")
        self.console.print(f"{stamp}{markup}", soft_wrap=True)

    def _speed(self) -> tuple[float, str]:
        """Tokens per second and the time left, both from the mean since the first row."""
        first, now = self._began, self._train
        seconds = now["seconds"] - first["seconds"]
        if not seconds:
            return now["tokens_per_second"], "?"
        left = self.num_steps - now["step"]
        each = seconds / (now["step"] - first["step"])
        return (now["tokens"] - first["tokens"]) / seconds, _clock(each * left)

    def _line(self) -> str:
        row = self._train
        speed, left = self._speed()
        return (
            f"step {row['step']:,}/{self.num_steps:,}  {row['tokens']:,} tokens  "
            f"{_loss(row)}  lr {row['learning_rate']:.2e}  |grad| {row['grad_norm']:.2f}  "
            f"{speed:,.0f} tokens/s  {row['memory'] / 2**30:.2f} GiB  {left} left"
        )

    def _panel(self) -> Panel:
        grid = Table.grid(padding=(0, 3))
        if self._train:
            row = self._train
            speed, left = self._speed()
            grid.add_row(
                f"tokens [bold]{row['tokens']:,}[/bold]",
                f"[bold]{speed:,.0f}[/bold] tokens/s",
                f"time left [bold]{left}[/bold]",
                f"memory [bold]{row['memory'] / 2**30:.2f}[/bold] GiB",
            )
            accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
            grid.add_row(
                f"train [bold]{_loss(row)}[/bold]",
                f"accuracy [bold]{accuracy}[/bold]",
                f"learning rate [bold]{row['learning_rate']:.2e}[/bold]",
                f"gradient norm [bold]{row['grad_norm']:.2f}[/bold]",
            )
        held_out = _scores(self._validation) if self._validation else "validation: not yet"
        return Panel(Group(self._bar, grid, held_out), title=escape(self.title), title_align="left")


def _loss(row: dict) -> str:
    if row["loss"] is None:
        return f"objective {row['objective']:.4f}"
    return f"loss {row['loss']:.4f}"


def _scores(row: dict) -> str:
    accuracy = "" if row["accuracy"] is None else f", accuracy {row['accuracy']:.1%}"
    return (
        f"validation loss [bold]{row['loss']:.4f}[/bold] nats per token, "
        f"{row['bits_per_byte']:.4f} bits per byte{accuracy}"
    )


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _one_line(text: str) -> str:
    shown = text.replace("\n", "⏎")
    return shown if len(shown) <= 160 else f"{shown[:159]}…"
