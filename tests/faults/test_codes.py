"""Each failure ends with the exit code that scripts rely on, and in words."""

import os

from lmplay.errors import BAD_CHECKPOINT, BAD_INPUT, LOCKED, NO_DATA, NUMERIC

SOAK = bool(os.environ.get("LMP_SOAK"))
NO_HUB = """
from lmplay.data import hub
hub._SECONDS = 0.1

def open_hub(*_):
    raise ConnectionError("no route to host")

hub.open_hub = open_hub
"""


def damaged(bench) -> None:
    """A run of which no checkpoint is whole."""
    bench.train("damaged", fault="term@step.part:20", code=143)
    for path in bench.folder("damaged").checkpoints.glob("step-*/model.safetensors"):
        os.truncate(path, 9)


def test_every_failure_has_the_code_that_is_documented(bench, trials, figure):
    bench.plan()
    hub = {"hub": {"hub": "someone/text"}}
    bench.plan("hub", datasets=hub, stages=[{"datasets": ["hub"]}])
    bench.plan("no_rate", optimizer={"name": "AdamW", "lr": -1.0})
    held = bench.start("held", fault="stop@step.part:9")
    assert held.has_stopped()
    if SOAK:
        bench.train("done")
        damaged(bench)
    term, full = {"fault": "term@step.part:9"}, {"fault": "enospc@save.write:8"}
    cases = [
        ("held", [], {}, LOCKED),
        ("a", [], {"plan": "hub", "setup": NO_HUB}, NO_DATA),
        ("b", ["--exp", "nothing"], {}, BAD_INPUT),
        ("c", [], {"plan": "no_rate"}, BAD_INPUT),
        ("d", ["--set", "optimizer.lr=1e30"], {}, NUMERIC),
        ("done", [], {}, 0),
        ("damaged", [], {}, BAD_CHECKPOINT),
        ("e", [], full, BAD_CHECKPOINT),
        ("f", [], {"fault": "enospc@row.write:3"}, 1),
        ("g", [], term, 143),
        ("h", [], {"fault": "int@step.part:9"}, 130),
        ("i", [], {"fault": "hup@step.part:9", "setup": "import signal\nsignal.signal(1, 0)"}, 129),
    ]
    cases = trials(cases[:2], cases)
    for out, args, options, code in cases:
        trial = bench.train(out, *args, code=code, **options)
        assert "Traceback" not in trial.said()
        assert code in (0, 129, 130, 143) or "error: " in trial.said()
    held.process.kill()
    held.wait()

    figure("exit_code_table", f"{len(cases)} of {len(cases)} codes as documented")
