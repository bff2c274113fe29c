import os
import subprocess
import sys

import pytest

from lmplay.machine import num_cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process")
def test_a_core_that_was_taken_away_does_not_count():
    core = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{core}}})\n"
        "from lmplay.machine import num_cores; print(num_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)

    assert int(done.stdout) == 1


def test_without_such_a_setting_every_core_counts(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)

    assert num_cores() == 7
