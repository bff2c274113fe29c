"""A grid is a flat list of requests."""

from dataclasses import replace
from pathlib import Path

import pytest

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.grid.grid_display import GridDisplay
from lmplay.grid.requests import arm_of, at_size, declare, expand
from lmplay.optim.known import replaced
from lmplay.plan_file import read_plan
from lmplay.run.design import design_of
from lmplay.run.request import Request


@pytest.fixture
def template(place):
    changes = {"optimizer.lr": 0.02}
    return Request(resolve("gpt2ish"), read_plan("words", changes), changes, {}, device="cpu")


def expanded(template, entries, design):
    return expand(template, entries, design, entries[0], "tokens", GridDisplay("words"))


def test_every_experiment_of_one_seed_stands_before_the_next_seed(template):
    entries = [resolve("gpt2ish"), resolve("value_norm")]
    requests = expand(
        template, entries, design_of("2", 3), entries[0], "tokens", GridDisplay("words")
    )

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
        expand(
            template, [resolve("leaky")], design_of("2"), template.entry, "tokens", GridDisplay("")
        )


def test_rates_are_runs_of_one_arm_whose_plan_and_label_say_the_rate(template):
    requests = expanded(template, [template.entry], design_of("1", 0, [0.5, 1, 2]))

    assert [each.label for each in requests] == [
        "gpt2ish,lr=0.01",
        "gpt2ish,lr=0.02",
        "gpt2ish,lr=0.04",
    ]
    assert [each.plan.optimizer.lr for each in requests] == [0.01, 0.02, 0.04]
    assert {arm_of(each) for each in requests} == {"gpt2ish,lr=0.02"}


def test_optimizers_are_arms_of_their_own(template):
    others = [
        replace(
            template,
            plan=read_plan("words", {"optimizer": replaced(template.plan.optimizer, name)}),
            changes={"optimizer": name},
        )
        for name in ("Muon", "Lion")
    ]
    requests = expand(
        template, [template.entry], design_of("1", 0, [1, 2]), template.entry, "tokens",
        GridDisplay("words"), others=others,
    )  # fmt: skip

    assert [each.plan.optimizer.name for each in requests] == [
        "AdamW", "AdamW", "Muon", "Muon", "Lion", "Lion",
    ]  # fmt: skip
    assert [arm_of(each) for each in requests[::2]] == [
        "gpt2ish,lr=0.02", "gpt2ish,optimizer=Muon", "gpt2ish,optimizer=Lion",
    ]  # fmt: skip
    assert requests[3].plan.optimizer.lr == 2 * requests[2].plan.optimizer.lr


@pytest.fixture
def trained(template, make_facts):
    """Writes a finished run.json of this request."""

    def write(request, **values):
        facts = make_facts(label=request.label, seed=request.seed, **values)
        request.folder.write(replace(facts, status="finished"))
        return request.folder

    return write


def test_runs_that_declare_nothing_take_up_the_design(template, trained):
    requests = expanded(template, [template.entry], design_of("2"))
    folder = trained(requests[0])
    declare(requests, set())

    assert folder.read().design == requests[0].design


def test_spent_seeds_are_never_spent_again(template, trained):
    design = design_of("3..8")
    requests = expanded(template, [template.entry], design)
    for request in requests[:5]:
        trained(request, design=design)
    declare(requests, set())  # which is how it goes on
    again = expanded(template, [template.entry], design_of("5"))

    with pytest.raises(UserError) as raised:
        declare(again, set())
    assert raised.value.code == 2
    assert "declared as --seeds 3..8, seeds 0 to 7" in raised.value.problem
    assert raised.value.problem.endswith("of its looks 8 are left")
    assert raised.value.hint == (
        "--seeds 3..8 goes on with it; --seed 8 --seeds 5 takes fresh seeds"
    )
    declare(again, {again[0].label})  # a baseline serves every design


def test_one_seed_spends_nothing(template, trained):
    requests = expanded(template, [template.entry], design_of("5"))
    single = expanded(template, [template.entry], design_of("1"))
    folder = trained(requests[0], design=single[0].design)
    declare(requests, set())
    declare(single, set())

    assert folder.read().design == requests[0].design


def test_one_rate_for_one_idea_and_three_for_another_contradict(template, trained):
    requests = expanded(template, [template.entry], design_of("2"))
    trained(requests[0], design=requests[0].design)

    with pytest.raises(UserError, match="not as --seeds 2 --rates"):
        declare(expanded(template, [template.entry], design_of("2", 0, [0.5, 1, 2])), set())


def test_a_frozen_name_that_an_experiment_lacks_is_refused_before_any_run(place):
    freeze = {"freeze": ["token_table.integration.*"]}
    template = Request(resolve("ue"), read_plan("words", freeze), freeze, {}, device="cpu")
    with pytest.raises(UserError) as raised:
        expanded(template, [resolve("ue"), resolve("gpt2ish")], design_of("1", 0))

    assert "token_table.integration" in raised.value.problem
    assert not Path("runs").exists()


def test_a_rung_has_heads_blocks_tokens_and_rates_by_rule(template):
    plan = template.plan.model_copy(update={"tokens": 100_000})
    plan = plan.model_copy(update={"model": {"num_blocks": 2, "width": 16, "num_heads": 2}})
    own, small, large = (at_size(replace(template, plan=plan), size) for size in (1, 0.5, 2))

    assert own.plan == plan and own.label == "gpt2ish,lr=0.02"
    assert small.plan.model == {"num_blocks": 1, "width": 8, "num_heads": 1}
    assert large.plan.model == {"num_blocks": 4, "width": 32, "num_heads": 4}
    assert small.plan.optimizer.lr == 0.04 and large.plan.optimizer.lr == 0.01
    assert small.plan.tokens < 100_000 / 2 and large.plan.tokens > 2 * 100_000
    assert large.label == "gpt2ish,lr=0.02,size=2"


def test_all_experiments_of_a_size_have_its_plan(template):
    entries = [resolve("gpt2ish"), resolve("ue")]
    display = GridDisplay("words")
    requests = expand(template, entries, design_of("1"), entries[0], "tokens", display, (0.5, 1, 2))

    assert [each.entry.name for each in requests] == ["gpt2ish", "ue"] * 3
    assert all(a.plan == b.plan for a, b in zip(requests[::2], requests[1::2], strict=True))
    assert len({each.plan.tokens for each in requests}) == 3


def test_a_plan_without_a_size_has_no_ladder(template):
    plan = template.plan.model_copy(update={"model": {}})

    with pytest.raises(UserError, match="--sizes"):
        at_size(replace(template, plan=plan), 2)
