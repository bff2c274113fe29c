"""The coordinate check: with the multipliers, a step changes as much at every width and depth."""

import pytest
import torch
from torch.testing import assert_close

from lmplay.catalog.entries import resolve
from lmplay.model.experiment import load_experiment
from lmplay.model.roles import roles_of
from lmplay.optim.joint import make_optimizer
from lmplay.optim.known import replaced
from lmplay.optim.scaling import scaled
from lmplay.plan import changed_plan
from lmplay.plan_file import read_plan

STEPS = 4
BASE = {"base_width": 64, "base_blocks": 2}
SMALL = {"vocab_size": 97, "max_len": 16, "embed_dropout": 0.0, "ff_dropout": 0.0}


def change(name, width=64, num_blocks=2, optimizer="AdamW", **options):
    """Root mean square of what STEPS steps change of the last hidden state."""
    experiment = load_experiment(resolve(name))
    base = BASE if "base_width" in experiment.fields else {}
    sizes = {"width": width, "num_heads": width // 32, "num_blocks": num_blocks}
    config = experiment.config(**SMALL, **sizes, **base)
    plan = read_plan("quick", {"scaling.by_width": "mup", "optimizer.lr": 2e-3})
    own = replaced(plan.optimizer, optimizer)
    plan = changed_plan(plan, {"optimizer": {**own, "options": own["options"] | options}})
    if base:
        plan = changed_plan(plan, scaled(plan, width / 64, 1))
    model = experiment.model(config, seed=0)
    optimizer = make_optimizer(plan.optimizer, model, roles_of(experiment, config))
    tokens_BT = torch.randint(97, (8, 17), generator=torch.Generator().manual_seed(0))
    before_BTC = model.hidden(tokens_BT[:, :-1]).detach()
    for _ in range(STEPS):
        logits_BTV = model(tokens_BT[:, :-1])
        targets_N = tokens_BT[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.set_factor(1.0)
        optimizer.step()
    after_BTC = model.hidden(tokens_BT[:, :-1]).detach()
    return (after_BTC - before_BTC).square().mean().sqrt().item()


def test_a_step_changes_as_much_at_every_width():
    found = [change("complete_p", width) for width in (64, 128, 256)]
    bare = [change("gpt2ish", width) for width in (64, 256)]

    assert max(found) < 1.3 * min(found), found
    assert bare[1] > 1.8 * bare[0], bare


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        *[(name, {}) for name in ("Muon", "NorMuon", "RMNP", "Lion", "LAMB", "Adafactor", "AdamH")],
        *[(name, {"scale": "original"}) for name in ("Muon", "RMNP")],
    ],
)
def test_the_rule_for_the_width_holds_for_other_optimizers(optimizer, options):
    found = [change("complete_p", width, 2, optimizer, **options) for width in (64, 256)]

    assert max(found) < 1.2 * min(found), found


def test_a_step_changes_as_much_at_every_depth():
    found = [change("complete_p", num_blocks=number) for number in (2, 4, 8)]
    bare = [change("mup", num_blocks=number) for number in (2, 8)]

    assert max(found) < 1.3 * min(found), found
    assert bare[1] > 1.8 * bare[0], bare


@pytest.mark.parametrize("name", ["complete_p", "mup", "depth_mup"])
def test_at_the_size_that_rates_were_found_at_it_is_gpt2ish(name):
    own, parent = (load_experiment(resolve(each)) for each in (name, "gpt2ish"))
    sizes = {"width": 64, "num_heads": 2, "num_blocks": 2}
    tokens_BT = torch.randint(97, (2, 16))
    models = [
        own.model(own.config(**SMALL, **sizes, **BASE), seed=3),
        own.model(own.config(**SMALL, **sizes), seed=3),
        parent.model(parent.config(**SMALL, **sizes), seed=3),
    ]
    plain_BTV = models[2](tokens_BT)
    for model in models[:2]:
        assert_close(model(tokens_BT), plain_BTV, rtol=0, atol=0)
        assert model.parameter_groups()[0]["lr_scale"] == 1.0


def test_blocks_of_depth_mup_have_a_lower_rate_and_all_parameters_one_group():
    experiment = load_experiment(resolve("depth_mup"))
    config = experiment.config(**experiment.tiny | {"num_blocks": 4})
    model, roles = experiment.model(config), roles_of(experiment, config)
    optimizer = make_optimizer(read_plan("quick").optimizer, model, roles)
    optimizer.set_factor(1.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        share = 0.5 if name.startswith("blocks.") else 1.0
        assert rates[id(parameter)] == pytest.approx(4e-3 * share)
