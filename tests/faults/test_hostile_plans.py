"""A plan is data: whatever stands in it, it is read or refused in one sentence with its place."""

import json
import os
import random
from functools import reduce

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.plan_file import read_plan
from lmplay.run.changes import refuse_unfit
from lmplay.train.clock import Clock

SOAK = bool(os.environ.get("LMP_SOAK"))
PLAN = {
    "tokenizer": "byte",
    "sequence_length": 16,
    "batch_size": [[0, 2], [0.5, 4]],
    "model": {"num_blocks": 1, "width": 8, "num_heads": 2},
    "datasets": {"one": {"files": ["one.txt"]}, "two": {"hub": "someone/something"}},
    "stages": [{"datasets": ["one"], "epochs": 2}, {"datasets": ["one", "two"], "mixing": [1, 2]}],
    "tokens": 10_000,
    "optimizer": {"name": "AdamW", "lr": 0.01, "roles": {"table": {"lr": 0.1}}},
    "schedule": {"name": "cosine", "warmup": 0.1},
    "precision": "fp32",
    "validation": {"tokens": 200, "fraction": 0.2, "every_tokens": 320},
    "checkpoints": {"every_tokens": 320, "keep": 2},
}
WORDS = [
    "../../../etc/passwd",
    "$(touch canary)",
    "__import__('os').abort()",
    "",
    "\x00",
    "é" * 300,
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths(value, here=()):
    """The way to each place in a plan."""
    yield here
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*here, key))


def put(value, path, new):
    """A copy of the plan with another value at this place."""
    if not path:
        return new
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = put(copy[key], rest, new)
    return copy


def at(value, path):
    """What stands at this place."""
    return reduce(lambda inner, key: inner[key], path, value)


def near(value):
    """What a user may have meant, or mistyped, in place of this value."""
    if type(value) in (int, float):
        return st.sampled_from([0, 1, 2, 3, 5, 64, -value, value * 2, value / 2, 1e9, 1e18, 1e-9])
    return st.sampled_from([value, [value], str(value).upper(), "fp16", "SGD", "Muon", "constant"])


@st.composite
def hostile(draw):
    """The text of a plan: one to three places changed, a key added, or no JSON at all."""
    plan = PLAN
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([*paths(plan)]))
        plan = put(plan, path, draw(st.one_of(JSON, near(at(plan, path)))))
        if isinstance(plan, dict) and draw(st.integers(0, 4)) == 0:
            plan = {**plan, draw(st.text(max_size=9)): draw(JSON)}
    text = json.dumps(plan)
    ways = {
        "cut": lambda: text[: draw(st.integers(0, len(text)))].encode(),
        "deep": lambda: b"[" * 100_000,
        "long": lambda: text.encode() + b" " * 10_000_000,
        "twice": lambda: text.encode() * 2,
        "bytes": lambda: draw(st.binary(max_size=30)),
    }
    way = draw(st.sampled_from([None] * 20 + [*ways]))
    return ways[way]() if way else text.encode()


counted = {"read": 0, "refused": 0}


@settings(
    max_examples=2000 if SOAK else 100,
    deadline=None,
    suppress_health_check=[*HealthCheck],
    derandomize=True,
    database=None,
)
@given(text=hostile())
def check_plan(folder, text):
    path = folder / "hostile.json"
    path.write_bytes(text)
    try:
        plan = read_plan(str(path))
        refuse_unfit(resolve("gpt2ish"), plan, {})
        if plan.tokens is not None:
            clock = Clock(plan, None)
            clock.at(0)
            clock.at(clock.num_steps)
    except UserError as error:
        counted["refused"] += 1
        assert error.problem and "\n" not in error.problem, error.problem
    else:
        counted["read"] += 1


def test_any_plan_is_read_or_refused_in_one_sentence(tmp_path, monkeypatch, figure):
    monkeypatch.chdir(tmp_path)
    check_plan(tmp_path)

    assert not list(tmp_path.rglob("canary"))
    num = sum(counted.values())
    figure(
        "hostile_plan",
        f"{num:,} plans: {counted['refused']:,} refused in words, 0 tracebacks",
        **counted,
    )


def test_a_plan_that_was_read_is_trained_or_refused_in_words(bench, trials, figure):
    draw, codes = random.Random(0), {}
    sizes = [-1, 0, 1, 2, 3, 7, 2.5, 1e9, "x", None, [], True]
    bench.plan()
    plan = json.loads((bench.path / "plans" / "tiny.json").read_text()) | {"tokens": 160}
    places = [path for path in paths(plan) if path and path[0] not in ("datasets", "tokenizer")]
    num = trials(6, 200)
    for number in range(num):
        name = f"hostile-{number}"
        changed = put(plan, draw.choice(places), draw.choice(sizes))
        (bench.path / "plans" / f"{name}.json").write_text(json.dumps(changed))
        setup = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))"
        trial = bench.start(name, plan=name, fault="int@step.taken:4", setup=setup)
        code = trial.wait()
        codes[code] = codes.get(code, 0) + 1
        assert code in (0, 2, 3, 4, 5, 130), f"{changed}\n{trial.said()}"
        assert "Traceback" not in trial.said(), f"{changed}\n{trial.said()}"
    figure("hostile_plan_trained", f"{num} plans trained or refused, 0 tracebacks", codes=codes)
