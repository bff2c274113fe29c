"""The contract: what an experiment file must hold, and what it lets be frozen."""

import pytest
import torch

from lmplay.catalog.entries import resolve
from lmplay.catalog.entry import read_source
from lmplay.errors import UserError
from lmplay.model.experiment import freeze, load_experiment, scale
from lmplay.plan import read_plan

GOOD = '''"""One line."""
from dataclasses import dataclass
from torch import nn
{extra}
@dataclass(frozen={frozen})
class Config:
    vocab_size: int
    {max_len}

class Model({base}):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, tokens_BT, cache=None):
        return self.table(tokens_BT)
'''


def loaded(tmp_path, extra="", frozen=True, max_len="max_len: int = 8", base="nn.Module"):
    source = GOOD.format(extra=extra, frozen=frozen, max_len=max_len, base=base)
    return load_experiment(read_source(source, tmp_path / "idea.py")[0])


def test_a_file_that_keeps_the_contract_loads(tmp_path):
    experiment = loaded(tmp_path)
    model = experiment.model(experiment.config(vocab_size=5), seed=1)

    assert model(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"frozen": False}, "Config is not a frozen dataclass"),
        ({"max_len": "length: int = 8"}, "Config lacks the field max_len"),
        ({"base": "dict"}, "Model is not an nn.Module"),
        ({"extra": "import no_such_package"}, "line 4 does not import"),
        ({"extra": "VARIANTS = {'wide': {'widht': 3}}"}, "wide sets 'widht'"),
    ],
)
def test_a_broken_contract_is_told_with_its_rule(tmp_path, change, told):
    with pytest.raises(UserError) as raised:
        loaded(tmp_path, **change)

    assert told in raised.value.problem and raised.value.code == 2


def test_an_unknown_config_value_gets_the_nearest():
    experiment = load_experiment(resolve("gpt2ish"))
    with pytest.raises(UserError, match="widht") as raised:
        experiment.config(vocab_size=5, widht=8)

    assert "width" in raised.value.hint


def test_a_value_that_config_refuses_is_a_sentence():
    experiment = load_experiment(resolve("gpt2ish"))
    with pytest.raises(UserError, match="not a multiple"):
        experiment.config(vocab_size=5, width=10, num_heads=3)


def test_a_seed_fixes_the_weights():
    experiment = load_experiment(resolve("gpt2ish"))
    config = experiment.config(**experiment.tiny)
    one, same, other = (experiment.model(config, seed).state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_file_then_plan_then_variant_then_set_decide_the_config():
    plan = read_plan("quick", {"model.token_std": 0.5})
    experiment = load_experiment(resolve("gpt2ish_small_init"))
    made = scale(experiment, plan, 4096, 0, {"num_blocks": 3})

    assert made.config.width == 192  # the plan's
    assert made.config.token_std == 0.2  # the variant's
    assert made.config.num_blocks == 3  # --set
    assert (made.config.vocab_size, made.config.max_len) == (4096, 256)
    assert made.differs == {"num_blocks": [4, 3], "token_std": [0.5, 0.2]}


def test_a_field_called_end_gets_the_token_that_ends_a_document(tmp_path):
    field = "    vocab_size: int\n"
    source = resolve("gpt2ish").source.replace(field, f"{field}    end: int\n")
    experiment = load_experiment(read_source(source, tmp_path / "a.py")[0])
    plan = read_plan("quick")

    assert scale(experiment, plan, 4096, 17, {}).config.end == 17
    assert experiment.config(**experiment.tiny).end == experiment.tiny["vocab_size"] - 1


def test_a_plan_may_not_scale_what_the_baseline_lacks():
    with pytest.raises(UserError, match="widht"):
        scale(load_experiment(resolve("ue")), read_plan("quick", {"model.widht": 1}), 4096, 0, {})


def test_what_an_experiment_lacks_is_reported_not_used():
    plan = read_plan("quick", {"model.token_std": 0.5})
    made = scale(load_experiment(resolve("ue")), plan, 4096, 0, {})

    assert made.differs == {"token_std": [0.5, None]}


def test_patterns_freeze_the_parameters_of_these_names():
    experiment = load_experiment(resolve("gpt2ish"))
    model = experiment.model(experiment.config(**experiment.tiny))
    frozen = freeze(model, ["blocks.0.mlp.*", "head.bia?", "blocks.0.*.bias"])

    expected = [
        name for name, _ in model.named_parameters()
        if name.startswith("blocks.0.") and (".mlp." in name or name.endswith("bias"))
    ] + ["head.bias"]  # fmt: skip
    assert frozen == expected
    assert freeze(experiment.model(experiment.config(**experiment.tiny)), []) == []


@pytest.mark.parametrize("name", ["table.weight", "head.weight"])
def test_a_tied_parameter_is_frozen_by_either_of_its_names(name):
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5)})
    model["head"].weight = model["table"].weight

    assert freeze(model, [name]) == ["table.weight"]
    assert not model["head"].weight.requires_grad and model["head"].bias.requires_grad
