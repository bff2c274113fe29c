from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmplay.errors import UserError
from lmplay.run.facts import League
from lmplay.run.records import VALIDATION_COLUMNS, Record
from lmplay.stats.compare import (
    RecordedRun,
    curve,
    final_rows,
    pair_runs,
    read_run,
    why_not_comparable,
)


def read(*folders):
    return [read_run(folder) for folder in folders]


def test_steps_tokens_seconds_and_flops_are_the_same_rows_on_other_axes(make_run):
    run = read_run(make_run())

    at = {x: curve(run, "train", "loss", x).x[-1] for x in ("steps", "tokens", "seconds", "flops")}
    assert at == {"steps": 20, "tokens": 2000, "seconds": 10, "flops": 2e9}


def test_a_row_without_a_loss_is_a_gap(make_run):
    run = read_run(make_run(losses=[5.0, None, float("inf"), float("nan"), 4.0] * 4))

    gaps = np.isnan(curve(run, "train", "loss", "tokens").y[:5])
    assert list(gaps) == [False, True, True, True, False]


NUMBERS = st.floats(-1e30, 1e30) | st.sampled_from([np.nan, np.inf]) | st.none()


@given(losses=st.lists(NUMBERS, max_size=20))
def test_every_number_is_read_as_it_was_written(losses, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "validation.csv"
    with Record(path, VALIDATION_COLUMNS) as record:
        for step, loss in enumerate(losses, start=1):
            record.write({"step": step, "tokens": 512 * step, "loss": loss, "seconds": step})

    read = RecordedRun(path.parent, {}).validation

    assert read["step"].tolist() == list(range(1, len(losses) + 1))
    given = np.array([np.nan if loss is None else loss for loss in losses], np.float64)
    np.testing.assert_array_equal(read["loss"], given)


def test_two_rows_within_one_tick_of_the_clock_count_once(make_run):
    folder = make_run()
    text = folder.train_csv.read_text().replace(",1.5\n", ",1.0\n")  # step 3 as late as step 2
    folder.train_csv.write_text(text)

    drawn = curve(read_run(folder), "train", "loss", "seconds")
    assert len(drawn.x) == 19 and all(np.diff(drawn.x) > 0)


def test_a_line_that_is_still_being_written_is_left_out(make_run):
    folder = make_run()
    with folder.train_csv.open("a") as file:
        file.write("21,2100,0.0")

    assert read_run(folder).train["step"].tolist() == list(range(1, 21))


def test_a_run_that_has_not_begun_has_no_numbers_and_says_so(make_run):
    folder = make_run(done=0)
    folder.train_csv.unlink()
    folder.validation_csv.unlink()

    row = final_rows(pair_runs(read(folder), None))[0]
    assert (row["tokens"], row["loss"], row["tokens_per_second"]) == (0, None, None)
    assert "not finished: never validated" in row["marks"]


def test_the_final_numbers_are_those_of_the_last_validation(make_run):
    base, idea = make_run(), make_run("ue", losses=[3.0] * 19 + [3.5])

    rows = final_rows(pair_runs(read(base, idea), None))
    assert rows[1]["loss"] == 3.5
    assert rows[1]["difference"] == 3.5 - 4.0
    assert rows[0]["difference"] is None and "baseline" in rows[0]["marks"]
    assert rows[1]["tokens_per_second"] == 200


def test_one_seed_is_no_evidence_and_two_are_paired_each_with_its_own(make_run):
    one = read(make_run(), make_run("ue"))
    two = [*one, *read(make_run(seed=1, losses=[2.0] * 20), make_run("ue", seed=1))]

    assert "one seed: no evidence" in final_rows(pair_runs(one, None))[1]["marks"]
    rows = final_rows(pair_runs(two, None))
    assert [row["difference"] for row in rows] == [None, 0.0, None, 2.0]
    assert not any("no evidence" in mark for row in rows for mark in row["marks"])


def test_a_seed_that_the_baseline_lacks_is_said(make_run):
    rows = final_rows(pair_runs(read(make_run(), make_run("ue", seed=7)), None))

    assert rows[1]["marks"] == ["not compared: gpt2ish has no run of this seed"]
    assert rows[1]["difference"] is None


def test_an_unfinished_run_is_not_compared_by_its_last_number(make_run):
    rows = final_rows(pair_runs(read(make_run(), make_run("ue", done=12)), None))

    assert rows[1]["difference"] is None
    assert rows[1]["marks"] == ["not finished: validated at 1,000 tokens"]


def test_a_failed_run_and_another_scale_and_a_bound_are_marked(make_run):
    folder = make_run(done=12, status="failed", bound=True, scale_differs={"width": [192, 256]})

    marks = final_rows(pair_runs(read(folder), None))[0]["marks"]
    assert "failed: validated at 1,000 tokens" in marks
    assert "scale differs: width=256, the plan's is 192" in marks
    assert any(mark.startswith("own log_likelihood") for mark in marks)


def test_held_out_text_that_says_little_is_marked(make_run):
    (run,) = read(make_run(data={"trained_on": 0.31, "validation_tokens": 144}))
    run.facts.plan["validation"] = {"tokens": 5000}

    marks = final_rows(pair_runs([run], None))[0]["marks"]
    assert "31% of the held-out text is also trained on" in marks
    assert "only 144 tokens are held out: says little" in marks


def test_a_run_whose_tokenizer_loses_text_is_marked(make_run):
    folder = make_run()
    header, *rows = folder.validation_csv.read_text().splitlines()
    at = header.split(",").index("bits_per_byte")
    lost = [",".join(c * (i != at) for i, c in enumerate(row.split(","))) for row in rows]
    folder.validation_csv.write_text("\n".join([header, *lost]) + "\n")

    marks = final_rows(pair_runs(read(folder), None))[0]["marks"]
    assert "no bits per byte: its tokenizer loses text" in marks


@pytest.mark.parametrize(
    "other, reason",
    [
        ({"data": {"fingerprint": "z"}}, "training data"),
        ({"data": {"validation_fingerprint": "z"}}, "validation text"),
        ({"data": {"tokenizer": "gpt2"}}, "tokenizer"),
        ({"num_steps": 30}, "budget"),
    ],
)
def test_runs_on_another_ruler_are_not_subtracted(make_run, other, reason):
    runs = read(make_run(), make_run("ue", **other))

    pair = pair_runs(runs, None)[1]
    assert not pair.comparable and reason in pair.obstacle
    assert final_rows([pair])[0]["difference"] is None


def test_budgets_that_differ_only_by_rounding_to_steps_agree(make_run):
    runs = read(make_run(), make_run("gpt2ish,batch_size=12", num_steps=14, tokens_per_step=150))

    assert why_not_comparable(*runs) == ""


def test_a_finished_run_without_a_validation_at_its_end_has_no_difference(make_run):
    rows = final_rows(pair_runs(read(make_run(num_steps=12), make_run("ue", num_steps=12)), None))

    assert rows[1]["difference"] is None and rows[1]["marks"] == ["validated at 1,000 tokens"]


def league(kind, **facts):
    return {"budget": League(kind=kind, baseline="gpt2ish"), **facts}


def test_runs_sized_to_flops_agree_within_a_step_of_them(make_run):
    base = make_run()  # 20 steps of 100 tokens at 1e6 FLOP each
    idea = league("flops", flops_per_token=3e6)
    runs = read(base, *(make_run(f"ue{n}", num_steps=n, **idea) for n in (5, 6, 7, 8)))

    reasons = [why_not_comparable(run, runs[0]) for run in runs[1:]]
    assert reasons[1:3] == ["", ""]
    assert reasons[0] == "other budget (1.5e+09 FLOP, not 2e+09)"
    assert reasons[3] == "other budget (2.4e+09 FLOP, not 2e+09)"
    assert why_not_comparable(runs[0], runs[2]) == ""


def test_runs_sized_to_seconds_may_have_other_tokens(make_run):
    base, idea, other = read(
        make_run(),
        make_run("ue", num_steps=10, **league("seconds")),
        make_run("ue16x", num_steps=20, **league("flops")),
    )

    assert why_not_comparable(idea, base) == ""
    assert why_not_comparable(idea, other) == "other league (seconds, not flops)"


def test_runs_that_a_time_limit_ended_agree_where_the_limits_do(make_run):
    runs = read(*(make_run(label, num_tokens=9000) for label in ("gpt2ish", "ue", "ue16x")))
    base, idea, other = (
        replace(run, facts=replace(run.facts, plan=run.facts.plan | {"seconds": seconds}))
        for run, seconds in zip(runs, (60, 60, 90), strict=True)
    )

    assert why_not_comparable(idea, base) == ""
    assert why_not_comparable(other, base) == "other time limit (90 seconds, not 60 seconds)"
    assert why_not_comparable(runs[0], base) == "other time limit (none, not 60 seconds)"


def test_like_for_like_looks_for_the_same_changes(make_run):
    labels = ["gpt2ish,lr=0.1", "ue,lr=0.1", "ue,lr=0.2", "ue,budget=flops,lr=0.1"]
    facts = [{}, {}, {}, league("flops")]
    runs = read(*(make_run(label, **more) for label, more in zip(labels, facts, strict=True)))

    pairs = pair_runs(runs, "gpt2ish", like_for_like=True)

    found = [pair.baseline and pair.baseline.label for pair in pairs]
    assert found == ["gpt2ish,lr=0.1", "gpt2ish,lr=0.1", None, "gpt2ish,lr=0.1"]
    assert pairs[2].obstacle == "no gpt2ish,lr=0.2 on plan quick"
    assert pair_runs(runs, None, like_for_like=True) == pairs


def test_one_run_cannot_be_like_all_others(make_run):
    runs = read(make_run(), make_run("ue"))

    with pytest.raises(UserError, match="not one run"):
        pair_runs(runs, runs[0], like_for_like=True)


def test_the_baseline_is_gpt2ish_else_the_longest_run_of_each_plan(make_run):
    runs = read(
        make_run("ue"),
        make_run(),
        make_run("a", plan="other", done=5),
        make_run("b", plan="other", done=10),
        make_run("gpt2ish,tokens=900", plan="third", done=5),
        make_run("a,tokens=900", plan="third"),
    )

    found = [pair.baseline.label for pair in pair_runs(runs, None)]
    assert found == ["gpt2ish"] * 2 + ["b"] * 2 + ["gpt2ish,tokens=900"] * 2


def test_a_run_as_baseline_is_held_against_its_seed_on_any_plan(make_run):
    runs = read(make_run(), make_run("ue", plan="other"), make_run("ue", seed=1))

    pairs = pair_runs(runs, runs[0])
    assert pairs[0].is_baseline and pairs[1].comparable and pairs[2].baseline is None


def test_two_runs_of_one_baseline_and_seed_are_not_chosen_between(make_run):
    base, idea = read(make_run(), make_run("ue"))

    pairs = pair_runs([base, base, idea], None)
    assert pairs[2].obstacle == "gpt2ish has several runs of this seed"


def test_an_unknown_baseline_names_the_nearest(make_run):
    with pytest.raises(UserError, match="no run of 'gpt2is'") as raised:
        pair_runs(read(make_run(), make_run("ue")), "gpt2is")
    assert "did you mean 'gpt2ish'?" in raised.value.hint


HEADER = "step,tokens,loss,accuracy,memory,seconds\n"
NO_RUNS_ROWS = {  # that are numbers all the same
    "1,,3,4,5,6\n": "its tokens are no numbers that rise",
    "1,2,3,4,5,nan\n": "its seconds are no numbers that rise",
    "-1,2,3,4,5,6\n": "its step are no numbers that rise",
    "1,inf,3,4,5,6\n": "its tokens are no numbers that rise",
    "2,9,3,4,5,6\n1,9,3,4,5,6\n": "its step are no numbers that rise",
    "1,2,1e308,4,5,6\n": "a number beyond 1e",
}


@pytest.mark.parametrize(
    "text, why",
    [
        ("step,tokens,loss,accuracy,memory,seconds\n1,oops,3,4,5,6\n", "invalid value 'oops'"),
        ("step,tokens,loss,accuracy,memory,seconds\n1,2,3,4\n", "Expected 6 columns, got 4"),
        ("step,tokens,loss\n1,2,3\n", "Column 'accuracy'"),
        *((HEADER + row, why) for row, why in NO_RUNS_ROWS.items()),
    ],
)
def test_a_damaged_curve_is_named(make_run, text, why):
    folder = make_run()
    folder.train_csv.write_text(text)

    with pytest.raises(UserError, match=rf"train\.csv is damaged: .*{why}"):
        _ = read_run(folder).train
