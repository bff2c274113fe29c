"""The size of a run: who decides each Config value, and what is reported instead of used."""

import pytest

from lmplay.catalog.entries import resolve
from lmplay.catalog.entry import read_source
from lmplay.errors import UserError
from lmplay.model.experiment import load_experiment
from lmplay.model.scale import scale
from lmplay.plan_file import read_plan


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


def test_values_that_no_model_can_be_made_with_are_a_sentence():
    with pytest.raises(UserError, match=r"gpt2ish cannot be made with .*ff_dropout=2: ValueError"):
        scale(load_experiment(resolve("gpt2ish")), read_plan("quick"), 4096, 0, {"ff_dropout": 2})


def test_dropout_that_an_experiment_lacks_is_no_dropout_there():
    plan = read_plan("quick", {"model.embed_dropout": 0.0, "model.ff_dropout": 0.1})
    made = scale(load_experiment(resolve("llama")), plan, 4096, 0, {})

    assert made.differs == {"ff_dropout": [0.1, None]}
