"""Many runs: shared, resumed, counted where they fail, each as if it were alone."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from lmplay.catalog.entries import resolve
from lmplay.errors import NO_DATA, UserError
from lmplay.grid import budget, grid
from lmplay.grid.budget import sized
from lmplay.grid.grid import run_grid
from lmplay.grid.grid_display import GridDisplay
from lmplay.grid.subprocesses import SignalForwarder, run_in_subprocess
from lmplay.plan_file import read_plan
from lmplay.run.request import Request
from lmplay.train.clock import Clock
from lmplay.train.session import run_experiment
from lmplay.train.signals import Stopped


def request(exp="gpt2ish", seed=0, out_dir="runs", **changes):
    plan = read_plan("words", changes)
    return Request(resolve(exp), plan, changes, {}, seed=seed, out_dir=Path(out_dir), device="cpu")


@pytest.fixture
def display():
    with GridDisplay("words") as shown:
        yield shown


def is_finished(request):
    return request.folder.read().status == "finished"


def weights(folder):
    return next((folder / "checkpoints").glob("step-*9/model.safetensors")).read_bytes()


def test_a_run_of_a_grid_is_the_run_that_it_would_be_alone(place, display):
    requests = [request(exp, seed) for seed in (0, 1) for exp in ("gpt2ish", "value_norm")]
    failures = run_grid(requests, display)

    assert not failures
    for each in requests:
        alone = replace(each, out_dir=Path("alone"))
        display.begin(alone.label, alone.seed)
        run_in_subprocess(run_experiment, alone, display, SignalForwarder())
        assert weights(each.folder.path) == weights(alone.folder.path)


def test_what_is_finished_is_not_trained_again_and_what_is_missing_is(place, display):
    run_grid([request(seed=0)], display)
    before = {p: p.stat().st_mtime_ns for p in place.rglob("runs/**/*") if p.is_file()}
    run_grid([request(seed=0), request(seed=1)], display)

    assert all(is_finished(request(seed=seed)) for seed in (0, 1))
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())


def test_a_failed_run_is_counted_and_the_others_go_on(place, display):
    requests = [request(**{"optimizer.lr": 1e30, "clip": None}), request(), request("value_norm")]
    failures = run_grid(requests, display)

    assert is_finished(requests[1]) and is_finished(requests[2])
    assert list(failures) == [str(requests[0].folder.path)]
    assert "not finite" in next(iter(failures.values()))
    assert requests[0].folder.read().status == "failed"


def test_a_run_that_cannot_be_written_is_a_failure_in_words(place, display, monkeypatch):
    folder, said = request().folder, []
    folder.samples_md.mkdir(parents=True)
    monkeypatch.setattr(display, "note", said.append)
    failures = run_grid([request()], display)

    assert "samples.md': Is a directory" in failures[str(folder.path)]
    assert not any("Traceback" in text for text in said)


def test_a_run_whose_process_is_killed_is_a_failure_and_the_others_go_on(place, display):
    (place / "experiments").mkdir()
    head = "    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:\n"
    begun = 'glob.glob("runs/*/killing/seed-*/train.csv")'  # not where it is proved
    kill = f"        import glob\n        if {begun} and not tokens_BT.is_meta:\n            {{}}\n"
    line = kill.format("import os; os.kill(os.getpid(), 9)")
    killing = resolve("gpt2ish").source.replace(head, head + line)
    (place / "experiments/killing.py").write_text(killing)
    failures = run_grid([request("killing"), request()], display)

    assert is_finished(request())
    assert "signal 9" in failures[str(request("killing").folder.path)]
    assert request("killing").folder.read().status == "failed"


def test_missing_data_ends_the_grid_at_once(place, display):
    (place / "text.jsonl").unlink()

    with pytest.raises(UserError) as raised:
        run_grid([request(), request(seed=1)], display)
    assert raised.value.code in (2, NO_DATA)


def test_data_that_goes_missing_ends_a_grid_that_has_begun(place, display, monkeypatch):
    def gone(*_):
        raise UserError("the hub does not answer", code=NO_DATA)

    run_grid([request()], display)
    monkeypatch.setattr(grid, "run_in_subprocess", gone)

    with pytest.raises(UserError, match="does not answer"):
        run_grid([request(), request(seed=1), request(seed=2)], display)


def test_runs_that_another_process_holds_are_waited_for(place, display, monkeypatch):
    monkeypatch.setattr(grid, "WAIT_SECONDS", 0.05)
    first, second = request(seed=0), request(seed=1)
    order = []
    held = first.folder.lock()
    held.__enter__()
    real = GridDisplay.end

    def end(self, state, result=None, why=""):
        order.append((self._now[1], state))
        if state == "held" and order.count((0, "held")) == 2:
            held.__exit__(None, None, None)
        real(self, state, result, why)

    monkeypatch.setattr(GridDisplay, "end", end)
    run_grid([first, second], display)

    assert is_finished(first) and is_finished(second)
    assert order[:2] == [(0, "held"), (1, "done")] and order[-1] == (0, "done")


def test_a_signal_stops_the_run_under_way_saves_it_and_ends_the_grid(place, display, monkeypatch):
    real = GridDisplay.row
    monkeypatch.setattr(
        GridDisplay,
        "row",
        lambda self, kind, row: (
            (real(self, kind, row), os.kill(os.getpid(), signal.SIGTERM))
            if kind == "train" and row["step"] == 3
            else None
        ),
    )
    first, second = request(tokens=160 * 2000), request(seed=1)
    with pytest.raises(Stopped) as raised:
        run_grid([first, second], display)

    assert raised.value.code == 143
    assert first.folder.read().status == "stopped"
    assert not second.folder.run_json.exists()
    assert list((first.folder.path / "checkpoints").glob("step-*"))


def test_equal_budgets_divide_the_baselines_compute(place, display):
    request_ue, baseline = request("ue"), request()
    by_flops = sized(request_ue, baseline, "flops", display)
    run_grid([by_flops, baseline], display)
    ours, theirs = by_flops.folder.read(), baseline.folder.read()

    assert by_flops.label == "ue,budget=flops"
    assert sized(baseline, baseline, "flops", display) == baseline
    assert sized(request_ue, baseline, "tokens", display) == request_ue
    spent = [facts.num_tokens * facts.flops_per_token for facts in (ours, theirs)]
    assert abs(spent[0] - spent[1]) <= ours.tokens_per_step * ours.flops_per_token / 2
    assert ours.num_steps < theirs.num_steps


def test_equal_budgets_are_equal_to_half_a_step_where_batch_and_rows_grow_too(place, display):
    ramps = {
        "batch_size": [[0, 1], [0.25, 2], [0.5, 5]],
        "sequence_length": [[0, 8], [0.6, 32]],
    }
    for tokens in (160 * 9, 160 * 9 + 70, 160 * 60):
        pair = [request(exp, tokens=tokens, **ramps) for exp in ("ue", "gpt2ish")]
        made = sized(*pair, "flops", display)
        clocks = [Clock(one.plan) for one in (made, pair[1])]

        wanted = clocks[1].num_tokens / made.budget.cost
        assert abs(clocks[0].num_tokens - wanted) <= 5 * 32 / 2


def test_equal_seconds_are_measured_once_and_kept_for_every_seed(place, display, monkeypatch):
    baseline = request()
    first = sized(request("ue"), baseline, "seconds", display)
    monkeypatch.setattr(budget, "run_in_subprocess", None)  # nothing is measured any more
    second = sized(request("ue", seed=1), baseline, "seconds", display)
    kept = json.loads((first.folder.path.parent / "budget.json").read_text())

    assert first.plan.tokens == second.plan.tokens and first.budget == second.budget
    assert first.budget.cost == kept["seconds_per_step_over_baselines"] > 0
    assert first.plan.tokens == pytest.approx(baseline.plan.tokens / first.budget.cost, abs=160)


def test_a_budget_needs_tokens_to_divide(place, display):
    with pytest.raises(UserError, match="whole epochs"):
        sized(request("ue", tokens=None), request(tokens=None), "flops", display)


def test_what_is_done_after_a_run_is_no_failure_of_the_run(place, display, monkeypatch):
    result = {"validation": {"loss": 4.0}}
    monkeypatch.setattr(grid, "run_in_subprocess", lambda *_: result)
    ended = []

    assert run_grid([request(), request(seed=1)], display, lambda: ended.append(1)) == {}
    assert len(ended) == 2

    def nothing_to_show():
        raise UserError("no run of 'gpt2ish' to hold the others against")

    with pytest.raises(UserError, match="to hold the others against"):
        run_grid([request()], display, nothing_to_show)
