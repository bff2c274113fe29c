import json

import numpy as np
import pytest
from scipy import stats

from lmplay.run.facts import League
from lmplay.run.records import TRAIN_COLUMNS, Record
from lmplay.stats.compare import pair_runs, read_run
from lmplay.stats.judge import UNDECLARED, judge
from lmplay.stats.verdict import power

MACHINE = {"device_name": "a CPU", "threads": 2, "world_size": 1, "compiled": False}


def judged(*folders, baseline=None, like_for_like=False):
    """The verdict rows; that these runs declare no looks is left out of the marks."""
    runs = [read_run(folder) for folder in folders]
    rows = judge(pair_runs(runs, baseline, like_for_like))
    return [row | {"marks": [m for m in row["marks"] if m != UNDECLARED]} for row in rows]


def proposed(row):
    """The number of fresh seeds that it says would tell."""
    return row["next"] and int(row["next"].split()[-1])


def row_of(rows, label):
    return next(row for row in rows if row["experiment"] == label)


@pytest.fixture
def seeds(make_run):
    """Makes runs of one label that end at these losses, one for each seed."""

    def make(label, losses, **facts):
        return [
            make_run(label, seed=seed, losses=[5.0] * 19 + [loss], **facts)
            for seed, loss in enumerate(losses)
        ]

    return make


def test_a_verdict_has_the_numbers_that_scipy_gives(seeds):
    base, idea = [4.0, 4.1, 4.2, 4.05], [3.9, 4.02, 4.13, 3.94]

    ours, row = judged(*seeds("gpt2ish", base), *seeds("ue", idea))

    test = stats.ttest_rel(idea, base)
    interval = test.confidence_interval(0.95)
    assert (row["experiment"], row["baseline"], row["seeds"]) == ("ue", "gpt2ish", 4)
    assert row["mean"] == pytest.approx(np.mean(idea))
    assert row["sd"] == pytest.approx(np.std(idea, ddof=1))
    assert row["difference"] == pytest.approx(np.mean(idea) - np.mean(base))
    assert row["interval"] == pytest.approx([interval.low, interval.high])
    assert row["p"] == row["p_holm"] == pytest.approx(test.pvalue)
    assert row["verdict"] == "better" and row["next"] is None and row["marks"] == []
    assert row["bits_per_byte"] == pytest.approx(np.mean(idea) / 2)
    assert row["accuracy"] == pytest.approx(np.mean(1 / np.array(idea)))
    assert ours["mean"] == pytest.approx(np.mean(base)) and ours["seeds"] == 4
    assert (ours["baseline"], ours["verdict"], ours["p"]) == ("gpt2ish", None, None)


def test_rows_are_json_and_name_their_runs(seeds):
    rows = judged(*seeds("gpt2ish", [4.0, 4.1]), *seeds("ue", [4.0, 4.2]))

    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [path.split("/")[-1] for path in rows[1]["runs"]] == ["seed-0", "seed-1"]


def test_the_baseline_is_first_then_the_best_and_what_cannot_be_compared_is_last(seeds, make_run):
    rows = judged(
        make_run("a_odd", data={"fingerprint": "z"}),
        *seeds("worse", [4.5]),
        *seeds("better", [3.5]),
        *seeds("gpt2ish", [4.0]),
        *seeds("other", [4.0], plan="b"),
    )

    names = ["gpt2ish", "better", "worse", "a_odd", "other"]
    assert [row["experiment"] for row in rows] == names


def test_p_is_corrected_over_the_ideas_of_one_plan_alone(seeds):
    base = [4.0, 4.1, 4.2]
    folders = [*seeds("gpt2ish", base), *seeds("gpt2ish", base, plan="b")]
    for i, shift in enumerate(([0.1, 0.12, 0.2], [0.3, 0.1, 0.15], [0.1, 0.11, 0.1])):
        folders += seeds(f"idea{i}", [b - s for b, s in zip(base, shift, strict=True)])
    folders += seeds("idea", [3.9, 4.0, 4.05], plan="b")

    rows = judged(*folders)

    of_plan = sorted((r["p"], r["p_holm"]) for r in rows if r["plan"] == "quick" and r["p"])
    p = [p for p, _ in of_plan]
    assert [h for _, h in of_plan] == pytest.approx(
        [3 * p[0], max(3 * p[0], 2 * p[1]), max(2 * p[1], p[2])]
    )
    other = row_of(rows, "idea")
    assert other["p"] == other["p_holm"]


def test_one_seed_is_no_evidence(seeds):
    row = judged(*seeds("gpt2ish", [4.0]), *seeds("ue", [1.0]))[1]

    assert row["difference"] == -3 and row["verdict"] == "cannot tell"
    assert (row["interval"], row["p"], row["p_holm"], row["sd"]) == (None,) * 4
    assert row["next"] == "--seeds 5" and row["marks"] == ["one seed: no evidence"]


def test_differences_that_are_all_zero_cannot_tell(seeds):
    row = judged(*seeds("gpt2ish", [4.0, 4.1]), *seeds("twin", [4.0, 4.1]))[1]

    assert (row["p"], row["p_holm"], row["interval"]) == (1, 1, [0, 0])
    assert row["verdict"] == "cannot tell" and row["next"] is None


def test_cannot_tell_says_how_many_fresh_seeds_would_tell(seeds):
    differences = np.array([-0.2, 0.1, -0.15, 0.05])
    base = np.array([4.0, 4.1, 4.2, 4.3])

    row = judged(*seeds("gpt2ish", base), *seeds("ue", base + differences))[1]

    effect, needed = abs(differences.mean()) / differences.std(ddof=1), proposed(row)
    assert row["verdict"] == "cannot tell"
    assert power(effect, needed, 0.05) >= 0.8 > power(effect, needed - 1, 0.05)


def test_among_several_ideas_more_seeds_are_needed(seeds):
    base = np.array([4.0, 4.1, 4.2, 4.3])
    idea = base + np.array([-0.2, 0.1, -0.15, 0.05])
    folders = [*seeds("gpt2ish", base), *seeds("ue", idea)]
    rivals = [*seeds("a", base[::-1]), *seeds("b", base[[1, 0, 3, 2]])]

    alone = proposed(row_of(judged(*folders), "ue"))
    among = proposed(row_of(judged(*folders, *rivals), "ue"))
    assert among > alone


def test_a_difference_next_to_nothing_would_take_too_many_seeds_to_say(seeds):
    rows = judged(*seeds("gpt2ish", [4.0, 4.0]), *seeds("ue", [4.1, 4.0 - 0.0999]))

    assert rows[1]["verdict"] == "cannot tell" and rows[1]["next"] is None


def test_only_seeds_that_both_have_are_paired(seeds, make_run):
    base = seeds("gpt2ish", [4.0, 4.1, 4.2])
    idea = seeds("ue", [3.9, 4.0])

    row = judged(*base, *idea, make_run("ue", seed=7), make_run("ue", seed=8))[1]

    assert row["seeds"] == 2 and row["difference"] == pytest.approx(-0.1)
    assert row["mean"] == pytest.approx(3.95)
    assert row["marks"] == ["not compared: gpt2ish has no run of this seed (seeds 7, 8)"]


def test_curves_of_unfinished_runs_never_enter_a_number(seeds, make_run):
    folders = [*seeds("gpt2ish", [4.0, 4.1]), *seeds("ue", [3.9, 4.0])]
    half = [make_run(label, seed=seed, done=10, losses=[0.1] * 10)
            for label in ("gpt2ish", "ue") for seed in (5, 6)]  # fmt: skip

    before, after = judged(*folders), judged(*folders, *half)

    for row, same in zip(after, before, strict=True):
        assert row["unfinished"] == 2 and row["marks"] == ["not finished: seeds 5, 6"]
        changed = {key for key in row if row[key] != same[key]}
        assert changed == {"unfinished", "marks", "runs"}


def test_a_baseline_that_is_not_finished_is_said(seeds, make_run):
    idea = seeds("ue", [3.9, 3.9, 3.9])
    base = seeds("gpt2ish", [4.0, 4.1])

    row = judged(*base, make_run(seed=2, done=10), *idea)[1]

    assert row["seeds"] == 2 and row["marks"] == ["the baseline is not finished: seed 2"]


def test_a_run_without_a_validation_at_its_end_has_no_final_loss(seeds, make_run):
    base, idea = seeds("gpt2ish", [4.0, 4.1, 4.2]), seeds("ue", [3.9, 4.0])
    short = make_run("ue", seed=2, num_steps=20)
    lines = short.validation_csv.read_text().splitlines(keepends=True)
    short.validation_csv.write_text("".join(lines[:-1]))

    row = judged(*base, *idea, short)[1]

    assert row["seeds"] == 2 and row["marks"] == ["no final validation loss: seed 2"]


def test_the_same_of_the_baseline_and_of_a_loss_that_is_not_finite(seeds):
    base = seeds("gpt2ish", [4.0, 4.1, float("nan")])

    ours, row = judged(*base, *seeds("ue", [3.9, 4.0, 4.0]))

    assert ours["seeds"] == row["seeds"] == 2
    assert ours["marks"] == ["no final validation loss: seed 2"]
    assert row["marks"] == ["the baseline has no final validation loss: seed 2"]


def test_an_idea_of_which_a_run_failed_is_never_better(seeds, make_run):
    base, idea = seeds("gpt2ish", [4.0, 4.1, 4.2]), seeds("ue", [3.5, 3.6, 3.7001])
    more = [make_run(seed=3), make_run("ue", seed=3, done=10, status="failed")]

    row = judged(*base, *idea, *more)[1]

    assert row["p_holm"] < 0.05 and row["difference"] < 0
    assert row["verdict"] == "cannot tell" and row["next"] is None
    assert (row["seeds"], row["failures"], row["unfinished"]) == (3, 1, 0)
    assert row["marks"] == [
        "1 of 4 runs failed",
        "better only where both survived: no verdict",
    ]


def test_it_may_still_be_worse(seeds, make_run):
    base, idea = seeds("gpt2ish", [4.0, 4.1, 4.2]), seeds("ue", [4.5, 4.6, 4.7001])
    more = [make_run(seed=3), make_run("ue", seed=3, done=10, status="failed")]

    row = judged(*base, *idea, *more)[1]

    assert row["verdict"] == "worse" and row["marks"] == ["1 of 4 runs failed"]


def test_a_seed_on_which_both_failed_says_nothing_against_the_idea(seeds, make_run):
    base, idea = seeds("gpt2ish", [4.0, 4.1, 4.2]), seeds("ue", [3.5, 3.6, 3.7001])
    more = [make_run(label, seed=3, done=10, status="failed") for label in ("gpt2ish", "ue")]

    assert judged(*base, *idea, *more)[1]["verdict"] == "better"


def test_an_idea_is_not_worse_where_the_baseline_failed_and_it_did_not(seeds, make_run):
    base, idea = seeds("gpt2ish", [4.0, 4.1, 4.2]), seeds("ue", [4.5, 4.6, 4.7001])
    more = [make_run(seed=3, done=10, status="failed"), make_run("ue", seed=3)]

    row = judged(*base, *idea, *more)[1]

    assert row["verdict"] == "cannot tell"
    assert row["marks"] == [
        "the baseline failed: seed 3",
        "worse only where both survived: no verdict",
    ]


def test_an_idea_that_failed_always_has_no_verdict(seeds, make_run):
    row = judged(*seeds("gpt2ish", [4.0]), make_run("ue", done=0, losses=[], status="failed"))[1]

    assert (row["seeds"], row["difference"], row["verdict"]) == (0, None, None)
    assert row["marks"] == ["its run failed"]


@pytest.mark.parametrize(
    "other, why",
    [
        ({"data": {"fingerprint": "z"}}, "other training data"),
        ({"data": {"validation_fingerprint": "z"}}, "other validation text"),
        ({"data": {"tokenizer": "gpt2"}}, "other tokenizer (gpt2, not byte)"),
        ({"num_steps": 40}, "other budget (4,000 tokens, not 2,000)"),
    ],
)
def test_runs_on_another_ruler_are_never_mixed_in(seeds, make_run, other, why):
    base, idea = seeds("gpt2ish", [4.0, 4.1, 4.2]), seeds("ue", [3.9, 4.0])
    odd = make_run("ue", seed=2, **other)

    row = judged(*base, *idea, odd)[1]
    alone = judged(*base, make_run("odd", **other))[1]

    assert row["seeds"] == 2 and row["difference"] == pytest.approx(-0.1)
    assert row["marks"] == [f"not compared: {why} (seed 2)"]
    assert alone["marks"] == [f"not compared: {why}"] and alone["mean"] is None


def test_pairs_of_two_rulers_are_not_averaged_and_the_larger_number_counts(seeds, make_run):
    new = {"data": {"fingerprint": "new"}}
    folders = [*seeds("gpt2ish", [4.0, 4.1]), *seeds("ue", [3.9, 4.0])]
    folders += [make_run(label, seed=2, **new) for label in ("gpt2ish", "ue")]

    for row in judged(*folders):
        assert row["seeds"] == 2
        assert row["marks"] == ["not mixed with the other seeds: other training data (seed 2)"]


def test_seeds_on_several_other_rulers_are_all_said(seeds, make_run):
    folders = [*seeds("gpt2ish", [4.0, 4.1])]
    folders += [make_run(seed=n, data={"fingerprint": str(n)}) for n in (2, 3)]

    (row,) = judged(*folders)

    assert row["marks"] == ["not mixed with the other seeds: other training data (seeds 2, 3)"]


def test_two_finished_runs_of_one_label_and_seed_are_not_chosen_between(seeds, make_run):
    folders = [*seeds("gpt2ish", [4.0, 4.1, 4.2]), *seeds("ue", [3.9, 4.0, 4.0])]
    runs = [read_run(folder) for folder in [*folders, folders[-1]]]

    row = judge(pair_runs(runs, None))[1]

    assert row["seeds"] == 2
    assert row["marks"] == ["several runs of one seed, left out: seed 2", UNDECLARED]


def test_a_plan_without_the_baseline_is_said(seeds):
    rows = judged(
        *seeds("gpt2ish", [4.0]), *seeds("ue", [4.0, 4.1], plan="other"), baseline="gpt2ish"
    )

    row = row_of(rows, "ue")
    assert (row["baseline"], row["verdict"], row["mean"]) == (None, None, None)
    assert row["marks"] == ["not compared: no gpt2ish on plan other"]


def test_a_baseline_on_another_plan_is_named_with_it(make_run):
    runs = [read_run(make_run()), read_run(make_run("gpt2ish", plan="other"))]

    rows = judge(pair_runs(runs, runs[0]))

    assert [row["baseline"] for row in rows] == ["gpt2ish", "quick/gpt2ish"]
    assert rows[1]["difference"] == 0


def test_other_runs_of_a_baseline_that_is_one_run_are_left_out(seeds):
    runs = [read_run(folder) for folder in seeds("gpt2ish", [4.0, 4.1])]

    (row,) = judge(pair_runs(runs, runs[0]))

    assert row["seeds"] == 1 and row["mean"] == 4.0
    assert row["marks"] == ["not compared: the baseline has seed 0 (seed 1)"]


def test_like_for_like_puts_each_idea_below_its_own_baseline(seeds):
    labels = ["gpt2ish", "ue", "gpt2ish,lr=0.001", "ue,lr=0.001"]
    folders = [f for i, label in enumerate(labels) for f in seeds(label, [4.0 - i, 4.1 - i])]

    rows = judged(*folders, like_for_like=True)

    assert [row["experiment"] for row in rows] == labels
    assert [row["baseline"] for row in rows] == ["gpt2ish"] * 2 + ["gpt2ish,lr=0.001"] * 2
    assert rows[3]["difference"] == pytest.approx(-1)


def falling(to):
    """A loss that falls on a straight line from 5 at step 5 to `to` at step 20."""
    return [5.0] * 5 + [5 + (to - 5) * (step - 5) / 15 for step in range(6, 21)]


def test_ratios_are_what_the_baselines_final_loss_took(make_run):
    base = [make_run(seed=seed, losses=falling(4.0)) for seed in (0, 1)]
    idea = [
        make_run("ue", seed=0, losses=falling(3.0)),
        make_run("ue", seed=1, losses=falling(2.0)),
    ]

    row = judged(*base, *idea)[1]

    needed = np.array([12.5, 10]) / 20  # steps: half and a third of the way from 5 to 20
    logs = np.log(needed)
    interval = np.exp(stats.t.interval(0.95, 1, logs.mean(), stats.sem(logs)))
    for key in ("tokens_ratio", "seconds_ratio"):
        assert row[key]["value"] == pytest.approx(np.exp(logs.mean()))
        assert row[key]["interval"] == pytest.approx(interval) and row[key]["bound"] == ""


def test_seconds_are_those_of_each_run_on_its_own(make_run):
    base, idea = make_run(losses=falling(4.0)), make_run("ue", losses=falling(4.0))
    slow = idea.validation_csv.read_text().replace(",10.0\n", ",25.0\n")
    idea.validation_csv.write_text(slow)

    row = judged(base, idea)[1]

    assert row["tokens_ratio"] == {"value": 1.0, "interval": None, "bound": ""}
    assert row["seconds_ratio"]["value"] == pytest.approx(2.5)


def test_with_a_decaying_schedule_an_early_crossing_is_an_upper_bound(make_run):
    base = make_run(losses=falling(4.0), schedule="linear")

    early = judged(base, make_run("ue", losses=falling(3.0), schedule="linear"))[1]
    at_end = judged(base, make_run("twin", losses=falling(4.0), schedule="linear"))[1]

    assert early["tokens_ratio"] == {"value": 0.625, "interval": None, "bound": "<="}
    assert at_end["tokens_ratio"]["bound"] == ""


def test_a_loss_that_the_first_validation_already_has_is_an_upper_bound(make_run):
    row = judged(make_run(losses=falling(4.0)), make_run("ue", losses=[3.0] * 20))[1]

    assert row["tokens_ratio"] == {"value": 0.25, "interval": None, "bound": "<="}


def test_where_a_seed_does_not_come_to_that_loss_its_whole_budget_stands_in(make_run):
    base = [make_run(seed=seed, losses=falling(4.0)) for seed in (0, 1)]
    idea = [
        make_run("ue", seed=0, losses=falling(3.0)),
        make_run("ue", seed=1, losses=falling(4.5)),
    ]

    row = judged(*base, *idea)[1]

    assert row["tokens_ratio"]["value"] == pytest.approx(np.sqrt(0.625 * 1.0))
    assert (row["tokens_ratio"]["bound"], row["tokens_ratio"]["interval"]) == (">=", None)
    assert "came to its baseline's loss on 1 of 2 seeds" in row["marks"]


def test_upper_bounds_of_some_seeds_and_lower_bounds_of_others_make_no_ratio(make_run):
    base = [make_run(seed=seed, losses=falling(4.0), schedule="linear") for seed in (0, 1)]
    idea = [
        make_run("ue", seed=0, losses=falling(3.0), schedule="linear"),
        make_run("ue", seed=1, losses=falling(4.5), schedule="linear"),
    ]

    row = judged(*base, *idea)[1]

    assert row["tokens_ratio"] is None and row["seconds_ratio"] is None
    assert "came to its baseline's loss on 1 of 2 seeds" in row["marks"]


def test_a_model_that_is_there_before_training_has_no_ratio(make_run):
    idea = make_run("ue")
    idea.validation_csv.write_text(
        "step,tokens,loss,loss_error,bits_per_byte,accuracy,seconds\n0,0,1,,1,0.1,0\n20,2000,1,,1,0.1,10\n"
    )

    row = judged(make_run(), idea)[1]

    assert row["tokens_ratio"] is None and row["seconds_ratio"] is None


@pytest.mark.parametrize(
    "other", [{"device_name": "a GPU"}, {"compiled": True}, {"changed_midway": ["threads"]}]
)
def test_seconds_of_other_machines_are_not_compared(make_run, other):
    base = [make_run(seed=seed, **MACHINE) for seed in (0, 1)]
    idea = [make_run("ue", seed=0, **MACHINE), make_run("ue", seed=1, **MACHINE | other)]

    row = judged(*base, *idea)[1]

    key = "threads" if "changed_midway" in other else next(iter(other))
    assert f"not compared in seconds: other {key} (seed 1)" in row["marks"]
    assert row["tokens_ratio"]["interval"] and row["seconds_ratio"]["interval"] is None


def test_speed_is_the_median_and_memory_the_largest_peak(make_run):
    folders = [make_run(seed=seed) for seed in range(3)]
    for folder, memory, seconds in zip(folders, (300, 900, 600), (5.0, 10.0, 40.0), strict=True):
        folder.train_csv.unlink()
        with Record(folder.train_csv, TRAIN_COLUMNS) as record:
            record.write({"step": 20, "tokens": 2000, "memory": memory, "seconds": seconds})

    (row,) = judged(*folders)

    assert (row["tokens_per_second"], row["memory"]) == (200, 900)


def test_parameters_are_those_of_run_json_and_folded_may_be_missing(make_run):
    (row,) = judged(make_run())

    sizes = row["trained"], row["matmul"], row["lookup"], row["folded"], row["memory"]
    assert sizes == (3_000_000, 2_000_000, 1_000_000, None, None)


def test_what_the_labels_do_not_say_is_marked(make_run):
    base = make_run()
    said = make_run("ue,lr=0.002", lr=0.002, changes={"optimizer.lr": 0.002})
    unsaid = make_run("edited", lr=0.002)

    rows = judged(base, said, unsaid)

    assert row_of(rows, "ue,lr=0.002")["marks"] == ["one seed: no evidence"]
    mark = "differs from its baseline, unsaid in its name, in optimizer.lr"
    assert mark in row_of(rows, "edited")["marks"]


def test_an_experiment_that_was_edited_between_its_seeds_is_marked(make_run):
    base = [make_run(seed=seed) for seed in (0, 1)]
    idea = [make_run("ue", seed=0), make_run("ue", seed=1, config={"width": 64})]
    for folder, text in zip(idea, ("old", "new"), strict=True):
        folder.experiment_py.write_text(text)

    marks = judged(*base, *idea)[1]["marks"]
    assert marks == ["its seeds differ in experiment.py, width"]


def test_another_scale_and_a_likelihood_of_its_own_are_marked(make_run):
    own = make_run("ue", bound=True, scale_differs={"width": [192, 256]})

    marks = judged(make_run(), own)[1]["marks"]
    assert "scale differs: width=256, the plan's is 192" in marks
    assert any(mark.startswith("own log_likelihood") for mark in marks)


def test_a_league_of_seconds_that_took_more_of_them_is_marked(make_run):
    league = {"budget": League(kind="seconds", baseline="gpt2ish")}
    base = make_run(num_steps=40)
    close = make_run("close,budget=seconds", num_steps=41, losses=[4.0] * 41, **league)
    slow = make_run("slow,budget=seconds", num_steps=45, **league)

    rows = judged(base, close, slow)

    assert row_of(rows, "slow,budget=seconds")["marks"] == [
        "one seed: no evidence",
        "took 12 % more seconds than its baseline",
    ]


def test_a_verdict_is_the_sign_of_an_interval_that_leaves_out_0(make_run):
    draw = np.random.default_rng(0)
    folders = [
        make_run(label, plan=f"p{plan}", seed=seed, num_steps=5, losses=[5.0] * 4 + [loss])
        for plan in range(12)
        for label, mean in (("gpt2ish", 4.0), ("ue", draw.choice([3.9, 4.0, 4.1])))
        for seed, loss in enumerate(draw.normal(mean, 0.02, draw.integers(2, 5)))
    ]

    rows = [row for row in judged(*folders) if row["experiment"] == "ue"]

    words = []
    for row in rows:
        low, high = row["interval"]
        words.append("better" if high < 0 else "worse" if low > 0 else "cannot tell")
    assert [row["verdict"] for row in rows] == words
    assert {*words} == {"better", "worse", "cannot tell"}
