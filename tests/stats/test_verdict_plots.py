import matplotlib
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from scipy import stats

from lmplay.stats.compare import pair_runs, read_run
from lmplay.stats.style import VERDICTS, looks
from lmplay.stats.verdict_plots import compute, forest


@pytest.fixture(autouse=True)
def plain_text():
    with matplotlib.rc_context({"text.parse_math": False, "font.family": "DejaVu Sans"}):
        yield


def row(experiment, difference=None, half=None, verdict="cannot tell", **more):
    interval = None if half is None else [difference - half, difference + half]
    return {
        "plan": "quick",
        "experiment": experiment,
        "baseline": "gpt2ish",
        "seeds": 1 if half is None else 5,
        "mean": 4.0,
        "sd": 0.01,
        "difference": difference,
        "interval": interval,
        "p_holm": None if half is None else 0.04,
        "verdict": None if difference is None else verdict,
        "marks": [],
    } | more


ROWS = [
    row("gpt2ish"),
    row("ue", -0.05, 0.01, "better", p_holm=0.0001),
    row("value_norm", -0.01, 0.02, p_holm=0.5, marks=["2 of 7 runs failed"]),
    row("mtp", 0.04, 0.015, "worse"),
    row("lucky", -0.03, marks=["one seed: no evidence"]),
]


def points(figure):
    return [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]


def bars(figure):
    found = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    return [path.vertices for c in found for path in c.get_paths()]


def texts(figure):
    return [text for text in [*figure.texts, *figure.axes[0].texts] if text.get_text()]


def words(figure):
    axes = figure.axes[0]
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    labels = [axes.get_xlabel(), axes.get_ylabel(), *ticks]
    return "\n".join([text.get_text() for text in texts(figure)] + labels)


def assert_readable(figure):
    """No text leaves the paper or lies on another."""
    figure.canvas.draw()
    axes = figure.axes[0]
    ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    seen = [*texts(figure), axes.xaxis.label, axes.yaxis.label]
    seen += [tick for tick in ticks if tick.get_text()]
    boxes = [text.get_window_extent() for text in seen if text.get_text()]
    paper = figure.bbox
    for index, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= paper.width + 1, seen[index]
        assert box.y0 >= 0 and box.y1 <= paper.height + 1, seen[index]
        for other in boxes[:index]:
            wide = min(box.x1, other.x1) - max(box.x0, other.x0)
            tall = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert wide <= 1 or tall <= 2, (box, other)  # a line's box has room above its letters


def test_each_verdict_has_its_point_and_interval_in_the_order_of_the_rows():
    figure = forest(ROWS)
    shown = ROWS[1:]

    assert [line.get_xdata()[0] for line in points(figure)] == [r["difference"] for r in shown]
    heights = [line.get_ydata()[0] for line in points(figure)]
    bottom, top = figure.axes[0].get_ylim()
    assert heights == sorted(heights) and bottom > top  # the first on top
    expected = [(r["interval"], y) for r, y in zip(shown, heights, strict=True) if r["interval"]]
    for bar, (interval, y) in zip(bars(figure), expected, strict=True):
        assert bar.tolist() == [[interval[0], y], [interval[1], y]]
    low, high = figure.axes[0].get_xlim()
    assert low < -0.06 and high > 0.055


def test_a_verdict_is_told_by_shape_colour_and_word():
    better, unsure, worse, _ = points(forest(ROWS))

    for line, verdict in ((better, "better"), (unsure, "cannot tell"), (worse, "worse")):
        assert (line.get_color(), line.get_marker()) == VERDICTS[verdict]
        assert line.get_markerfacecolor() == line.get_color()
    assert len({marker for _, marker in VERDICTS.values()}) == len(VERDICTS)
    assert {"better", "worse", "cannot tell"} <= set(words(forest(ROWS)).split("\n"))


def test_one_seed_is_a_hollow_point_that_says_so():
    figure = forest(ROWS)

    assert points(figure)[-1].get_markerfacecolor() == "white"
    assert len(bars(figure)) == 3 and "one seed" in words(figure).split("\n")


def test_the_numbers_stand_beside_the_verdict():
    said = words(forest(ROWS)).split("\n")

    assert "−0.0500 ± 0.0100" in said and "+0.0400 ± 0.0150" in said and "−0.0300" in said
    assert "<0.001" in said and "0.500" in said and said.count("5") == 3


def test_what_a_reader_has_to_know_stands_below():
    said = words(forest(ROWS))

    assert "value_norm [1]" in said and "[1] 2 of 7 runs failed" in said
    assert "no evidence" in said and "one seed: no evidence" not in said


def test_the_baseline_is_named_and_like_for_like_each_row_names_its_own():
    assert "to gpt2ish (nats per token); left is better" in words(forest(ROWS))

    rates = [row(f"ue,lr={r}", 0.1, 0.1, baseline=f"gpt2ish,lr={r}") for r in (1, 2)]
    said = words(forest(rates))
    assert "to gpt2ish,lr=1" in said and "to gpt2ish,lr=2" in said and "to its baseline" in said


def test_several_plans_stand_under_headings():
    figure = forest([*ROWS, row("ue", 0.1, 0.1, plan="small")])
    headings = {text.get_text(): text.get_position()[1] for text in figure.texts}

    last = points(figure)[-1].get_ydata()[0]
    assert headings["plan quick"] < headings["plan small"] < last
    assert_readable(figure)


def test_an_interval_beyond_the_others_ends_in_an_arrow():
    figure = forest([*ROWS, row("diverged", 9.0, 1.0, "worse")])

    high = figure.axes[0].get_xlim()[1]
    assert high < 1
    assert points(figure)[-1].get_marker() == ">" and points(figure)[-1].get_xdata()[0] == high


def test_what_has_nothing_to_compare_is_left_out_by_name():
    assert "left out, the table says why: odd" in words(forest([*ROWS, row("odd")]))
    assert "only the baseline is here" in words(forest(ROWS[:1]))
    assert "no run can be compared" in words(forest([ROWS[0], row("odd")]))


def test_a_difference_of_exactly_nothing_is_drawn():
    low, high = forest([row("twin", 0.0, 0.0)]).axes[0].get_xlim()

    assert low < 0 < high


def test_the_forest_grows_and_stays_readable():
    few = forest(ROWS)
    many = forest([row(f"idea_{'long_' * 9}{i}+other,lr=0.001", i / 100, 0.1) for i in range(30)])

    assert many.get_figheight() > few.get_figheight() + 5
    assert_readable(few)
    assert_readable(many)


def finished_pairs(*folders):
    return pair_runs([read_run(folder) for folder in folders], None)


def test_compute_is_the_final_loss_over_the_flop_of_finished_runs(make_run):
    finals = [4.0, 4.2, 4.5]
    folders = [make_run(seed=i, losses=[9.0] * 19 + [loss]) for i, loss in enumerate(finals)]
    folders += [make_run(seed=3, done=10), make_run("ue", flops_per_token=2e6)]
    pairs = finished_pairs(*folders)
    figure = compute(pairs, looks(pairs))

    base, ue = points(figure)
    assert base.get_xydata().tolist() == [[2000 * 1e6, pytest.approx(np.mean(finals))]]
    assert ue.get_xydata().tolist() == [[2000 * 2e6, 4.0]]
    [bar] = [line for line in figure.axes[0].lines if len(set(line.get_ydata())) == 2]
    ends = stats.t.interval(0.95, 2, loc=np.mean(finals), scale=stats.sem(finals))
    np.testing.assert_allclose(bar.get_ydata(), ends)
    assert figure.axes[0].get_xscale() == "log"
    assert "gpt2ish (3 seeds)" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_the_budgets_of_one_experiment_are_joined(make_run):
    folders = [make_run("ue"), make_run("ue,tokens=1k", num_steps=10), make_run("gpt2ish")]
    folders.append(make_run("ue,budget=flops", num_steps=5, data={"fingerprint": "z"}))
    pairs = finished_pairs(*folders, make_run("ue,lr=1"))
    figure = compute(pairs, looks(pairs))

    joined = [line.get_xdata() for line in figure.axes[0].lines]
    assert [list(x) for x in joined if len(set(x)) > 1] == [[1000 * 1e6, 2000 * 1e6]]


def test_points_of_one_place_stand_side_by_side(make_run):
    pairs = finished_pairs(make_run(), make_run("ue"), make_run("far", flops_per_token=9e6))
    figure = compute(pairs, looks(pairs))
    figure.canvas.draw()

    pixels = [line.get_transform().transform(line.get_xydata())[0] for line in points(figure)]
    assert abs(pixels[0][0] - pixels[1][0]) > 5
    assert [line.get_xdata()[0] for line in points(figure)] == [2e9, 2e9, 18e9]


def test_losses_that_span_much_are_on_a_logarithmic_axis(make_run):
    pairs = finished_pairs(make_run(), make_run("ue", losses=[1.0] * 20))

    assert compute(pairs, looks(pairs)).axes[0].get_yscale() == "log"


def test_without_a_finished_run_compute_says_so(make_run):
    pairs = finished_pairs(make_run(done=7))

    assert "no run is finished" in words(compute(pairs, looks(pairs)))
