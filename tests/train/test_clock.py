"""One clock: what a step trains on, what came before it, and how far the run is."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmplay.plan import Plan
from lmplay.train.clock import Clock


def make_plan(tokens=None, **more):
    return Plan.model_validate(
        {
            "tokenizer": "byte",
            "sequence_length": 16,
            "batch_size": 4,
            "datasets": {"a": {"files": ["a.txt"]}},
            "stages": [{"datasets": ["a"]}],
            "tokens": tokens,
            "optimizer": {"name": "SGD", "lr": 0.1},
            "validation": {"tokens": 300, "every_tokens": 100},
            "checkpoints": {"every_tokens": 100},
            **more,
        }
    )


def ramps(values):
    """A number, or a ramp over these values."""
    shares = st.lists(st.floats(0.001, 0.999), max_size=4, unique=True).map(sorted)
    rising = shares.flatmap(
        lambda found: st.tuples(*[values] * (len(found) + 1)).map(
            lambda made: [list(point) for point in zip([0, *found], made, strict=True)]
        )
    )
    return values | rising


@st.composite
def plans(draw):
    sizes = draw(ramps(st.integers(1, 50)))
    lengths = draw(ramps(st.sampled_from([1, 2, 4, 8, 16])))
    return make_plan(draw(st.integers(1, 5000)), batch_size=sizes, sequence_length=lengths)


def moments(clock):
    return [clock.at(step) for step in range(clock.num_steps + 1)]


@pytest.mark.parametrize(
    ("tokens", "num_steps"), [(1, 1), (64, 1), (65, 2), (128, 2), (6_400_001, 100_001)]
)
def test_a_budget_is_rounded_up_to_whole_steps(tokens, num_steps):
    clock = Clock(make_plan(tokens))

    assert clock.num_steps == num_steps and clock.num_tokens == 64 * num_steps
    assert clock.at(num_steps - 1).tokens == 64
    with pytest.raises(IndexError):
        clock.at(num_steps + 1)


def test_without_a_budget_the_rows_that_there_are_decide():
    clocks = [Clock(make_plan(), rows) for rows in (0, 1, 4, 5, 8, 9)]

    assert [clock.num_steps for clock in clocks] == [0, 1, 1, 2, 2, 3]
    assert clocks[0].at(0).progress == 1


@given(plans())
def test_every_row_comes_once_and_tokens_before_are_those_of_the_steps_before(plan):
    rows = tokens = 0
    for moment in moments(Clock(plan)):
        assert (moment.first_row, moment.tokens_before) == (rows, tokens)
        rows, tokens = rows + moment.num_rows, tokens + moment.tokens
        assert moment.tokens == moment.num_rows * plan.max_len

    assert tokens == Clock(plan).num_tokens >= plan.tokens


@given(plans())
def test_the_budget_is_spent_by_the_last_step_and_not_before(plan):
    clock = Clock(plan)

    assert clock.at(clock.num_steps - 1).tokens_before < plan.tokens <= clock.num_tokens


@given(plans())
def test_progress_rises_from_nothing_to_exactly_all_as_tokens_do(plan):
    clock = Clock(plan)
    found = [moment.progress for moment in moments(clock)]

    assert found[0] == 0 and found[-1] == 1
    assert all(earlier < later for earlier, later in pairwise(found))
    for moment in moments(clock):
        assert moment.progress == moment.tokens_before / clock.num_tokens


@given(plans())
def test_a_ramp_takes_its_next_value_once_its_share_of_the_tokens_was_trained_on(plan):
    rows = -(-plan.tokens // plan.max_len)
    for moment in moments(Clock(plan))[:-1]:
        for ramp, value in [
            (plan.batch_sizes, moment.num_rows),
            (plan.sequence_lengths, moment.row_length),
        ]:
            due = [v for share, v in ramp if share * rows <= moment.first_row + 1e-9]
            assert value == due[-1]


@given(plans(), st.integers(1, 3000))
def test_what_falls_due_does_so_in_the_first_step_that_reaches_the_next_multiple(plan, every):
    clock = Clock(plan)
    due = [moment.tokens_before for moment in moments(clock) if clock.is_due(moment.step, every)]
    reached = {}
    for moment in moments(clock):
        reached.setdefault(moment.tokens_before // every, moment.tokens_before)

    assert due == list(reached.values())


def test_what_falls_due_every_so_many_tokens_is_due_at_the_start_too():
    clock = Clock(make_plan(64 * 9))

    assert [step for step in range(10) if clock.is_due(step, 3 * 64)] == [0, 3, 6, 9]
    assert [step for step in range(10) if clock.is_due(step, 100)] == [0, 2, 4, 5, 7, 8]
    assert all(clock.is_due(step, 1) for step in range(10))


def test_a_batch_grows_and_a_row_gets_longer_at_their_own_shares():
    clock = Clock(
        make_plan(
            16 * 40, batch_size=[[0, 2], [0.5, 5]], sequence_length=[[0, 4], [0.1, 8], [0.5, 16]]
        )
    )
    found = [(m.num_rows, m.row_length) for m in moments(clock)[:-1]]

    assert found == [(2, 4)] * 2 + [(2, 8)] * 8 + [(5, 16)] * 4
    assert clock.num_tokens == 16 * 40


def test_a_share_is_read_as_it_is_written():
    """0.07 of 100 rows is 7, though not in binary."""
    clock = Clock(make_plan(16 * 100, batch_size=[[0, 1], [0.07, 3]]))

    assert [phase.first_row for phase in clock.phases] == [0, 7]


def test_a_mean_over_lengths_is_weighted_by_tokens():
    clock = Clock(make_plan(16 * 48, sequence_length=[[0, 4], [0.25, 16]]))

    assert clock.mean(float) == pytest.approx(0.25 * 4 + 0.75 * 16)
    assert Clock(make_plan(1)).mean(float) == 16


@given(plans())
def test_the_length_of_rows_changes_no_step_but_its_cut(plan):
    short = plan.model_copy(update={"sequence_length": [(0.0, 4), (0.3, 16)]})
    long = plan.model_copy(update={"sequence_length": 16})
    found = [
        [(m.first_row, m.num_rows, m.tokens, m.progress) for m in moments(Clock(made))]
        for made in (short, long)
    ]

    assert found[0] == found[1]
