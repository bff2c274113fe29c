"""The contract: what an experiment file must hold."""

import pytest
import torch

from lmplay.catalog.entries import resolve
from lmplay.catalog.entry import read_source
from lmplay.errors import UserError
from lmplay.model.experiment import load_experiment

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
    with pytest.raises(UserError, match="not a multiple") as raised:
        experiment.config(vocab_size=5, width=10, num_heads=3)

    assert raised.value.hint.endswith("one of num_blocks=6, width=10, num_heads=3")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("width", -4, "not between 1 and 1,048,576"),
        ("width", 0, "not between 1 and"),
        ("num_heads", 0, "not between 1 and"),
        ("num_blocks", 10**6, "not between 1 and 4,096"),
        ("max_len", -1, "below 0"),
        ("ff_dropout", float("nan"), "no finite number"),
    ],
)
def test_a_size_that_is_none_is_a_sentence(key, value, told):
    experiment = load_experiment(resolve("gpt2ish"))
    with pytest.raises(UserError, match=f"{key}={value} is {told}"):
        experiment.config(vocab_size=5, **{key: value})


@pytest.mark.parametrize("value", [[1], "0.1", None, True])
def test_a_value_of_another_type_than_the_field_s_is_a_sentence(value):
    experiment = load_experiment(resolve("gpt2ish"))
    with pytest.raises(UserError, match="ff_dropout should be float, not "):
        experiment.config(vocab_size=5, ff_dropout=value)


def test_a_seed_fixes_the_weights():
    experiment = load_experiment(resolve("gpt2ish"))
    config = experiment.config(**experiment.tiny)
    one, same, other = (experiment.model(config, seed).state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
