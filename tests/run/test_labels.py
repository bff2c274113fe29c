"""Two different sets of changes never share a label."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmplay.catalog.entries import entries
from lmplay.plan import fixed_keys, has_key
from lmplay.run.folder import run_path
from lmplay.run.labels import label_of, short_key

CONFIG = sorted({name for entry in entries().values() for name in entry.fields})
OPEN = [
    "datasets.a.split",
    "datasets.lr.split",
    "optimizer.options.betas",
    "model.width",
    "model.lr",
]
KEYS = st.sampled_from([*fixed_keys(), *OPEN, *CONFIG]) | st.from_regex("[a-z_.]+", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
NUMBERS = st.integers() | st.floats(allow_nan=False)
RAMPS = st.lists(st.lists(NUMBERS, min_size=2, max_size=2))
VALUES = SCALARS | st.lists(SCALARS) | RAMPS | st.dictionaries(st.text(), SCALARS)
CHANGES = st.dictionaries(KEYS, VALUES, max_size=3)


def identity(value):
    """What tells two values apart: their type too, but 1 is 1.0."""
    if isinstance(value, list):
        return tuple(map(identity, value))
    if isinstance(value, dict):
        return frozenset((key, identity(inner)) for key, inner in value.items())
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return "number" if is_number else type(value).__name__, value


@given(one=CHANGES, other=CHANGES)
@example(one={"validation.every_tokens": 1}, other={"checkpoints.every_tokens": 1})
@example(one={"optimizer.name": "SGD"}, other={"schedule.name": "SGD"})
@example(one={"optimizer.lr": 1}, other={"lr": 1})  # of some Config
@example(one={"a": "1,b=2"}, other={"a": 1, "b": 2})
@example(one={"a": 1}, other={"a": "1"})
@example(one={"a": float("inf")}, other={"a": "inf"})
@example(one={"a": []}, other={"a": [""]})
@example(one={"a": [[0, 8], [0.5, 16]]}, other={"a": ["8@0", "16@0.5"]})
@example(one={"a": [[0, 8]]}, other={"a": [[0, 8.0]]})
@example(one={"a": [[0, 8]]}, other={"a": [0, 8]})
@example(one={"tokens": 2**53}, other={"tokens": 2.0**53})
def test_two_sets_of_changes_share_a_label_just_where_they_are_equal(one, other):
    assert (label_of("ue", one) == label_of("ue", other)) == (identity(one) == identity(other))


@given(one=st.text(), other=st.text(), changes=CHANGES)
def test_no_name_of_an_experiment_reads_like_another_with_changes(one, other, changes):
    assert (label_of(one, {}) == label_of(other, changes)) == (one == other and not changes)


def test_a_key_is_as_short_as_no_other_key_of_any_plan_allows():
    assert short_key("optimizer.lr") == "lr" and short_key("schedule.warmup") == "warmup"
    assert short_key("validation.every_tokens") == "validation.every_tokens"
    assert short_key("optimizer.name") == "optimizer.name"
    assert short_key("width") == "width" and short_key("tokens") == "tokens"
    assert short_key("lr") == "Config.lr"  # of a Config that has such a field


def test_every_key_of_every_plan_and_config_is_called_otherwise():
    keys = {*filter(has_key, fixed_keys()), *OPEN, *CONFIG}

    assert len({short_key(key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1e-3, "0.001"),
        (5e-05, "5e-05"),
        (2e6, "2000000"),
        ("1", '"1"'),
        ("bpe:4096", "bpe:4096"),
        ([0.9, 0.95], "0.9+0.95"),
        (True, "true"),
        (None, "null"),
    ],
)
def test_a_label_stays_readable(value, shown):
    assert label_of("ue", {"k": value}) == f"ue,k={shown}"


def test_a_ramp_says_what_is_when():
    assert label_of("ue", {"batch_size": [[0, 16], [0.5, 32]]}) == "ue,batch_size=16@0+32@0.5"


def test_a_label_can_be_read_in_any_script_and_a_path_is_ascii():
    chinese, latin = "\u4e2d\u6587", "caf\udce9"  # the second is bytes that are no text

    assert label_of(chinese, {"name": chinese}) == f"{chinese},name={chinese}"
    assert label_of(latin, {}) == "caf%E9"
    path = run_path(Path("runs"), chinese, latin, {"name": chinese}, 0)
    assert path == Path("runs/%E4%B8%AD%E6%96%87/caf%E9,name=%E4%B8%AD%E6%96%87/seed-0")
