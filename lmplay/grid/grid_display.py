"""What training many runs shows on stderr."""

import time
from typing import ClassVar

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from lmplay.console import err
from lmplay.train.display import Display, as_time


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
            text += f", about {as_time(left * sum(self._took) / len(self._took))} left"
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
