"""Documents to shards in a folder of the cache, so that a kill loses no whole shard."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmplay.data.document import Document
from lmplay.data.shard_cache import read_json, write_json, write_whole
from lmplay.data.shard_format import shard_bytes, shard_header, token_dtype, write_shard
from lmplay.data.tokenizers import Tokenizer
from lmplay.errors import NO_DATA, UserError
from lmplay.fault_points import reach

VERSION = 2  # of what a prepared folder holds
INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """One file of a stream of tokens; of our own also where its source goes on."""

    file: str
    tokens: int
    begin: int = 0  # tokens of the file that come before these
    masked: bool = False  # a .mask beside it: a byte for each token, 1 where it is learned
    sha256: str = ""  # of tokens and mask; empty for a foreign file
    row: int = 0  # of the source, the one that goes on after this shard,
    row_tokens: int = 0  # and how many of its tokens are written
    records: int = 0  # whole ones so far
    text_bytes: int = 0  # of UTF-8 so far whose tokens are learned


def read_index(folder: Path) -> tuple[list[Shard], bool]:
    """The shards of a prepared folder and whether they are all: those before a damaged one."""
    index = read_json(folder / INDEX)
    shards = [Shard(**entry) for entry in index.get("shards", [])]
    for number, shard in enumerate(shards):
        if not _is_whole(folder / shard.file, shard):
            return shards[:number], False
    return shards, bool(index.get("complete"))


def mask_path(path: Path) -> Path:
    """Where the learn mask of a shard lies."""
    return path.with_suffix(".mask")


def digest(tokens: np.ndarray, mask: np.ndarray | None) -> str:
    """The checksum that the index keeps of a shard."""
    sha = hashlib.sha256(memoryview(np.ascontiguousarray(tokens)).cast("B"))
    if mask is not None:
        sha.update(memoryview(np.ascontiguousarray(mask)).cast("B"))
    return sha.hexdigest()


class Encoded(NamedTuple):
    """Some documents as tokens."""

    documents: list[Document]
    tokens: np.ndarray  # of all documents, an END after each
    learned: np.ndarray | None  # 1 where a token is; None for everywhere
    ends: np.ndarray  # of each document in `tokens`
    sizes: list[int]  # bytes of UTF-8 of each document that are learned


class Writer:
    """Writes END, then every document with an END after it, as shards of a fixed size.

    A full shard is written only when another token follows it, so a shard that the index shows
    in an unfinished folder is never the last one.

    Attributes:
        row: of the source, where to go on.
        num_tokens: written or waiting to be.
        num_bytes: of UTF-8 in the documents seen.
        full: whether the limit is reached.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        learn_prompt: bool,
        shard_tokens: int,
        limit: int | None,
        about: dict,
        done: list[Shard],
        publish: Callable[[list[Shard], bool], object],
    ):
        """
        Args:
            learn_prompt: whether prompts are learned too.
            limit: most targets to write; a document is cut there, without an END.
            about: what the folder holds, for people who look into its index.
            done: shards that are there already.
            publish: called with all shards, and whether they are all, after each new one.
        """
        self._folder, self._tokenizer, self._learn_prompt = folder, tokenizer, learn_prompt
        self._about, self._shards, self._publish = about, list(done), publish
        self._limit = limit
        size = shard_tokens if limit is None else min(shard_tokens, limit + 1)
        self._buffer = np.empty(size, token_dtype(tokenizer.vocab_size))
        self._mask: np.ndarray | None = None
        self._used = 0
        last = done[-1] if done else Shard("", 0)
        self.row, self._row_tokens = last.row, last.row_tokens
        self._records, self._text_bytes = last.records, last.text_bytes
        self.num_tokens = sum(shard.tokens for shard in done)
        self.num_bytes = last.text_bytes
        if not done:
            self._buffer[0], self._used, self.num_tokens = tokenizer.end, 1, 1

    @property
    def full(self) -> bool:
        return self._limit is not None and self.num_tokens > self._limit

    def encode(self, documents: list[Document]) -> Encoded:
        """What `add` writes; it changes nothing here, so threads may call it at once."""
        reach("prepare.encode")
        texts = [document.parts(self._learn_prompt) for document in documents]
        ids = iter(self._tokenizer.encode_batch([text for parts in texts for text, _ in parts]))
        end = np.array([self._tokenizer.end], self._buffer.dtype)
        pieces, learned, lengths = [], [], []
        for document, parts in zip(documents, texts, strict=True):
            made = [next(ids) for _ in parts]
            pieces += [*made, end]
            for part, (_, is_on) in zip(made, parts, strict=True):
                learned.append(np.full(len(part), is_on, np.uint8))
            learned.append(np.full(1, document.learn_end, np.uint8))
            lengths.append(sum(map(len, made)) + 1)
        everywhere = all(each.learn_end for each in documents)
        everywhere = everywhere and all(is_on for parts in texts for _, is_on in parts)
        return Encoded(
            documents,
            tokens=np.concatenate(pieces).astype(self._buffer.dtype, copy=False),
            learned=None if everywhere else np.concatenate(learned),
            ends=np.cumsum(lengths),
            sizes=[sum(len(text.encode()) for text, is_on in parts if is_on) for parts in texts],
        )

    def add(self, encoded: Encoded) -> None:
        """Write the next documents of the source, the first of them at `row`."""
        documents, tokens, learned, ends, sizes = encoded
        if self._row_tokens and (documents[0].row != self.row or ends[0] <= self._row_tokens):
            raise UserError(
                f"the source of {self._folder} has changed since it was begun",
                hint="delete that folder and start again",
                code=NO_DATA,
            )
        bytes_before = np.concatenate([[0], np.cumsum(sizes)])
        position, stop = self._row_tokens, len(tokens)
        if self._limit is not None:
            stop = min(stop, position + self._limit + 1 - self.num_tokens)
        records, text_bytes = self._records, self._text_bytes
        while position < stop:
            if self._used == len(self._buffer):
                self._reach(position, documents, ends, records, text_bytes, bytes_before)
                self._flush(complete=False)
            position += self._take(tokens, learned, position, stop)
        self._reach(position, documents, ends, records, text_bytes, bytes_before)
        if self._row_tokens:  # the limit cut a document
            begin = position - self._row_tokens
            on = slice(None) if learned is None else learned[begin:position] == 1
            kept = tokens[begin:position][on].tolist()
            self._text_bytes += sum(len(self._tokenizer.token_bytes(token)) for token in kept)
        self.num_bytes += sum(document.num_bytes for document in documents)

    def finish(self, **facts: object) -> None:
        """Write the last shard, and `facts` into the index; the stream is complete.

        Raises:
            UserError: code NO_DATA, there was no document.
        """
        if self.num_tokens < 2:
            where = ", ".join(self._about.get("files") or [self._about.get("dataset", "")])
            raise UserError(
                f"no text is left in {where} for {self._about.get('split')}",
                hint="two different records are needed, one to train on and one to hold out: rows, "
                "or passages of 16,384 characters of plain text; or name the text to hold out with "
                "--validation-data. Rows without text, and chats without an assistant, are none",
                code=NO_DATA,
            )
        self._about = {**self._about, **facts}
        self._flush(complete=True)

    def _take(self, tokens, learned, position: int, stop: int) -> int:
        count = min(stop - position, len(self._buffer) - self._used)
        there, here = slice(self._used, self._used + count), slice(position, position + count)
        self._buffer[there] = tokens[here]
        if learned is not None and self._mask is None:
            self._mask = np.ones(len(self._buffer), np.uint8)
        if self._mask is not None:
            self._mask[there] = 1 if learned is None else learned[here]
        self._used += count
        self.num_tokens += count
        return count

    def _reach(self, position, documents, ends, records, text_bytes, bytes_before) -> None:
        """Remember that the source is written up to this token of these documents."""
        whole = int(np.searchsorted(ends, position, side="right"))
        begin = int(ends[whole - 1]) if whole else 0
        self.row = documents[whole].row if whole < len(documents) else documents[-1].row + 1
        self._row_tokens = int(position - begin)
        self._records = records + whole
        self._text_bytes = text_bytes + int(bytes_before[whole])

    def _flush(self, complete: bool) -> None:
        reach("prepare.shard")
        tokens = self._buffer[: self._used]
        mask = self._mask[: self._used] if self._mask is not None else None
        if mask is not None and mask.all():
            mask = None
        path = self._folder / f"{len(self._shards):06d}.bin"
        if mask is not None:
            write_whole(mask_path(path), lambda file: file.write(mask), len(mask))
        size = shard_bytes(len(tokens), tokens.dtype)
        write_whole(path, lambda file: write_shard(file, tokens), size)
        shard = Shard(
            file=path.name,
            tokens=len(tokens),
            masked=mask is not None,
            sha256=digest(tokens, mask),
            row=self.row,
            row_tokens=self._row_tokens,
            records=self._records,
            text_bytes=self._text_bytes,
        )
        self._shards.append(shard)
        entries = [asdict(shard) for shard in self._shards]
        write_json(self._folder / INDEX, {**self._about, "complete": complete, "shards": entries})
        self._publish(self._shards, complete)
        self._used = 0


def _is_whole(path: Path, shard: Shard) -> bool:
    try:
        if shard.masked and mask_path(path).stat().st_size != shard.tokens:
            return False
        return shard_header(path)[0] == shard.tokens
    except (OSError, UserError):
        return False
