"""A ladder of sizes: what an idea is worth in compute, where the law is known."""

import numpy as np
import pytest

from lmplay.run.design import design_of
from lmplay.stats.compare import pair_runs, read_run
from lmplay.stats.judge import judge
from lmplay.stats.ladder import EXPONENT, NATS_PER_BYTE, ladder_rows

SIZES = (0.5, 1, 2, 4)
ALPHA, SCALE = 0.15, 12.0


@pytest.fixture
def ladder(make_run):
    """Makes runs whose baseline follows the law, and whose idea is worth so much more compute."""

    def make(worth, seeds=4, noise=0.002):
        draw, runs = np.random.default_rng(0), []
        for size in SIZES:
            flops = 2000 * 1e6 * size**2
            for seed in range(seeds):
                shared = draw.normal(0, 0.01)
                for label, more in (("gpt2ish", 1.0), ("ue", worth(size))):
                    loss = NATS_PER_BYTE + SCALE * (flops * more) ** -ALPHA + shared
                    loss += draw.normal(0, noise)
                    changes = {} if size == 1 else {"size": size}
                    folder = make_run(
                        label if size == 1 else f"{label},size={size:g}", seed=seed,
                        changes=changes, losses=[5.0] * 19 + [float(loss)],
                        flops_per_token=1e6 * size**2, design=design_of(str(seeds)),
                    )  # fmt: skip
                    runs.append(read_run(folder))
        return pair_runs(runs, "gpt2ish")

    return make


def test_a_constant_worth_is_found_at_every_size_and_neither_grows_nor_shrinks(ladder):
    (row,) = ladder_rows(ladder(lambda size: 1.5))

    assert row["alpha"] == pytest.approx(ALPHA, rel=0.1)
    assert row["floor"] == pytest.approx(NATS_PER_BYTE)
    assert [rung["size"] for rung in row["sizes"]] == list(SIZES)
    for rung in row["sizes"]:
        assert rung["interval"][0] < 1.5 < rung["interval"][1]
    assert row["trend"]["1"] == "cannot tell"


@pytest.mark.parametrize(("power", "word"), [(0.5, "grows"), (-0.5, "shrinks")])
def test_a_worth_that_follows_the_size_is_told(ladder, power, word):
    (row,) = ladder_rows(ladder(lambda size: 2 * size**power, noise=0.0005))

    assert set(row["trend"].values()) == {word}


def test_each_size_is_held_against_its_own_baseline(ladder):
    rows = judge(ladder(lambda size: 3.0))

    assert [(row["experiment"], row["baseline"]) for row in rows[:2]] == [
        ("gpt2ish", "gpt2ish"),
        ("ue", "gpt2ish"),
    ]
    for row in rows:
        assert row["experiment"].partition(",")[2] == row["baseline"].partition(",")[2]


def test_two_sizes_are_no_ladder(ladder):
    pairs = [p for p in ladder(lambda size: 2.0) if p.run.facts.changes.get("size", 1) < 2]

    assert ladder_rows(pairs) == []


def test_a_loss_below_the_floor_gives_no_worth(make_run):
    runs = [
        read_run(make_run(f"{label},size={size}", seed=seed, losses=[0.1] * 20,
                          changes={"size": size}, flops_per_token=size))
        for label in ("gpt2ish", "ue") for size in (2, 3, 4) for seed in (0, 1)
    ]  # fmt: skip
    (row,) = ladder_rows(pair_runs(runs, "gpt2ish"))

    assert row["sizes"] == [] and row["alpha"] is None


def test_a_margin_in_compute_is_what_the_baseline_would_gain_from_it(make_run):
    law = NATS_PER_BYTE + SCALE * (2e9) ** -EXPONENT
    more = NATS_PER_BYTE + SCALE * (2e9 * 1.05) ** -EXPONENT
    runs = []
    for label, loss in (("gpt2ish", law), ("ue", law + 1e-4)):
        for seed in range(4):
            losses = [5.0] * 19 + [loss + 1e-5 * seed * (label == "ue")]
            runs.append(read_run(make_run(label, seed=seed, losses=losses, design=design_of("4"))))
    row = judge(pair_runs(runs, "gpt2ish"), margin="5%")[1]

    assert row["margin"] == pytest.approx(law - more, rel=0.05)
    assert row["verdict"] == f"equal within {row['margin']:g}"
