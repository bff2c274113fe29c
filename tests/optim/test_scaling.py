"""What rates, decay and batch become at another width and on more tokens."""

import pytest
from hypothesis import given
from hypothesis.strategies import floats, sampled_from

from lmplay.errors import UserError
from lmplay.optim.known import replaced
from lmplay.optim.rules import rule_of
from lmplay.optim.scaling import rates_times, scaled
from lmplay.plan import Plan, changed_plan
from lmplay.plan_file import read_plan

RULES = [(width, tokens) for width in ("all", "mup") for tokens in ("none", "power", "sde")]


def quick(width="all", tokens="none", **changes) -> Plan:
    rules = {"scaling.by_width": width, "scaling.by_tokens": tokens}
    return read_plan("quick", rules | {key.replace("_to_", "."): v for key, v in changes.items()})


def at(plan, wider, longer):
    """The plan by its rules; its rates and decays by role."""
    made = changed_plan(plan, scaled(plan, wider, longer))
    rules = {role: rule_of(made.optimizer, role) for role in ("matrix", "table", "head", "vector")}
    return made, {role: (rule.lr, rule.weight_decay) for role, rule in rules.items()}


@pytest.mark.parametrize("rules", RULES)
def test_at_its_own_size_a_plan_says_what_it_said(rules):
    plan = quick(*rules)

    assert at(plan, 1, 1)[1] == at(quick(), 1, 1)[1]
    assert at(plan, 1, 1)[0].batch_size in (8, [[0.0, 8]])


def test_by_default_every_rate_is_as_one_over_the_width_and_nothing_else_changes():
    plan, rates = at(quick(), 4, 10)

    assert set(rates.values()) == {(1e-3, 0.1)}
    assert plan.batch_size == 8 and plan.optimizer.options == quick().optimizer.options


def test_mup_lowers_the_rates_of_what_is_as_wide_as_the_model_and_raises_its_decay():
    rates = at(quick("mup"), 4, 10)[1]

    assert rates["matrix"] == rates["head"] == (1e-3, 0.4)
    assert rates["table"] == rates["vector"] == (4e-3, 0.1)


@given(sampled_from(["power", "sde"]), sampled_from([1, 2, 4]), floats(0.02, 60))
def test_weights_forget_over_the_same_share_of_a_longer_run(tokens, wider, longer):
    """Tokens of a step over rate, decay and tokens of the run are what they were."""
    plan, rates = at(quick("mup", tokens), wider, longer)

    lr, decay = rates["matrix"]
    own = 8 / (4e-3 * 0.1)
    assert plan.batch_size / (lr * decay * longer) == pytest.approx(own, rel=1e-8)


def test_the_batch_follows_a_power_of_the_tokens_and_rates_its_root():
    sizes = {longer: at(quick(tokens="power"), 1, longer) for longer in (1 / 64, 1, 2, 8, 64)}

    assert {longer: plan.batch_size for longer, (plan, _) in sizes.items()} == {
        1 / 64: 2, 1: 8, 2: 8, 8: 16, 64: 32,
    }  # fmt: skip
    assert sizes[8][1]["table"][0] == pytest.approx(4e-3 * 2**0.5)


def test_a_batch_that_grows_keeps_its_ramp():
    plan = quick(tokens="power", batch_size=[[0, 4], [0.5, 8]])

    assert at(plan, 1, 64)[0].batch_size == [(0.0, 16), (0.5, 32)]


def test_averages_last_as_long_in_shares_of_the_run():
    plan = at(quick(tokens="sde"), 1, 4)[0]

    assert plan.optimizer.options["betas"] == pytest.approx([0.975, 0.9875])
    assert plan.optimizer.lr == pytest.approx(2e-3)


def test_a_roles_own_rate_and_decay_are_scaled_too():
    plan = quick("mup", optimizer_to_roles={"head": {"lr": 8e-3, "weight_decay": 0.0},
                                            "table": {"lr": 1e-2}})  # fmt: skip
    rates = at(plan, 2, 1)[1]

    assert rates["head"] == (4e-3, 0.0) and rates["table"] == (1e-2, 0.1)


def test_rates_times_a_factor_are_those_that_the_plan_gives():
    muon = quick(optimizer=replaced(quick().optimizer, "soap")).optimizer

    assert rates_times(muon, 2) == {"optimizer.lr": 2 * muon.lr}
    of_vectors = rates_times(muon, 2, "vector")["optimizer.roles.vector.lr"]
    assert of_vectors == pytest.approx(2 * muon.lr / 3, rel=1e-6)  # AdamW has a third of it


@pytest.mark.parametrize(
    ("name", "options", "power"),
    [
        *[(name, {}, 0.5) for name in ("Muon", "NorMuon", "AdaMuon", "TEON", "LAMB", "AdamH")],
        *[("Muon", {"scale": scale}, 0.0) for scale in ("original", "spectral")],
        *[("RMNP", {}, 1.0), ("RMNP", {"scale": "original"}, 0.5), ("SOAP", {}, 1.0)],
        *[("MuonH", {}, 0.0), ("Scion", {}, 0.0), ("Lion", {}, 1.0)],
    ],
)
def test_how_a_matrix_s_rate_and_decay_follow_the_width_is_its_steps_affair(name, options, power):
    own = replaced(quick().optimizer, name)
    own["options"] |= options
    plan = quick("mup", optimizer=own)
    (lr, decay), (wide_lr, wide_decay) = (at(plan, wider, 1)[1]["matrix"] for wider in (1, 4))

    assert wide_lr == pytest.approx(lr / 4**power, rel=1e-6)
    assert wide_decay == pytest.approx(decay * 4**power, rel=1e-6)


def test_the_rule_is_refused_where_steps_are_as_long_as_the_gradient():
    plan = quick("mup", optimizer=replaced(quick().optimizer, "sgd"))

    with pytest.raises(UserError, match="does not hold for SGD"):
        scaled(plan, 2, 1)
