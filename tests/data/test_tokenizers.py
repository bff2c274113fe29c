"""Tokens stand for exactly their text, and nothing in a text stands for the end marker."""

import itertools
import json
import os
import signal
import sys
import threading
from functools import cache
from hashlib import sha1
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmplay.data import bpe
from lmplay.data import tokenizers as tokens
from lmplay.data.tokenizers import END, open_tokenizer, vocabulary_of
from lmplay.errors import NO_DATA, UserError

_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
WORDS = ["low lower lowest", "new newer newest wide wider", "naïve café 北京 🙂 it's 1234"] * 20


def has_gpt2():
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    return bool(folder) and Path(folder, sha1(_GPT2.encode()).hexdigest()).is_file()


def word_level(path):
    """A tokenizer whose tokens are words, which ends documents with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0, "</s>": 1, "hello": 2, "world": 3}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["</s>", "[UNK]"])
    made.save(str(path))
    return path


BYTE = open_tokenizer("byte")
BPE = open_tokenizer("bpe:300", texts=lambda: WORDS)

SPECIAL = st.sampled_from([END, "\xa0", "\0", "\1"])
TEXTS = st.lists(st.one_of(st.text(" \n\ta1's", max_size=6), SPECIAL), max_size=3).map("".join)

both = pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])


@both
@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
@given(text=st.text())
def test_tokens_add_up_to_the_bytes_of_the_text(tokenizer, text):
    ids = tokenizer.encode(text)

    assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.skipif(not has_gpt2(), reason="GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR")
@given(texts=st.lists(TEXTS, max_size=6))
def test_texts_in_a_batch_have_the_tokens_that_tiktoken_gives(texts):
    import tiktoken

    expected = tiktoken.get_encoding("gpt2").encode_ordinary_batch(texts)
    assert [ids.tolist() for ids in open_tokenizer("gpt2").encode_batch(texts)] == expected


@pytest.fixture(scope="module")
def tiny_gpt2():
    """A tokenizer and tiktoken's: GPT-2's pattern, and merges of pairs, which show each cut."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    pairs = [bytes(pair) for pair in itertools.product(b" \n\ta1's", repeat=2)]
    ranks = {token: i for i, token in enumerate([*(bytes([i]) for i in range(256)), *pairs])}
    made = tiktoken.Encoding(
        "tiny", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", lambda name: made)
        return open_tokenizer("gpt2"), made


@given(texts=st.lists(TEXTS, max_size=6))
def test_each_text_of_a_batch_has_the_tokens_of_the_whole_pattern(tiny_gpt2, texts):
    tokenizer, whole = tiny_gpt2

    expected = [whole.encode_ordinary(text) for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
    assert [tokenizer.encode(text) for text in texts] == expected


@both
@given(texts=st.lists(st.text(), max_size=5))
def test_a_batch_is_each_text_alone(tokenizer, texts):
    alone = [tokenizer.encode(text) for text in texts]

    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == alone


@both
def test_a_text_never_holds_the_end_marker(tokenizer):
    ids = tokenizer.encode(f"before{END}after")

    assert tokenizer.end not in ids
    assert tokenizer.decode(ids) == f"before{END}after"
    assert tokenizer.decode([tokenizer.end]) == END


@both
def test_a_lone_surrogate_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a�b"


@both
def test_half_a_character_decodes_to_the_replacement_character(tokenizer):
    ids = tokenizer.encode("🙂")

    assert tokenizer.decode(ids[:-1]).strip("�") == ""


def test_bpe_has_the_tokens_asked_for_with_the_end_marker_among_them():
    assert BPE.vocab_size == 300
    assert 0 <= BPE.end < 300


def test_the_same_text_trains_the_same_tokenizer():
    again = open_tokenizer("bpe:300", texts=lambda: iter(WORDS))
    other = open_tokenizer("bpe:300", texts=lambda: ["quite other words here"] * 60)

    assert again.fingerprint == BPE.fingerprint
    assert other.fingerprint != BPE.fingerprint


def test_bpe_is_trained_on_the_beginning_only(monkeypatch):
    monkeypatch.setattr(bpe, "BPE_BYTES", sum(len(text.encode()) for text in WORDS))

    longer = open_tokenizer("bpe:300", texts=lambda: [*WORDS, "zebra " * 500])

    assert longer.fingerprint == BPE.fingerprint


def test_a_saved_tokenizer_opens_as_it_was(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    opened = open_tokenizer("bpe:300", file=tmp_path / "tokenizer.json")

    assert opened.fingerprint == BPE.fingerprint
    assert opened.encode(WORDS[2]) == BPE.encode(WORDS[2])
    assert opened.end == BPE.end
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json"]


def test_a_tokenizer_json_of_any_kind_can_be_named_by_its_path(tmp_path):
    opened = open_tokenizer(str(word_level(tmp_path / "words.json")))

    assert opened.encode("hello world") == [2, 3]
    assert opened.decode([2, 3]) == "hello world"
    assert opened.end == 1
    assert 1 not in opened.encode("hello </s> world")


def test_the_end_marker_of_a_tokenizer_survives_saving(tmp_path):
    from tokenizers import Tokenizer

    path = word_level(tmp_path / "words.json")
    made = Tokenizer.from_file(str(path))
    made.add_special_tokens(["<stop>"])
    made.save(str(path))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    opened = open_tokenizer(str(path))
    (tmp_path / "run").mkdir()
    opened.save(tmp_path / "run" / "tokenizer.json")

    again = open_tokenizer("any", file=tmp_path / "run" / "tokenizer.json")

    assert opened.end == again.end == made.token_to_id("<stop>")
    assert again.fingerprint == opened.fingerprint


@pytest.mark.parametrize("name", ["bpe:12", "bpe:many", "bpe:-300"])
def test_an_impossible_size_is_refused(name):
    with pytest.raises(UserError, match="at least 257"):
        open_tokenizer(name, texts=lambda: WORDS)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "wrong.json").write_text("{}")

    with pytest.raises(UserError, match=r"wrong\.json is no tokenizer\.json"):
        open_tokenizer(str(tmp_path / "wrong.json"))


def test_sizes_are_known_without_a_download():
    assert vocabulary_of("gpt2") == (50257, 50256)
    assert vocabulary_of("bpe:4096") == (4096, 0)
    assert vocabulary_of("byte") == (BYTE.vocab_size, BYTE.end) == (257, 256)


@pytest.mark.skipif(not has_gpt2(), reason="TIKTOKEN_CACHE_DIR holds no gpt2")
def test_gpt2_has_the_vocabulary_of_gpt2():
    gpt2 = open_tokenizer("gpt2")

    assert (gpt2.vocab_size, gpt2.end) == (50257, 50256)
    assert gpt2.encode("Hello world<|endoftext|>") == [15496, 995, 27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.decode(gpt2.encode("naïve 🙂\n\n")) == "naïve 🙂\n\n"


def test_an_id_that_the_vocabulary_leaves_free_adds_nothing():
    assert BPE.token_bytes(299) and BPE.token_bytes(300) == b""


def test_a_tokenizer_host_that_never_answers_is_given_up(monkeypatch):
    import tiktoken

    never = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: never.wait())
    monkeypatch.setattr(tokens, "_SECONDS", 0.05)

    with pytest.raises(UserError, match="no answer") as caught:
        open_tokenizer("gpt2")

    never.set()
    assert caught.value.code == NO_DATA
    assert "TIKTOKEN_CACHE_DIR" in caught.value.hint and "--plan quick" in caught.value.hint


def test_a_tokenizer_that_the_hub_cannot_give_says_what_to_set(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **options):
        raise ConnectionError("Offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)

    with pytest.raises(UserError, match="someone/tokenizer") as caught:
        open_tokenizer("someone/tokenizer")

    assert caught.value.code == NO_DATA
    assert "HF_HUB_OFFLINE" in caught.value.hint and "--plan quick" in caught.value.hint


def test_a_name_typed_wrong_gets_the_nearest_one(monkeypatch):
    import huggingface_hub

    def missing(*args, **options):
        raise FileNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)

    with pytest.raises(UserError) as caught:
        open_tokenizer("gtp2")

    assert "did you mean 'gpt2'" in caught.value.hint


def test_a_tokenizer_comes_from_the_hubs_cache_first(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    path = word_level(tmp_path / "tokenizer.json")
    asked = []

    def cached(name, file, local_files_only=False):
        asked.append((file, local_files_only))
        if file == "tokenizer.json":
            return str(path)
        raise LocalEntryNotFoundError("no") if local_files_only else EntryNotFoundError("no")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)

    assert open_tokenizer("someone/words").encode("world") == [3]
    assert asked[0] == ("tokenizer.json", True)


def test_importing_it_loads_nothing_heavy():
    import subprocess

    code = "import sys, lmplay.data.tokenizers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {"torch", "numpy", "tiktoken", "tokenizers", "datasets"} & set(done.stdout.split())


@cache
def trained_bpe():
    return open_tokenizer("bpe:300", texts=lambda: WORDS)


words = st.text(st.sampled_from("ab \n\u00a0é1'.\t"), max_size=300)


@given(text=words)
def test_a_long_text_has_the_tokens_of_its_pieces(text):
    with pytest.MonkeyPatch.context() as patch:
        whole = trained_bpe().encode(text)
        patch.setattr(bpe, "_PIECE", 7)
        patch.setattr(tokens, "_ROUND", 20)

        assert trained_bpe().encode(text) == whole
        assert "".join(bpe.pieces_of(text)) == text


def test_text_without_spaces_trains_a_tokenizer_in_time_and_keeps_all_of_it():
    random = Random(1)
    text = "".join(random.choices("abcdefghijklmnop", k=200_000))
    cut = list(bpe._with_short_words(f"a {text} b"))

    assert "".join(cut) == f"a {text} b" and max(map(len, cut)) <= 256
    assert open_tokenizer("bpe:300", texts=lambda: [text]).vocab_size == 300


def test_a_signal_ends_the_training_of_a_tokenizer(monkeypatch):
    is_over = threading.Event()

    def texts():
        os.kill(os.getpid(), signal.SIGTERM)
        while not is_over.is_set():
            yield "words of a text without an end "

    monkeypatch.setattr(bpe, "BPE_BYTES", 1 << 62)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit):
            open_tokenizer("bpe:300", texts=texts)
    finally:
        signal.signal(signal.SIGTERM, before)
        is_over.set()


def test_training_a_tokenizer_says_how_far_it_is(monkeypatch):
    told = []
    is_told = threading.Event()

    def texts():
        yield "words of a text " * 100
        is_told.wait(60)
        yield "more words"

    def note(text):
        told.append(text)
        is_told.set()

    monkeypatch.setattr(bpe, "_TELL_SECONDS", 0.01)
    open_tokenizer("bpe:300", texts=texts, note=note)

    assert told[0].startswith("training bpe:300: 0.0 M characters, 0 s")


@pytest.mark.parametrize("name", ["bpe:99999999999", "bpe:12", "bpe:x"])
def test_a_size_without_sense_is_refused(name):
    with pytest.raises(UserError, match="bpe"):
        open_tokenizer(name, texts=lambda: ["a"])


def test_a_broken_config_beside_a_tokenizer_is_named(tmp_path):
    trained_bpe().save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{bad")

    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))
