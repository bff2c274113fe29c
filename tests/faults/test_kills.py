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
FEW = ["save.write", "save.rename", "save.prune", "row.write"]


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
    kills = [(place, n) for place in places for n in spread(reached[place], trials(1, 4))]
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
    kills, draw = trials(4, 200), random.Random(0)
    bench.plan(steps=trials(60, 3000), every=5)
    began = time.monotonic()
    bench.train("whole")
    alone = time.monotonic() - began

    began = time.monotonic()
    num_killed = 0
    while num_killed < kills:
        trial = bench.start("cut")
        trial.process.join(draw.uniform(0.1, trials(1.5, 2.5)))
        trial.process.kill()
        code = trial.wait()
        num_killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), trial.said()
        if code == 0:
            break
    bench.train("cut")
    seconds = time.monotonic() - began

    bench.assert_same("cut")
    figure(
        "random_kill_soak",
        f"{num_killed} kills, equal final hash, 0 rows repeated or lost; "
        f"{seconds:.0f} s instead of {alone:.0f} s",
        kills=num_killed,
        seconds=seconds,
        seconds_alone=alone,
    )
