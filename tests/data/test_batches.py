"""The rows of training are a pure function of plan and seed; an epoch has each target once."""

import json
import os
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmplay.data import batches
from lmplay.data import hub as hub_module
from lmplay.data import preparation as preparing
from lmplay.data import shard_cache as cache
from lmplay.data import sources as text
from lmplay.data.batches import Batch, Data, open_data
from lmplay.data.tokenizers import open_tokenizer
from lmplay.errors import NO_DATA, UserError
from lmplay.model.objective import IGNORE
from lmplay.plan import Plan, changed_plan

BYTE = open_tokenizer("byte")
SHARD_TOKENS = 150


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LMP_DATASETS", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    prepare = preparing.prepare
    monkeypatch.setattr(
        batches, "prepare", lambda *a, **k: prepare(*a, **k, shard_tokens=SHARD_TOKENS)
    )
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """A hub of lists of rows, by name; `hub.gates` may hold one back until it is set."""

    class Hub:
        tables, gates, opened = {}, {}, []

    found = Hub()
    found.tables, found.gates, found.opened = {}, {}, []

    def open_hub(dataset, split, skip):
        found.opened.append(dataset.hub)
        for number, row in enumerate(found.tables[dataset.hub]):
            if number == 1500 and dataset.hub in found.gates:
                found.gates[dataset.hub].wait(10)
            if number >= skip:
                yield row

    monkeypatch.setattr(hub_module, "open_hub", open_hub)
    monkeypatch.setattr(hub_module, "_ROWS", 8)
    monkeypatch.setattr(preparing, "_BATCH_RECORDS", 8)
    return found


def records(name, count):
    return [{"text": f"{name} record {i}"} for i in range(count)]


def make_plan(datasets, stages=None, tokens=None, sequence_length=16, batch_size=4, **more):
    return Plan.model_validate(
        {
            "tokenizer": "byte",
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "datasets": datasets,
            "stages": stages or [{"datasets": list(datasets)}],
            "tokens": tokens,
            "optimizer": {"name": "SGD", "lr": 0.1},
            "validation": {"tokens": 300, "fraction": 0.1, "every_tokens": 100},
            "checkpoints": {"every_tokens": 100},
            **more,
        }
    )


def files(folder, name, count):
    path = folder / f"{name}.txt.jsonl"
    path.write_text("".join(f'{{"text": "{name} record {i}"}}\n' for i in range(count)))
    return {"files": [str(path)]}


def opened(plan, seed=0):
    return Data(plan, BYTE, seed)


def rows_of(data):
    """Every row of training in order, as (inputs, targets)."""
    found, plan = [], data._plan
    count = -(-plan.tokens // plan.sequence_length) if plan.tokens else data.num_rows
    for first in range(0, count, 4):
        batch = data.rows(first, min(4, count - first))
        assert batch.num_targets == int((batch.targets_BT != IGNORE).sum())
        pairs = zip(batch.tokens_BT.tolist(), batch.targets_BT.tolist(), strict=True)
        found += [(tuple(tokens), tuple(targets)) for tokens, targets in pairs]
    return found


def targets_of(rows):
    return Counter(target for _, targets in rows for target in targets if target != IGNORE)


def training_stream(plan, name="a"):
    fraction = plan.validation.fraction
    stream = [BYTE.end]
    for document in text.documents(plan.datasets[name], "train", fraction):
        stream += [*document.text.encode(), BYTE.end]
    return stream


@pytest.mark.parametrize("T", [1, 7, 16, 149, 150, 151, 400])
def test_an_epoch_has_every_target_once_after_what_comes_before_it(folder, T):
    plan = make_plan({"a": files(folder, "a", 60)}, sequence_length=T)
    stream = training_stream(plan)
    expected = Counter()
    for start in range(0, len(stream) - 1, T):
        inputs, targets = stream[start : start + T], stream[start + 1 : start + T + 1]
        missing = T - len(targets)
        inputs = [*inputs[: len(targets)], *[BYTE.end] * missing]
        expected[tuple(inputs), tuple([*targets, *[IGNORE] * missing])] += 1

    rows = [row for row in rows_of(opened(plan)) if set(row[1]) != {IGNORE}]

    assert Counter(rows) == expected
    assert targets_of(rows) == Counter(stream[1:])


def test_rows_past_the_end_have_no_target(folder):
    data = opened(make_plan({"a": files(folder, "a", 30)}))
    last = data.rows(data.num_rows - 2, 7)

    assert last.tokens_BT.shape == last.targets_BT.shape == (7, 16)
    assert [bool((row == IGNORE).all()) for row in last.targets_BT] == [False] * 2 + [True] * 5


def test_restarts_do_not_change_a_batch(folder):
    plan = make_plan({"a": files(folder, "a", 60), "b": files(folder, "b", 30)}, tokens=9999)
    data = opened(plan)
    forwards = [data.rows(first, 4).tokens_BT for first in range(0, 624, 4)]
    again = opened(plan)

    for number in reversed(range(len(forwards))):
        assert torch.equal(again.rows(4 * number, 4).tokens_BT, forwards[number])


def test_another_seed_or_epoch_is_another_order_of_the_same_rows(folder):
    once = make_plan({"a": files(folder, "a", 60)}, batch_size=1)
    twice = make_plan(once.datasets, [{"datasets": ["a"], "epochs": 2.0}], batch_size=1)
    first, other = rows_of(opened(once)), rows_of(opened(once, seed=1))
    both = rows_of(opened(twice))

    assert first != other and Counter(first) == Counter(other)
    assert both[: len(first)] == first
    assert both[len(first) :] != first and Counter(both[len(first) :]) == Counter(first)


def test_a_streamed_source_gives_the_batches_of_a_prepared_one(folder, hub):
    hub.tables["x/a"], hub.tables["x/b"] = records("a", 200), records("b", 120)
    plan = make_plan({"a": {"hub": "x/a"}, "b": {"hub": "x/b"}}, tokens=3000)
    streaming = opened(plan)
    streamed = rows_of(streaming)
    streaming.close()
    complete = opened(make_plan(plan.datasets, tokens=20_000))
    rows_of(complete)  # waits for all of it
    complete.close()

    prepared = opened(plan)

    assert rows_of(prepared) == streamed
    assert prepared.fingerprint == streaming.fingerprint
    assert prepared.validation_fingerprint == streaming.validation_fingerprint


def test_a_source_that_cannot_be_reached_is_told_before_others_are_prepared(folder, hub):
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records("a", 100)))
    plan = make_plan({"a": {"files": [str(folder / "a.jsonl")]}, "b": {"hub": "x/b"}})
    told = []

    with pytest.raises(KeyError):  # there is no such table
        Data(plan, BYTE, 0, on_progress=lambda *numbers: told.append(numbers))

    assert not told


def test_what_is_read_first_changes_no_order(folder, hub):
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records("a", 100)))
    hub.tables["x/b"] = records("b", 100)
    plan = make_plan({"a": {"files": [str(folder / "a.jsonl")]}, "b": {"hub": "x/b"}})
    data = opened(plan)
    first, *_ = data.validation_batches(1)
    names = [[name, data._training[name].fingerprint] for name in ("a", "b")]
    stages = [stage.model_dump() for stage in plan.stages]
    data.close()

    assert BYTE.decode(first.targets_BT[0].tolist()).startswith("a record")
    assert data.fingerprint == cache.fingerprint(names, stages)


def test_a_row_needs_only_the_shards_up_to_its_own(folder, hub, monkeypatch):
    hub.tables["x/a"] = records("a", 2000)
    plan = make_plan({"a": {"hub": "x/a"}}, tokens=10**6)
    monkeypatch.setattr(text, "HELD_OUT_SPAN", 300)
    hub.gates["x/a"] = threading.Event()
    data = opened(plan)

    first = data.rows(0, 8)  # the source stands still at record 1,500

    assert data._training["a"].num_tokens is None
    hub.gates["x/a"].set()
    later = data.rows(200, 8)
    data.close()
    assert first.num_targets == later.num_targets == 8 * 16


def test_what_was_streamed_once_needs_neither_network_nor_thread(folder, hub, monkeypatch):
    hub.tables["x/a"] = records("a", 60)
    plan = make_plan({"a": {"hub": "x/a", "download": "about 9 GB"}}, batch_size=1)
    notes = []
    streamed = Data(plan, BYTE, 0, note=notes.append)
    before = rows_of(streamed)
    streamed.close()  # waits for its thread

    def offline(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub_module, "open_hub", offline)
    data = opened(plan)

    assert rows_of(data) == before
    assert not any("prepare" in thread.name for thread in threading.enumerate())
    (told,) = [note for note in notes if "about 9 GB" in note]
    assert "--plan quick" in told


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_a_download_is_announced_before_it_begins(folder, hub, tokenizer):
    dataset = {"hub": "x/a", "download": "about 9 GB"}
    plan = make_plan({"a": dataset}, tokenizer=tokenizer)
    notes = []

    with pytest.raises(KeyError):  # there is no such table
        open_data(plan, 0, notes.append)

    assert len(notes) == 1 and "about 9 GB" in notes[0]


def test_what_stops_a_stream_stops_the_batch_that_needs_it(folder, hub, monkeypatch):
    hub.tables["x/a"] = records("a", 200)
    plan = make_plan({"a": {"hub": "x/a"}}, tokens=10_000)
    monkeypatch.setattr(text, "HELD_OUT_SPAN", 500)
    open_hub = hub_module.open_hub

    def breaking(dataset, split, skip):
        for number, row in enumerate(open_hub(dataset, split, skip)):
            if number + skip >= 100:
                raise PermissionError("gated")
            yield row

    monkeypatch.setattr(hub_module, "open_hub", breaking)
    data = opened(plan)

    assert data.rows(0, 4).num_targets == 64
    with pytest.raises(UserError, match="gated") as caught:
        data.rows(620, 4)
    assert caught.value.code == NO_DATA
    data.close()


def test_under_a_budget_of_tokens_the_last_stage_never_ends(folder):
    data = opened(make_plan({"a": files(folder, "a", 60)}, tokens=1))

    assert data.num_rows is None
    assert data.rows(400_000, 4).num_targets > 0


def test_a_fraction_of_an_epoch_is_that_share_of_its_rows(folder):
    datasets = {"a": files(folder, "a", 60)}
    whole = rows_of(opened(make_plan(datasets, batch_size=1)))
    plan = make_plan(datasets, [{"datasets": ["a"], "epochs": 0.25}], batch_size=1)

    assert rows_of(opened(plan)) == whole[: -(-len(whole) // 4)]


def sources(rows):
    """The dataset of each row: its letter occurs in no other dataset's records."""
    letters = [Counter(chr(t) for t in tokens if chr(t) in "xyz") for tokens, _ in rows]
    return [max(counts, key=counts.get) if counts else "?" for counts in letters]


def letter_files(folder, letter, count):
    path = folder / f"{letter}.jsonl"
    path.write_text("".join(f'{{"text": "{letter * 20} {i}"}}\n' for i in range(count)))
    return {"files": [str(path)]}


def test_stages_follow_one_another_and_mix_as_they_say(folder):
    datasets = {letter: letter_files(folder, letter, n) for letter, n in [("x", 60), ("y", 20)]}
    lengths = {
        letter: len(rows_of(opened(make_plan({letter: datasets[letter]}, batch_size=1))))
        for letter in datasets
    }
    stages = [
        {"datasets": ["x", "y"], "mixing": "first_exhausted"},
        {"datasets": ["x", "y"], "mixing": "all_exhausted"},
        {"datasets": ["x", "y"], "mixing": [3.0, 1.0], "epochs": 0.5},
        {"datasets": ["y"]},
    ]

    def found(stage):
        return sources(rows_of(opened(make_plan(datasets, [stage], batch_size=1))))

    first, both, shares, alone = (found(stage) for stage in stages)
    rows = rows_of(opened(make_plan(datasets, stages, batch_size=1)))
    everything = sources(rows)

    assert first == ["x", "y"] * lengths["y"]
    assert both == (["x", "y"] * lengths["x"])[:-1]
    assert abs(shares.count("x") - 3 * shares.count("y")) <= 4
    assert alone == ["y"] * lengths["y"]
    assert everything == first + both + shares + alone


def test_a_later_stage_goes_on_where_an_earlier_one_left_the_dataset(folder):
    datasets = {"a": files(folder, "a", 60)}
    whole = make_plan(datasets, [{"datasets": ["a"], "epochs": 2.0}], batch_size=1)
    cut = make_plan(
        datasets,
        [{"datasets": ["a"], "epochs": 0.5}, {"datasets": ["a"], "epochs": 1.5}],
        batch_size=1,
    )
    rows = rows_of(opened(whole))

    assert rows_of(opened(cut))[: len(rows)] == rows


def test_the_last_stage_goes_on_until_the_budget_is_spent(folder):
    datasets = {letter: letter_files(folder, letter, 20) for letter in "xy"}
    stages = [{"datasets": ["x"]}, {"datasets": ["y"]}]
    free = sources(rows_of(opened(make_plan(datasets, stages, batch_size=1))))

    data = opened(make_plan(datasets, stages, batch_size=1, tokens=16 * 3 * len(free)))

    found = sources(rows_of(data))
    assert found[: len(free)] == free
    assert set(found[len(free) :]) == {"y"} and len(found) == 3 * len(free)


@settings(deadline=None)
@given(
    B=st.integers(1, 9), size=st.integers(1, 5), world_size=st.integers(1, 4), T=st.integers(1, 3)
)
def test_the_parts_of_all_ranks_add_up_to_the_batch(B, size, world_size, T):
    tokens_BT = torch.arange(B * T).reshape(B, T)
    batch = Batch(tokens_BT, tokens_BT + 1000, num_targets=B * T)
    ranks = [batch.of_rank(rank, world_size, size) for rank in range(world_size)]

    rows = Counter()
    for part in [part for parts in ranks for part in parts]:
        for tokens, targets in zip(part.tokens_BT, part.targets_BT, strict=True):
            if (targets != IGNORE).any():
                rows[tuple(tokens.tolist()), tuple(targets.tolist())] += 1
    shapes = [[part.tokens_BT.shape for part in parts] for parts in ranks]
    assert rows == Counter((tuple(t.tolist()), tuple((t + 1000).tolist())) for t in tokens_BT)
    assert all(shape == shapes[0] for shape in shapes)
    assert all(part.num_targets == B * T for parts in ranks for part in parts)
    assert all(len(part.tokens_BT) <= size for parts in ranks for part in parts)


def test_shorter_rows_are_rows_cut_in_equal_parts(folder):
    data = opened(make_plan({"a": files(folder, "a", 60)}))
    whole, cut = data.rows(2, 3), data.rows(2, 3, 4)

    assert cut.tokens_BT.shape == cut.targets_BT.shape == (12, 4)
    assert cut.tokens_BT.flatten().tolist() == whole.tokens_BT.flatten().tolist()
    assert cut.targets_BT.flatten().tolist() == whole.targets_BT.flatten().tolist()
    assert cut.num_targets == whole.num_targets


def test_a_batch_is_split_into_its_rows(folder):
    batch = opened(make_plan({"a": files(folder, "a", 60)})).rows(0, 4)

    parts = batch.split(3)

    assert [len(part.tokens_BT) for part in parts] == [3, 1]
    assert torch.equal(torch.cat([part.tokens_BT for part in parts]), batch.tokens_BT)
    assert torch.equal(torch.cat([part.targets_BT for part in parts]), batch.targets_BT)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_every_held_out_target_is_scored_once(folder, size):
    plan = make_plan({"a": files(folder, "a", 200), "b": files(folder, "b", 90)})
    data = opened(plan)
    expected, num_bytes = Counter(), 0
    for dataset in plan.datasets.values():
        stream = []
        held_out = text.documents(dataset, "validation", 0.1)
        for document in sorted(held_out, key=lambda document: document.place):
            stream += [*document.text.encode(), BYTE.end]
        stream = stream[:150]  # of the 300, each dataset has half
        expected.update(stream)
        num_bytes += sum(token != BYTE.end for token in stream)

    found = list(data.validation_batches(size))

    scored = torch.cat([batch.targets_BT for batch in found]).flatten().tolist()
    assert Counter(target for target in scored if target != IGNORE) == expected
    assert data.validation_tokens == sum(expected.values()) == sum(b.num_targets for b in found)
    assert data.validation_bytes == num_bytes
    assert all(len(batch.tokens_BT) == size for batch in found[:-1])


def test_the_held_out_text_is_the_same_for_every_seed_and_context(folder):
    datasets = {"a": files(folder, "a", 200)}
    one = opened(make_plan(datasets))
    other = opened(make_plan(datasets, sequence_length=50, batch_size=2), seed=7)

    assert one.validation_fingerprint == other.validation_fingerprint
    assert one.fingerprint == other.fingerprint
    assert one.validation_bytes == other.validation_bytes


def test_other_text_or_mixing_has_another_fingerprint(folder):
    datasets = {"a": files(folder, "a", 200), "b": files(folder, "b", 100)}
    plans = [
        make_plan(datasets),
        make_plan({"a": datasets["a"]}),
        make_plan(datasets, [{"datasets": ["a", "b"], "mixing": "all_exhausted"}]),
    ]

    assert len({opened(plan).fingerprint for plan in plans}) == 3


def test_only_the_truth_is_scored(folder):
    path = folder / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "ask {i}", "truth": "TOLD"}}\n' for i in range(60)))
    plan = make_plan({"a": {"files": [str(path)]}}, batch_size=1)

    scored = targets_of(rows_of(opened(plan)))

    assert {chr(token) for token in scored if token != BYTE.end} <= set("TOLD")
    assert scored[BYTE.end] > 0


def test_the_example_is_a_prompt_and_what_follows_it(folder):
    path = folder / "chat.jsonl"
    rows = [f'{{"prompt": "question {i}?", "truth": "answer {i}."}}\n' for i in range(60)]
    path.write_text("".join(rows))
    plan = make_plan({"a": files(folder, "a", 200)})
    ((_, *plain),) = opened(plan).examples(0)
    ((_, *chat),) = opened(make_plan({"a": {"files": [str(path)]}}, sequence_length=64)).examples(0)

    assert all(0 < len(part) <= 8 for part in plain)
    first = next(text.documents(plan.datasets["a"], "validation", 0.1))
    assert first.text.startswith(BYTE.decode(plain[0] + plain[1]))
    assert BYTE.decode(chat[0]).startswith("question") and BYTE.decode(chat[0]).endswith("\n\n")
    assert BYTE.decode(chat[1]).startswith("answer") and BYTE.decode(chat[1]).endswith(".")


def test_examples_are_of_the_stage_that_was_trained_last(folder):
    datasets = {name: files(folder, name, 60) for name in "abc"}
    data = opened(make_plan(datasets, [{"datasets": ["a"]}, {"datasets": ["c", "b"]}]))
    names = [[name for name, *_ in data.examples(count)] for count in range(data.num_rows + 1)]
    rows_of_first = -(-(len(training_stream(make_plan(datasets), "a")) - 1) // 16)

    assert names == [["a"] if count <= rows_of_first else ["c", "b"] for count in range(len(names))]
    for name, prompt, _ in data.examples(data.num_rows):
        assert BYTE.decode(prompt).startswith(name)


def test_what_one_dataset_holds_out_and_another_trains_on_is_told(folder):
    one, other = files(folder, "a", 200), files(folder, "b", 200)
    notes = []

    data = Data(
        make_plan({"a": {**one, "validation_files": other["files"]}, "b": other}),
        BYTE, 0, note=notes.append,
    )  # fmt: skip

    assert 0.8 < data.trained_on < 1
    assert any(n.startswith("a: ") and "training text of other datasets" in n for n in notes)
    assert Data(make_plan({"a": one, "b": other}), BYTE, 0).trained_on == 0


@pytest.mark.parametrize(
    ("truth", "is_told"), [("a few", True), ("an answer as long as what it asks", False)]
)
def test_answers_that_are_a_small_part_of_their_rows_are_told(folder, truth, is_told):
    notes = []
    Data(asking(folder, truth), BYTE, 0, note=notes.append)

    assert any("of its tokens are learned, those of the answers" in n for n in notes) == is_told


def test_a_budget_that_would_hardly_be_trained_on_is_refused_and_its_hints_hold(folder):
    plan = asking(folder, "x", tokens=3000)
    with pytest.raises(UserError, match=r"3,000 tokens asked for about \d{3} would") as caught:
        Data(plan, BYTE, 0)

    assert "tokens=null" in caught.value.hint and "a.learn_prompt=true" in caught.value.hint
    for change in ({"tokens": None}, {"datasets.a.learn_prompt": True}):
        assert Data(changed_plan(plan, change), BYTE, 0).rows(0, 4).num_targets


@pytest.mark.parametrize(("count", "is_told"), [(3, True), (200, False)])
def test_places_without_text_are_told_where_they_are_many(folder, count, is_told):
    one = {**files(folder, "a", count), "validation_files": files(folder, "b", 50)["files"]}
    notes = []
    plan = make_plan({"a": one}, tokens=3000, sequence_length=27)
    data = Data(plan, BYTE, 0, note=notes.append)

    places = 2 * 27  # of an epoch of three records
    assert count > 3 or round(data.rows(0, 2).num_targets / places, 2) == 0.61
    assert any("61% of the places in its rows" in note for note in notes) == is_told


def asking(folder, truth, **values):
    """A plan of 40 questions with the same answer."""
    rows = [{"prompt": f"what is {i} plus {i}?", "truth": truth} for i in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_plan({"a": {"files": [str(folder / "a.jsonl")]}}, **values)


def test_bpe_is_trained_on_the_plans_training_text_once(folder, monkeypatch):
    plan = make_plan({"a": files(folder, "a", 300)}, tokens=1000, tokenizer="bpe:270")
    read = []
    documents = batches.documents

    def watched(dataset, split, fraction):
        read.append(split)
        return documents(dataset, split, fraction)

    monkeypatch.setattr(batches, "documents", watched)
    notes = []
    first, data = open_data(plan, 0, notes.append)
    second, again = open_data(plan, 0, notes.append)

    assert first.vocab_size == 270 and first.fingerprint == second.fingerprint
    assert read == ["train"] and sum("bpe:270" in note for note in notes) == 1
    assert torch.equal(data.rows(0, 4).tokens_BT, again.rows(0, 4).tokens_BT)


def test_bpe_needs_text(folder):
    plan = make_plan({"a": {"shards": ["a.bin"]}}, tokenizer="bpe:300")

    with pytest.raises(UserError, match="only shards of tokens"):
        open_data(plan, 0, print)


def test_the_original_s_columns_can_be_trained_on(folder, hub):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    hub.tables = {
        "wiki": [{"id": i, "title": f"T{i}", "text": f"About {i}."} for i in range(40)],
        "orca": [
            {"system_prompt": "", "question": f"{i}?", "response": f"It is {i}."} for i in range(40)
        ],
        "talk": [
            {"messages": [*chat, *chat[:1], {**chat[1], "content": str(i)}]} for i in range(40)
        ],
    }
    plan = make_plan(
        {
            "wiki": {"hub": "wiki", "text": ["title", "text"]},
            "orca": {
                "hub": "orca",
                "prompt": ["system_prompt", "question"],
                "truth": "response",
            },
            "talk": {"hub": "talk", "messages": "messages"},
        },
        [{"datasets": ["wiki", "orca", "talk"], "mixing": "all_exhausted"}],
    )
    tokenizer, data = open_data(plan, 0, lambda note: None)

    seen = "".join(tokenizer.decode(t for t in tokens) for tokens, _ in rows_of(data))

    assert "About" in seen and "It is" in seen and "Assistant:" in seen
    assert data.validation_tokens > 0
    data.close()


def test_a_text_shorter_than_a_row_is_refused(folder):
    plan = make_plan({"a": files(folder, "a", 40)}, sequence_length=10_000)

    with pytest.raises(UserError, match=r"tokens to train on, fewer than the 10,000 of a row"):
        opened(plan)
