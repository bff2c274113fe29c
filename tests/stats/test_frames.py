"""In a notebook: the same rows as in the table and the CSV files."""

import csv
import io

import pytest

from lmplay.run.records import read_rows
from lmplay.stats.cli import print_csv
from lmplay.stats.frames import curves, verdicts
from lmplay.stats.judge import verdicts_of


@pytest.fixture
def folders(make_run):
    return [
        make_run(label, seed=seed, losses=[5.0] * 19 + [end + seed / 10])
        for label, end in (("gpt2ish", 4.0), ("ue", 3.9))
        for seed in range(3)
    ]


def test_verdicts_are_the_rows_of_the_csv(folders, tmp_path, capsys):
    frame = verdicts(tmp_path / "runs", baseline="gpt2ish")
    print_csv(verdicts_of(folders, "gpt2ish"))
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))

    assert list(frame.columns) == list(rows[0])
    assert list(frame["experiment"]) == [row["experiment"] for row in rows] == ["gpt2ish", "ue"]
    assert float(rows[1]["difference"]) == frame["difference"][1] == pytest.approx(-0.1)


def test_curves_are_the_rows_of_the_runs_files(folders, tmp_path):
    frame = curves(tmp_path / "runs")
    of_one = frame[(frame.experiment == "ue") & (frame.seed == 2)]

    for split in ("train", "validation"):
        rows = read_rows(getattr(folders[-1], f"{split}_csv"))
        part = of_one[of_one.split == split]
        assert list(part["loss"]) == [row["loss"] for row in rows]
        assert list(part["tokens"]) == [row["tokens"] for row in rows]
    assert len(frame) == 6 * (20 + 4)
