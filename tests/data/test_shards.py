"""Shards that somebody else made are read as they are, and their end or their val is held out."""

import numpy as np
import pytest

from lmplay.data.shard_format import map_shard, write_shard
from lmplay.data.shards import open_foreign
from lmplay.data.sources import shard_paths
from lmplay.data.tokenizers import open_tokenizer
from lmplay.errors import UserError
from lmplay.plan import Dataset, Validation

BYTE = open_tokenizer("byte")
HELD_OUT = Validation(tokens=500, fraction=0.1, every_tokens=1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LMP_DATASETS", str(tmp_path / "cache"))
    return tmp_path


def opened(dataset):
    """What is held out and what is trained on."""
    return open_foreign(dataset, "name", BYTE, HELD_OUT)


def stream(shards):
    return shards.window(0, shards.num_tokens)[0].tolist()


def foreign(path, tokens):
    with open(path, "wb") as file:
        write_shard(file, np.array(tokens, "<u2"))


def test_a_foreign_shard_has_the_layout_of_modded_nanogpt(folder):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 5
    tokens = np.array([256, 104, 105, 256, 33], "<u2")
    (folder / "fineweb_train_000001.bin").write_bytes(header.tobytes() + tokens.tobytes())

    assert map_shard(folder / "fineweb_train_000001.bin").tolist() == tokens.tolist()
    foreign(folder / "ours.bin", tokens)
    assert (folder / "ours.bin").read_bytes() == (folder / "fineweb_train_000001.bin").read_bytes()


def test_large_vocabularies_take_four_bytes(folder):
    with open(folder / "a.bin", "wb") as file:
        write_shard(file, np.array([1, 100_000], "<u4"))

    header = np.fromfile(folder / "a.bin", "<i4", 3)
    assert header.tolist() == [20240801, 7, 2]
    assert map_shard(folder / "a.bin").tolist() == [1, 100_000]


@pytest.mark.parametrize("name", ["x_val_0", "x_valid", "x_validation-0", "x_Dev", "x_val0"])
def test_foreign_shards_called_val_are_held_out(folder, name):
    for number in (2, 1):
        foreign(folder / f"x_train_{number}.bin", [256, number, number])
    foreign(folder / f"{name}.bin", [256, 9, 9, 9])
    dataset = Dataset(shards=[str(folder / "x_*.bin")])

    assert stream(opened(dataset)[1]) == [256, 1, 1, 256, 2, 2]
    assert stream(opened(dataset)[0]) == [256, 9, 9, 9]
    assert opened(dataset)[0].text_bytes() == 3


@pytest.mark.parametrize("name", ["interval", "x_values", "devices", "rival_0"])
def test_foreign_shards_whose_names_only_contain_val_are_trained_on(folder, name):
    foreign(folder / f"{name}.bin", [256, *range(99)])
    foreign(folder / "zz_val_0.bin", [256, 9, 9, 9])
    dataset = Dataset(shards=[str(folder / "*.bin")])

    assert stream(opened(dataset)[0]) == [256, 9, 9, 9]
    assert stream(opened(dataset)[1]) == [256, *range(99)]


def test_of_foreign_shards_the_end_is_held_out_else(folder):
    tokens = [*range(200)] * 10
    foreign(folder / "a.bin", tokens[:1000])
    foreign(folder / "b.bin", tokens[1000:])
    dataset = Dataset(shards=[str(folder / "*.bin")])
    training, held_out = stream(opened(dataset)[1]), stream(opened(dataset)[0])

    assert len(held_out) == 1 + 200  # a tenth, and its context
    assert training + held_out[1:] == tokens
    assert training[-1] == held_out[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"x" * 2000, "begins with"),
        (np.array([20240520, 1, 9] + [0] * 253, "<i4").tobytes() + b"12", "9 tokens make 1,042"),
    ],
)
def test_a_file_that_is_no_shard_is_named(folder, content, message):
    (folder / "bad.bin").write_bytes(content)

    with pytest.raises(UserError, match=message) as caught:
        opened(Dataset(shards=[str(folder / "bad.bin")]))

    assert "bad.bin" in caught.value.problem


def test_shards_of_another_tokenizer_are_refused(folder):
    foreign(folder / "a.bin", [256, 1, 50256, 2])

    with pytest.raises(UserError, match="holds token 50256, and byte has only 257"):
        stream(opened(Dataset(shards=[str(folder / "a.bin")]))[1])


def test_a_name_with_brackets_is_a_name_before_it_is_a_pattern(folder):
    (folder / "[1]").mkdir()
    foreign(folder / "[1]" / "train_1.bin", [256, 1, 1])
    dataset = Dataset(shards=[str(folder / "[1]" / "train_1.bin")])

    assert shard_paths(dataset) == [folder / "[1]" / "train_1.bin"]


def test_a_pattern_without_shards_is_named(folder):
    with pytest.raises(UserError, match=r"nothing_\*\.bin"):
        opened(Dataset(shards=[str(folder / "nothing_*.bin")]))
