import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.collections import FillBetweenPolyCollection, LineCollection
from scipy import stats

from lmplay.stats.compare import pair_runs, read_run
from lmplay.stats.curve import Curve
from lmplay.stats.judge import judge
from lmplay.stats.plots import (
    _METRICS,
    COLUMNS,
    MOST_BARS,
    View,
    _figure,
    _thin,
    _XAxis,
    draw,
    mean_over_runs,
)
from lmplay.stats.style import looks

NAMES = ["loss", "accuracy", "loss_difference", "accuracy_difference", "verdicts", "compute"]
STEPS = np.arange(1, 21)
SMOOTHED = View()
EXACT = View(half_life=0.0)


def pairs_of(*folders, baseline=None):
    return pair_runs([read_run(folder) for folder in folders], baseline)


def drawn(pairs, view, folder):
    return draw(pairs, judge(pairs), view, folder)


def loss_figure(pairs, view=EXACT, differences=False):
    return _figure(pairs, looks(pairs), _METRICS[0], view, differences)


def words(figure):
    """All that is written outside the axes, and the legend."""
    legend = [text.get_text() for part in figure.legends for text in part.get_texts()]
    return " ".join([text.get_text() for text in figure.texts] + legend)


def bands(figure):
    """Of each band its x, low and high."""
    found = []
    for band in figure.axes[0].collections:
        if isinstance(band, FillBetweenPolyCollection):
            x, y = band.get_paths()[0].vertices.T
            by_x = {at: sorted(y[x == at]) for at in sorted(set(x))}
            found.append(np.array([(at, ys[0], ys[-1]) for at, ys in by_x.items()]).T)
    return found


def lines(figure):
    return [line.get_xydata() for line in figure.axes[0].lines if len(line.get_xydata()) > 2]


def t_interval(values_RX):
    return stats.t.interval(
        0.95, len(values_RX) - 1, loc=values_RX.mean(axis=0), scale=stats.sem(values_RX, axis=0)
    )


def noisy(seed, level=4.0):
    return (level + np.random.default_rng(seed).normal(size=20)).tolist()


@pytest.mark.parametrize("format", ["png", "svg", "pdf"])
def test_the_same_runs_give_the_same_bytes(make_run, tmp_path, format):
    pairs = pairs_of(make_run(), make_run(seed=1), make_run("ue"), make_run("ue", seed=1))
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files = drawn(pairs, View(format=format), tmp_path / name)
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
def test_every_view_draws_six_figures(make_run, tmp_path, view):
    folders = [make_run(seed=seed, losses=noisy(seed)) for seed in range(3)]
    pairs = pairs_of(*folders, make_run("ue", done=7), make_run("mtp", losses=[None] * 20))

    files = drawn(pairs, view, tmp_path)
    assert [file.stem for file in files] == NAMES


def test_a_line_is_the_mean_over_seeds_and_its_band_the_t_interval(make_run):
    losses = [noisy(seed) for seed in range(4)]
    pairs = pairs_of(*[make_run(seed=seed, losses=losses[seed]) for seed in range(4)])

    figure = loss_figure(pairs)

    [(x, low, high)] = bands(figure)
    expected_low, expected_high = t_interval(np.array(losses))
    np.testing.assert_array_equal(x, STEPS * 100)
    np.testing.assert_allclose(low, expected_low)
    np.testing.assert_allclose(high, expected_high)
    np.testing.assert_allclose(lines(figure)[0][:, 1], np.mean(losses, axis=0))
    assert "gpt2ish (4 seeds)" in words(figure) and "95 % t interval" in words(figure)


def test_validation_has_its_interval_as_bars_or_alone_as_a_band(make_run):
    losses = [noisy(seed) for seed in range(3)]
    pairs = pairs_of(*[make_run(seed=seed, losses=losses[seed]) for seed in range(3)])
    low, high = t_interval(np.array(losses)[:, 4::5])

    beside, alone = loss_figure(pairs), loss_figure(pairs, View(split="validation"))

    [bars] = [c for c in beside.axes[0].collections if type(c) is LineCollection]
    ends = np.array([path.vertices for path in bars.get_paths()])
    np.testing.assert_allclose(ends[:, :, 0], np.stack([STEPS[4::5] * 100] * 2, axis=1))
    np.testing.assert_allclose(ends[:, :, 1], np.stack([low, high], axis=1))
    np.testing.assert_allclose(bands(alone)[0][1:], [low, high])


def test_bars_that_would_hide_one_another_are_left_out_and_it_is_said(make_run):
    folders = [
        make_run(f"idea{index}", seed=seed, losses=noisy(10 * index + seed))
        for index in range(MOST_BARS + 1)
        for seed in range(2)
    ]
    figure = loss_figure(pairs_of(*folders))

    assert not [c for c in figure.axes[0].collections if type(c) is LineCollection]
    assert len(bands(figure)) == MOST_BARS + 1
    assert "of validation only where it is drawn alone" in words(figure)


def test_a_difference_is_the_mean_of_the_paired_differences(make_run):
    base = [noisy(seed) for seed in range(3)]
    gains = np.array([noisy(10 + seed, level=-0.1) for seed in range(3)]) / 100
    folders = [make_run(seed=seed, losses=base[seed]) for seed in range(3)]
    folders += [
        make_run("ue", seed=seed, losses=(base[seed] + gains[seed]).tolist()) for seed in range(3)
    ]
    figure = loss_figure(pairs_of(*folders), differences=True)

    [(_, low, high)] = bands(figure)
    np.testing.assert_allclose((low, high), t_interval(gains), rtol=1e-6)
    np.testing.assert_allclose(lines(figure)[0][:, 1], gains.mean(axis=0), rtol=1e-6)
    assert any(
        np.all(np.equal(line.get_ydata(), 0)) for line in figure.axes[0].lines
    )  # the zero line


def test_one_run_has_a_line_and_no_band(make_run):
    figure = loss_figure(pairs_of(make_run()), SMOOTHED)

    assert not bands(figure) and "seeds" not in words(figure)


def test_what_is_not_finished_never_enters_a_mean_and_the_note_says_so(make_run):
    losses = [noisy(seed) for seed in range(3)]
    folders = [make_run(seed=seed, losses=losses[seed]) for seed in range(3)]
    folders.append(make_run(seed=3, losses=[99.0] * 7, done=7))
    figure = loss_figure(pairs_of(*folders))

    np.testing.assert_allclose(lines(figure)[0][:, 1], np.mean(losses, axis=0))
    assert "left out: not finished: gpt2ish (seed 3)" in words(figure)


def test_where_nothing_is_finished_each_run_is_drawn_by_itself(make_run):
    figure = loss_figure(pairs_of(make_run(done=9), make_run(seed=1, done=6)))

    assert sorted(len(line) for line in lines(figure)) == [6, 9]
    assert not bands(figure) and "gpt2ish (2 not finished)" in words(figure)


def test_a_difference_to_a_baseline_that_is_not_finished_is_in_no_mean(make_run):
    folders = [make_run(seed=seed, losses=noisy(seed)) for seed in range(2)]
    folders.append(make_run(seed=2, done=9))
    folders += [make_run("ue", seed=seed, losses=noisy(seed)) for seed in range(3)]
    figure = loss_figure(pairs_of(*folders), differences=True)

    assert "ue (2 seeds)" in words(figure) and "not finished: ue (seed 2)" in words(figure)


@pytest.mark.parametrize("other", [{"data": {"fingerprint": "z"}}, {"tokens_per_step": 300}])
def test_runs_of_one_label_on_other_data_or_budgets_are_not_mixed(make_run, other):
    folders = [make_run(), make_run(seed=1), make_run(seed=2, losses=[9.0] * 20, **other)]
    figure = loss_figure(pairs_of(*folders))

    assert "gpt2ish (2 + 1 runs, apart)" in words(figure)
    assert sorted(line[-1, 1] for line in lines(figure) if len(line) == 20) == [4.0, 9.0]


def test_a_seed_that_ran_twice_is_not_two_seeds(make_run, tmp_path):
    folders = [make_run(seed=0), make_run(seed=1), make_run(seed=2)]
    twice = make_run("copy", seed=1)
    twice.write(replace(twice.read(), label="gpt2ish"))
    figure = loss_figure(pairs_of(*folders, twice))

    assert "gpt2ish (2 seeds)" in words(figure)
    assert "several runs of one seed: gpt2ish (seed 1)" in words(figure)


values_RX = arrays(
    np.float64, st.tuples(st.integers(2, 5), st.integers(1, 30)), elements=st.floats(-9, 9)
)


@given(values_RX)
def test_the_band_of_curves_on_one_axis_is_the_t_interval_at_each_point(values_RX):
    x = np.arange(values_RX.shape[1], dtype=float)
    band = mean_over_runs([Curve(x, row) for row in values_RX])

    spread = stats.sem(values_RX, axis=0) * stats.t.ppf(0.975, len(values_RX) - 1)
    np.testing.assert_array_equal(band.mean.x, x)
    np.testing.assert_allclose(band.mean.y, values_RX.mean(axis=0))
    np.testing.assert_allclose(band.high - band.mean.y, spread, atol=1e-12)
    np.testing.assert_allclose(band.mean.y - band.low, spread, atol=1e-12)


axes_of_runs = st.lists(
    st.lists(st.integers(0, 50), min_size=1, max_size=20, unique=True), min_size=2, max_size=4
)


@given(axes_of_runs)
def test_a_mean_is_only_where_all_curves_are_and_exact_where_they_are_straight(axes):
    curves = []
    for slope, points in enumerate(axes, start=1):
        x = np.array(sorted(points), dtype=float)
        curves.append(Curve(x, slope * x + 1))
    band = mean_over_runs(curves)

    low, high = max(c.x[0] for c in curves), min(c.x[-1] for c in curves)
    assert (band.mean.x >= low).all() and (band.mean.x <= high).all()
    assert len(band.mean.x) == 0 if low > high else {low, high} <= set(band.mean.x)
    slope = np.mean(np.arange(1, len(axes) + 1))
    np.testing.assert_allclose(band.mean.y, slope * band.mean.x + 1)


def test_a_gap_of_one_seed_is_a_gap_of_the_mean():
    x, gap = np.arange(4.0), np.array([1.0, np.nan, 3.0, 4.0])
    band = mean_over_runs([Curve(x, gap), Curve(x, x)])

    assert np.isnan([band.mean.y[1], band.low[1], band.high[1]]).all()
    assert np.isfinite(np.delete(band.mean.y, 1)).all()


def test_nothing_is_drawn_beyond_what_every_seed_recorded(make_run):
    folders = [make_run(seed=0), make_run(seed=1)]
    pairs = pairs_of(*folders)
    slower = pairs[1].run
    for columns in (slower.train, slower.validation):
        columns["seconds"] = 1.5 * columns["seconds"]
    figure = loss_figure(pairs, View("seconds", half_life=0.0))

    everything = np.concatenate([line[:, 0] for line in lines(figure)])
    assert everything.max() == 10.0 and everything.min() == 0.75
    [(x, _, _)] = bands(figure)
    assert (x.min(), x.max()) == (0.75, 10.0)


def test_long_bands_of_two_seeds_do_not_flatten_the_lines(make_run):
    folders = [make_run(losses=[4.0] * 20), make_run("ue", losses=[3.9] * 20)]
    folders += [make_run(seed=1, losses=[4.1] * 20), make_run("ue", seed=1, losses=[3.7] * 20)]
    low, high = loss_figure(pairs_of(*folders)).axes[0].get_ylim()

    assert high - low < 4 * (4.05 - 3.8)


def test_a_label_has_one_look_in_all_figures(make_run):
    folders = [make_run(), make_run("ue"), make_run("ue,tokens=2M"), make_run("value_norm")]
    pairs = pairs_of(*folders, make_run(plan="other"))
    look_of = looks(pairs)

    assert look_of["quick", "ue"].colour == look_of["quick", "ue,tokens=2M"].colour
    assert look_of["quick", "ue"].marker != look_of["quick", "ue,tokens=2M"].marker
    assert look_of["quick", "ue"].colour != look_of["quick", "value_norm"].colour
    assert look_of["quick", "gpt2ish"].is_baseline and look_of["other", "gpt2ish"].is_baseline
    assert len({(look.colour, look.marker) for look in look_of.values()}) == len(look_of)


@pytest.mark.parametrize("number", [24, 50])
def test_so_many_labels_are_told_apart(make_run, number):
    pairs = pairs_of(*[make_run(f"idea{index}") for index in range(number + 1)], baseline="idea0")
    found = looks(pairs).values()

    assert len({(look.colour, look.dash, look.marker) for look in found}) == number + 1
    assert number > 24 or len({(look.colour, look.dash) for look in found}) == number + 1


def test_what_cannot_be_compared_leaves_the_difference_and_says_so(make_run, tmp_path):
    pairs = pairs_of(make_run(), make_run("ue", data={"fingerprint": "z"}))

    svg = drawn(pairs, View(format="svg"), tmp_path)[2].read_text()
    assert "no run can be compared" in svg  # matplotlib keeps the text as a comment


def test_the_axis_of_a_difference_says_which_way_is_better(make_run, tmp_path):
    files = drawn(pairs_of(make_run(), make_run("ue")), View(format="svg"), tmp_path)

    assert "below 0: better" in files[2].read_text()
    assert "above 0: better" in files[3].read_text()


def test_a_cut_of_the_first_steps_is_said(make_run, tmp_path):
    steep = [50.0, *[5.0] * 19]
    files = drawn(pairs_of(make_run(losses=steep)), View(format="svg"), tmp_path)

    assert "y is cut: curves go up to" in files[0].read_text()


@pytest.mark.parametrize("number", [30, 44])
def test_the_legend_of_many_long_names_stays_on_the_paper(make_run, number):
    folders = [make_run(f"{'long_name' * 8}_{index},lr=0.001,width=512") for index in range(number)]
    figure = loss_figure(pairs_of(*folders, make_run(plan="other")))

    box = figure.legends[0].get_window_extent()
    assert box.y0 >= 0 and box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert len(figure.legends[0].get_texts()) == number + 1
    assert figure.axes[0].get_position().x1 * figure.bbox.width <= box.x0


def test_no_figure_has_a_letter_that_its_font_lacks(make_run, tmp_path):
    chinese, plan = "\u4e2d\u6587,lr=0.1", "\u8ba1\u5212"
    pairs = pairs_of(*[make_run(label, plan) for label in ("gpt2ish", chinese)])

    with warnings.catch_warnings(action="error"):
        draw(pairs, judge(pairs, None), View(), tmp_path)


@given(size=st.integers(2 * COLUMNS + 1, 20_000), seed=st.integers(0, 5), log=st.booleans())
def test_thinning_keeps_the_peaks_the_ends_and_the_order(size, seed, log):
    x = np.arange(1.0, size + 1)
    original = Curve(x, np.random.default_rng(seed).normal(size=size))

    thin_x, thin_y = _thin(original, _XAxis(1.0 if log else 0.0, float(size), log))

    assert thin_y.min() == original.y.min() and thin_y.max() == original.y.max()
    assert thin_x[0] == 1 and thin_x[-1] == size and (np.diff(thin_x) >= 0).all()
    assert len(thin_x) <= 2 * COLUMNS + 2
