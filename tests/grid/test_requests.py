"""A grid is a flat list of requests."""

from pathlib import Path

import pytest

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.grid.grid_display import GridDisplay
from lmplay.grid.requests import expand
from lmplay.plan import read_plan
from lmplay.run.request import Request


@pytest.fixture
def template(place):
    changes = {"optimizer.lr": 0.02}
    return Request(resolve("gpt2ish"), read_plan("words", changes), changes, {}, device="cpu")


def test_every_experiment_of_one_seed_stands_before_the_next_seed(template):
    entries = [resolve("gpt2ish"), resolve("value_norm")]
    requests = expand(template, entries, range(3, 5), entries[0], "tokens", GridDisplay("words"))

    assert [(each.label, each.seed) for each in requests] == [
        ("gpt2ish,lr=0.02", 3),
        ("value_norm,lr=0.02", 3),
        ("gpt2ish,lr=0.02", 4),
        ("value_norm,lr=0.02", 4),
    ]
    assert len({each.folder.path for each in requests}) == 4
    assert requests[3].folder.path == Path("runs/words/value_norm,optimizer.lr=0.02/seed-4")


def test_an_experiment_that_fails_the_check_is_refused_before_any_run(template, place):
    (place / "experiments").mkdir()
    source = resolve("gpt2ish").source
    assert "is_causal=T > 1" in source
    (place / "experiments/leaky.py").write_text(
        source.replace("is_causal=T > 1", "is_causal=False")
    )

    with pytest.raises(UserError, match="leaky fails the check"):
        expand(template, [resolve("leaky")], range(2), template.entry, "tokens", GridDisplay(""))
