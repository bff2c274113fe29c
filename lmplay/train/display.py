"""What training shows on stderr: a live panel on a terminal, timestamped lines elsewhere."""

import time
from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from lmplay.console import err, harmless
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
        return (now["tokens"] - first["tokens"]) / seconds, _clock(left), share

    def _line(self) -> str:
        row = self._train
        speed, left, share = self._speed()
        mfu = "" if self.fastest is None else f"  MFU {share}"
        return (
            f"step {row['step']:,}/{self.clock.num_steps:,}  {row['tokens']:,} tokens  "
            f"{_clock(row['seconds'])}  "
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
            grid.add_row(f"trained [bold]{_clock(row['seconds'])}[/bold]", mfu)
            lines.append(grid)
        if self._is_validating:
            lines.append("[dim]validating[/dim]")
        elif self._validation:
            lines.append(f"validation {_scores(self._validation)}")
        return Group(*lines)


class GridDisplay(Display):
    """Shows many runs: a row for each label, a column for each seed, and the run under way.

    Args:
        plan: its name.
        console: as for `Display`.
    """

    _WORDS: ClassVar = {"held": "elsewhere", "failed": "failed"}

    def __init__(self, plan: str, console: Console = err):
        super().__init__(plan, console)
        self._plan = plan
        self._cells: dict[tuple[str, int], str] = {}
        self._done: set[tuple[str, int]] = set()
        self._now: tuple[str, int] | None = None
        self._began_run = 0.0
        self._took: list[float] = []  # seconds of the runs that were trained here

    def expect(self, runs: list[tuple[str, int]]) -> None:
        """These labels and seeds are about to come."""
        self._cells |= {run: self._cells.get(run, "") for run in runs}

    def begin(self, label: str, seed: int) -> None:
        """What comes from now on is of this run."""
        self._now = label, seed
        self._train, self._validation, self._began = {}, {}, None
        self.title = f"{label} on {self._plan}, seed {seed}: {self._progress()}"
        self._began_run = time.monotonic()
        self._bar.reset(self._task, total=None)

    def end(self, state: str, result: dict | None = None, why: str = "") -> None:
        """The run is over: "done" with its result, "failed" and why, or "held" elsewhere."""
        self._cells[self._now] = self._WORDS.get(state, "")
        self._is_validating = False
        if result is not None:
            self._cells[self._now] = f"{result['validation']['loss']:.4f}"
            self._done.add(self._now)
        if self.console.is_terminal:
            self._draw(self._state())
        if state == "failed" or (state == "done" and self._train):
            self._took.append(time.monotonic() - self._began_run)
            said = ": ".join(part for part in (self._cells[self._now], why) if part)
            self.note(f"{said}; {self._progress()}")

    def _progress(self) -> str:
        """How many runs are done, and the time that the rest will take if nobody shares it."""
        left = len(self._cells) - len(self._done)
        text = f"{len(self._done)} of {len(self._cells)} runs done"
        if left and self._took:
            text += f", about {_clock(left * sum(self._took) / len(self._took))} left"
        return text

    def row(self, kind: str, row: dict) -> None:
        if kind == "train":
            self._cells[self._now] = f"{self.clock.at(row['step']).progress:.0%}"
        super().row(kind, row)

    def example(self, prompt: str, truth: str, said: str) -> None:
        """Nothing: it is in the run's samples.md."""

    def _print(self, markup: str) -> None:
        run = "" if self._now is None else "{}, seed {}: ".format(*self._now)
        super()._print(escape(run) + markup)

    def _state(self) -> RenderableType:
        return Group(super()._state(), "", self._matrix())

    def _matrix(self) -> Table:
        seeds = sorted({seed for _, seed in self._cells})
        labels = list(dict.fromkeys(label for label, _ in self._cells))
        room = self.console.width - 4 - max(map(cell_len, labels))
        made = Table(box=None, pad_edge=False, header_style="dim")
        made.add_column("")
        if room < len(seeds) * 11:  # too many seeds for a column each
            made.add_column("finished", justify="right")
            for label in labels:
                runs = {run for run in self._cells if run[0] == label}
                made.add_row(escape(label), f"{len(runs & self._done)} of {len(runs)}")
            return made
        for seed in seeds:
            made.add_column(f"seed {seed}", justify="right", no_wrap=True)
        for label in labels:
            cells = [self._cells.get((label, seed), "") for seed in seeds]
            made.add_row(escape(label), *cells)
        return made


def _loss(row: dict) -> str:
    if row["loss"] is None:
        return f"objective {row['objective']:.4f}"
    return f"loss {row['loss']:.4f}"


def _scores(row: dict) -> str:
    accuracy = "" if row["accuracy"] is None else f", accuracy {row['accuracy']:.1%}"
    return (
        f"[bold]{row['loss']:.4f}[/bold] nats per token, "
        f"{row['bits_per_byte']:.4f} bits per byte{accuracy}"
    )


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
