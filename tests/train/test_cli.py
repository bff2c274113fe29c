"""lmp-trainer as it is typed: exit codes, streams, listings, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmplay.catalog.entries import resolve
from lmplay.run.records import read_rows

ROOT = Path(__file__).parent.parent.parent
PLAN = {
    "tokenizer": "byte",
    "sequence_length": 32,
    "batch_size": 4,
    "model": {"num_blocks": 1, "width": 16, "num_heads": 2},
    "datasets": {"words": {"files": ["words.txt"]}},
    "stages": [{"datasets": ["words"]}],
    "tokens": 40 * 128,
    "optimizer": {"name": "AdamW", "lr": 0.01},
    "precision": "fp32",
    "validation": {"tokens": 200, "fraction": 0.2, "every_tokens": 20 * 128},
    "checkpoints": {"every_tokens": 20 * 128, "keep": 2},
}


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = "\n\n".join(f"Line {i} of a text, and again line {i}." for i in range(4000))
    (tmp_path / "words.txt").write_text(text)
    (tmp_path / "words.json").write_text(json.dumps(PLAN))
    wide = {"extends": "words.json", "model": {"width": "wide"}}
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    source = resolve("gpt2ish").source.replace(
        "vocab_size: int\n", "vocab_size: int\n    end: int\n"
    )
    (tmp_path / "ends.py").write_text(source)
    return tmp_path


def command(*args):
    return [sys.executable, "-m", "lmplay.train", *args]


def lmp_trainer(*args, **options):
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=400, **options)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--exp", "gpt2is"], ["no experiment called 'gpt2is'", "did you mean 'gpt2ish'?"]),
        (["--exp", "mine.py"], ["there is no experiment file mine.py"]),
        (["--exp", ""], ["no experiment called ''"]),  # a variable of the shell that is not set
        (["--plan", ""], ["no plan called ''"]),
        (["--plan", "quik"], ["no plan called 'quik'", "did you mean 'quick'?"]),
        (["--set", "optimizer.lrr=1"], ["optimizer.lrr", "did you mean"]),
        (["--plan", "quick", "--optimizer", "muno"], ["--optimizer", "did you mean 'Muon'?"]),
        (["--optimizer", "sgd", "--set", "optimizer.name=Adam"], ["two answers", "give one"]),
        (["--plan", "quick", "--optimizer", "muon,Muon"], ["--optimizer names one twice"]),
        (["--plan", "quick", "--optimizer", "adamw,muon", "--describe"], ["one optimizer, not 2"]),
        (["--set", "widht=3"], ["--set widht", "did you mean 'width'?"]),
        (["--set", "width"], ["no key=value"]),
        (["--exp", "ue+value_norm", "--write", "mine"], [".py file", "--write mine.py"]),
        (["--exp", "ue+value_norm", "--write", "words.txt/mine.py"], ["cannot write words.txt"]),
        (["--exp", "ue+value_norm", "--write", "/proc/mine.py"], ["cannot write /proc/mine.py"]),
        (["--plan", "quick", "--set", "optimizer.lr=fast"], ["optimizer.lr"]),
        (["--plan", "quick", "--set", "width=wide"], ['--set width should be int, not "wide"']),
        (["--plan", "quick", "--set", "width=1.5"], ["--set width should be int, not 1.5"]),
        (["--plan", "quick", "--set", "width=true"], ["--set width should be int, not true"]),
        (["--plan", "quick", "--set", "vocab_size=9"], ["--set vocab_size", "the tokenizer's own"]),
        (
            ["--exp", "ends.py", "--plan", "quick", "--set", "end=9"],
            ["--set end", "the tokenizer's"],
        ),
        (["--plan", "quick", "--set", "max_len=9"], ["--set max_len=9", "256 tokens"]),
        (["--plan", "wide.json"], ['plan wide: model.width should be int, not "wide"']),
        (["--plan", "quick", "--data", "nowhere.txt"], ["'nowhere.txt'", "is relative to"]),
        (["--plan", "quick", "--data", "word.txt"], ["'word.txt'", "did you mean 'words.txt'?"]),
        (["--plan", "quick", "--data", ""], ["there is no file ''"]),
        (["--tokens", "inf"], ["--tokens inf"]),
        (["--exp", "gpt2ish,ue", "--seeds", "0", "--plan", "quick"], ["--seeds 0", "3..12"]),
        (["--exp", "gpt2ish,ue", "--seeds", "9..3", "--plan", "quick"], ["--seeds 9..3"]),
        (["--rates", "1,2", "--plan", "quick"], ["--rates 1,2", "0.5,1,2"]),
        (["--sizes", "1,2", "--plan", "quick"], ["--sizes 1,2", "0.5,1,2"]),
        (["--margin", "0", "--plan", "quick"], ["--margin 0"]),
        (["--margin", "-5%", "--plan", "quick"], ["--margin -5%", "such as 5%"]),
        (["--exp", "gpt2ish", "--set", "budget=1", "--plan", "quick"], ["--set budget"]),
        (["--exp", "ue,ue8x", "--plan", "quick"], ["names one experiment twice"]),
        (["--exp", "ue+ue", "--plan", "quick"], ["ue is in it twice"]),
        (["--exp", "gpt2ish,ue", "--baseline", "gpt3", "--plan", "quick"], ["'gpt3'"]),
        (["--exp", "gpt2ish,ue", "--plan", "quick", "--resume", "none"], ["for one run"]),
        (["--greedy", "ue", "--plan", "quick"], ["one seed is never better", "--seeds"]),
        (["--exp", "gpt2ish,ue", "--describe"], ["--describe takes one"]),
        (["--exp", "ue", "--budget", "hours"], ["--budget"]),
        (["--role", "matrix", "--plan", "quick"], ["--role matrix", "add --find-lr"]),
        (["--find-lr", "--exp", "gpt2ish,ue", "--plan", "quick"], ["--find-lr takes one"]),
        (["--find-lr", "--seeds", "3", "--plan", "quick"], ["--find-lr is for one run"]),
        (["--tokens", "0"], ["--tokens 0"]),
        (["--plan", "quick", "--device", "gpu"], ["--device gpu"]),
        (["--plan", "quick", "--precision", "fp8"], ["fp8"]),
        (
            ["--plan", "quick", "--precision", "fp16", "--device", "cpu"],
            ["fp16", "amp is what is fast"],
        ),
        (["--amp", "--precision", "fp32"], ["two answers"]),
        (["--mini-batch-size", "0"], ["--mini-batch-size 0"]),
        (["--resume", "never"], ["--resume", "never"]),
        (["--tokns", "3"], ["--tokens"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence_and_exit_code_2(place, args, told):
    done = lmp_trainer(*args)

    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    for words in told:
        assert words in " ".join(done.stderr.split())
    assert "loading torch" not in done.stderr or "fp16" in args  # which some GPU might know


def test_an_experiment_that_does_not_import_is_named_with_its_line(place):
    (place / "mine.py").write_text('"""Mine."""\n\nimport nothing_such\n')
    done = lmp_trainer("--exp", "mine.py", "--plan", "words.json")

    assert done.returncode == 2
    assert "mine.py, line 3 does not import" in done.stderr


def test_json_is_one_document_and_progress_goes_to_stderr(place):
    done = lmp_trainer("--plan", "words.json", "--json", "--mini_batch_size", "2")
    result = json.loads(done.stdout)

    assert done.returncode == 0
    assert result["status"] == "finished" and result["schema_version"] == 1
    assert "step" in done.stderr
    assert result["validation"]["tokens"] == 40 * 128


def test_own_text_takes_the_place_of_the_plans_datasets(place):
    (place / "own.txt").write_text("another text altogether\n\n" * 2000)
    done = lmp_trainer("--plan", "words.json", "--data", "own.txt", "--tokens", "256", "--json")
    result = json.loads(done.stdout)
    facts = json.loads(Path(result["run"], "run.json").read_text())

    assert facts["plan"]["datasets"]["data"]["files"] == ["own.txt"]
    assert Path(result["run"]) == Path("runs/words+own/gpt2ish,tokens=256/seed-0")
    assert facts["num_steps"] == 2 and facts["changes"] == {"tokens": 256}


@pytest.mark.parametrize("listing", [["--exp", "list"], ["--plan", "list"], ["--plan", "schema"]])
def test_listings_have_json(place, listing):
    done = lmp_trainer(*listing, "--json")

    assert done.returncode == 0 and json.loads(done.stdout)


def test_describe_shows_docstring_diff_values_and_counts(place):
    done = lmp_trainer("--exp", "value_norm", "--plan", "words.json", "--describe")

    assert done.returncode == 0, done.stderr
    for words in ("Value norm:", "+++ value_norm.py", "num_blocks=1", "trained", "FLOPs per token"):
        assert words in done.stdout


def test_describe_shows_what_is_frozen(place):
    args = ("--exp", "gpt2ish", "--plan", "words.json", "--set", 'freeze=["head.*"]', "--describe")
    table, document = lmp_trainer(*args), json.loads(lmp_trainer(*args, "--json").stdout)

    assert "Frozen: head.weight, head.bias" in table.stdout
    assert document["frozen"] == ["head.weight", "head.bias"]
    assert document["parameters"]["frozen"] == 257 * 16 + 257


def test_a_described_plan_is_a_plan_file_and_its_json_a_document(place):
    file = json.loads(lmp_trainer("--plan", "words.json", "--describe").stdout)
    document = json.loads(lmp_trainer("--plan", "words.json", "--describe", "--json").stdout)

    assert document == {"schema_version": 1, "plan": file}
    (place / "again.json").write_text(json.dumps(file))
    assert json.loads(lmp_trainer("--plan", "again.json", "--describe").stdout)["tokens"] == 5120


def test_check_prints_every_proof(place):
    done = lmp_trainer("--exp", "gpt2ish", "--check", "--json")
    proofs = json.loads(done.stdout)["proofs"]

    assert done.returncode == 0
    assert len(proofs) > 10 and all(proof["passed"] is not False for proof in proofs)


def test_a_reader_that_leaves_causes_no_traceback(place):
    done = subprocess.run(
        f"{' '.join(command('--exp', 'list'))} | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=400,
    )

    assert "Traceback" not in done.stderr and "Error" not in done.stderr


def grid(*args, exp="gpt2ish,value_norm", seeds=2):
    return ["--plan", "words.json", "--exp", exp, "--seeds", str(seeds), *args]


@pytest.mark.slow
def test_a_grid_ends_with_the_verdicts_and_a_second_time_trains_nothing(place):
    done = lmp_trainer(*grid("--json"))
    again = lmp_trainer(*grid("--json"))
    document = json.loads(done.stdout)
    baseline, idea = document["verdicts"]

    assert done.returncode == 0, done.stderr
    assert json.loads(again.stdout) == document and "validation" not in again.stderr
    assert (baseline["experiment"], idea["experiment"]) == ("gpt2ish", "value_norm")
    assert idea["baseline"] == "gpt2ish" and idea["seeds"] == 2 and not document["failures"]
    assert {"mean", "sd", "difference", "interval", "p", "p_holm", "verdict"} <= idea.keys()
    table = lmp_trainer(*grid()).stdout
    assert f"{idea['difference']:+.4f}" in table and idea["verdict"] in table


@pytest.mark.slow
def test_two_grids_on_one_folder_share_the_runs(place):
    processes = [
        subprocess.Popen(
            command(*grid("--json", exp="gpt2ish", seeds=6)), stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = [json.loads(process.communicate(timeout=400)[0]) for process in processes]
    rows = [read_rows(path) for path in place.rglob("train.csv")]

    assert answers[0] == answers[1] and answers[0]["verdicts"][0]["seeds"] == 6
    assert len(rows) == 6
    assert all([row["step"] for row in run] == list(range(1, 41)) for run in rows)


@pytest.mark.slow
def test_a_failed_run_of_a_grid_is_in_the_verdict_and_the_exit_code_is_3(place):
    (place / "experiments").mkdir()
    normed = "        x_BTC = self.final_norm(x_BTC)\n"
    begun = 'glob.glob("runs/*/wild*/seed-*/train.csv")'  # not yet where it is proved
    blow_up = f"        import glob\n        if self.training and {begun}:\n"
    blow_up += "            x_BTC = x_BTC / 0.0\n"
    wild = (ROOT / "experiments/gpt2ish.py").read_text().replace(normed, normed + blow_up)
    (place / "experiments/wild.py").write_text(wild)
    done = lmp_trainer(*grid("--json", exp="gpt2ish,wild"))
    document = json.loads(done.stdout)

    assert done.returncode == 3 and len(document["failures"]) == 2
    assert document["verdicts"][1]["failures"] == 2 and document["verdicts"][1]["verdict"] is None
    assert document["verdicts"][0]["seeds"] == 2


@pytest.mark.slow
def test_an_idea_that_is_refused_at_its_own_size_leaves_the_others_their_verdicts(place):
    (place / "experiments").mkdir()
    head = "    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:\n"
    leak = "        tokens_BT = tokens_BT.roll(-1, 1) if tokens_BT.shape[1] > 16 else tokens_BT\n"
    source = (ROOT / "experiments/gpt2ish.py").read_text()
    (place / "experiments/leaking.py").write_text(source.replace(head, head + leak))
    done = lmp_trainer(*grid("--json", exp="gpt2ish,leaking,value_norm"))
    document = json.loads(done.stdout)

    assert done.returncode == 3 and len(document["failures"]) == 2
    assert all("leaking fails the check" in why for why in document["failures"].values())
    assert [row["experiment"] for row in document["verdicts"]] == ["gpt2ish", "value_norm"]
    assert all(row["seeds"] == 2 for row in document["verdicts"])


@pytest.mark.slow
def test_a_stopped_grid_goes_on_where_it_stopped(place):
    args = grid("--tokens", "128e5", exp="gpt2ish")  # more than anybody waits for
    folder = place / "runs/words/gpt2ish,tokens=12800000"
    lmp_trainer("--plan", "words.json", "--tokens", "128", "--out-dir", "short")
    shutil.copytree(next(Path("short").rglob("seed-0")), folder / "seed-0")  # so it is finished
    curve = folder / "seed-1/train.csv"
    steps = 0
    for _ in range(2):
        process = subprocess.Popen(command(*args), stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.poll() is None:
            if curve.exists() and len(read_rows(curve)) > steps + 3:
                break
            time.sleep(0.05)  # until it trains the second run
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=400)
        state = json.loads((folder / "seed-1/run.json").read_text())
        went_on = f"going on at step {steps}" in stderr
        steps, before = len(read_rows(curve)), steps

        assert process.returncode == 130 and "goes on from here" in stderr, stderr
        assert state["status"] == "stopped" and "seed 0: validation" not in stderr
        assert went_on == (before > 0) and steps > before


@pytest.mark.slow
def test_a_greedy_search_prints_its_path(place):
    args = ["--plan", "words.json", "--greedy", "ue,value_norm", "--seeds", "2", "--tokens", "2000"]
    done = lmp_trainer(*args, "--json")
    document = json.loads(done.stdout)
    first = document["rounds"][0]

    assert done.returncode == 0, done.stderr
    assert first["stack"] == "gpt2ish"
    assert {c["name"] for c in first["candidates"]} == {"ue", "value_norm"}
    assert "best stack: " in lmp_trainer(*args).stdout


def test_a_stack_is_written_as_a_file_that_can_be_trained(place):
    done = lmp_trainer("--exp", "value_norm+ue", "--write", "experiments/mine.py")
    again = lmp_trainer("--exp", "value_norm+ue", "--write", "experiments/mine.py")
    checked = lmp_trainer("--exp", "mine", "--check")

    assert (done.returncode, again.returncode, checked.returncode) == (0, 2, 0)
    assert "is there already" in again.stderr


def test_a_conflict_exits_with_2_shows_both_hunks_and_writes_the_markers(place):
    (place / "experiments").mkdir()
    base = (ROOT / "experiments/gpt2ish.py").read_text()
    for name in ("relu", "silu"):
        text = base.replace("F.gelu", f"F.{name}").replace(
            "Source:", "Changed from gpt2ish: MLP.\nSource:", 1
        )
        (place / f"experiments/{name}.py").write_text(text)
    described = lmp_trainer("--exp", "relu+silu", "--describe")
    written = lmp_trainer("--exp", "relu+silu", "--write", "both.py")

    assert described.returncode == written.returncode == 2
    for words in ("F.relu", "F.silu", "--write"):
        assert words in described.stderr
    assert "<<<<<<< relu" in (place / "both.py").read_text()


def test_a_process_of_a_group_ends_with_its_output_and_its_own_code(place):
    env = os.environ | {"RANK": "0"}

    listed = lmp_trainer("--exp", "list", "--json", env=env)
    wrong = lmp_trainer("--exp", "nosuch", env=env)

    assert listed.returncode == 0 and json.loads(listed.stdout)
    assert wrong.returncode == 2 and "nosuch" in wrong.stderr


def torchrun(*args):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return [*launch, "-m", "lmplay.train", *args, "--device", "cpu"]


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_bit_for_bit(place):
    args = ["--plan", "words.json", "--tokens", str(120 * 128)]
    for out in ("whole", "cut"):
        process = subprocess.Popen(torchrun(*args, "--out-dir", out), stderr=subprocess.PIPE)
        curve = place / out / "words/gpt2ish,tokens=15360/seed-0/train.csv"
        while out == "cut" and process.poll() is None:
            if curve.exists() and len(read_rows(curve)) > 3:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        process.communicate(timeout=400)
    cut = read_rows(curve)
    assert 3 < len(cut) < 120
    subprocess.run(torchrun(*args, "--out-dir", "cut"), check=True, timeout=400)
    losses = [
        [row["loss"] for row in read_rows(next(Path(out).rglob("train.csv")))]
        for out in ("whole", "cut")
    ]

    assert losses[0] == losses[1]  # dropout is on: each process has its own generator back


@pytest.mark.slow
def test_two_processes_train_as_one(place):
    plain = ["--set", "embed_dropout=0", "--set", "ff_dropout=0", "--plan", "words.json"]
    # matrices are spread over the processes; curvature is estimated in all of them
    plain += ["--set", "optimizer.roles.matrix.name=Muon"]
    plain += ["--set", "optimizer.roles.head.name=Sophia"]
    one = lmp_trainer(*plain, "--out-dir", "one")
    two = subprocess.run(
        torchrun(*plain, "--out-dir", "two"), capture_output=True, text=True, timeout=400
    )
    assert one.returncode == two.returncode == 0, two.stderr
    state = json.loads(next(Path("two").rglob("run.json")).read_text())
    rows = [read_rows(next(Path(name).rglob("train.csv"))) for name in ("one", "two")]
    scores = [read_rows(next(Path(name).rglob("validation.csv"))) for name in ("one", "two")]

    assert state["world_size"] == 2
    assert len(rows[0]) == len(rows[1]) == 40
    for a, b in zip(rows[0] + scores[0], rows[1] + scores[1], strict=True):
        for column in ("step", "tokens", "loss", "accuracy"):
            assert a[column] == pytest.approx(b[column], rel=1e-5)
