"""SIGKILL at every named place and at random: the same command goes on to the same end."""

import ast
import random
import signal
import time
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lmplay"
COUNT = """
class Counting:
    def reach(self, place):
        os.write(counted, place.encode() + b"\\n")

counted = os.open("places", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
real_arm = fault_points.arm
fault_points.arm = lambda text: setattr(fault_points, "_fault", Counting())
"""
FEW = ["save.write", "save.rename", "save.trash", "row.write"]


def named_places() -> set[str]:
    """Every literal that `reach` is given anywhere in lmplay."""
    calls = (n for f in PACKAGE.rglob("*.py") for n in ast.walk(ast.parse(f.read_text())))
    return {
        call.args[0].value
        for call in calls
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "reach"
    }


def spread(last: int, most: int) -> list[int]:
    """At most so many of the numbers from 1 to `last`, which is among them."""
    return sorted({max(1, last * n // most) for n in range(1, most + 1)})


def test_a_kill_at_any_named_place_costs_nothing(bench, trials, figure, tmp_path):
    bench.plan()
    bench.train("whole", setup=COUNT)
    reached = Counter((tmp_path / "places").read_text().split())
    assert named_places() - set(reached) == set()
    places = trials(FEW, sorted(reached))
    kills = [(place, n) for place in places for n in spread(reached[place], trials(1, 2))]
    per_save = reached["save.write"] // reached["save.begin"]  # a piece of a file each
    second = range(per_save + 1, 2 * per_save + 1)
    kills += trials([], [("save.write", n) for n in second])
    repairs = 0

    for number, (place, time_reached) in enumerate(kills):
        out = f"cut-{number}"
        cache = tmp_path / f"cache-{number}"
        cache.mkdir()
        (cache / "checks").symlink_to(bench.cache / "checks")
        env = {"LMP_DATASETS": str(cache)}
        fault = f"kill@{place}:{time_reached}"
        bench.train(out, fault=fault, code=-signal.SIGKILL, **env)
        repairs += bench.start(out, **env).wait() != 0
        bench.assert_same(out)

    assert repairs == 0
    text = f"{len(kills)} kills at {len(places)} named places, {repairs} manual repairs"
    figure("kill_at_every_save_point", text, kills=len(kills), places=sorted(reached))


def test_kills_at_random_times_change_nothing(bench, trials, figure):
    runs = [f"cut-{number}" for number in range(trials(1, 4))]  # at the same time
    rounds, steps, draw = trials(4, 60), trials(60, 500), random.Random(0)
    bench.plan(steps=steps, every=5)
    bench.train("proved", "--tokens", "80")  # which takes long, the first time
    began = time.monotonic()
    whole = bench.start("whole")
    while whole.process.is_alive() and not bench.num_taken("whole"):
        time.sleep(0.01)
    beginning = time.monotonic() - began

    num_killed = 0
    for _ in range(rounds):
        under_way = [bench.start(out) for out in runs]
        began = time.monotonic()
        for delay, trial in zip(sorted(draw.random() for _ in runs), under_way, strict=True):
            trial.process.join(max(0, began + 2 * beginning * delay - time.monotonic()))
            trial.process.kill()
            code = trial.wait()
            num_killed += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), trial.said()
        draw.shuffle(runs)
    assert whole.wait() == 0, whole.said()
    for out in runs:
        bench.train(out)
        bench.assert_same(out)

    again = sum(map(bench.num_taken, runs)) - steps * len(runs)
    text = f"{num_killed} kills in {len(runs)} runs of {steps} steps: equal final hashes, 0 rows "
    figure("random_kill_soak", f"{text}repeated or lost; {again:,} steps taken again")
