"""What an idea stacks with is found by merging, and told with what keeps the others from it."""

import itertools
import os
from datetime import date
from zlib import crc32

import pytest

from lmplay.catalog.entries import entries, family_of, resolve
from lmplay.catalog.partners import baseline_of, collision, partners
from lmplay.errors import UserError
from lmplay.model.experiment import load_experiment
from lmplay.proofs.tiny import check


def test_each_other_idea_on_the_baseline_is_a_partner_or_told_by_what_collides():
    found = partners(resolve("canon_full"))

    assert found["gated_attention"] == found["qk_norm"] == found["x0_lambdas"] == ""
    assert found["rwkv7"] == "lines"
    assert not {"canon", "canon_full", "llama", "gpt2ish", "value_norm"} & found.keys()


def test_a_baseline_is_what_belongs_to_no_family():
    known = entries()

    assert baseline_of(resolve("forgetting_pro"), known) == "llama"
    assert baseline_of(resolve("sac2"), known) == "gpt2ish"
    assert partners(resolve("llama")) == {}


def test_names_and_lines_keep_ideas_apart():
    assert collision(resolve("ngram_memory"), resolve("ngram_lambdas")) == "names"
    assert collision(resolve("no_positions"), resolve("simple_rope")) == "lines"


def test_a_file_that_is_no_python_below_its_head_stacks_with_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    source = resolve("z_loss").source.replace("class Model(", "class Model((")
    (tmp_path / "experiments/broken.py").write_text(source)

    assert partners(resolve("qk_norm"))["broken"] == "syntax"


def ideas_on(baseline, without=()):
    known = entries()
    families = {name: family_of(entry, known) for name, entry in known.items()}
    return [
        name
        for name, entry in known.items()
        if name == entry.file and entry.parent == baseline
        if families[name] and families[name] not in without
    ]


@pytest.mark.slow
def test_most_pairs_of_ideas_on_llama_stack():
    ideas = ideas_on("llama", without=("mixing", "patches", "diffusion"))  # whole architectures
    pairs = itertools.combinations(ideas, 2)
    sample = [pair for pair in pairs if crc32("+".join(pair).encode()) % 6 == 0]
    found = [collision(resolve(one), resolve(other)) for one, other in sample]

    assert len(found) > 200 and found.count("") >= 0.85 * len(found)


THREE = "gated_attention+qk_norm+zero_init"
GOOD = [f"{THREE}+{name}" for name in ideas_on("llama") if name not in THREE]
GOOD += ["layer_token_embedding+gated_attention+ngram_memory+differential_v2"]
# whose arguments, results, conditions, expressions or words are merged, or which have one put back
PARTS = [
    *("grouped_query+wide_residual", "kv_reuse+qkv_bias", "hyper_connections+value_residual"),
    *("layer_norm+qk_norm", "moe+poly_norm", "parallel_block+sandwich_norm"),
    *("no_positions+sparse_indexer", "mhc+token_up_projection", "grouped_query+sliding_window"),
]
if "LMP_ALL" not in os.environ:  # each takes a check, so some each day
    today = date.today().toordinal()
    GOOD, PARTS = (
        [name for name in names if (today + crc32(name.encode())) % 16 == 0]
        for names in (GOOD, PARTS)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_what_stacks_with_three_that_all_start_from_passes_the_check(name):
    try:
        entry = resolve(name)
    except UserError as error:
        pytest.skip(error.problem.partition("\n")[0])
    failed = [proof for proof in check(load_experiment(entry)) if proof.passed is False]

    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_what_is_merged_part_by_part_holds_both_ideas(name):
    failed = [p for p in check(load_experiment(resolve(name))) if p.passed is False]

    assert not failed
