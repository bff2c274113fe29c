"""Every benchmark runs, at a size that says nothing about speed, so that none of them rots."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def measured(tmp_path, name):
    """The report of a benchmark, which is in the table too."""
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--short", "--only", name]
    subprocess.run([*command, "--out-dir", str(tmp_path)], check=True)
    (report,) = json.loads((tmp_path / "results.json").read_text())["reports"]

    assert report["rows"] and all(isinstance(row["ours"], float | int) for row in report["rows"])
    assert all(row["what"] in (tmp_path / "results.md").read_text() for row in report["rows"])
    assert {"device_name", "versions", "git_commit"} <= set(report["machine"])
    return report


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["step", "generate", "scaling", "prepare", "startup"])
def test_a_benchmark_measures_and_fills_a_table(tmp_path, name):
    measured(tmp_path, name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_sides_of_training_are_the_same_model_on_the_same_tokens(tmp_path):
    sides = {side["side"]: side for side in measured(tmp_path, "train")["cases"][0]["sides"]}

    pytest.importorskip("transformers")
    assert set(sides) == {"lmplay", "loop"}
    assert abs(sides["lmplay"]["first_loss"] - sides["loop"]["first_loss"]) < 0.05
