"""Every benchmark runs, at a size that says nothing about speed, so that none of them rots."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Loads a file of benchmarks/ under a name of its own; the sides stay processes."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name):
        spec = importlib.util.spec_from_file_location(
            f"benchmark_{name}", BENCHMARKS / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def measured(load, monkeypatch):
    """Makes the report of a benchmark, which is in the table too. Nothing is downloaded."""

    def get_encoding(name):
        raise FileNotFoundError(name)

    monkeypatch.setattr("tiktoken.get_encoding", get_encoding)

    def measured(name):
        options = ["--json", "--threads", "1", *load("run").SHORT[name]]
        ended = CliRunner().invoke(load(name).app, options, catch_exceptions=False)
        report = json.loads(ended.stdout)
        is_there(report, load("run").markdown([report]))
        return report

    return measured


def is_there(report, table):
    assert report["rows"] and all(isinstance(row["ours"], float | int) for row in report["rows"])
    assert all(row["what"] in table for row in report["rows"])
    assert {"device_name", "versions", "git_commit"} <= set(report["machine"])


@pytest.mark.slow
def test_the_command_writes_what_it_measured_and_the_table(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--short", "--only", "startup,step"]
    subprocess.run([*command, "--out-dir", str(tmp_path)], check=True)

    reports = json.loads((tmp_path / "results.json").read_text())["reports"]
    assert [report["benchmark"] for report in reports] == ["startup", "step"]
    for report in reports:
        is_there(report, (tmp_path / "results.md").read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["generate", "scaling", "prepare"])
def test_a_benchmark_measures_and_fills_a_table(measured, name):
    measured(name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_sides_of_training_are_the_same_model_on_the_same_tokens(measured):
    sides = {side["side"]: side for side in measured("train")["cases"][0]["sides"]}

    pytest.importorskip("transformers")
    assert set(sides) == {"lmplay", "loop"}
    assert abs(sides["lmplay"]["first_loss"] - sides["loop"]["first_loss"]) < 0.05
