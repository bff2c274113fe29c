from dataclasses import replace

import pytest

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.plan_file import read_plan
from lmplay.run.changes import read_changes, refuse_unfit


def test_a_change_is_the_plans_where_the_plan_has_its_key_else_configs():
    changes = read_changes(["optimizer.lr=1e-3", "width=512", "model.width=8"], tokens=900)

    assert changes.of_plan == {"optimizer.lr": 0.001, "model.width": 8, "tokens": 900}
    assert changes.of_config == {"width": 512}


@pytest.mark.parametrize(
    ("text", "value"),
    [("k=1", 1), ("k=true", True), ("k=[1, 2]", [1, 2]), ("k=byte", "byte"), ("k=a=b", "a=b"),
     ("k=", "")],
)  # fmt: skip
def test_a_value_is_json_else_text(text, value):
    assert read_changes([text]).values == {"k": value}


@pytest.mark.parametrize("text", ["width", "=3", ""])
def test_a_change_without_a_key_or_a_value_is_refused(text):
    with pytest.raises(UserError, match="no key=value"):
        read_changes([text])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"widht": 3}, "--set widht: neither in Config nor in the plan"),
        ({"vocab_size": 9}, "the tokenizer's own"),
        ({"width": "wide"}, '--set width should be int, not "wide"'),
        ({"width": 1.5}, "--set width should be int, not 1.5"),
        ({"width": True}, "--set width should be int, not true"),
        ({"max_len": 9}, "--set max_len=9: the plan's rows have 256 tokens"),
        ({"budget": "flops"}, "has a meaning of its own"),
        ({"name": "mine"}, "--set name: neither in Config nor in the plan"),
    ],
    ids=str,
)
def test_what_no_model_could_use_is_refused(changes, said):
    plan = read_plan("quick", {"sequence_length": 256})
    with pytest.raises(UserError) as raised:
        refuse_unfit(resolve("gpt2ish"), plan, changes)

    assert said in raised.value.problem


def test_a_field_of_another_type_than_jsons_takes_any_value():
    entry = resolve("gpt2ish")
    windows = entry.source.replace("    num_heads: int", "    num_heads: tuple[int, ...]")

    refuse_unfit(replace(entry, source=windows), read_plan("quick"), {"num_heads": [2, 4]})
    with pytest.raises(UserError):
        refuse_unfit(entry, read_plan("quick"), {"num_heads": [2, 4]})


def test_another_optimizer_is_one_change_and_its_name_is_given_once():
    changes = read_changes(["optimizer.lr=0.5", "width=8"]).of_optimizer("Lion")

    assert changes.values == {"optimizer": "Lion", "optimizer.lr": 0.5, "width": 8}
    assert changes.of_config == {"width": 8}
    for text in ("optimizer.name=SGD", "optimizer=1"):
        with pytest.raises(UserError, match="two answers"):
            read_changes([text]).of_optimizer("Lion")
