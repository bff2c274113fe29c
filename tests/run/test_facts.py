import json
import os
from dataclasses import asdict, fields, replace

import pytest

from lmplay.run.facts import Beginning, Compilation, Facts, League


def with_changes(facts, **changes):
    return json.dumps(asdict(facts) | changes).encode()


def test_what_is_written_is_read_back_whatever_a_command_line_holds(make_facts):
    facts = make_facts(
        label="é", command=[os.fsdecode(b"\xff")], budget=League(kind="flops", baseline="gpt2ish")
    )

    assert Facts.from_json(json.dumps(asdict(facts)).encode()) == facts


@pytest.mark.parametrize("key", [field.name for field in fields(Facts)])
def test_a_key_that_is_not_there_is_named(make_facts, key):
    values = asdict(make_facts())
    del values[key]

    with pytest.raises(ValueError, match=f"it lacks {key}$"):
        Facts.from_json(json.dumps(values))


def test_of_many_keys_that_are_not_there_three_are_named():
    with pytest.raises(ValueError, match=r"it lacks schema_version, experiment, file and \d+ more"):
        Facts.from_json(b"{}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": "0"}, "seed should be a whole number"),
        ({"seed": True}, "seed should be a whole number"),
        ({"flops_per_token": None}, "flops_per_token should be a number or a whole number"),
        ({"git_commit": 3}, "git_commit should be text or null"),
        ({"config": []}, "config should be an object"),
        ({"data": {}}, "it lacks data.content, data.fingerprint, data.validation_fingerprint"),
        ({"data": 3}, "data should be an object"),
        ({"budget": {"kind": 1, "baseline": "a", "cost": 1}}, "budget.kind should be text"),
        ({"status": "asleep"}, "status is 'asleep'"),
        ({"colour": "red"}, "colour is an unknown key"),
    ],
    ids=str,
)
def test_a_value_that_does_not_belong_is_named(make_facts, changes, said):
    with pytest.raises(ValueError) as raised:
        Facts.from_json(with_changes(make_facts(), **changes))

    assert said in str(raised.value)


def test_a_whole_number_is_a_number(make_facts):
    assert Facts.from_json(with_changes(make_facts(), flops_per_token=3)).flops_per_token == 3


def test_a_run_that_goes_on_or_ends_well_has_no_reason_to_have_stopped(make_facts):
    stopped = make_facts().stopped("stopped by signal 2")

    assert (stopped.status, stopped.exit_reason) == ("stopped", "stopped by signal 2")
    assert stopped.running() == replace(stopped, status="running", exit_reason=None)
    ended = replace(stopped, status="finished", exit_reason=None, num_steps=7)
    assert stopped.finished(7) == ended


def test_a_number_that_is_not_finite_counts_as_a_failure_and_stays_one(make_facts):
    broken = make_facts().failed("division by zero")
    diverged = broken.failed("the loss of step 6 is not finite", is_numeric=True)

    assert (broken.status, broken.failures) == ("failed", 0)
    assert diverged.running().failures == 1


@pytest.mark.parametrize(
    ("graphs", "breaks", "said"),
    [(1, 0, "1 graph, no break"), (0, 1, "no graph, 1 break"), (3, 2, "3 graphs, 2 breaks")],
)
def test_graphs_and_breaks_are_told(graphs, breaks, said):
    made = Compilation(graphs=graphs, breaks=breaks, seconds=4.4)

    assert str(made) == f"compiled: {said}, in 4 s"


def test_how_a_run_began_is_one_line_that_names_three_tensors_of_a_kind():
    began = Beginning(
        name="gpt2ish~1a2b3c4d", path="runs/a", step=10, copied=20, unfolded=["token_table"],
        fresh=["a", "b", "c", "d", "e"], unused=[], logits_differ=0.00012,
    )  # fmt: skip

    assert str(began) == (
        "starts from runs/a: 20 tensors copied; unfolded: token_table; "
        "fresh: a, b, c and 2 more; logits within 1.2e-04 of its"
    )
