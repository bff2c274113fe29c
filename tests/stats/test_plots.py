import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmplay.stats.compare import Curve, pair_runs, read_run
from lmplay.stats.plots import COLUMNS, View, _common_range, _thin, _XAxis, draw

NAMES = ["loss", "accuracy", "loss_difference", "accuracy_difference"]


def pairs_of(*folders):
    return pair_runs([read_run(folder) for folder in folders], None)


@pytest.mark.parametrize("format", ["png", "svg", "pdf"])
def test_the_same_runs_give_the_same_bytes(make_run, tmp_path, format):
    pairs = pairs_of(make_run(), make_run("ue"))
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files = draw(pairs, View(format=format), tmp_path / name)
        contents.append([file.read_bytes() for file in files])

    assert [file.name for file in files] == [f"{name}.{format}" for name in NAMES]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "view",
    [
        View("tokens", "train", half_life=0.0, log=True, format="svg"),
        View("steps", "validation", half_life_share=0.0, format="svg"),
        View("seconds", "both", half_life=3.0, format="svg"),
        View("seconds", "validation", log=True, format="svg"),
        View("flops", "both", log=True, format="svg"),
    ],
    ids=str,
)
def test_every_view_draws_four_figures(make_run, tmp_path, view):
    pairs = pairs_of(make_run(), make_run("ue", done=7), make_run("mtp", losses=[None] * 20))

    files = draw(pairs, view, tmp_path)
    assert [file.stem for file in files] == NAMES


def test_what_cannot_be_compared_leaves_the_difference_and_says_so(make_run, tmp_path):
    pairs = pairs_of(make_run(), make_run("ue", data={"fingerprint": "z"}))

    svg = draw(pairs, View(format="svg"), tmp_path)[2].read_text()
    assert "no run can be compared" in svg  # matplotlib keeps the text as a comment


def test_the_axis_of_a_difference_says_which_way_is_better(make_run, tmp_path):
    files = draw(pairs_of(make_run(), make_run("ue")), View(format="svg"), tmp_path)

    assert "below 0: better" in files[2].read_text()
    assert "above 0: better" in files[3].read_text()


def test_a_cut_of_the_first_steps_is_said(make_run, tmp_path):
    steep = [50.0, *[5.0] * 19]
    files = draw(pairs_of(make_run(losses=steep)), View(format="svg"), tmp_path)

    assert "y is cut: curves go up to" in files[0].read_text()


def test_thirty_long_names_and_one_plan_more_are_drawn(make_run, tmp_path):
    folders = [make_run(f"{'long_name' * 8}_{index},lr=0.001,width=512") for index in range(30)]

    assert len(draw(pairs_of(*folders, make_run(plan="other")), View(format="svg"), tmp_path)) == 4


@given(size=st.integers(2 * COLUMNS + 1, 20_000), seed=st.integers(0, 5), log=st.booleans())
def test_thinning_keeps_the_peaks_the_ends_and_the_order(size, seed, log):
    x = np.arange(1.0, size + 1)
    original = Curve(x, np.random.default_rng(seed).normal(size=size))

    thin_x, thin_y = _thin(original, _XAxis(1.0 if log else 0.0, float(size), log))

    assert thin_y.min() == original.y.min() and thin_y.max() == original.y.max()
    assert thin_x[0] == 1 and thin_x[-1] == size and (np.diff(thin_x) >= 0).all()
    assert len(thin_x) <= 2 * COLUMNS + 2


def test_one_run_that_ran_away_does_not_rule_the_range():
    lows, highs = np.array([3.0, 3.1, 3.0, 90.0]), np.array([4.0, 4.1, 4.2, 100.0])

    low, high = _common_range(lows, highs)
    assert low == 3.0 and high < 10
