"""What a grid shows, on a terminal and in a log."""

import io
import re

import pytest
from rich.console import Console

from lmplay.grid.grid_display import GridDisplay
from lmplay.plan_file import read_plan
from lmplay.train.clock import Clock

TRAIN = {
    "step": 40, "tokens": 512_000_000, "loss": 1.5, "objective": 1.5, "accuracy": 0.484,
    "learning_rate": 4.17e-5, "grad_norm": 0.66, "tokens_per_second": 147_040.0,
    "memory": 12 * 2**30, "seconds": 9000.0,
}  # fmt: skip
CLOCK = Clock(read_plan("quick", {"batch_size": 10, "sequence_length": 100, "tokens": 80_000}))
VALIDATION = {
    "step": 40, "loss": 1.4221, "loss_error": None, "bits_per_byte": 2.0517, "accuracy": 0.522,
}  # fmt: skip


@pytest.fixture
def grid_shown():
    def show(act, width=80, terminal=True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
        with GridDisplay("quick", console) as display:
            act(display)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()

    return show


def grid_of(num_seeds):
    def act(display):
        runs = [(label, seed) for seed in range(num_seeds) for label in ("gpt2ish", "ue")]
        display.expect(runs)
        display.begin("gpt2ish", 0)
        display.end("done", {"validation": VALIDATION})
        display.begin("ue", 0)
        display.start(CLOCK, 0)
        display.row("train", TRAIN)
        display.end("failed", why="it blew up")
        display.begin("gpt2ish", 1)
        display.end("held")
        display.begin("ue", 1)
        display.start(CLOCK, 0)
        display.row("train", TRAIN)

    return act


def test_a_grid_shows_each_run_where_its_label_and_its_seed_cross(grid_shown):
    lines = grid_shown(grid_of(2))
    at = max(i for i, line in enumerate(lines) if "seed 0" in line and "seed 1" in line)

    assert max(map(len, lines)) <= 80
    assert lines[at + 1].split()[1:4] == ["gpt2ish", "1.4221", "elsewhere"]
    assert lines[at + 2].split()[1:4] == ["ue", "failed", "50%"]
    assert any("ue, seed 0: failed: it blew up; 1 of 4 runs done, about" in line for line in lines)


def test_a_grid_forgets_the_validation_of_a_run_that_failed_in_it(grid_shown):
    def act(display):
        display.expect([("gpt2ish", 0)])
        display.begin("gpt2ish", 0)
        display.row("validating", {"step": 0})
        display.end("failed", why="it blew up")

    lines = grid_shown(act)
    last = max(i for i, line in enumerate(lines) if line.startswith("╭"))

    assert not any("validating" in line for line in lines[last:])


def test_a_grid_of_many_seeds_shows_how_many_are_done(grid_shown):
    lines = grid_shown(grid_of(40))

    assert max(map(len, lines)) <= 80
    assert any("gpt2ish" in line and "1 of 40" in line for line in lines)


def test_a_grid_in_a_log_names_the_run_on_every_line(grid_shown):
    lines = grid_shown(grid_of(2), terminal=False)

    assert len(lines) >= 2 and all("ue, seed" in line for line in lines)
