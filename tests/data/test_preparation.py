"""Prepared tokens are the source's, whole, in order, once; whatever interrupts the preparation."""

import contextlib
import errno
import json
import os
import threading
import tracemalloc
from random import Random

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from lmplay.data import preparation as preparing
from lmplay.data import shard_cache as cache
from lmplay.data import sources as text
from lmplay.data.preparation import prepare
from lmplay.data.shard_format import write_shard
from lmplay.data.sources import documents
from lmplay.data.tokenizers import open_tokenizer
from lmplay.disk import TEMPORARY
from lmplay.errors import NO_DATA, UserError
from lmplay.plan import Dataset, Validation

BYTE = open_tokenizer("byte")
HELD_OUT = Validation(tokens=500, fraction=0.1, every_tokens=1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LMP_DATASETS", str(tmp_path / "cache"))
    monkeypatch.setattr(preparing, "_BATCH_RECORDS", 7)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # slow, and nothing here cuts power
    return tmp_path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(files=[str(path)])


def numbered(count):
    return [{"text": f"record {i} é"} for i in range(count)]


def made(dataset, split="train", on_progress=lambda *numbers: None, **options):
    options = {"shard_tokens": 100, **options}
    held_out, training = prepare(dataset, "name", BYTE, HELD_OUT, on_progress, **options)
    return training if split == "train" else held_out


def stream(prepared):
    return prepared.window(0, prepared.num_tokens)[0].tolist()


def packed(dataset, split="train", fraction=0.1):
    expected = [BYTE.end]
    found = documents(dataset, split, fraction)
    if split == "validation":  # a fair sample, not the source's beginning
        found = sorted(found, key=lambda document: document.place)
    for document in found:
        expected += [*document.text.encode(), BYTE.end]
    return expected


def folder_of(root, prepared):
    return root / "cache" / f"name-{prepared.fingerprint[:12]}"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


@settings(max_examples=40, deadline=None)
@given(
    records=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=30),
    shard_tokens=st.integers(5, 300),
)
def test_packing_keeps_every_token_in_order(tmp_path_factory, records, shard_tokens):
    root = tmp_path_factory.mktemp("packing")
    dataset = jsonl(root / "a.jsonl", [{"text": record} for record in records])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMP_DATASETS", str(root / "cache"))
        fraction = text.held_out_fraction(dataset, 0.1)
        if not list(documents(dataset, "train", fraction)):
            return

        prepared = made(dataset, shard_tokens=shard_tokens)

        assert stream(prepared) == packed(dataset, "train", fraction)
        ends, complete = prepared.known()
        assert complete
        assert all(end == (i + 1) * shard_tokens for i, end in enumerate(ends[:-1]))
        assert prepared.text_bytes() == sum(
            document.num_bytes for document in documents(dataset, "train", fraction)
        )


def test_a_window_may_lie_anywhere(folder):
    prepared = made(jsonl(folder / "a.jsonl", numbered(100)))
    whole = stream(prepared)

    for start in (0, 1, 99, 100, 150, len(whole) - 5):
        for length in (1, 5, 100, 350):
            tokens, learned = prepared.window(start, length)
            assert tokens.tolist() == whole[start : start + length]
            assert tokens.dtype == np.int64 and learned.all() and len(learned) == len(tokens)


@pytest.mark.parametrize("learn_prompt", [False, True])
def test_only_the_truth_and_its_end_are_learned(folder, learn_prompt):
    rows = [{"prompt": f"question {i}?" * 3, "truth": f"answer {i}"} for i in range(60)]
    dataset = jsonl(folder / "a.jsonl", rows).model_copy(update={"learn_prompt": learn_prompt})
    expected = [True]
    num_bytes = 0
    for document in documents(dataset, "train", 0.1):
        expected += [learn_prompt] * len(document.prompt) + [True] * (len(document.truth) + 1)
        num_bytes += len(document.truth) + (len(document.prompt) if learn_prompt else 0)

    prepared = made(dataset)

    assert prepared.window(0, prepared.num_tokens)[1].tolist() == expected
    assert stream(prepared) == packed(dataset)
    assert prepared.text_bytes() == num_bytes


def test_the_held_out_text_ends_at_its_limit(folder):
    dataset = jsonl(folder / "a.jsonl", numbered(1000))

    prepared = made(dataset, "validation")

    assert stream(prepared) == packed(dataset, "validation")[: 1 + HELD_OUT.tokens]
    text_tokens = [token for token in stream(prepared) if token != BYTE.end]
    assert prepared.text_bytes() == len(text_tokens)


def test_a_source_shorter_than_the_limit_is_held_out_whole(folder):
    dataset = jsonl(folder / "a.jsonl", numbered(100))

    assert stream(made(dataset, "validation")) == packed(dataset, "validation")


def test_the_bytes_of_a_cut_chat_are_those_of_its_learned_tokens(folder):
    rows = [{"prompt": "q" * 40, "truth": "é" * 40} for _ in range(3)]
    (folder / "data").mkdir()
    jsonl(folder / "data" / "train.jsonl", rows)
    jsonl(folder / "data" / "validation.jsonl", rows * 9)
    dataset = Dataset(files=[str(folder / "data")])

    prepared = made(dataset, "validation")

    tokens, learned = prepared.window(1, prepared.num_tokens)
    assert len(tokens) == HELD_OUT.tokens
    assert prepared.text_bytes() == int((learned & (tokens != BYTE.end)).sum())


def test_a_larger_limit_leaves_the_training_text_alone(folder):
    dataset = jsonl(folder / "a.jsonl", numbered(300))
    more = HELD_OUT.model_copy(update={"tokens": 2000})

    small, (_, large) = made(dataset), prepare(dataset, "name", BYTE, more, print, shard_tokens=100)

    assert small.fingerprint == large.fingerprint


def test_one_pass_over_the_source_makes_both_sides(folder, monkeypatch):
    dataset = jsonl(folder / "a.jsonl", numbered(100))
    text.held_out_fraction(dataset, HELD_OUT.fraction)  # reads until it has found one
    passes = []
    rows = text.file_rows
    monkeypatch.setattr(text, "file_rows", lambda *a: passes.append(a) or rows(*a))
    monkeypatch.setattr(preparing, "share_trained_on", lambda *a, **k: 0.0)  # looks by itself

    held_out, training = prepare(dataset, "name", BYTE, HELD_OUT, print, shard_tokens=100)

    assert len(passes) == 1
    assert stream(held_out) == packed(dataset, "validation")
    assert stream(training) == packed(dataset)


def test_what_is_wrong_with_a_validation_split_is_told_before_training_text_is_prepared(folder):
    (folder / "data").mkdir()
    jsonl(folder / "data" / "train.jsonl", numbered(100))
    jsonl(folder / "data" / "validation.jsonl", [{"words": "no such column"}])
    told = []

    with pytest.raises(UserError, match=r"validation\.jsonl"):
        made(Dataset(files=[str(folder / "data")]), on_progress=lambda *numbers: told.append(1))

    assert not told


@pytest.mark.parametrize(("is_parallel", "most"), [(True, 1), (False, 3)])
def test_a_tokenizer_that_uses_all_cores_is_called_from_one_thread(
    folder, monkeypatch, is_parallel, most
):
    dataset = jsonl(folder / "a.jsonl", numbered(400))
    together = threading.Barrier(most)
    running = []

    class Tracked(type(BYTE)):
        def encode_batch(self, texts):
            running.append(threading.current_thread())
            if len(texts) == 7 and not together.broken:
                with contextlib.suppress(threading.BrokenBarrierError):
                    together.wait(5)  # returns at once where `most` threads are here
            return super().encode_batch(texts)

    tokenizer = Tracked()
    tokenizer.is_parallel = is_parallel
    monkeypatch.setattr(preparing, "num_cores", lambda: 3)
    _, training = prepare(dataset, "name", tokenizer, HELD_OUT, print, shard_tokens=100)

    assert stream(training) == packed(dataset)
    assert len({thread for thread in running if thread is not threading.main_thread()}) == most


def test_what_is_prepared_is_not_prepared_again(folder, monkeypatch):
    dataset = jsonl(folder / "a.jsonl", numbered(100))
    before = made(dataset)
    monkeypatch.setattr(preparing, "documents", None)

    again = made(dataset)

    assert stream(again) == stream(before)
    assert again.text_bytes() == before.text_bytes()


def test_a_dataset_s_name_leads_to_no_other_folder(folder):
    dataset = jsonl(folder / "a.jsonl", numbered(100))

    prepare(dataset, "../some where/else", BYTE, HELD_OUT, print, shard_tokens=100)

    folders = [path for path in (folder / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 2  # a side each
    assert all(path.name.startswith(".._some_where_else-") for path in folders)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_killed_preparation_goes_on_after_its_last_whole_shard(folder, error):
    dataset = jsonl(folder / "a.jsonl", numbered(200))
    done = []

    def killed(name, num_bytes, tokens, total):
        done.append(tokens)
        if tokens > 800:
            raise error

    with pytest.raises(error):
        made(dataset, on_progress=killed)
    half = next(path for path in (folder / "cache").iterdir() if path.name.startswith("name-"))
    left = json.loads((half / "index.json").read_text())
    assert not left["complete"] and len(left["shards"]) >= 7
    done.clear()
    resumed = made(dataset, on_progress=lambda name, b, tokens, total: done.append(tokens))

    assert done[0] > 800  # what was whole is not made again
    assert stream(resumed) == packed(dataset)
    assert stream(made(dataset, "validation")) == packed(dataset, "validation")
    assert resumed.text_bytes() == sum(d.num_bytes for d in documents(dataset, "train", 0.1))


def test_killed_at_every_write_it_ends_in_the_same_files(folder, monkeypatch):
    rows = [{"prompt": f"question {i}", "truth": f"answer {i}"} for i in range(30)]
    dataset = jsonl(folder / "a.jsonl", rows)
    monkeypatch.setenv("LMP_DATASETS", str(folder / "cache" / "whole"))
    whole = made(dataset)
    expected = contents(folder / "cache" / "whole" / f"name-{whole.fingerprint[:12]}")
    write_whole = cache.write_whole
    from lmplay.data import shard_writer as writer

    for moment in range(200):
        root = folder / "cache" / str(moment)
        monkeypatch.setenv("LMP_DATASETS", str(root))
        text.held_out_fraction(dataset, HELD_OUT.fraction)
        writes = []

        def killed(path, write, num_bytes=0, moment=moment, writes=writes):
            if len(writes) == moment:
                path.with_name(f"{TEMPORARY}left").write_bytes(b"half of it")
                raise KeyboardInterrupt
            writes.append(path)
            write_whole(path, write, num_bytes)

        with monkeypatch.context() as patch:
            patch.setattr(writer, "write_whole", killed)
            patch.setattr(cache, "write_whole", killed)
            try:
                made(dataset)
            except KeyboardInterrupt:
                finished = False
            else:
                finished = True
        prepared = made(dataset)
        assert contents(root / f"name-{prepared.fingerprint[:12]}") == expected
        if finished:
            break

    assert moment > 15


@pytest.mark.parametrize("damage", ["missing", "short", "no mask", "index"])
def test_a_damaged_folder_is_mended_from_the_first_bad_shard_on(folder, damage):
    rows = [{"prompt": f"question {i}", "truth": f"answer {i}"} for i in range(40)]
    dataset = jsonl(folder / "a.jsonl", rows)
    before = made(dataset)
    path = folder_of(folder, before)
    expected = contents(path)
    shard = path / "000004.bin"
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "no mask":
        (path / "000004.mask").unlink()
    else:
        (path / "index.json").write_text('{"shards": [')

    made(dataset)

    assert contents(path) == expected


def test_a_flipped_bit_is_found_when_the_shard_is_read(folder):
    dataset = jsonl(folder / "a.jsonl", numbered(100))
    shard = folder_of(folder, made(dataset)) / "000002.bin"
    content = bytearray(shard.read_bytes())
    content[1024 + 20] ^= 4
    shard.write_bytes(content)
    prepared = made(dataset)
    prepared.window(0, 150)

    with pytest.raises(UserError, match=r"000002\.bin is damaged") as caught:
        prepared.window(210, 5)

    assert "delete that file" in caught.value.hint


def test_a_full_disk_keeps_what_is_whole(folder, monkeypatch):
    dataset = jsonl(folder / "a.jsonl", numbered(200))
    from lmplay.data import shard_writer as writer

    def full(file, tokens):
        if len(list(folder.glob("cache/name-*/*.bin"))) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_shard(file, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_shard", full)
        with pytest.raises(UserError, match=r"the disk is full: .* needs .* bytes") as caught:
            made(dataset)

    assert caught.value.code == NO_DATA and "LMP_DATASETS" in caught.value.hint
    assert len(list(folder.glob("cache/name-*/*.bin"))) == 3
    assert not list(folder.glob(f"cache/name-*/{TEMPORARY}*"))
    assert stream(made(dataset)) == packed(dataset)


def test_a_second_preparer_uses_what_the_first_one_makes(folder, monkeypatch):
    dataset = jsonl(folder / "a.jsonl", numbered(100))
    prepared = made(dataset)
    path = folder_of(folder, prepared)
    index = (path / "index.json").read_text()
    (path / "index.json").write_text(json.dumps({"shards": [], "complete": False}))
    notes = []
    lock = FileLock(path / "lock")
    lock.acquire()

    def note(text):
        notes.append(text)
        (path / "index.json").write_text(index)  # the first one has finished

    monkeypatch.setattr(preparing, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(preparing, "Writer", lambda *_, **__: pytest.fail("it wrote too"))
    followed = made(dataset, note=note)
    lock.release()

    assert stream(followed) == stream(prepared)
    assert len(notes) == 1 and "another process prepares" in notes[0]


def test_a_source_without_text_is_no_empty_dataset(folder):
    one = jsonl(folder / "one.jsonl", numbered(1))

    with pytest.raises(UserError, match=r"no text is left in .* for train") as caught:
        made(one)
    assert caught.value.code == NO_DATA
    with pytest.raises(UserError, match="no text is left"):
        made(jsonl(folder / "none.jsonl", [{"text": " "}]))


def test_progress_is_told_with_the_total_where_it_is_known(folder):
    (folder / "a.txt").write_text("line\n" * 50_000)
    told = []

    made(
        Dataset(files=[str(folder / "a.txt")]),
        on_progress=lambda *numbers: told.append(numbers),
        shard_tokens=1 << 16,
    )

    names, num_bytes, tokens, totals = zip(*told, strict=True)
    assert set(names) == {"name"} and set(totals) == {250_000}
    assert list(num_bytes) == sorted(num_bytes) and num_bytes[-1] <= 250_000
    assert list(tokens) == sorted(tokens)


def test_preparing_needs_no_more_memory_for_more_text(folder, monkeypatch):
    monkeypatch.setattr(preparing, "_BATCH_CHARACTERS", 1 << 16)
    peaks = []
    for size in (20_000, 200_000):
        (folder / f"{size}.txt").write_text("a line of text\n" * size)
        tracemalloc.start()
        made(Dataset(files=[str(folder / f"{size}.txt")]), shard_tokens=1 << 18)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert peaks[1] < 1.5 * peaks[0] + 500_000


def notes_of(dataset, tokenizer=None, held_out=HELD_OUT):
    notes = []
    sides = prepare(
        dataset, "name", tokenizer or BYTE, held_out, lambda *numbers: None, notes.append
    )
    return sides, notes


def lines(first, count):
    return "".join(f"line {i} of a text that is long enough\n" for i in range(first, first + count))


WORDS = "".join(map(chr, Random(1).choices(range(0x4E00, 0x9000), k=9000)))  # without a blank
ANSWERS = [{"prompt": f"{i} + {i}?", "truth": f"{2 * i}"} for i in range(400)]


def as_json(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("suffix", "train", "copied", "other"),
    [
        ("txt", lines(0, 2000), lines(1000, 500), lines(5000, 500)),
        ("txt", lines(0, 2000), lines(1000, 500).replace(" of ", "\r\nof "), lines(9000, 500)),
        ("txt", WORDS[:6000], WORDS[3333:5555], WORDS[6000:]),
        ("jsonl", as_json(ANSWERS[:300]), as_json(ANSWERS[99:120]), as_json(ANSWERS[300:])),
    ],
    ids=["lines", "other ends of lines", "no lines", "short rows"],
)
def test_what_is_held_out_and_trained_on_too_is_told(folder, suffix, train, copied, other):
    (folder / f"train.{suffix}").write_text(train)
    (folder / f"validation.{suffix}").write_text(copied)
    (held_out, _), notes = notes_of(Dataset(files=[str(folder)]))
    (folder / f"validation.{suffix}").write_text(other)
    (without, _), said = notes_of(Dataset(files=[str(folder)]))

    assert held_out.trained_on > 0.5 and without.trained_on == 0
    assert any("of the text held out is also in the training text" in note for note in notes)
    assert not any("also in" in note for note in said)


def test_a_part_held_out_of_a_text_that_is_there_twice_is_told(folder):
    text, books = lines(0, 3000), folder / "books"
    books.mkdir()
    (books / "a.txt").write_text(text)
    (once, _), _ = notes_of(Dataset(files=[str(books)]))
    (books / "b.txt").write_text(text[7777:])
    (twice, _), notes = notes_of(Dataset(files=[str(books)]))

    assert once.trained_on == 0 and twice.trained_on > 0.9
    assert any("also in the training text" in note for note in notes)


def test_text_named_for_validation_is_held_out_whatever_else_is_called_so(folder):
    (folder / "in").mkdir()
    (folder / "in" / "a.txt").write_text("trained")
    (folder / "in" / "validation.txt").write_text("neither")
    (folder / "mine.txt").write_text("held out")

    dataset = Dataset(files=[str(folder / "in")], validation_files=[str(folder / "mine.txt")])
    (held_out, training), notes = notes_of(dataset)

    assert bytes(t for t in stream(held_out) if t < 256) == b"held out"
    assert bytes(t for t in stream(training) if t < 256) == b"trained"
    assert any(
        "reads a.txt; holds out mine.txt; left out: validation.txt" in note for note in notes
    )


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", 'id,text\n1,"x"\n', "holds a table"),
        ("a.txt", '{"text": "x"}\n', "holds lines of JSON: call it .jsonl"),
        ("a.md", "3 is a number\n", None),
    ],
)
def test_rows_that_are_read_as_plain_text_are_told(folder, name, text, told):
    (folder / name).write_text(text * 4000)

    _, notes = notes_of(Dataset(files=[str(folder / name)]))
    assert [told for note in notes if "as plain text" in note] == [told] * (told is not None)
    assert all(told in note for note in notes if "as plain text" in note)


class Lossy(type(BYTE)):
    """Bytes without the blanks, as a tokenizer that splits at them may give them back."""

    def __init__(self):
        super().__init__()
        self.fingerprint = "lossy"

    def decode(self, ids):
        return super().decode(ids).replace(" ", "")


def test_a_tokenizer_that_loses_text_is_found_by_the_text_that_is_held_out(folder):
    dataset = jsonl(folder / "a.jsonl", numbered(100))

    (held_out, _), notes = notes_of(dataset, Lossy())
    (whole, _), quiet = notes_of(dataset)
    late = [{"text": f"{i}" + "long" * 5_000 + " end"} for i in range(9)]
    much = HELD_OUT.model_copy(update={"tokens": 10**6})
    (of_late, _), _ = notes_of(jsonl(folder / "b.jsonl", late), Lossy(), much)
    assert not of_late.is_lossless()

    assert not held_out.is_lossless() and any("loses text" in note for note in notes)
    assert whole.is_lossless() and not any("loses" in note for note in quiet)
