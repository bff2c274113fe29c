import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmplay.errors import UserError
from lmplay.run.records import TRAIN_COLUMNS, VALIDATION_COLUMNS, Record, read_rows

COLUMNS = ("step", "tokens", "loss")
VALUES = st.none() | st.integers() | st.floats(allow_nan=False)
ROWS = st.lists(st.fixed_dictionaries({"tokens": VALUES, "loss": VALUES}), max_size=20)


def numbered(rows):
    return [{"step": step, **row} for step, row in enumerate(rows, start=1)]


def write(path, rows, keep_through=None):
    with Record(path, COLUMNS, keep_through) as record:
        for row in rows:
            record.write(row)


@settings(deadline=None)  # a disk may be slow
@given(rows=ROWS)
def test_what_is_written_is_read_back_exactly(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("record") / "train.csv"
    write(path, numbered(rows))

    assert read_rows(path) == numbered(rows)


def test_a_number_that_is_none_comes_back_as_what_it_is(tmp_path):
    write(tmp_path / "train.csv", [{"step": 1, "tokens": 2, "loss": math.nan}])

    assert math.isnan(read_rows(tmp_path / "train.csv")[0]["loss"])


def test_a_number_from_numpy_is_written_like_any_other(tmp_path):
    import numpy as np

    write(tmp_path / "train.csv", [{"step": 1, "tokens": np.int64(2), "loss": np.float64(0.1)}])

    assert read_rows(tmp_path / "train.csv") == [{"step": 1, "tokens": 2, "loss": 0.1}]


@settings(deadline=None)
@given(rows=ROWS, cut=st.integers(0, 2000), keep=st.integers(0, 25) | st.none())
def test_a_file_cut_anywhere_goes_on_without_a_step_twice_or_damaged(
    tmp_path_factory, rows, cut, keep
):
    path = tmp_path_factory.mktemp("record") / "train.csv"
    write(path, numbered(rows))
    path.write_bytes(path.read_bytes()[:cut])
    whole = [row for row in read_rows(path) if keep is None or row["step"] <= keep]

    write(path, [{"step": 1000, "tokens": 1, "loss": 0.5}], keep_through=keep)

    assert whole == numbered(rows)[: len(whole)]
    assert read_rows(path) == [*whole, {"step": 1000, "tokens": 1, "loss": 0.5}]


def test_a_row_is_in_the_file_as_soon_as_write_returns(tmp_path):
    record = Record(tmp_path / "train.csv", COLUMNS)
    record.write({"step": 1, "tokens": 2, "loss": 3.0})

    assert len(read_rows(tmp_path / "train.csv")) == 1
    record.close()


def test_zeros_that_a_power_cut_left_behind_are_cut(tmp_path):
    path = tmp_path / "train.csv"
    write(path, numbered([{"tokens": 1, "loss": 2.0}]))
    path.write_bytes(path.read_bytes() + b"\0" * 100)

    write(path, [{"step": 2, "tokens": 3, "loss": 1.0}], keep_through=1)

    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_a_file_that_began_with_other_columns_keeps_its_header(tmp_path):
    path = tmp_path / "train.csv"
    with Record(path, ("step", "tokens")) as record:
        record.write({"step": 1, "tokens": 2})

    write(path, [{"step": 2, "tokens": 4, "loss": 1.0}])

    assert read_rows(path) == [{"step": 1, "tokens": 2}, {"step": 2, "tokens": 4}]


def test_reopening_leaves_the_rows_that_stay_untouched(tmp_path):
    path = tmp_path / "train.csv"
    write(path, numbered([{"tokens": 1, "loss": 1 / 3}] * 5))
    before = path.read_bytes()

    write(path, [], keep_through=5)

    assert path.read_bytes() == before


def test_rows_that_are_deleted_while_they_are_written_are_no_silent_loss(tmp_path):
    with Record(tmp_path / "train.csv", TRAIN_COLUMNS) as record:
        record.write({"step": 1})
        record.sync()
        (tmp_path / "train.csv").unlink()

        with pytest.raises(UserError, match=r"train\.csv was deleted"):
            record.sync()


def test_what_is_no_file_is_refused_and_not_read(tmp_path):
    (tmp_path / "train.csv").symlink_to("/dev/zero")

    for read in (read_rows, lambda path: Record(path, TRAIN_COLUMNS)):
        with pytest.raises(UserError, match=r"train\.csv is damaged: it is no file"):
            read(tmp_path / "train.csv")


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("step,tokens,loss\n1,2,3.0\n2,oops\n3,4,5.0\n")

    with pytest.raises(UserError, match="line 3 is '2,oops'") as raised:
        read_rows(path)
    assert str(path) in raised.value.problem


def test_a_file_that_is_no_record_is_left_alone(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("dear diary\n")

    with pytest.raises(UserError, match="dear diary"):
        Record(path, COLUMNS)
    assert path.read_text() == "dear diary\n"


def test_both_files_begin_with_step_and_tokens():
    assert TRAIN_COLUMNS[:2] == VALIDATION_COLUMNS[:2] == ("step", "tokens")


@pytest.mark.parametrize("module", ["lmplay.run.records", "lmplay.stats.cli"])
def test_importing_a_light_file_loads_nothing_heavy(module):
    heavy = "{'torch', 'accelerate', 'datasets', 'pandas', 'matplotlib', 'numpy'}"
    code = f"import sys, {module}; sys.exit(','.join({heavy} & sys.modules.keys()) or 0)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
