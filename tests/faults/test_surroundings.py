"""Where a run stands: no network, odd names, a folder that goes away under it."""

import shutil
import signal

NOWHERE = "http://127.0.0.1:9"  # the port of a service that throws away
OFFLINE = dict.fromkeys(["HF_ENDPOINT", "http_proxy", "https_proxy", "HTTPS_PROXY"], NOWHERE)


def test_without_a_network_everything_works_on_text_of_ones_own(bench, trials, figure):
    bench.plan()
    bench.train("out", fault="term@step.part:20", code=143, **OFFLINE)
    bench.train("out", **OFFLINE)
    run = bench.folder("out").path
    commands = [("stats", run), ("generate", run, "7", "--max-tokens", 4)]
    commands += trials([], [("export", run, "exported")])
    for command in commands:
        trial = bench.command(*command, **OFFLINE)
        assert trial.wait() == 0, trial.said()

    num = len(commands) + 2
    figure("fully_offline", f"{num} of {num} commands without a network")


def test_names_that_are_odd_do_no_harm_and_a_place_that_is_none_is_told(bench, trials, figure):
    bench.plan()
    bench.train("whole")
    odd = ["with space", "[brackets] {braces}", "名前-é", "n" * 200, "-dash", "a'b\"c"]
    odd = trials(odd[1:2], odd)
    for name in odd:
        bench.train(f"./{name}")
        assert bench.state(name) == bench.state("whole")
    bad = {"one.jsonl": "Not a directory", "/proc/nowhere": "No such file"}
    for place, reason in bad.items():
        trial = bench.train(place, code=2)
        assert "Traceback" not in trial.said() and "--out-dir" in trial.said()
        assert reason in trial.said()

    num = len(odd) + len(bad)
    figure("bad_paths", f"{num} of {num} names used or refused in words")


def test_a_run_whose_folder_is_deleted_under_way_ends_in_words(bench):
    bench.plan()
    trial = bench.start("gone", fault="stop@step.part:14")
    assert trial.has_stopped()
    shutil.rmtree(bench.path / "gone")
    trial.seconds_until(signal.SIGCONT)

    assert trial.process.exitcode in (1, 2, 5)
    assert "Traceback" not in trial.said(), trial.said()


def test_what_was_taken_out_of_a_finished_run_is_named(bench):
    bench.plan()
    bench.train("done")
    for name in ("validation.csv", "experiment.py"):
        (bench.folder("done").path / name).unlink()
        trial = bench.train("done", code=2)

        assert name in trial.said() and "Traceback" not in trial.said()
