"""What training shows, on a terminal and in a log."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

import lmplay.train.display as display_module
from lmplay.plan_file import read_plan
from lmplay.train.clock import Clock
from lmplay.train.display import Display

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
def shown():
    """Lets a display show something, and gives back the lines that a terminal or a log got."""

    def show(act, width=80, terminal=True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
        with Display("ue on quick, seed 0", console) as display:
            act(display)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()

    return show


def rows(display):
    display.start(CLOCK, 0)
    first = {"step": 1, "tokens": 12_800_000, "seconds": 10.0}
    for kind, row in (("train", TRAIN | first), ("train", TRAIN), ("validation", VALIDATION)):
        display.row(kind, row)


def test_the_panel_and_the_scores_fit_into_80_columns_without_a_wrap(shown):
    lines = shown(rows)

    assert max(map(len, lines)) <= 80
    for words in (
        "tokens 512,000,000",
        "trained 2:30:00",
        "time left",
        "lr 4.17e-05",
        "gradient norm 0.66",
    ):
        assert any(words in line for line in lines), words
    assert any(line.startswith("step 40: validation 1.4221 nats") for line in lines)


@pytest.mark.parametrize("terminal", [True, False])
def test_mfu_is_the_speed_over_that_of_matrix_products(shown, monkeypatch, terminal):
    monkeypatch.setattr(display_module, "LINE_SECONDS", 0)

    def act(display):
        display.start(CLOCK, 0, fastest=10.0)
        for step, seconds in ((1, 10.0), (11, 2510.0)):  # 250 s a step
            display.row("train", TRAIN | {"step": step, "seconds": seconds})

    lines = shown(act, terminal=terminal)

    assert "MFU 40.0%" in "\n".join(lines)
    assert max(map(len, lines)) <= 80 or not terminal


def test_time_left_is_that_of_the_tokens_left_where_steps_grow(shown, monkeypatch):
    monkeypatch.setattr(display_module, "LINE_SECONDS", 0)
    sizes = {"batch_sizes": [(0.0, 1), (0.5, 10)], "sequence_lengths": [(0.0, 1)], "max_len": 1}
    clock = Clock(SimpleNamespace(tokens=200, **sizes))

    def act(display):
        display.start(clock, 0, fastest=2.0)
        for step, seconds in ((20, 0.0), (100, 80.0)):  # a second a token; 100 tokens are left
            display.row("train", TRAIN | {"step": step, "tokens": step, "seconds": seconds})

    last = shown(act, terminal=False)[-1]

    assert "step 100/110" in last and "1:40 left" in last and "MFU 50.0%" in last


def test_no_panel_is_drawn_before_there_is_something_to_show(shown):
    assert shown(lambda display: None) == []
    assert shown(lambda display: display.note("going on")) == ["going on"]


def test_the_panel_says_that_a_validation_is_under_way(shown):
    def begin(display):
        display.start(CLOCK, 0)
        display.row("validating", {"step": 40})

    def end(display):
        begin(display)
        display.row("validation", VALIDATION)

    assert any("validating" in line for line in shown(begin))
    assert "validating" not in shown(end)[-2]
    assert "validation 1.4221" in shown(end)[-2]


def test_a_log_has_the_time_and_no_panel(shown):
    lines = shown(rows, terminal=False)

    assert len(lines) == 2
    assert re.match(r"\d\d:\d\d:\d\d step 1/80 ", lines[0])
    assert re.match(r"\d\d:\d\d:\d\d step 40: validation 1.4221 nats per token", lines[1])


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_says_is_one_line_that_no_terminal_obeys(shown, terminal):
    said = "a\x1b[2Jb\rc\x07d\ne\x85f\tg [bold] " + "日本" * 200

    def act(display):
        display.example("the prompt", "the truth", said)

    *_, line = shown(act, terminal=terminal)
    assert "a\ufffd[2Jb\ufffdc\ufffdd⏎e\ufffdf g [bold] 日本" in line and line.endswith("…")
    assert len(shown(act, terminal=terminal)) == 3
