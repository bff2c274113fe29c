"""A signal in any phase: saved where training had begun, the exit code says which, and soon."""

import signal
import time
from pathlib import Path

import pytest

from lmplay.run.records import read_rows

# where a run may be when it is told to stop; before the first step there is nothing to save
BEFORE = ["import", "prepare.encode", "prepare.shard", "prove", "file.rename"]
TRAINING = [
    *("step.part:1", "step.part:11", "step.update:5", "step.taken:7", "validate.part:8"),
    *("sample:3", "row.write:6", "save.begin:2", "save.write:9", "save.fsync:7", "save.rename:2"),
    *("save.published:2", "save.prune:1", "save.trash:1"),
]


def test_a_sigterm_in_any_phase_ends_it_soon_and_loses_nothing(bench, trials, figure, tmp_path):
    bench.plan(every=3)
    bench.train("whole")
    places = [*trials(BEFORE[1:2], BEFORE), *trials(TRAINING[1:9:3], TRAINING)]
    seconds = {}

    for place in places:
        cache = tmp_path / f"cache-{place}"
        cache.mkdir()
        if place != "prove":
            (cache / "checks").symlink_to(bench.cache / "checks")
        trial = bench.start(place, fault=f"stop@{place}", LMP_DATASETS=str(cache))
        assert trial.has_stopped(), place
        seconds[place] = trial.seconds_until(signal.SIGTERM)
        assert trial.process.exitcode == 143, trial.said()
        assert "Traceback" not in trial.said()
        if place in TRAINING:
            done = [row["step"] for row in read_rows(bench.folder(place).train_csv)]
            assert bench.steps(place)[-1] == (done[-1] if done else 0)
        bench.train(place, LMP_DATASETS=str(cache))
        bench.assert_same(place)

    ordered = sorted(seconds.values())
    p50, p95 = ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))]
    text = f"{len(places)} of {len(places)} phases; p50 {p50:.2f} s, p95 {p95:.2f} s"
    figure("sigterm_every_phase", text, seconds=seconds)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_one_signal_saves_and_says_how_to_go_on(bench, number, code):
    bench.plan()
    setup = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)"  # nohup ignores it
    trial = bench.start("cut", fault="stop@step.part:14", setup=setup)
    assert trial.has_stopped()
    trial.seconds_until(number)

    assert trial.process.exitcode == code and "goes on from here" in trial.said()
    assert bench.folder("cut").read().status == "stopped"
    assert bench.steps("cut")[-1] == 4


def test_a_second_ctrl_c_leaves_at_once_and_the_earlier_checkpoint_is_whole(bench, trials, figure):
    bench.plan()
    bench.train("whole")
    places = ["save.write:9", *trials([], ["save.fsync:7", "save.rename:2", "step.part:14"])]
    for place in places:
        trial = bench.start(place, fault=f"stop@{place}")
        assert trial.has_stopped()
        trial.send(signal.SIGINT)
        trial.send(signal.SIGTERM)  # of two alike that are pending, one is lost
        trial.seconds_until()

        assert trial.process.exitcode in (130, 143), trial.said()
        assert "Traceback" not in trial.said()
        bench.train(place)
        bench.assert_same(place)
    figure("ctrl_c_once_twice", f"{len(places) + 2} of {len(places) + 2} cases")


def test_sigusr1_saves_and_changes_nothing_else(bench, trials, figure):
    bench.plan(checkpoints={"every_tokens": 10**6, "keep": 99})
    bench.train("whole")
    places = ["step.part:14", *trials([], ["validate.part:8", "step.taken:3", "step.update:7"])]
    for place in places:
        bench.train(place, fault=f"usr1@{place}")
        assert bench.state(place) == bench.state("whole")
        assert len(bench.steps(place)) == 1 + len(bench.steps("whole"))
    figure("sigusr1_checkpoint", f"{len(places)} of {len(places)} equal final hashes")


@pytest.mark.soak
def test_no_run_of_a_killed_grid_is_left_behind(bench, figure):
    bench.plan(steps=100_000)
    grid = bench.start("grid", "--seeds", "2")
    deadline = time.monotonic() + 300
    while not any(len(read_rows(f)) > 3 for f in bench.path.glob("grid/**/train.csv")):
        assert time.monotonic() < deadline, grid.said()
        time.sleep(0.01)
    owner = next(bench.path.glob("grid/**/owner.json")).read_text()
    pid = int(owner.partition('"pid": ')[2].partition(",")[0])
    grid.process.kill()
    grid.wait()
    began = time.monotonic()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < began + 60:
        time.sleep(0.01)
    seconds = time.monotonic() - began

    assert seconds < 30 and bench.folder("grid").read().status == "stopped"
    figure("worker_signal_inheritance", f"0 orphans, {seconds:.1f} s after the grid was killed")
