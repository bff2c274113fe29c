"""A source becomes the documents its rows say, and its held-out records stay held out."""

import itertools
import json
import sysconfig

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmplay import network
from lmplay.data import hub
from lmplay.data import sources as text
from lmplay.data.document import Document
from lmplay.data.python_library import library
from lmplay.data.sources import (
    documents,
    expected_bytes,
    has_own_validation,
    held_out_fraction,
    source_fingerprint,
)
from lmplay.errors import NO_DATA, UserError
from lmplay.plan import Dataset


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMP_DATASETS", str(tmp_path / "cache"))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(first, last):
    return [{"text": f"record {i}"} for i in range(first, last)]


def texts(dataset, split="train", fraction=0.2, skip=0):
    return [document.text for document in documents(dataset, split, fraction, skip)]


def on_hub(monkeypatch, tables):
    """Put lists of rows, by split, in the place of the hub; gives the list of what is opened."""
    opened = []

    def open_hub(dataset, split, skip):
        opened.append((split, skip))
        return iter(tables[split][skip:])

    monkeypatch.setattr(hub, "open_hub", open_hub)
    return opened


@pytest.mark.parametrize(
    ("row", "columns", "parts"),
    [
        ({"text": "a", "id": "7"}, {}, [("a", True)]),
        ({"title": "T", "text": "a"}, {}, [("T\n\na", True)]),
        ({"title": None, "text": "a"}, {}, [("a", True)]),
        ({"title": "T", "text": "a"}, {"text": ["text"]}, [("a", True)]),
        ({"a": "1", "b": "2", "c": "3"}, {"text": ["c", "a"]}, [("3\n\n1", True)]),
        ({"prompt": "p", "truth": "t", "text": "x"}, {}, [("p\n\n", False), ("t", True)]),
        (
            {"system_prompt": "s", "question": "q", "response": "r"},
            {"prompt": ["system_prompt", "question"], "truth": "response"},
            [("s\n\nq\n\n", False), ("r", True)],
        ),
        (
            {"system_prompt": "", "question": "q", "response": "r"},
            {"prompt": ["system_prompt", "question"], "truth": "response"},
            [("q\n\n", False), ("r", True)],
        ),
    ],
)
def test_columns_make_a_document(tmp_path, row, columns, parts):
    dataset = Dataset(files=[jsonl(tmp_path / "a.jsonl", [row])], **columns)

    (document,) = documents(dataset, "train", 0.0)

    assert document.parts(learn_prompt=False) == parts
    assert document.parts(learn_prompt=True) == [(text, True) for text, _ in parts]
    assert document.text == "".join(text for text, _ in parts)


def test_of_a_chat_the_last_answer_is_learned(tmp_path):
    said = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Thanks"},
    ]
    dataset = Dataset(files=[jsonl(tmp_path / "a.jsonl", [{"messages": said, "text": "no"}])])

    (document,) = documents(dataset, "train", 0.0)

    assert document.prompt == (
        "System:\nBe kind.\n\nUser:\nHi\n\nAssistant:\nHello\n\nUser:\n2+2?\n\nAssistant:\n"
    )
    assert document.truth == "4"


def test_a_chat_may_come_as_columns(tmp_path):
    chat = {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}
    dataset = Dataset(files=[jsonl(tmp_path / "a.jsonl", [{"chat": chat}])], messages="chat")

    assert texts(dataset, fraction=0.0) == ["User:\nHi\n\nAssistant:\nHello"]


def test_rows_that_say_nothing_are_left_out(tmp_path):
    rows = [{"text": "a"}, {"text": ""}, {"text": " \n"}, {"text": None}, {"text": "b"}]
    chats = [{"messages": [{"role": "user", "content": "Hi"}]}, {"messages": []}]
    plain = Dataset(files=[jsonl(tmp_path / "a.jsonl", rows)])
    chat = Dataset(files=[jsonl(tmp_path / "b.jsonl", chats)])

    assert texts(plain, fraction=0.0) == ["a", "b"]
    assert texts(chat, fraction=0.0) == []


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"body": "a", "id": 1}, {}, "it has body, id"),
        ({"txt": "a"}, {"text": ["text"]}, "no column 'text'; it has txt"),
        ({"q": "a", "a": "b"}, {"prompt": ["q"], "truth": "answer"}, "no column 'answer'"),
        ({"text": 3}, {}, "'text' of .* holds int"),
        ({"messages": ["hi"]}, {}, "no list of role and content"),
        ({"messages": 3}, {}, "no list of role and content"),
        ({"messages": {"role": 5, "content": "x"}}, {}, "no list of role and content"),
        ({"messages": {"role": ["user"], "content": []}}, {}, "no list of role and content"),
        (
            {"messages": [{"role": 3, "content": ""}, {"role": "assistant", "content": "a"}]},
            {},
            "'role' of .* holds int",
        ),
    ],
)
def test_a_wrong_column_is_explained(tmp_path, row, columns, message):
    dataset = Dataset(files=[jsonl(tmp_path / "a.jsonl", [row])], **columns)

    with pytest.raises(UserError, match=message):
        texts(dataset)


@pytest.mark.parametrize(
    ("first", "row", "message"),
    [
        ({"text": "a"}, {"txt": "b"}, "has no column 'text'; it has txt"),
        ({"title": "a", "text": "a"}, {"tag": "b"}, "has no column 'title'; it has tag"),
        ({"prompt": "a", "truth": "a"}, {"prompt": "b"}, "has no column 'truth'; it has prompt"),
        ({"messages": []}, {"text": "b"}, "has no column 'messages'; it has text"),
    ],
)
def test_a_later_row_without_what_is_learned_is_no_silent_loss(tmp_path, first, row, message):
    dataset = Dataset(files=[jsonl(tmp_path / "a.jsonl", [first, row])])

    with pytest.raises(UserError, match=message):
        texts(dataset)


def test_a_row_may_lack_a_title_or_a_prompt(tmp_path):
    titled = [{"title": "a", "text": "b"}, {"text": "c"}]
    asked = [{"prompt": "a", "truth": "b"}, {"truth": "c"}]

    assert texts(Dataset(files=[jsonl(tmp_path / "a.jsonl", titled)]), fraction=0.0)[1] == "c"
    assert texts(Dataset(files=[jsonl(tmp_path / "b.jsonl", asked)]), fraction=0.0)[1] == "c"


def test_a_lone_surrogate_in_json_becomes_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')

    assert texts(Dataset(files=[str(tmp_path / "a.jsonl")]), fraction=0.0) == ["a�b"]


def test_every_record_is_on_one_side_only(tmp_path):
    dataset = Dataset(files=[jsonl(tmp_path / "a.jsonl", numbered(0, 1000))])
    training, held_out = texts(dataset), texts(dataset, "validation")

    assert sorted([*training, *held_out]) == sorted(f"record {i}" for i in range(1000))
    assert 150 < len(held_out) < 250


def test_data_added_anywhere_moves_no_record_to_the_other_side(tmp_path):
    small = Dataset(files=[jsonl(tmp_path / "a.jsonl", numbered(300, 600))])
    large = Dataset(files=[jsonl(tmp_path / "b.jsonl", numbered(0, 900))])

    assert set(texts(small, "validation")) <= set(texts(large, "validation"))
    assert set(texts(small)) <= set(texts(large))


@given(content=st.text())
def test_the_place_of_a_record_depends_on_its_text_alone(content):
    place = Document(content, None, row=1).place

    assert 0 <= place < 1
    assert place == Document(content, None, row=2).place


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_small_source_holds_one_record_out(tmp_path, count):
    dataset = Dataset(files=[jsonl(tmp_path / "a.jsonl", numbered(0, count))])
    fraction = held_out_fraction(dataset, 1e-9)

    assert len(texts(dataset, "validation", fraction)) == 1
    assert len(texts(dataset, "train", fraction)) == count - 1
    assert held_out_fraction(dataset, 0.999) == 0.999


def test_the_sources_own_held_out_files_win_over_the_hash(tmp_path):
    jsonl(tmp_path / "train.jsonl", numbered(0, 50))
    jsonl(tmp_path / "validation.jsonl", numbered(50, 60))
    jsonl(tmp_path / "test.jsonl", numbered(60, 70))
    dataset = Dataset(files=[str(tmp_path)])

    assert has_own_validation(dataset)
    assert texts(dataset) == [f"record {i}" for i in range(50)]
    assert texts(dataset, "validation") == [f"record {i}" for i in range(50, 60)]


def test_held_out_files_that_a_plan_names_must_be_there(tmp_path):
    jsonl(tmp_path / "one.jsonl", numbered(0, 50))

    with pytest.raises(UserError, match="starts with 'held'"):
        texts(Dataset(files=[str(tmp_path)], validation_split="held"))


def test_a_folder_of_test_files_is_never_trained_on(tmp_path):
    jsonl(tmp_path / "test.jsonl", numbered(0, 5))

    with pytest.raises(UserError, match="only files to test or validate"):
        texts(Dataset(files=[str(tmp_path)]))


def test_a_file_that_is_named_to_be_held_out_is_not_trained_on(tmp_path):
    for name, first in (("a", 0), ("b", 50)):
        jsonl(tmp_path / f"{name}.jsonl", numbered(first, first + 50))
    dataset = Dataset(files=[str(tmp_path)], validation_files=[str(tmp_path / "b.jsonl")])

    assert texts(dataset) == [f"record {i}" for i in range(50)]
    assert texts(dataset, "validation") == [f"record {i}" for i in range(50, 100)]
    with pytest.raises(UserError, match="all of it is named to be held out"):
        texts(dataset.model_copy(update={"files": dataset.validation_files}))


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_reading_can_go_on_at_any_document(tmp_path, monkeypatch, kind):
    rows = [{"text": f"record {i}" if i % 5 else ""} for i in range(300)]
    if kind == "files":
        half = jsonl(tmp_path / "a.jsonl", rows[:120])
        dataset = Dataset(files=[half, jsonl(tmp_path / "b.jsonl", rows[120:])])
    else:
        on_hub(monkeypatch, {"train": rows})
        dataset = Dataset(hub="someone/records")
    everything = list(documents(dataset, "train", 0.2))

    for index in (0, 1, 50, len(everything) - 1):
        rest = list(documents(dataset, "train", 0.2, skip=everything[index].row))
        assert rest == everything[index:]


def test_the_fingerprint_follows_the_content(tmp_path):
    dataset = Dataset(files=[jsonl(tmp_path / "a.jsonl", numbered(0, 9))])
    before = source_fingerprint(dataset)
    moved = Dataset(files=[jsonl(tmp_path / "elsewhere.jsonl", numbered(0, 9))])
    elsewhere = source_fingerprint(moved)
    jsonl(tmp_path / "a.jsonl", numbered(0, 10))

    assert before == elsewhere
    assert source_fingerprint(dataset) != before


def test_the_standard_library_is_here_without_its_tests():
    dataset = Dataset(builtin="python-stdlib")
    found = dict(library())

    assert {"argparse.py", "json/decoder.py"} <= found.keys()
    assert list(found) == sorted(found)
    assert not any("site-packages" in name or "/tests/" in name for name in found)
    assert not any(name.startswith(("test/", "idlelib/idle_test/")) for name in found)
    assert 5e6 < expected_bytes(dataset) < 50e6
    (first,) = itertools.islice(documents(dataset, "train", 0.0), 1)
    assert first.text == found["__future__.py"].read_text()


def test_a_python_without_source_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))

    with pytest.raises(UserError, match="no source") as caught:
        texts(Dataset(builtin="python-stdlib"))

    assert caught.value.code == NO_DATA and "--data PATH" in caught.value.hint


def test_a_hub_dataset_is_read_by_its_splits(monkeypatch):
    tables = {"train": numbered(0, 20), "test": numbered(20, 25)}
    on_hub(monkeypatch, tables)
    dataset = Dataset(hub="someone/records", validation_split="test")

    assert texts(dataset) == [row["text"] for row in tables["train"]]
    assert texts(dataset, "validation") == [row["text"] for row in tables["test"]]


def test_held_out_records_of_a_hub_dataset_come_from_its_beginning(monkeypatch):
    on_hub(monkeypatch, {"train": numbered(0, 1000)})
    monkeypatch.setattr(text, "HELD_OUT_SPAN", 100 * len("record 999"))
    dataset = Dataset(hub="someone/records")
    everything = Dataset(hub="someone/records", validation_split="train")

    held_out = texts(dataset, "validation")

    assert 0 < len(held_out) < 50
    assert (
        held_out == [t for t in texts(everything)[:120] if Document(t).place < 0.2][: len(held_out)]
    )
    assert all(Document(t).place >= 0.2 for t in texts(dataset))  # the later ones are held out too


def test_a_hub_that_breaks_off_is_opened_again_where_it_did(monkeypatch):
    pauses = []
    monkeypatch.setattr(network, "sleep", pauses.append)
    opened = []

    def open_hub(dataset, split, skip):
        opened.append(skip)
        yield from numbered(skip, skip + 300)
        if skip < 900:
            raise ConnectionError("reset")

    monkeypatch.setattr(hub, "open_hub", open_hub)

    found = texts(Dataset(hub="someone/records", validation_split="test"))

    assert found == [f"record {i}" for i in range(len(found))]
    assert len(found) >= 900 and opened == sorted(set(opened)) and len(opened) > 2
    assert pauses


def test_a_hub_that_is_gone_says_what_to_set(monkeypatch):
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    def open_hub(dataset, split, skip):
        raise ConnectionError("Couldn't reach someone/records")

    monkeypatch.setattr(network, "sleep", sleep)
    monkeypatch.setattr(network, "clock", lambda: now[0])
    monkeypatch.setattr(hub, "open_hub", open_hub)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    with pytest.raises(UserError, match="someone/records") as caught:
        texts(Dataset(hub="someone/records"))

    assert 10 < now[0] <= 60
    assert caught.value.code == NO_DATA
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "--data PATH", "--plan quick"):
        assert name in caught.value.hint


def test_who_asked_to_stay_offline_is_not_told_to_check_the_network(monkeypatch):
    def open_hub(dataset, split, skip):
        raise ConnectionError("Couldn't reach someone/records (OfflineModeIsEnabled)")

    monkeypatch.setattr(hub, "open_hub", open_hub)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    with pytest.raises(UserError, match="someone/records") as caught:
        texts(Dataset(hub="someone/records"))

    assert caught.value.code == NO_DATA
    assert caught.value.hint.startswith("HF_HUB_OFFLINE is set: unset it to download")
    assert "--plan quick" in caught.value.hint


def test_a_hub_dataset_without_such_a_split_is_explained(monkeypatch):
    def open_hub(dataset, split, skip):
        raise ValueError("Unknown split 'trian'. Should be one of ['train']")

    monkeypatch.setattr(hub, "open_hub", open_hub)

    with pytest.raises(UserError, match=r"one of \['train'\]"):
        texts(Dataset(hub="someone/records", split="trian"))


def test_the_datasets_library_is_called_as_it_wants_to_be(tmp_path):
    """The adapter's own calls, with the hub's place taken by a local builder."""
    import datasets

    path = jsonl(tmp_path / "a.jsonl", numbered(0, 10))
    load_dataset = datasets.load_dataset
    asked = {}

    def local(name, config, *, split, revision, streaming):
        asked.update(name=name, config=config, revision=revision)
        return load_dataset("json", data_files=path, split=split, streaming=streaming)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", local)
        rows = list(hub.open_hub(Dataset(hub="a/b", config="c", revision="r"), "train", 7))

    assert rows == numbered(7, 10)
    assert asked == {"name": "a/b", "config": "c", "revision": "r"}
