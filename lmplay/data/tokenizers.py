"""Text to tokens and back, with one marker that ends a document."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from lmplay.data.bpe import pieces_of, train_bpe
from lmplay.data.gaps import CUT, CUT_GAPS, NEXT, SHORT_GAPS, cut, has_short_gaps, is_plain
from lmplay.disk import write_json, write_text
from lmplay.errors import UserError, nearest
from lmplay.network import bounded

if TYPE_CHECKING:
    import numpy as np

END = "<|endoftext|>"
_MOST_BPE = 1 << 20
_ROUND = 1 << 22  # characters
_SECONDS = 15.0  # for a tokenizer's download, all attempts together
_TIKTOKEN = {  # how many tokens it has, and which of them ends a document
    "gpt2": (50257, 50256),
    "r50k_base": (50257, 50256),
    "p50k_base": (50281, 50256),
    "cl100k_base": (100277, 100257),
    "o200k_base": (200019, 199999),
}
_GPT2_LIKE = ("gpt2", "r50k_base", "p50k_base")  # those that cut text by GPT-2's pattern
_ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")
_HINT = "check the network, or set {variable}; --plan quick makes its own tokenizer and needs none"


def valid(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 can hold, replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """Text to token ids and back; the text of a special token is ordinary text.

    Attributes:
        name: as a plan spells it.
        vocab_size: ids are below this.
        end: id of the marker that ends a document; `encode` never gives it.
        fingerprint: equal where every text has equal tokens.
        is_parallel: whether `encode_batch` uses all cores by itself.
    """

    name: str
    vocab_size: int
    end: int
    fingerprint: str
    is_parallel = False

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without any marker."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list["np.ndarray"]:
        """The ids of each text, as unsigned integers; threads may call this at once."""
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to the text; a character may need several tokens.

        An id that the vocabulary leaves free adds nothing.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are no UTF-8 become U+FFFD, the end marker its name."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Write what `open_tokenizer(name, file=path)` reads; nothing where the name is enough."""


def open_tokenizer(
    name: str,
    texts: Callable[[], Iterable[str]] | None = None,
    file: Path | None = None,
    note: Callable[[str], object] = lambda text: None,
) -> Tokenizer:
    """The tokenizer that a plan calls `name`.

    Args:
        name: an encoding of tiktoken, "bpe:N" (byte-level BPE of N tokens, the end marker and 256
            bytes among them), "byte", the path of a tokenizer.json, or a tokenizer on the hub.
        texts: what bpe:N is trained on, at most its first 50 MB. The same text gives the same
            tokenizer.
        file: a tokenizer.json saved earlier, which wins over everything else.
        note: gets a sentence now and then while bpe:N is trained.
    Raises:
        UserError: no such tokenizer; a file that is none; code NO_DATA where it cannot be
            downloaded within 15 s.
    """
    if name == "byte":
        return _Bytes()
    if name.startswith("bpe:"):
        size = _bpe_size(name)
        if file is not None:
            return _from_file(name, file)
        if texts is None:
            raise UserError(
                f"{name} is trained on a plan's text, and there is none here",
                hint="open it with the tokenizer.json of a run",
            )
        return _HuggingFace(name, train_bpe(name, size, map(valid, texts()), END, note), END)
    if file is not None:
        return _from_file(name, file)
    if name in _TIKTOKEN:
        return _Tiktoken(name)
    if name.endswith(".json") or Path(name).is_file():
        return _from_file(name, Path(name))
    return _from_hub(name)


def vocabulary_of(name: str) -> tuple[int, int]:
    """The size and the end marker of a tokenizer, not downloaded or trained where they are known.

    A bpe:N trained on very little text may have fewer than N tokens.
    """
    if name in _TIKTOKEN:
        return _TIKTOKEN[name]
    if name.startswith("bpe:"):
        return _bpe_size(name), 0  # the only special token, so the first
    tokenizer = open_tokenizer(name)
    return tokenizer.vocab_size, tokenizer.end


class _Bytes(Tokenizer):
    def __init__(self):
        self.name, self.vocab_size, self.end = "byte", 257, 256
        self.fingerprint = "byte"

    def encode_batch(self, texts):
        import numpy as np

        return [np.frombuffer(valid(text).encode(), dtype=np.uint8) for text in texts]

    def token_bytes(self, token):
        return END.encode() if token == self.end else bytes([token])


class _Tiktoken(Tokenizer):
    def __init__(self, name: str):
        import tiktoken

        self._encoding = bounded(
            lambda: tiktoken.get_encoding(name),
            _SECONDS,
            f"cannot download the tokenizer {name}",
            _HINT.format(variable="TIKTOKEN_CACHE_DIR to a folder that holds it"),
        )
        self.name, self.vocab_size = name, self._encoding.n_vocab
        self.end = self._encoding.eot_token
        self.fingerprint = f"tiktoken {name}"  # tiktoken holds the files to their hashes

    def encode(self, text):
        return self._encoding.encode_ordinary(valid(text))

    def encode_batch(self, texts):
        made: list[np.ndarray] = []
        for is_fast, run in groupby(map(valid, texts), self._is_fast):
            if is_fast:
                made += self._encode_joined(list(run))
            else:
                made += [self._encoding.encode_to_numpy(t, disallowed_special=()) for t in run]
        return made

    def _is_fast(self, text: str) -> bool:
        return self.name in _GPT2_LIKE and is_plain(text)

    def _encode_joined(self, texts: list[str]) -> list["np.ndarray"]:
        """One call for all of them, which costs less than one for each."""
        joined = NEXT.join(texts)
        if has_short_gaps(joined):
            encoding = self._for_short_gaps
        else:
            encoding, joined = self._for_cut_gaps, cut(joined)
        ids = encoding.encode_to_numpy(joined, allowed_special={CUT, NEXT}, disallowed_special=())
        ids = ids[ids != self.vocab_size]
        ends = (ids == self.vocab_size + 1).nonzero()[0].tolist()
        begins = [0, *(end + 1 for end in ends)]
        return [ids[begin:end] for begin, end in zip(begins, [*ends, None], strict=True)]

    @cached_property
    def _for_short_gaps(self):
        return self._with_pattern(SHORT_GAPS)

    @cached_property
    def _for_cut_gaps(self):
        return self._with_pattern(CUT_GAPS)

    def _with_pattern(self, pattern: str):
        import tiktoken

        return tiktoken.Encoding(
            self.name,
            pat_str=pattern,
            mergeable_ranks=self._encoding._mergeable_ranks,
            special_tokens={CUT: self.vocab_size, NEXT: self.vocab_size + 1},
        )

    def token_bytes(self, token):
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""


class _HuggingFace(Tokenizer):
    is_parallel = True

    def __init__(self, name: str, text: str, end: str | None):
        import tokenizers

        self._inner = tokenizers.Tokenizer.from_str(text)
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # that is: as ordinary text
        self._text = text
        special = [t.content for t in self._inner.get_added_tokens_decoder().values() if t.special]
        self._end = end or next((known for known in _ENDS if known in special), None)
        if self._end is None or self._inner.token_to_id(self._end) is None:
            raise UserError(
                f"the tokenizer {name} has no end marker; its special tokens: {special}",
                hint='name one in a tokenizer_config.json beside it: {"eos_token": "..."}',
            )
        self.name = name
        self.vocab_size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values())
        self.end = self._inner.token_to_id(self._end)
        canonical = json.dumps([json.loads(text), self._end], sort_keys=True)
        self.fingerprint = "tokenizer " + hashlib.sha256(canonical.encode()).hexdigest()[:16]
        self._decoder = json.dumps(json.loads(text).get("decoder"))
        self._added = {i: t.content for i, t in self._inner.get_added_tokens_decoder().items()}
        before = json.loads(text).get("pre_tokenizer") or {}
        self._can_be_cut = (
            before.get("type") == "ByteLevel"
            and before.get("use_regex", True)
            and not before.get("add_prefix_space")
            and json.loads(text).get("normalizer") is None
            and all(t.special for t in self._inner.get_added_tokens_decoder().values())
        )
        self._byte_of = byte_of_character() if '"ByteLevel"' in self._decoder else None

    def encode_batch(self, texts):
        import numpy as np

        cut = pieces_of if self._can_be_cut else lambda text: [text]
        parts = [cut(valid(text)) for text in texts]
        ids = self._ids([piece for pieces in parts for piece in pieces])
        return [np.concatenate([next(ids) for _ in pieces]) for pieces in parts]

    def _ids(self, pieces: list[str]) -> Iterator["np.ndarray"]:
        """Of each piece, in rounds: what the library keeps of a token is a hundred times an id."""
        import numpy as np

        batch, size = [], 0
        for number, piece in enumerate(pieces, start=1):
            batch.append(piece)
            size += len(piece)
            if size >= _ROUND or number == len(pieces):
                made = self._inner.encode_batch_fast(batch, add_special_tokens=False)
                yield from (np.array(encoding.ids, dtype=np.uint32) for encoding in made)
                batch, size = [], 0

    def token_bytes(self, token):
        if token in self._added:
            return self._added[token].encode()
        word = self._inner.id_to_token(token)
        if word is None:
            return b""
        if self._byte_of is not None:
            return bytes(self._byte_of[character] for character in word)
        if '"ByteFallback"' in self._decoder and len(word) == 6 and word.startswith("<0x"):
            return bytes([int(word[3:5], 16)])
        before = [self._inner.token_to_id(self._end)]  # a decoder may treat a text's start apart
        start = len(self._inner.decode(before, skip_special_tokens=False))
        return self._inner.decode([*before, token], skip_special_tokens=False)[start:].encode()

    def decode(self, ids):
        if self._byte_of is not None:
            return super().decode(ids)
        return self._inner.decode([int(token) for token in ids], skip_special_tokens=False)

    def save(self, path):
        """Write tokenizer.json, and beside it who ends a document, as Hugging Face does."""
        if self._end != END:
            write_json(path.with_name("tokenizer_config.json"), {"eos_token": self._end})
        write_text(path, self._text)


def _bpe_size(name: str) -> int:
    size = name.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < 257:
        raise UserError(
            f"{name!r} is no tokenizer: bpe:N needs N of at least 257",
            hint="256 bytes and the end marker come first; try bpe:4096",
        )
    if int(size) > _MOST_BPE:
        raise UserError(f"{name!r} is more than bpe:{_MOST_BPE}", hint="try bpe:4096")
    return int(size)


def _from_file(name: str, path: Path) -> Tokenizer:
    config = path.with_name("tokenizer_config.json")
    try:
        text = path.read_text(encoding="utf-8")
        end = _end_of(config.read_text(encoding="utf-8")) if config.is_file() else None
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config} beside {path} is no such file: {error}") from None
    try:
        return _HuggingFace(name, text, end)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path} is no tokenizer.json: {error}") from None


def _from_hub(name: str) -> Tokenizer:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    def fetch(file: str) -> Path:
        try:
            return Path(hf_hub_download(name, file, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(name, file))

    def fetch_both() -> Path:
        tokenizer = fetch("tokenizer.json")
        try:
            fetch("tokenizer_config.json")
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            pass  # the well-known markers are tried
        return tokenizer

    hint = nearest(name, _TIKTOKEN) + _HINT.format(
        variable="HF_ENDPOINT, HF_TOKEN or HF_HUB_OFFLINE=1"
    )
    try:
        path = bounded(
            fetch_both, _SECONDS, f"cannot download the tokenizer {name!r} from the hub", hint
        )
    except HFValidationError:
        raise UserError(f"no tokenizer called {name!r}", hint) from None
    return _from_file(name, path)


def _end_of(config: str) -> str | None:
    end = json.loads(config).get("eos_token")
    return end.get("content") if isinstance(end, dict) else end


def byte_of_character() -> dict[str, int]:
    """Byte-level BPE's letters: printable bytes stand for themselves, the rest from U+0100 on.

    Source: Radford et al. 2019, the code of GPT-2.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
