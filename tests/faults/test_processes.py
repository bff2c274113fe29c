"""Two processes that share each step: as one, together and after either has died."""

import math
import signal
import time

import pytest
from torch import isfinite

from lmplay.run.checkpoint import newest_checkpoint
from lmplay.run.records import read_rows

PLAIN = ["--set", "embed_dropout=0", "--set", "ff_dropout=0"]
STEPS = 12


def difference(bench, out: str, column: str = "loss", curve: str = "train_csv") -> float:
    """The largest between two curves, relative."""
    rows = [read_rows(getattr(bench.folder(name), curve)) for name in ("whole", out)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    return max(abs(a[column] / b[column] - 1) for a, b in zip(*rows, strict=True))


def test_processes_and_micro_batches_change_neither_the_rows_nor_the_losses(bench, trials, figure):
    bench.plan(steps=STEPS)
    bench.train("whole", *PLAIN)
    settings = trials([(2, 2)], [(n, rows) for n in (1, 2) for rows in (1, 2, 5)])
    moved, worst, held_out = 0, 0.0, 0.0

    for num, rows in settings:
        out = f"{num}-{rows}"
        if num == 1:
            bench.train(out, *PLAIN, rows=rows)
        else:
            bench.train_group(out, *PLAIN, rows=rows)
        moved += bench.num_moved(out, "whole")
        worst = max(worst, difference(bench, out))
        held_out = max(held_out, difference(bench, out, curve="validation_csv"))

    assert moved == 0
    assert worst < 1e-6 and held_out < 1e-6
    num = len(settings)
    figure("order_invariance", f"{moved} rows moved in {num} settings", rows_moved=moved)
    figure("two_processes_as_one", f"losses within {worst:.1e} of one process's", worst=worst)
    text = f"within {held_out:.1e}; 200 targets in rows of 16 do not divide by 2 x 2 rows"
    figure("distributed_eval_exact", text, worst=held_out)


def test_two_processes_then_one_then_two_train_on_the_same_rows(bench, trials, figure):
    bench.plan(steps=STEPS)
    bench.train("whole", *PLAIN)
    pairs = trials([(9, 6)], [(2, 3), (9, 6), (11, 12), (14, 5)])
    moved, worst = 0, 0.0

    for number, (first, second) in enumerate(pairs):
        out = f"cut-{number}"
        both = (f"term@step.part:{first}", None)  # only one of them is told
        bench.train_group(out, *PLAIN, faults=both, codes=(143, 143))
        bench.train(out, *PLAIN, fault=f"term@step.part:{second}", code=143)
        bench.train_group(out, *PLAIN)
        moved += bench.num_moved(out, "whole")
        worst = max(worst, difference(bench, out))

    assert moved == 0 and worst < 1e-6
    text = f"{moved} rows repeated or lost in {len(pairs)} runs of 2, 1, 2 processes; losses within"
    figure("elastic_resume", f"{text} {worst:.1e}", rows_moved=moved, worst=worst)


def test_what_two_processes_left_goes_on_bit_by_bit(bench, trials, figure):
    bench.plan(steps=STEPS)
    bench.train_group("whole")
    cuts = trials([9], list(range(1, 2 * STEPS, 3)))
    for cut in cuts:
        faults = (None, f"term@step.part:{cut}")
        bench.train_group(f"cut-{cut}", faults=faults, codes=(143, 143))
        bench.train_group(f"cut-{cut}")
        bench.assert_same(f"cut-{cut}")
    text = f"{len(cuts)} of {len(cuts)} cuts identical, dropout on"
    figure("bitwise_resume_of_two", text)


def test_the_death_of_a_process_ends_the_other_soon_and_what_was_saved_goes_on(
    bench, trials, figure
):
    bench.plan(steps=STEPS)
    bench.train_group("whole")
    places = ["step.part:15", "validate.part:3", "step.update:8", "step.part:2", "step.part:21"]
    places = trials(places[:1], [place for place in places for _ in range(4)])
    seconds = []

    for number, place in enumerate(places):
        out, victim = f"cut-{number}", number % 2
        faults = tuple(f"stop@{place}" if rank == victim else None for rank in (0, 1))
        group = bench.start_group(out, faults=faults)
        assert group[victim].has_stopped()
        began = time.monotonic()
        group[victim].process.kill()
        survivor = group[1 - victim]
        survivor.wait()
        seconds.append(time.monotonic() - began)
        assert survivor.process.exitcode != 0
        bench.train_group(out)
        bench.assert_same(out)

    worst = sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]
    text = f"{len(places)} of {len(places)} ended and went on; p95 {worst:.2f} s"
    figure("rank_death", text, seconds=seconds)


POISON = """
real = loop.take_step
def take_step(session, batch, *more):
    rank = session.run.accelerator.process_index
    if session.run.step == {step} and rank == {rank}:
        block = dict(session.run.model.named_modules())["{name}"]
        block.register_forward_hook(lambda module, given, made: made * float("nan"))
    return real(session, batch, *more)
loop.take_step = take_step
"""


def test_a_number_that_is_not_finite_stops_every_process_before_it_is_learned(
    bench, trials, figure
):
    bench.plan(steps=STEPS)
    bench.train_group("whole")
    cases = trials([(1, 7)], [(rank, step) for rank in (0, 1) for step in (4, 7, 11)])
    named = 0

    for rank, step in cases:
        out, name = f"cut-{rank}-{step}", "blocks.0.mlp"
        setup = POISON.format(step=step, rank=rank, name=name)
        group = bench.train_group(out, setup=setup, codes=(3, 3))
        named += any(f"begins in {name}" in trial.said() for trial in group)
        checkpoint = newest_checkpoint(bench.folder(out), pytest.fail)
        assert checkpoint.step == 3 * (step // 3)
        assert all(isfinite(value).all() for value in checkpoint.model.values())
        bench.train_group(out)
        bench.assert_same(out)

    num = len(cases)
    text = f"0 updates after the fault in {num} cases; the module named in {named} of {num}"
    figure("nan_injection", text, cases=num, named=named)


def test_a_process_that_hangs_ends_the_others_in_bounded_time(bench, trials, figure):
    bench.plan(steps=STEPS)
    setup = "from datetime import timedelta\nfrom lmplay.run import accelerator\n"
    setup += "accelerator.PATIENCE = timedelta(seconds=3)"
    group = bench.start_group("cut", faults=(None, "stop@step.part:9"), setup=setup)
    assert group[1].has_stopped()
    began = time.monotonic()
    group[0].wait()
    seconds = time.monotonic() - began
    group[1].process.kill()

    assert group[0].process.exitcode not in (0, -signal.SIGKILL)
    assert seconds < 30
    bench.train_group("cut")
    figure("rank_hangs", f"the other ends in {seconds:.1f} s where it may wait for 3 s")
