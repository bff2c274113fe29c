"""One clock: what a step trains on, what came before it, and how far the run is."""

import pytest

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
    assert [Clock(make_plan(), rows).num_steps for rows in (0, 1, 4, 5, 8, 9)] == [
        *(0, 1, 1, 2, 2, 3)
    ]


def test_what_falls_due_every_so_many_tokens_is_due_at_the_start_too():
    clock = Clock(make_plan(64 * 9))

    assert [step for step in range(10) if clock.is_due(step, 3 * 64)] == [0, 3, 6, 9]
    assert [step for step in range(10) if clock.is_due(step, 100)] == [0, 2, 4, 5, 7, 8]
    assert all(clock.is_due(step, 1) for step in range(10))
