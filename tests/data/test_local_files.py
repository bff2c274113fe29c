"""Every kind of local file gives its rows, and its name tells its split."""

import gzip
import io
import json
import os
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmplay.data.local_files import (
    PASSAGE,
    Place,
    SourceFile,
    file_rows,
    of_split,
    passages,
    source_files,
)
from lmplay.data.rendering import Renderer
from lmplay.errors import UserError
from lmplay.plan import Dataset

ROWS = [{"title": f"title {i}", "text": f"text {i}\nmore é"} for i in range(700)]


def read(path):
    rows = []
    for file in of_split(source_files([str(path)]), "train"):
        rows += file_rows(file, lambda names: [n for n in names if n != "unwanted"])
    return rows


def write_jsonl(path, rows=ROWS):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def write_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=100)


def write_arrow_stream(path):
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


def write_arrow_file(path):
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.json": write_jsonl,
    "a.jsonl.gz": write_jsonl,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow_stream,
    "b.arrow": write_arrow_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_table_gives_its_rows_in_order(tmp_path, name):
    WRITERS[name](tmp_path / name)

    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.txt.gz", "a.whatever"])
def test_anything_else_is_read_as_text(tmp_path, name):
    text = "".join(f"line {i} é\n" for i in range(9000))
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(text)

    rows = read(tmp_path / name)

    assert len(rows) > 3
    assert "".join(row["text"] for row in rows) == text


@given(
    lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))),
    seed=st.randoms(use_true_random=False),
)
def test_passages_joined_are_the_text(lines, seed):
    lines = [line * seed.choice([0, 1, 300, 5000]) for line in lines]
    text = "\n".join(lines)

    cut = list(passages(io.StringIO(text)))

    assert "".join(cut) == text
    assert all(0 < len(passage) <= PASSAGE for passage in cut)


def test_passages_end_at_a_blank_line_else_at_the_end_of_a_line():
    paragraphs = ("word " * 200 + "\n\n") * 60
    lines = ("word " * 200 + "\n") * 60

    assert all(p.endswith("\n\n") for p in passages(io.StringIO(paragraphs)))
    assert all(p.endswith("\n") for p in passages(io.StringIO(lines)))


def test_text_added_at_the_end_moves_no_earlier_cut():
    text = "".join(f"line {i}\n" for i in range(9000))

    before = list(passages(io.StringIO(text)))
    after = list(passages(io.StringIO(text + "more\n" * 9000)))

    assert after[: len(before) - 1] == before[:-1]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")

    assert read(tmp_path / "a.txt") == [{"text": "hello"}]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "c.txt", ".hidden/x.txt", "b/.x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")

    assert [row["text"] for row in read(tmp_path)] == ["a/1.txt", "b/2.txt", "c.txt"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.txt", "train"),
        ("train-00001-of-00002.parquet", "train"),
        ("validation.jsonl.gz", "validation"),
        ("valid.txt", "validation"),
        ("val/part.txt", "validation"),
        ("test.txt", "test"),
        ("Test-0-of-1.txt", "test"),
        ("Train Dreams.txt", None),
        ("Test Pilot.txt", None),
        ("Dev Diary.txt", None),
        ("val_1.txt", None),
        ("interval.txt", None),
        ("testament.txt", None),
        ("training.txt", None),
        ("value.txt", None),
        ("my-train.txt", None),
    ],
)
def test_a_whole_name_tells_the_split(tmp_path, name, split):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("text")

    assert [file.split for file in source_files([str(tmp_path)])] == [split]


def names(files):
    return [file.path.name for file in files]


def test_training_reads_train_files_or_all_that_are_no_other_split(tmp_path):
    for name in ("one.txt", "two.txt", "test.txt", "valid.txt"):
        (tmp_path / name).write_text("text")
    without_train = source_files([str(tmp_path)])
    (tmp_path / "train.txt").write_text("text")
    with_train = source_files([str(tmp_path)])

    assert names(of_split(without_train, "train")) == ["one.txt", "two.txt"]
    assert names(of_split(with_train, "train")) == ["train.txt"]
    assert names(of_split(with_train, "validation")) == ["valid.txt"]


def test_a_plan_can_say_how_held_out_files_are_called(tmp_path):
    for name in ("one.txt", "held-1.txt", "valid.txt", "test.txt"):
        (tmp_path / name).write_text("text")

    found = source_files([str(tmp_path)], held_out="held")

    assert names(of_split(found, "train")) == ["one.txt"]
    assert names(of_split(found, "validation")) == ["held-1.txt"]


def test_a_file_named_alone_is_trained_on_whatever_its_name(tmp_path):
    (tmp_path / "valid.txt").write_text("text")
    (tmp_path / "test.txt").write_text("text")

    alone = source_files([str(tmp_path / "valid.txt")])
    in_a_folder = source_files([str(tmp_path)])

    assert names(of_split(alone, "train")) == ["valid.txt"]
    assert of_split(in_a_folder, "train") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'["text"]\n', "line 1 is no JSON object"),
        ("a.json", b'[\n{"text": "a"}]\n', "line 1 is not JSON"),
        ("a.txt", b"caf\xe9 au lait", "is not UTF-8"),
        ("a.txt", b"a\0b", "holds no text: it is binary, with a NUL byte"),
        ("a.txt", "text".encode("utf-16")[:-1], "is not whole, though its mark says UTF-16"),
        ("a.pdf", b"%PDF-1.4\n%\xe2\xe3\n", "holds no text: it is a PDF"),
        ("a.docx", b"PK\3\4word", "holds no text: it is a zip archive"),
        ("a.txt", gzip.compress(b"text", mtime=0), "it is packed by gzip, and lacks the suffix"),
        ("a.parquet", b"PAR1 not really", "no whole Parquet"),
        ("a.arrow", b"ARROW1 not really", "no whole Arrow"),
        ("a.txt.gz", b"not packed", "cannot read"),
        ("b.txt.gz", gzip.compress(b"text " * 9999, mtime=0)[:-9], "cannot read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)

    assert name in caught.value.problem


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*nowhere\.txt"):
        source_files([str(tmp_path / "nowhere.txt")])


def test_no_name_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")

    with pytest.raises(UserError, match="no file ''"):
        source_files([""])


def test_a_folder_without_text_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no text"):
        source_files([str(tmp_path)])


def test_a_large_text_is_read_in_bounded_memory(tmp_path, monkeypatch):
    import tracemalloc

    (tmp_path / "a.txt").write_text("a line of text\n" * 400_000)  # 6 MB
    (file,) = source_files([str(tmp_path / "a.txt")])
    tracemalloc.start()

    total = sum(len(row["text"]) for row in file_rows(file, list))

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 6_000_000
    assert peak < 1_000_000


def test_what_is_left_out_of_a_folder_says_why(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "LICENSE").write_text("about")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_bytes(b"te\0xt")
    (tmp_path / "a.txt~").write_text("text as it was before")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "c.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")

    found = source_files([str(tmp_path)])

    assert names(of_split(found, "train")) == ["a.txt"]
    reasons = {file.path.name: file.left_out for file in found}
    assert reasons["README.md"] == reasons["LICENSE"] == "about the data"
    assert "NUL" in reasons["b.txt"] and reasons["a.txt"] is None
    assert "editor" in reasons["a.txt~"] and reasons["dataset_infos.json"] == "about the data"
    assert (reasons["c.txt"], reasons["pipe"]) == ("a link that leads nowhere", "no file")


def test_a_folder_of_readmes_is_a_text_too(tmp_path):
    (tmp_path / "README.md").write_text("about")

    assert read(tmp_path) == [{"text": "about"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_mark_tells_the_encoding(tmp_path, encoding, name):
    text = '{"text": "caf\xe9 \u4e2d"}\n'
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)

    expected = json.loads(text) if name.endswith("jsonl") else {"text": text}
    assert read(tmp_path / name) == [expected] == read(tmp_path)


def test_a_file_with_two_names_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to("a.txt")

    for paths in ([tmp_path], [tmp_path / "a.txt", tmp_path / "b.txt"], [tmp_path / "a.txt"] * 2):
        first, second = source_files([*map(str, paths)])
        assert first.left_out is None and "a.txt" in second.left_out


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("text")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")

    assert read(tmp_path / "data") == [{"text": "text"}]


def test_a_folder_that_the_datasets_library_saved_is_read(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_arrow_stream(tmp_path / split / "data-00000-of-00001.arrow")
        for name in ("state.json", "dataset_info.json"):
            (tmp_path / split / name).write_text("{\n}")
    (tmp_path / "dataset_dict.json").write_text("{}")

    assert read(tmp_path) == ROWS and read(tmp_path / "train") == ROWS


def test_a_bad_byte_has_a_line_and_an_offset(tmp_path):
    lines = ["caf\xe9"] * 30_000
    data = "\n".join(lines).encode()  # more than is decoded at once
    at = len(data) * 9 // 10 // 6 * 6
    (tmp_path / "a.txt").write_bytes(data[:at] + b"\xe9\n" + data[at:])

    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.txt")

    assert f"line {data[:at].count(10) + 1:,}, byte {at:,}" in caught.value.problem


@pytest.mark.parametrize("name", ["a.jsonl", "my text.txt", "a.txt.gz"])
def test_the_way_to_convert_a_file_leads_to_a_good_end(tmp_path, name):
    text = '{"text": "caf\xe9"}\n'
    data = text.encode("latin1")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    command = caught.value.hint.removeprefix("convert it first: ").partition(", and name that")[0]

    subprocess.run(["bash", "-c", command], check=True)

    (made,) = [path for path in tmp_path.iterdir() if path.name != name]
    assert read(made) == [json.loads(text) if name == "a.jsonl" else {"text": text}]


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
@pytest.mark.parametrize("text", ['[{"text": "a"},\n{"text": "b"}]\n', '{\n"text": "a"}\n'])
@pytest.mark.parametrize("packed", [False, True])
def test_the_way_to_make_lines_of_json_leads_to_a_good_end(tmp_path, text, packed):
    path = tmp_path / ("my file.json.gz" if packed else "my file.json")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(UserError, match="line 1 is not JSON") as caught:
        read(path)
    command = caught.value.hint.removeprefix("one object a line is needed: ")

    subprocess.run(["bash", "-c", command.removesuffix(", and name that")], check=True)

    (made,) = [other for other in tmp_path.iterdir() if other != path]
    assert read(made) == [{"text": letter} for letter in "ab" if f'"{letter}"' in text]


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_rows_inside_of_an_object_are_found_and_the_way_to_them_is_right(tmp_path):
    path = tmp_path / "my file.jsonl"
    path.write_text(json.dumps({"version": 1, "the data": [{"text": "a"}, {"text": "b"}]}))
    place = Place(path)
    render = Renderer(Dataset(files=[str(path)]), place)
    (row,) = file_rows(SourceFile(path, None), list, place)
    with pytest.raises(UserError, match="seem to be inside of 'the data'") as caught:
        render(row, 0)
    command = caught.value.hint.removeprefix("one object a line is needed: ")

    subprocess.run(["bash", "-c", command.removesuffix(", and name that")], check=True)

    assert read(tmp_path / "my file.lines.jsonl") == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("name", ["link", "pipe"])
def test_what_is_there_and_is_no_file_is_not_said_to_be_missing(tmp_path, name):
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(UserError, match=r"leads nowhere|no file and no folder") as caught:
        source_files([str(tmp_path / name)])

    assert "did you mean" not in caught.value.hint


def test_only_a_relative_path_is_said_to_be_one(tmp_path):
    with pytest.raises(UserError) as caught:
        source_files([str(tmp_path / "nowhere" / "a.txt")])

    assert caught.value.hint == f"see {tmp_path}"


def test_a_converted_file_keeps_its_split(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8") as caught:
        read(tmp_path / "train.txt")

    assert f"> {tmp_path / 'train.utf8.txt'}" in caught.value.hint
    (tmp_path / "train.utf8.txt").write_text("x")
    assert {file.split for file in source_files([str(tmp_path)])} == {"train"}


def test_whoever_finds_fault_with_a_row_knows_its_place(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*ROWS[:3], {}])
    (tmp_path / "a.jsonl").write_text("\n\n" + (tmp_path / "a.jsonl").read_text())
    place = Place("a.jsonl")

    places = [str(place) for _ in file_rows(SourceFile(tmp_path / "a.jsonl", None), list, place)]

    assert places == ["a.jsonl, line 3", "a.jsonl, line 4", "a.jsonl, line 5", "a.jsonl, line 6"]


@pytest.mark.parametrize("text", ["a" * 300, "~nosuchuser/a.txt", "a\0b"])
def test_a_name_that_no_file_can_have_is_refused_in_words(text):
    with pytest.raises(UserError):
        source_files([text])
