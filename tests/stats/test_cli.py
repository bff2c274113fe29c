import csv
import io
import json
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
from rich.console import Console

from lmplay import console
from lmplay.stats.cli import run

FIGURES = [
    "accuracy.png",
    "accuracy_difference.png",
    "compute.png",
    "loss.png",
    "loss_difference.png",
    "verdicts.png",
]

Done = namedtuple("Done", ["returncode", "stdout", "stderr"])


@pytest.fixture
def plotstats(tmp_path, monkeypatch, capsys):
    """Runs the command in tmp_path, as its console script does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["lmp-plotstats", *args])
        with pytest.raises(SystemExit) as left:
            run()
        return Done(left.value.code, *capsys.readouterr())

    return call


def drawn(tmp_path):
    return sorted(path.name for path in (tmp_path / "plots").iterdir())


def test_without_a_word_it_draws_every_run_and_prints_a_verdict_on_each(
    make_run, plotstats, tmp_path
):
    make_run(), make_run("ue", losses=[3.0] * 20)

    done = plotstats()

    assert not any(line.endswith(" ") for line in done.stdout.splitlines())

    assert done.returncode == 0, done.stderr
    assert drawn(tmp_path) == FIGURES
    line = next(line for line in done.stdout.splitlines() if line.startswith("ue "))
    assert "3.0000" in line and "-1.0000" in line and "one seed: no evidence" in line


def test_several_seeds_are_one_row(make_run, plotstats):
    for seed in (0, 1):
        make_run(seed=seed), make_run("ue", seed=seed, losses=[3.0 + seed / 100] * 20)

    lines = plotstats().stdout.splitlines()

    (line,) = (line for line in lines if line.startswith("ue "))
    assert "3.0050 ± 0.0071" in line and "better" in line


def test_a_narrow_terminal_gets_whole_lines_and_is_told_what_has_no_room(
    make_run, plotstats, monkeypatch
):
    name = "value_norm,lr=0.002"
    make_run(), make_run("ue"), make_run(name), make_run("odd", data={"fingerprint": "z"})
    monkeypatch.setattr(console, "out", Console(force_terminal=True, width=80))

    done = plotstats()

    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith(("gpt2ish ", "ue ", f"{name} ", "odd ")) for line in lines) == 4
    notes = [line.strip().split(maxsplit=1) for line in lines if line[:1].isdigit()]
    number = next(n for n, text in notes if text == "not compared: other training data")
    assert next(line for line in lines if line.startswith("odd")).endswith(f" {number}")
    assert sum(text == "one seed: no evidence" for _, text in notes) == 1
    assert "no room for tokens x" in done.stderr and "--csv" in done.stderr


def test_what_takes_long_to_load_and_is_not_needed_is_not_loaded(make_run, tmp_path):
    for seed in (0, 1):
        make_run(seed=seed), make_run("ue", seed=seed, losses=[4.0 + seed] * 20)
    code = (
        "import sys\n"
        "from lmplay.stats.cli import run\n"
        "try:\n"
        "    run()\n"
        "finally:\n"
        "    print(*sys.modules, file=sys.stderr)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )

    loaded = set(done.stderr.split())
    assert done.returncode == 0 and "matplotlib" in loaded
    assert not loaded & {"torch", "pandas", "datasets", "pyarrow.compute"}


def test_json_is_one_document_and_the_figures_are_drawn_too(make_run, plotstats, tmp_path):
    make_run(), make_run("ue"), make_run("odd", data={"fingerprint": "z"})

    document = json.loads(plotstats("--json").stdout)

    assert drawn(tmp_path) == FIGURES
    assert document["schema_version"] == 1 and document["baseline"] == "gpt2ish"
    assert sorted(path.split("/")[-1] for path in document["files"]) == FIGURES
    by_name = {run["experiment"]: run for run in document["runs"]}
    assert by_name["odd"]["marks"] == ["not compared: other training data"]
    assert by_name["odd"]["difference"] is None and by_name["ue"]["difference"] == 0.0


def test_json_has_the_verdicts_beside_the_runs(make_run, plotstats):
    for seed in (0, 1):
        make_run(seed=seed), make_run("ue", seed=seed)

    document = json.loads(plotstats("--json").stdout)

    assert list(document) == [
        "schema_version", "baseline", "verdicts", "runs", "ladder", "x", "split", "files",
    ]  # fmt: skip
    keys = {"experiment", "seeds", "mean", "sd", "difference", "interval", "p", "p_holm", "verdict"}
    assert [keys <= row.keys() for row in document["verdicts"]] == [True, True]
    assert document["verdicts"][1]["interval"] == [0, 0] and len(document["runs"]) == 4


def test_csv_has_every_number_of_a_verdict_in_full(make_run, plotstats):
    make_run()
    for seed in (0, 1):
        make_run("ue", seed=seed, losses=[1 / 3 + seed] * 20)

    rows = list(csv.DictReader(io.StringIO(plotstats("--csv").stdout)))

    ours = rows[1]
    assert float(ours["mean"]) == 1 / 3 and ours["interval_low"] == ours["sd"] == ""
    assert float(ours["tokens_ratio"]) == 0.25 and ours["tokens_ratio_bound"] == "<="
    assert ours["marks"].startswith("not compared: gpt2ish has no run of this seed (seed 1); one")
    assert ours["runs"] == "runs/quick/ue/seed-0; runs/quick/ue/seed-1"


def test_an_interval_has_two_columns_in_csv(make_run, plotstats):
    for seed in (0, 1):
        make_run(seed=seed), make_run("ue", seed=seed, losses=[3.0 + seed] * 20)

    row = list(csv.DictReader(io.StringIO(plotstats("--csv").stdout)))[1]

    assert float(row["interval_low"]) < float(row["difference"]) < float(row["interval_high"])
    assert float(row["tokens_ratio_low"]) <= float(row["tokens_ratio_high"])


def test_markdown_is_a_table_for_each_plan(make_run, plotstats):
    make_run(), make_run("ue"), make_run(plan="other")

    text = plotstats("--markdown").stdout

    assert text.startswith("**Plan other**\n\n| experiment |") and "**Plan quick**" in text
    assert "\n| ue | 1 |" in text
    assert plotstats("--markdown", "runs/other").stdout.startswith("| experiment |")


def test_like_for_like_holds_the_same_changes_against_each_other(make_run, plotstats):
    make_run("gpt2ish,lr=0.002"), make_run("ue,lr=0.002"), make_run(), make_run("ue")

    rows = json.loads(plotstats("--json", "--like-for-like").stdout)["verdicts"]

    assert {row["experiment"]: row["baseline"] for row in rows} == {
        "gpt2ish": "gpt2ish",
        "ue": "gpt2ish",
        "gpt2ish,lr=0.002": "gpt2ish,lr=0.002",
        "ue,lr=0.002": "gpt2ish,lr=0.002",
    }


def test_a_board_is_written_beside_the_table(make_run, plotstats, tmp_path):
    make_run(), make_run("ue")

    done = plotstats("--board", "BOARD.md")

    assert "| ue | cannot tell | --seeds 5 |" in (tmp_path / "BOARD.md").read_text()
    assert "ue " in done.stdout and "wrote BOARD.md" in done.stderr


def test_a_file_without_a_place_for_a_board_is_told_before_anything_is_drawn(
    make_run, plotstats, tmp_path
):
    make_run()
    (tmp_path / "README.md").write_text("mine\n")

    done = plotstats("--board", "README.md")

    assert done.returncode == 2 and "no place for a board" in done.stderr
    assert "<!-- lmplay board -->" in done.stderr and "<!-- /lmplay board -->" in done.stderr
    assert (tmp_path / "README.md").read_text() == "mine\n" and not (tmp_path / "plots").exists()


def test_runs_are_named_by_folder_by_parent_or_by_what_is_below_runs(make_run, plotstats):
    make_run(), make_run("ue"), make_run(plan="other")

    for args in (["runs/quick"], ["quick/gpt2ish/seed-0", "runs/quick/ue"]):
        document = json.loads(plotstats("--json", *args).stdout)
        assert [run["experiment"] for run in document["runs"]] == ["gpt2ish", "ue"]


def test_a_baseline_that_is_a_run_is_drawn_too(make_run, plotstats):
    make_run("ue"), make_run("value_norm")

    done = plotstats("--json", "quick/ue", "--baseline", "quick/value_norm/seed-0")

    rows = json.loads(done.stdout)["runs"]
    assert [row["experiment"] for row in rows] == ["ue", "value_norm"]
    assert rows[0]["baseline"] == "runs/quick/value_norm/seed-0"


@pytest.mark.parametrize(
    "args, said",
    [
        (["--baseline", "gpt2is"], "did you mean 'gpt2ish'?"),
        (["--baseline", "quick/gpt2ish/seed-9"], "there is no run quick/gpt2ish/seed-9"),
        (["--smooth", "lots"], "500k in units of --x"),
        (["--smooth", "200%"], "more than the axis"),
        (["--json", "--csv"], "choose one"),
        (["--markdown", "--csv"], "--csv and --markdown both want stdout"),
        (["--like-for-like", "--baseline", "quick/gpt2ish/seed-0"], "not one run"),
        (["nowhere"], "there is no folder nowhere"),
        (["--runs", "empty"], "lmp-trainer"),
        (["--out-dir", "file"], "choose another place with --out-dir"),
    ],
)
def test_a_mistake_exits_2_and_says_what_to_type(make_run, plotstats, tmp_path, args, said):
    make_run()
    (tmp_path / "file").touch()

    done = plotstats(*args)

    assert done.returncode == 2 and not done.stdout
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [["-h"], ["--version"]])
def test_help_and_version_need_no_run(plotstats, args):
    done = plotstats(*args)

    assert done.returncode == 0 and done.stdout


def test_a_hundred_thousand_rows_are_drawn(make_run, plotstats):
    losses = 3 + 1 / np.arange(1.0, 100_001)
    make_run(num_steps=100_000, losses=losses.tolist())

    done = plotstats("--json", "--x", "seconds")

    assert json.loads(done.stdout)["runs"][0]["tokens"] == 10_000_000


@pytest.mark.parametrize("name", ["run.json", "train.csv", "validation.csv"])
def test_a_damaged_run_is_told_and_left_out_unless_it_was_named(
    make_run, plotstats, tmp_path, name
):
    make_run()
    bad = make_run("ue").path
    (bad / name).write_text("nonsense\n")

    among, named = plotstats("runs"), plotstats(str(bad))

    assert among.returncode == 0 and "gpt2ish" in among.stdout and "ue" not in among.stdout
    assert f"left out: {bad.relative_to(tmp_path)}/{name} is damaged" in among.stderr
    assert named.returncode == 2 and "is damaged" in named.stderr
