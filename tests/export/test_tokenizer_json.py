"""Exported tokenizers give the ids that the run was trained on."""

import string

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import Tokenizer, models, pre_tokenizers

from lmplay.data.tokenizers import END, open_tokenizer
from lmplay.export.tokenizer_json import of_encoding, save_tokenizer

TEXTS = [
    "",
    "def main(self):\n    return 'x'\n",
    " ",
    "a\n  ",
    "a  \n\n  b\t\r\n \r",
    "don't DON'T I'LL 's \u2019s",
    "1234567 \u0663\u0664\u0665\u0666 \u00bd",
    "na\u00efve e\u0301 \ufb01 \u0149 \u01c5ungla \u0130\u0131\u017f",
    "\u65e5\u672c\u8a9e \U0001f469\u200d\U0001f466",
    "\u00a0\u2003\u2028 a\u200b \x00\x1c\x7f",
    "x" * 99,
    "<|endoftext",
    "zqzq",
]
difficult = st.text(
    st.sampled_from([*string.printable, *"\u00e9\u0663\u65e5\u00a0\u0301\u01c5\u2028"])
)


def learned(vocab_size):
    return open_tokenizer(
        f"bpe:{vocab_size}", lambda: [*TEXTS[:-1], string.printable, "the then " * 9]
    )


@pytest.fixture(scope="module")
def encodings():
    """The patterns of every encoding of tiktoken with few tokens, and a gap before the marker."""
    ours = learned(400)
    ranks = {ours.token_bytes(i + 1): i for i in range(ours.vocab_size - 1)}
    ranks[TEXTS[-1].encode()] = len(ranks)  # no merge leads to it, as to some of theirs
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(openai_public, name, lambda *_, **__: ranks)
        for name in ("gpt2", "p50k_base", "cl100k_base", "o200k_base"):
            pattern = getattr(openai_public, name)()["pat_str"]
            special = {END: len(ranks) + 1, "<|other|>": len(ranks) + 4}
            made[name] = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
    return {name: (encoding, of_encoding(encoding)) for name, encoding in made.items()}


@given(text=difficult)
def test_a_converted_encoding_of_tiktoken_gives_its_ids(encodings, text):
    for encoding, fast in encodings.values():
        for one in (text, *TEXTS):
            ids = fast.encode(one, add_special_tokens=False).ids
            assert ids == encoding.encode(one, disallowed_special=()), encoding.name


def test_a_converted_encoding_keeps_the_ids_of_special_tokens_and_gives_text_back(encodings):
    for encoding, fast in encodings.values():
        assert fast.token_to_id(END) == encoding.eot_token
        assert fast.encode(f"a{END}<|other|>").ids[1:] == [
            encoding.eot_token,
            encoding.encode_single_token("<|other|>"),
        ]
        for text in TEXTS:
            assert fast.decode(fast.encode(text).ids) == text


@pytest.mark.parametrize("name", ["byte", "bpe:300", "words", "gpt2"])
def test_transformers_reads_the_same_ids_behind_the_end_marker(
    name, transformers, encodings, tmp_path, monkeypatch
):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encodings[name][0])
    if name == "words":
        words = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "def": 2}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.add_special_tokens(["[SEP]"])
        words.enable_truncation(3)
        words.enable_padding(length=5)
        words.save(str(tmp_path / "words.json"))
        ours = open_tokenizer(str(tmp_path / "words.json"))
    else:
        ours = learned(300) if name.startswith("bpe") else open_tokenizer(name)
    (tmp_path / "out").mkdir()
    save_tokenizer(ours, tmp_path / "out", 24)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    fast = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))

    assert (theirs.eos_token_id, theirs.model_max_length) == (ours.end, 24)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == fast.encode(text).ids == [ours.end, *ids], text
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        if name != "words":
            assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    marker = ours.token_bytes(ours.end).decode()
    assert theirs(f"def{marker}")["input_ids"][-1] == ours.end
