"""Looks, screens, margins and rates: what a verdict says, and when."""

import numpy as np
import pytest

from lmplay.run.design import Rate, design_of
from lmplay.stats.arms import Arm, Look, decide, take_look
from lmplay.stats.judge import UNDECLARED, verdicts_of
from lmplay.stats.looks import level_of, spent_at
from lmplay.stats.verdict import mean_interval, paired


@pytest.fixture
def arms(make_run):
    """Makes runs of a baseline and of ideas whose losses differ from its by these numbers."""

    def make(design, **differences):
        draw, folders = np.random.default_rng(0), []
        seeds = design.seeds if design else range(99)
        losses = dict(zip(seeds, draw.normal(4, 0.05, len(seeds)), strict=True))
        longest = max(map(len, differences.values()))
        for label, values in {"gpt2ish": np.zeros(longest), **differences}.items():
            for seed, value in zip(seeds, values, strict=False):
                loss = float(losses[seed] + value)
                folders.append(
                    make_run(label, seed=seed, losses=[5.0] * 19 + [loss], design=design)
                )
        return folders

    return make


def row_of(rows, label):
    return next(row for row in rows if row["experiment"] == label)


def verdict(folders, label="ue", **options):
    return row_of(verdicts_of(folders, "gpt2ish", **options), label)


CLEAR = [-0.1, -0.11, -0.105, -0.1, -0.11, -0.1, -0.1, -0.1]
UNCLEAR = [-0.1, 0.08, -0.01, 0.02, -0.03, 0.01, 0.05, -0.06]


def test_a_look_uses_its_seeds_at_its_level_and_shows_that_interval(arms):
    design = design_of("3..8")
    values = np.array([-0.10, 0.03, -0.05, -0.06, -0.02, 0.7])  # the sixth is of no look yet
    row = verdict(arms(design, ue=values))

    level = level_of((3, 5, 8))
    test = paired(values[:5], level)
    assert row["seeds"] == 5 and row["difference"] == pytest.approx(values[:5].mean())
    assert row["look"] == {"number": 2, "of": 3, "level": level}
    assert row["p"] == pytest.approx(spent_at((3, 5, 8), test.p))
    assert row["interval"] == pytest.approx([test.low, test.high])
    assert (row["verdict"], row["next"], row["is_pending"]) == ("cannot tell", "--seeds 3..8", True)


def test_what_a_look_has_told_stays_told_whatever_comes_later(arms):
    design = design_of("3..8")
    row = verdict(arms(design, ue=[-0.1, -0.1001, -0.1002, 0.5, -0.9, 0.7, -0.2, 0.6]))

    assert (row["verdict"], row["seeds"], row["next"]) == ("better", 3, None)


def test_before_the_first_look_there_is_no_p(arms):
    row = verdict(arms(design_of("5"), ue=CLEAR[:4]))

    assert (row["p"], row["interval"], row["verdict"]) == (None, None, "cannot tell")
    assert "its first look is at 5 seeds" in row["marks"] and row["is_pending"]


def test_after_the_last_look_only_fresh_seeds_are_left(arms):
    row = verdict(arms(design_of("3..8"), ue=UNCLEAR))

    assert row["verdict"] == "cannot tell" and not row["is_pending"]
    assert row["next"] is None or row["next"].startswith("--seed 8 --seeds ")


def test_later_seeds_are_judged_alone_as_fresh_ones(arms):
    first, second = design_of("5"), design_of("5", 5)
    row = verdict([*arms(first, ue=UNCLEAR[:5]), *arms(second, ue=CLEAR[:5])])

    assert (row["seeds"], row["difference"]) == (5, pytest.approx(np.mean(CLEAR[:5])))
    assert row["verdict"] == "better"
    assert "looked at before, left out: seeds 0, 1, 2, 3, 4" in row["marks"]


def test_runs_without_a_design_are_marked(make_run, arms):
    row = verdict(arms(None, ue=CLEAR[:3]))

    assert UNDECLARED in row["marks"] and row["look"] is None


def test_a_screens_seeds_never_enter_the_verdict(arms):
    design = design_of("3+5")
    row = verdict(arms(design, ue=[-9.0, -9.1, -9.2, *CLEAR[:5]]))

    assert (row["seeds"], row["difference"]) == (5, pytest.approx(np.mean(CLEAR[:5])))
    assert row["verdict"] == "better" and row["look"]["number"] == 1


def test_what_a_screen_drops_is_not_confirmed_and_not_counted_by_holm(arms):
    design = design_of("3+5")
    ideas = {f"null{i}": UNCLEAR[:3] for i in range(6)}
    folders = arms(design, ue=[*CLEAR[:3], -0.03, -0.02, -0.028, -0.022, -0.04], **ideas)
    rows = verdicts_of(folders, "gpt2ish")
    dropped, kept = row_of(rows, "null0"), row_of(rows, "ue")

    assert (dropped["verdict"], dropped["seeds"], dropped["p_holm"]) == ("not confirmed", 3, None)
    assert dropped["p"] > 0.2 and dropped["next"] is None and not dropped["is_pending"]
    assert kept["p_holm"] == kept["p"] and kept["verdict"] == "better"


def test_what_a_screen_keeps_goes_on(arms):
    row = verdict(arms(design_of("3+5"), ue=CLEAR[:3]))

    assert row["verdict"] == "cannot tell" and row["is_pending"]
    assert row["p_holm"] is None and "kept by the screen" in row["marks"]


def test_ideas_that_are_still_to_be_tested_count_for_holm(arms):
    folders = arms(design_of("3..8"), ue=CLEAR[:3], other=UNCLEAR[:2])
    row = verdict(folders)

    assert row["p_holm"] == pytest.approx(min(1, 2 * row["p"]))


def test_equal_within_a_margin_is_two_one_sided_tests(arms):
    values = np.array([0.001, -0.002, 0.0015, -0.0005, 0.0005])
    folders = arms(design_of("5"), ue=values)
    _, low, high = mean_interval(values, 0.1)
    edge = max(-low, high)

    assert verdict(folders, margin=edge * 1.01)["verdict"] == f"equal within {edge * 1.01:g}"
    assert verdict(folders, margin=edge * 0.99)["verdict"] == "cannot tell"
    assert verdict(folders)["verdict"] == "cannot tell"


def test_a_difference_that_is_there_but_within_the_margin_is_equal(arms):
    folders = arms(design_of("5"), ue=[-0.002, -0.0021, -0.0019, -0.002, -0.0022])
    row = verdict(folders, margin=0.01)

    assert row["verdict"] == "equal within 0.01" and "better, by less than 0.01" in row["marks"]
    assert verdict(folders)["verdict"] == "better"


def test_a_difference_beyond_the_margin_says_so(arms):
    row = verdict(arms(design_of("5"), ue=CLEAR[:5]), margin=0.01)

    assert row["verdict"] == "better" and "better by more than 0.01" in row["marks"]


def test_an_idea_that_failed_on_a_seed_is_not_equal(arms, make_run):
    design = design_of("5")
    folders = arms(design, ue=np.zeros(5))
    make_run("ue", seed=4, done=10, status="failed", design=design)

    assert verdict(folders, margin=0.01)["verdict"] == "cannot tell"


def test_the_pairs_say_how_alike_they_are(arms):
    row = verdict(arms(design_of("5"), ue=[-0.001, 0.002, 0.001, 0.0, -0.002]))

    assert row["difference_sd"] == pytest.approx(np.std([-1, 2, 1, 0, -2], ddof=1) / 1000)
    assert 0.9 < row["correlation"] < 1


@pytest.fixture
def at_rates(make_run):
    """Makes runs of one label at several rates, whose losses lie on a parabola."""

    def make(label, best, bottom, seeds=5, design=None, factors=(0.5, 1, 2)):
        design = design or design_of(str(seeds), 0, [0.5, 1, 2])
        draw = np.random.default_rng(len(label))
        folders = []
        for seed in range(seeds):
            noise = draw.normal(0, 0.001)
            for factor in factors:
                loss = bottom + noise + 0.3 * np.log(factor / best) ** 2
                name = label if factor == 1 else f"{label},lr={factor / 1000:g}"
                folders.append(
                    make_run(
                        name, seed=seed, losses=[5.0] * 19 + [float(loss)], design=design,
                        rate=Rate(factor=factor, of=label), lr=factor / 1000,
                    )
                )  # fmt: skip
        return folders

    return make


def test_the_verdict_is_on_the_lowest_loss_over_the_rates(at_rates):
    folders = [*at_rates("gpt2ish", 1.3, 4.0), *at_rates("ue", 0.8, 4.1)]
    base, row = verdicts_of(folders, "gpt2ish")

    assert base["mean"] == pytest.approx(4.0, abs=0.002) and row["rates"] == [0.5, 1, 2]
    assert row["difference"] == pytest.approx(0.1, abs=0.002) and row["verdict"] == "worse"
    spread = np.mean([0.3 * np.log(factor / 0.8) ** 2 for factor in (0.5, 1, 2)])
    assert row["sensitivity"] == pytest.approx(spread, abs=1e-6)


def test_an_idea_that_only_mends_a_bad_rate_is_told_from_a_better_one(at_rates):
    folders = [*at_rates("gpt2ish", 1.9, 4.0), *at_rates("ue", 1.0, 4.0)]
    base, row = verdicts_of(folders, "gpt2ish")

    assert row["verdict"] == "cannot tell" and row["sensitivity"] < base["sensitivity"]


def test_a_best_rate_at_the_edge_is_flagged(at_rates):
    row = verdict([*at_rates("gpt2ish", 1, 4.0), *at_rates("ue", 3.0, 4.0)])

    assert "best at the highest rate on 5 of 5 seeds: try beyond" in row["marks"]
    assert "no parabola on 5 of 5 seeds: the best run counts" in row["marks"]


def test_three_rates_are_not_held_against_one(at_rates):
    folders = [
        *at_rates("gpt2ish", 1, 4.0, design=design_of("5"), factors=(1,)),
        *at_rates("ue", 1.0, 4.0),
    ]
    row = verdict(folders)

    assert row["verdict"] is None and row["p"] is None
    assert "not compared: not both have a run at each of the rates 0.5, 1, 2" in row["marks"]


@pytest.mark.parametrize(("looks", "ideas"), [("3..8", 1), ("5", 8), ("3+5", 8)])
def test_ideas_without_an_effect_are_told_apart_in_few_of_many_tables(looks, ideas):
    """Through the arms themselves: looks, screen and Holm, on 300 tables."""
    design, draw, errors = design_of(looks), np.random.default_rng(5), 0
    for _ in range(300):
        made = [null_arm(design, draw) for _ in range(ideas)]
        for number in range(len(design.stages)):
            for arm in made:
                if arm.word is None:
                    values = arm.values[list(design.stages[number])]
                    take_look(arm, number, Look([], [], values, np.zeros(len(values)), []))
            decide(made)
        errors += any(arm.word in ("better", "worse") for arm in made)

    assert errors <= 15 + 3 * np.sqrt(15)  # 5 % and three standard errors


def null_arm(design, draw):
    arm = Arm([], design, [], [[]] * len(design.stages), [1.0])
    arm.values = draw.standard_normal(design.seeds.stop)
    return arm


def test_one_seed_of_a_grid_may_be_the_first_of_five(arms):
    row = verdict(arms(design_of("1"), ue=[-0.1]))

    assert (row["verdict"], row["next"]) == ("cannot tell", "--seeds 5")
