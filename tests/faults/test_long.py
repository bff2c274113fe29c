"""What only a long run shows: memory, sizes of files, and the time that saving takes."""

import json
import time

import numpy as np
import pytest

from lmplay.run.records import TRAIN_COLUMNS, Record

WATCH = """
import time
steps, began = [0], time.perf_counter()
watched, saving = loop.advance, loop.save
spent = [0.0, 0.0]

def advance(session):
    watched(session)
    steps[0] += 1
    if steps[0] % {every} == 0:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        with open("memory.jsonl", "a") as file:
            file.write(json.dumps([session.run.step, pages * 4]) + chr(10))

def save(*given):
    before = time.perf_counter()
    saving(*given)
    spent[0] += time.perf_counter() - before
    spent[1] += 1
    with open("saving.json", "w") as file:
        file.write(json.dumps([spent[0], spent[1], time.perf_counter() - began]))

loop.advance, loop.save = advance, save
"""


def trained_long(bench, steps: int, saves: int):
    """KB per 1,000 steps that memory grows over the last three quarters; sizes of checkpoints."""
    bench.plan(steps=steps, every=steps // saves, checkpoints={
        "every_tokens": steps // saves * 80, "keep": 10**6,
    })  # fmt: skip
    bench.train("long", setup=WATCH.format(every=max(1, steps // 100)))
    lines = (bench.path / "memory.jsonl").read_text().splitlines()
    points = np.array([json.loads(line) for line in lines], float)
    later = points[len(points) // 4 :]
    slope = np.polyfit(later[:, 0], later[:, 1], 1)[0] * 1000
    folders = [p for p in bench.folder("long").checkpoints.iterdir() if p.name != "step-0"]
    sizes = [sum(f.stat().st_size for f in folder.iterdir()) for folder in folders]
    return slope, sizes


@pytest.mark.timeout(3600)
def test_memory_and_checkpoints_stay_flat_over_a_long_run(bench, trials, figure):
    steps = trials(40, 20_000)
    slope, sizes = trained_long(bench, steps, trials(4, 50))

    assert len(sizes) == trials(4, 50) and max(sizes) - min(sizes) < 100
    assert steps < 1000 or abs(slope) < 100  # in a short run what is allocated once counts
    text = f"{slope:+.1f} KB per 1,000 steps over {steps:,} steps; {len(sizes)} checkpoints of "
    figure("rss_and_file_growth", text + f"{min(sizes):,} to {max(sizes):,} bytes", slope=slope)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_checkpoints_take_a_small_share_of_training_at_the_default_cadence(bench, figure):
    command = ["--plan", "quick", "--out-dir", "quick"]
    trial = bench.command("train", *command, out="quick", setup=WATCH.format(every=10**9))
    assert trial.wait() == 0, trial.said()
    seconds, saves, whole = json.loads((bench.path / "saving.json").read_text())
    share = seconds / whole

    assert share < 0.01
    text = f"{share:.2%} of {whole:.0f} s: {saves:.0f} checkpoints of the plan quick, "
    figure("checkpoint_share", text + f"{seconds / saves:.3f} s each", share=share)


def test_a_row_costs_the_same_however_long_its_file_is(tmp_path, trials, figure):
    num = trials(2_000, 100_000)
    row = {column: 0.123456789 for column in TRAIN_COLUMNS} | {"step": 1}
    began = time.perf_counter()
    with Record(tmp_path / "train.csv", TRAIN_COLUMNS) as record:
        for _ in range(num):
            record.write(row)
    seconds = time.perf_counter() - began

    assert len((tmp_path / "train.csv").read_bytes().splitlines()) == num + 1
    text = f"0 rows wrong; {seconds * 1e5 / num:.1f} s for 100,000 rows"
    figure("metrics_file_integrity", text, seconds=seconds * 1e5 / num)
