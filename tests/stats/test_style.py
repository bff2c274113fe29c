import numpy as np
import pytest

from lmplay.stats.compare import pair_runs, read_run
from lmplay.stats.style import (
    LEFT,
    blank,
    broken,
    common_range,
    drawable,
    family,
    sole_of_seed,
    with_one_ruler,
    with_room,
    wrapped,
)


@pytest.mark.parametrize(
    "label, kept",
    [
        ("ue", "ue"),
        ("ue,tokens=2M", "ue"),
        ("ue,budget=flops,lr=0.001,tokens=2M", "ue,lr=0.001"),
        ("value_norm+ue16x,width=256", "value_norm+ue16x,width=256"),
    ],
)
def test_a_family_is_a_label_without_its_budget(label, kept):
    assert family(label) == kept


def test_one_run_that_ran_away_does_not_rule_the_range():
    lows, highs = np.array([3.0, 3.1, 3.0, 90.0]), np.array([4.0, 4.1, 4.2, 100.0])

    low, high = common_range(lows, highs)
    assert low == 3.0 and high < 10


def test_intervals_widen_the_range_but_do_not_rule_it():
    short = with_room(1.0, 2.0, np.array([0.9, 1.5]), np.array([1.1, 2.2]))
    long = with_room(1.0, 2.0, np.array([-50.0]), np.array([2.0]))

    assert short == (0.9, 2.2)
    assert 0 <= long[0] < 1 and long[1] == 2.0
    assert with_room(2.0, 2.0, np.array([1.0]), np.array([3.0])) == (1.0, 3.0)


def test_runs_share_a_ruler_where_plan_label_data_and_budget_agree(make_run):
    folders = [
        make_run(),
        make_run(seed=1),
        make_run(seed=2, data={"fingerprint": "z"}),
        make_run("ue"),
        make_run(plan="other"),
    ]
    pairs = pair_runs([read_run(folder) for folder in folders], None)

    assert [len(group) for group in with_one_ruler(pairs)] == [2, 1, 1, 1]


def test_a_seed_that_is_there_twice_is_no_seed_of_its_own(make_run):
    folders = [make_run(seed=2), make_run(seed=0), make_run("copy", seed=2)]
    pairs = pair_runs([read_run(folder) for folder in folders], None)

    assert [pair.run.seed for pair in sole_of_seed(pairs)] == [0]


def test_a_long_label_breaks_where_its_parts_begin_and_keeps_both_its_ends():
    label = "value_norm+gated_attention+ue16x,optimizer.lr=0.001," + "x" * 80 + "=" + "9" * 80

    lines = wrapped(label).split("\n  ")
    assert lines[:2] == ["value_norm+", "gated_attention+ue16x,"]
    assert all(len(line) <= 40 for line in lines) and len(lines) == 6
    assert lines[3].startswith("xxx") and lines[-1].endswith("999") and "…" in "".join(lines)


def test_letters_that_the_font_lacks_are_spelled_out_and_lose_nothing():
    name = "\u4e2d\u6587\u5b9e\u9a8c\u4e00\u4e8c\u4e09\u56db"

    assert drawable("idée \u03b1\n") == "idée \u03b1\n"
    assert drawable("\U0001f9a5\u4e2d") == r"\U0001f9a5\u4e2d"
    assert wrapped(name).replace("\n  ", "").encode().decode("unicode_escape") == name


@pytest.mark.parametrize(
    "text",
    [
        "a note that fits\nand another",
        "\n".join(["not finished: " + ", ".join(f"idea_{i} (seeds 0, 1)" for i in range(20))] * 2),
        "plan " + "x" * 400,
    ],
    ids=["short", "long", "one word"],
)
def test_a_text_that_is_too_long_is_broken_and_loses_nothing(text):
    figure, _ = blank()
    written = figure.text(0, 0, text, fontsize=8)

    place = broken(written)

    assert place.width <= figure.bbox.width - 2 * LEFT * figure.dpi
    assert written.get_window_extent().bounds == place.bounds
    assert "".join(written.get_text().split()) == "".join(text.split())
    assert (written.get_text() == text) == (len(text) < 40)
