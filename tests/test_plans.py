"""Every bundled plan, held to the rules that all of them share."""

import json
from math import ceil

import pytest

from lmplay.data import hub
from lmplay.data import sources as text
from lmplay.optim.schedules import factor
from lmplay.plan import Plan
from lmplay.plan_file import read_plan
from lmplay.roots import bundled_root
from lmplay.train.clock import Clock

FOLDER = bundled_root() / "plans"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.json"))
THREE = ["openorca", "orcamathword200", "smoltalk_all"]
INSTRUCTIONS = {  # a row of each as its hub has it, and how it is rendered
    "openorca": (
        {"id": "1", "system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
        "Be brief.\n\n2+2?\n\n",
    ),
    "orcamathword200": ({"question": "2+2?", "answer": "4"}, "2+2?\n\n"),
    "smoltalk_all": (
        {
            "messages": [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "4"},
            ],
            "source": "a",
        },
        "User:\n2+2?\n\nAssistant:\n",
    ),
}
SEVEN = ["wiki_en", "wiki_es", "tinystories", "cosmopedia_v2", *THREE]

every_plan = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMPLAY_PATH", raising=False)


def own_keys(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def datasets_of(name):
    return [(stage.datasets, stage.mixing) for stage in read_plan(name).stages]


def test_the_plans_of_the_original_are_all_here():
    named = "default wiki_en_es l_wiki_en_es pretrain bigpretrain hugepretrain instruction_ft "
    named += (
        "l_instruction_ft full_v1 full all quick minute tiny small shakespeare fineweb_edu noam "
    )
    named += "bytes long recall"

    assert set(NAMES) == {*named.split(), *SEVEN}


@every_plan
def test_a_plan_resolves_and_describes_itself_in_one_line(name):
    plan = read_plan(name)

    assert plan.name == name
    assert 30 <= len(plan.description) <= 100 and plan.description.isprintable()
    assert own_keys(name)["description"] == plan.description  # never its parent's


@every_plan
def test_a_plan_defines_no_dataset_and_repeats_nothing_it_extends(name):
    own = own_keys(name)

    assert "datasets" not in own
    if "extends" in own:
        parent = read_plan(own["extends"]).model_dump(exclude_unset=True)
        assert not [key for key in own if key in parent and own[key] == parent[key]]


def test_every_shared_dataset_is_used_and_says_how_much_is_downloaded():
    shared = json.loads((FOLDER / "_datasets.json").read_text())
    used = {n: d for name in NAMES for n, d in read_plan(name).datasets.items()}

    assert set(used) == set(shared)
    assert all((d.hub is None) == (d.download is None) for d in used.values())
    assert all(d.download.startswith("about ") for d in used.values() if d.hub)


@every_plan
def test_a_plan_dumped_to_a_file_is_the_same_plan(name, tmp_path):
    plan = read_plan(name)
    file = tmp_path / f"{name}.json"
    file.write_text(plan.model_dump_json())

    assert read_plan(str(file)) == plan


@every_plan
def test_validation_takes_about_a_tenth_of_the_time_at_most(name):
    plan = read_plan(name)
    cost = plan.validation.tokens / 3  # a forward pass is a third of a training step
    most = 0.125 if name == "minute" else 0.1  # where curves are compared over seeds

    if plan.tokens is None:  # the length is known once all is prepared
        assert cost <= most * plan.validation.every_tokens
    else:
        number = 1 + ceil(plan.tokens / plan.validation.every_tokens)  # the first is before step 1
        assert number * cost <= most * plan.tokens


@every_plan
def test_held_out_text_is_bounded(name):
    plan = read_plan(name)

    assert plan.validation.tokens <= 1_000_000
    if any(d.hub for d in plan.datasets.values()):
        assert plan.validation.fraction == 0.005


@every_plan
def test_a_checkpoint_of_a_full_sized_model_is_not_written_too_often(name):
    plan = read_plan(name)

    assert "width" in plan.model or plan.checkpoints.every_tokens >= 20_000_000


@every_plan
def test_every_plan_takes_the_fastest_precision_that_the_device_has(name):
    assert read_plan(name).precision == "amp"


@every_plan
def test_validations_and_checkpoints_fall_on_whole_steps(name):
    plan = read_plan(name)

    tokens = Clock(plan, num_rows=1).at(0).tokens

    assert plan.validation.every_tokens % tokens == 0
    assert plan.checkpoints.every_tokens % tokens == 0


def test_quick_needs_no_download_and_is_the_recipe_that_was_tried():
    plan = read_plan("quick")

    assert [d.builtin for d in plan.datasets.values()] == ["python-stdlib"]
    assert (plan.tokenizer, plan.tokens, plan.optimizer.lr) == ("bpe:4096", 512_000, 4e-3)
    assert plan.validation.tokens == 25_600


@pytest.mark.parametrize("name", ["bytes", "long", "recall"])
def test_plans_of_other_rulers_need_no_download_and_have_quicks_rates(name):
    plan, quick = read_plan(name), read_plan("quick")

    assert all(d.builtin for d in plan.datasets.values())
    assert (plan.optimizer, plan.schedule, plan.clip) == (
        quick.optimizer, quick.schedule, quick.clip
    )  # fmt: skip


def test_long_and_quick_differ_in_the_length_of_rows_only():
    long, quick = read_plan("long"), read_plan("quick")
    same = set(Plan.model_fields) - {"name", "description", "sequence_length", "batch_size"}

    assert long.model_dump(include=same) == quick.model_dump(include=same)
    assert Clock(long).at(0).tokens == Clock(quick).at(0).tokens


def test_default_is_the_published_recipe_of_the_original():
    plan = read_plan("default")

    assert (plan.tokenizer, plan.sequence_length, plan.batch_size) == ("gpt2", 1024, 50)
    assert (plan.optimizer.name, plan.optimizer.lr) == ("Adagrad", 6e-4)
    assert (plan.optimizer.weight_decay, plan.optimizer.options) == (0.0, {})
    assert (plan.schedule.name, plan.schedule.warmup) == ("constant", 0.0)
    assert (plan.precision, plan.model) == ("amp", {})
    assert datasets_of("default") == [(["wiki_en", "wiki_es"], "first_exhausted")]


@pytest.mark.parametrize(
    "name",
    sorted(
        set(NAMES)
        - {"quick", "minute", "tiny", "small", "shakespeare", "fineweb_edu", "noam"}
        - {"bytes", "long", "recall"}
    ),
)
def test_the_plans_of_the_original_differ_in_their_data_only(name):
    data = {"name", "description", "datasets", "stages", "tokens"}
    recipe = set(Plan.model_fields) - data

    assert read_plan(name).model_dump(include=recipe) == read_plan("default").model_dump(
        include=recipe
    )


def test_noam_is_the_winners_recipe():
    plan = read_plan("noam")
    clock = Clock(plan)
    sizes = [(clock.at(s).tokens_before, clock.at(s + 1).tokens_before) for s in (499, 9999)]
    rates = [plan.optimizer.lr * factor(plan.schedule, *of, clock.num_tokens) for of in sizes]

    assert (clock.num_steps, clock.at(0).tokens) == (10_000, 131_072)
    assert rates == pytest.approx([1.25e-3, 1.25e-4], rel=1e-2)
    assert (plan.clip, plan.optimizer.weight_decay, plan.seconds) == (1.0, 0.1, 3 * 3600)
    assert plan.optimizer.roles["head"].weight_decay == 0  # the winner's tied table


def test_stages_are_those_of_the_original():
    first, both = "first_exhausted", "all_exhausted"
    wiki, stories = ["wiki_en", "wiki_es"], ["tinystories", "cosmopedia_v2"]

    assert datasets_of("wiki_en_es") == [(wiki, first)]
    assert datasets_of("l_wiki_en_es") == [(wiki, both)]
    assert datasets_of("pretrain") == datasets_of("tinystories") == [(["tinystories"], first)]
    assert datasets_of("bigpretrain") == [(stories, first)]
    assert datasets_of("hugepretrain") == [(stories, both)]
    assert datasets_of("instruction_ft") == [(THREE, first)]
    assert datasets_of("l_instruction_ft") == [(THREE, both)]
    assert datasets_of("full_v1") == [(wiki, first), (stories, first), (THREE, first)]
    assert datasets_of("full") == [(wiki, both), (stories, both), (THREE, both)]
    assert datasets_of("all") == [(SEVEN, both)]
    for name in SEVEN:
        assert datasets_of(name) == [([name], first)]


def test_datasets_are_those_of_the_original():
    datasets = read_plan("all").datasets

    assert {name: (d.hub, d.config) for name, d in datasets.items()} == {
        "wiki_en": ("wikimedia/wikipedia", "20231101.en"),
        "wiki_es": ("wikimedia/wikipedia", "20231101.es"),
        "tinystories": ("roneneldan/TinyStories", None),
        "cosmopedia_v2": ("HuggingFaceTB/smollm-corpus", "cosmopedia-v2"),
        "openorca": ("Open-Orca/OpenOrca", None),
        "orcamathword200": ("microsoft/orca-math-word-problems-200k", None),
        "smoltalk_all": ("HuggingFaceTB/smoltalk", "all"),
    }
    assert datasets["wiki_en"].text == datasets["wiki_es"].text == ["title", "text"]
    assert datasets["tinystories"].text == datasets["cosmopedia_v2"].text == ["text"]
    assert datasets["openorca"].prompt == ["system_prompt", "question"]
    assert datasets["openorca"].truth == "response"
    assert datasets["orcamathword200"].prompt == ["question"]
    assert datasets["orcamathword200"].truth == "answer"
    assert datasets["smoltalk_all"].messages == "messages"


@every_plan
def test_of_instructions_every_plan_learns_the_answer_only(name, monkeypatch):
    datasets = read_plan(name).datasets
    for key in datasets.keys() & INSTRUCTIONS:
        row, prompt = INSTRUCTIONS[key]
        monkeypatch.setattr(hub, "open_hub", lambda dataset, split, skip, row=row: iter([row]))
        (document,) = text.documents(datasets[key], "train", 0.0)

        assert document.parts(datasets[key].learn_prompt) == [(prompt, False), ("4", True)]
    for key in datasets.keys() - INSTRUCTIONS:
        assert datasets[key].truth is None and datasets[key].messages is None
