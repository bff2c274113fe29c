"""Token shards: prepared once from documents, or foreign ones; mapped, read by windows."""

import atexit
import glob
import hashlib
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock, Timeout

from lmplay.errors import NO_DATA, UserError
from lmplay.plan import Dataset, Validation
from lmplay.tokens import Tokenizer
from lmplay.train import cache
from lmplay.train.layout import map_shard, shard_header
from lmplay.train.text import (
    HELD_OUT_SPAN,
    Document,
    Split,
    columns_of,
    documents,
    expected_bytes,
    fair_sample,
    has_own_validation,
    held_out_fraction,
    is_fraction_known,
    source_fingerprint,
)
from lmplay.train.writer import Shard, Writer, digest, mask_path, read_index

VERSION = 2  # of what a prepared folder holds
SHARD_TOKENS = 1 << 24
_BATCH_CHARACTERS = 4 << 20  # tokenised at once
_BATCH_RECORDS = 4096
_MOST_BYTES = 16  # of text for a held-out token: several times the usual
_POLL_SECONDS = 1.0  # while another process prepares

Progress = Callable[[str, int, int, int | None], object]
"""Called with the dataset's name, bytes of text done, tokens done, and bytes in all or None."""
Note = Callable[[str], object]
T = TypeVar("T")


class Shards:
    """A stream of tokens: END, then every document with an END after it.

    A source may still grow: a shard appears only once it is settled whether another follows.

    Attributes:
        name: of the dataset.
        fingerprint: equal where the stream is.
    """

    def __init__(self, name: str, folder: Path, fingerprint: str, tokenizer: Tokenizer):
        self.name, self.fingerprint = name, fingerprint
        self._folder, self._tokenizer = folder, tokenizer
        self._state: tuple[list[Shard], list[int], bool] = ([], [], False)
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._maps: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def num_tokens(self) -> int | None:
        """Tokens of the whole stream, None while it grows."""
        _, ends, complete = self._state
        return ends[-1] if complete else None

    def known(self) -> tuple[list[int], bool]:
        """Where each shard that is there ends, and whether these are all."""
        _, ends, complete = self._state
        return ends, complete

    def wait(self, num_shards: int) -> None:
        """Return once there are more than `num_shards` shards or the stream is complete.

        Raises:
            Exception: whatever stopped the preparation.
        """
        with self._changed:
            while len(self._state[1]) <= num_shards and not self._state[2]:
                if self._error is not None:
                    raise self._error
                self._changed.wait(0.5)  # returns now and then, so that Ctrl-C is seen

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens from `start` on (int64), and which are learned (bool); fewer at the end."""
        shards, ends, _ = self._state
        tokens, learned = [], []
        stop = min(start + length, ends[-1])
        while start < stop:
            index = bisect_right(ends, start)
            ids, mask = self._map(index)
            first = start - (ends[index] - shards[index].tokens)
            last = min(shards[index].tokens, first + stop - start)
            tokens.append(ids[first:last].astype(np.int64))
            learned.append(
                np.ones(last - first, bool) if mask is None else mask[first:last].astype(bool)
            )
            start += last - first
        return np.concatenate(tokens), np.concatenate(learned)

    def text_bytes(self) -> int:
        """Bytes of UTF-8 whose tokens are learned, in the stream as it is now."""
        shards = self._state[0]
        if shards[-1].sha256:
            return shards[-1].text_bytes
        tokens, _ = self.window(1, self.known()[0][-1])
        ids, counts = np.unique(tokens[tokens != self._tokenizer.end], return_counts=True)
        sizes = (len(self._tokenizer.token_bytes(token)) for token in ids.tolist())
        return sum(size * count for size, count in zip(sizes, counts.tolist(), strict=True))

    def content_fingerprint(self) -> str:
        """Equal where every token is, wherever it came from."""
        ends, _ = self.known()
        tokens, learned = self.window(0, ends[-1])
        digest = hashlib.sha256(tokens.astype("<i8").tobytes() + learned.tobytes())
        return digest.hexdigest()[:16]

    def close(self) -> None:
        """Stop a preparation in the background; what it has finished stays."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5.0)
            atexit.unregister(self.close)

    def publish(self, shards: list[Shard], complete: bool) -> None:
        """Replace what is known of the stream by a longer beginning of it."""
        ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64).tolist()
        with self._changed:
            self._state = (list(shards), ends, complete)
            self._changed.notify_all()

    def run_in_background(self, preparation: Callable[[threading.Event], None]) -> None:
        """Prepare in a thread; what it raises is raised by `wait`."""

        def run():
            try:
                preparation(self._stop)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()

        self._thread = threading.Thread(target=run, name=f"prepare {self.name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _map(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """A shard's tokens and mask, checked when first used."""
        if index not in self._maps:
            shard = self._state[0][index]
            path = self._folder / shard.file
            tokens = map_shard(path)[shard.begin : shard.begin + shard.tokens]
            mask = None
            if shard.masked:
                mask = np.memmap(mask_path(path), np.uint8, mode="r", shape=(shard.tokens,))
            if shard.sha256 and digest(tokens, mask) != shard.sha256:
                raise UserError(
                    f"the prepared shard {path} is damaged",
                    hint="delete that file and start again; it is prepared anew",
                    code=NO_DATA,
                )
            if len(tokens) and int(tokens.max()) >= self._tokenizer.vocab_size:
                raise UserError(
                    f"{path} holds token {int(tokens.max())}, and {self._tokenizer.name} has only "
                    f"{self._tokenizer.vocab_size}",
                    hint="give the plan the tokenizer that the shards were made with",
                )
            if len(self._maps) >= 4:
                self._maps.pop(next(iter(self._maps)))
            self._maps[index] = (tokens, mask)
        return self._maps[index]


def prepare(
    dataset: Dataset,
    name: str,
    tokenizer: Tokenizer,
    validation: Validation,
    on_progress: Progress,
    note: Note = lambda text: None,
    split: Split = "train",
    shard_tokens: int = SHARD_TOKENS,
) -> Shards:
    """The tokens of a split: from the cache, or prepared now; a hub's training text while used.

    Args:
        dataset: where the text comes from.
        name: of the dataset, the start of its folder's name in the cache.
        tokenizer: whose tokens these are.
        validation: what is held out; of a validation split, a fair sample of `tokens` targets.
        on_progress: called now and then, from another thread for a hub dataset.
        note: gets a sentence the user should see, the same one perhaps more than once.
        split: "train", or "validation".
        shard_tokens: size of a shard; another size is another order of training.
    Raises:
        UserError: the source is missing, empty or damaged, the disk is full; code NO_DATA where
            the network is.
    """
    if dataset.shards is not None:
        return _foreign(dataset, name, tokenizer, validation, split)
    own = has_own_validation(dataset)
    if not is_fraction_known(dataset, validation.fraction):
        note_download(dataset, name, note)
    fraction = held_out_fraction(dataset, validation.fraction)
    limit = validation.tokens if split == "validation" else None
    settings = {
        "version": VERSION,
        "source": source_fingerprint(dataset, split if own else "train"),
        "tokenizer": tokenizer.fingerprint,
        "columns": columns_of(dataset),
        "learn_prompt": dataset.learn_prompt,
        "held_out": None if own else [split, fraction],
        "span": HELD_OUT_SPAN if dataset.hub and split == "validation" else None,
        "limit": limit,
        "shard_tokens": shard_tokens,
    }
    fingerprint = cache.fingerprint(settings)
    safe_name = re.sub(r"[^\w.-]", "_", name)
    folder = cache.cache_root() / f"{safe_name}-{fingerprint[:12]}"
    shards = Shards(name, folder, fingerprint, tokenizer)
    shards.publish(*read_index(folder))
    if shards.num_tokens is not None:
        return shards
    note_download(dataset, name, note)
    cache.make_folder(folder)
    is_training = split == "train"
    expected = expected_bytes(dataset) if is_training else None

    def write(done: list[Shard], stop: threading.Event) -> None:
        writer = Writer(
            folder,
            tokenizer,
            learn_prompt=dataset.learn_prompt,
            shard_tokens=shard_tokens,
            limit=limit,
            about={
                "dataset": name,
                "files": dataset.files,
                "split": split,
                "settings": settings,
            },
            done=done if is_training else [],  # a sample is written in one go
            publish=shards.publish,
        )
        source: Iterable[Document] = documents(dataset, split, fraction, writer.row)
        if limit is not None:
            source = fair_sample(source, limit * _MOST_BYTES)
        batches = _batches(source)
        if dataset.hub is None:  # a thread that waits for the network would hold up a Ctrl-C
            made = _ahead(map(writer.encode, _ahead(batches)))
        else:
            made = map(writer.encode, batches)
        for encoded in made:
            if stop.is_set():
                return
            writer.add(encoded)
            if is_training:
                on_progress(name, writer.num_bytes, writer.num_tokens, expected)
            if writer.full:
                break
        writer.finish()

    if dataset.hub is not None and is_training:
        shards.run_in_background(lambda stop: _write_or_follow(shards, folder, write, note, stop))
    else:
        _write_or_follow(shards, folder, write, note, threading.Event())
    return shards


def note_download(dataset: Dataset, name: str, note: Note) -> None:
    """Say that a hub dataset is about to be read, and how large it is."""
    if dataset.hub is not None:
        size = f" ({dataset.download})" if dataset.download else ""
        note(f"{name}: streaming {dataset.hub}{size} from the hub; --plan quick downloads nothing")


def _write_or_follow(
    shards: Shards,
    folder: Path,
    write: Callable[[list[Shard], threading.Event], None],
    note: Note,
    stop: threading.Event,
) -> None:
    """Finish a folder, or follow the process that does: whoever holds the lock writes."""
    lock = FileLock(folder / "lock")
    told = False
    while not stop.is_set():
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not told:
                note(f"{shards.name}: another process prepares this text; using what it makes")
            told = True
            stop.wait(_POLL_SECONDS)
            shards.publish(*read_index(folder))
            if shards.num_tokens is not None:
                return
            continue
        try:
            done, complete = read_index(folder)
            shards.publish(done, complete)
            if not complete:
                for left_over in folder.glob(f"{cache.TEMPORARY}*"):
                    left_over.unlink(missing_ok=True)
                write(done, stop)
        finally:
            lock.release()
        return


def _batches(source: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in source:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ahead(source: Iterator[T]) -> Iterator[T]:
    """The same items; while one is used, a thread makes the next."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, source, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, source, None)
            yield item


def _foreign(
    dataset: Dataset, name: str, tokenizer: Tokenizer, validation: Validation, split: Split
) -> Shards:
    """Shards that somebody else made: those called val are held out, else the end of the last."""
    paths = sorted({Path(p) for pattern in dataset.shards or [] for p in _expanded(pattern)})
    files = [Shard(str(path.resolve()), shard_header(path)[0]) for path in paths]
    files = [file for file in files if file.tokens]
    held_out = [file for file in files if "val" in Path(file.file).name]
    training = [file for file in files if file not in held_out]
    if not training or training[-1].tokens < 2:
        raise UserError(f"{name}: no shard is left to train on", hint="name more shards")
    if not held_out:
        last = training[-1]
        total = sum(file.tokens for file in training)
        tail = min(validation.tokens, int(validation.fraction * total), last.tokens // 2)
        tail = max(1, tail)
        begin = last.tokens - tail
        held_out = [replace(last, begin=begin - 1, tokens=tail + 1)]  # one token as context
        training[-1] = replace(last, tokens=begin)
    chosen = training
    if split == "validation":
        chosen, left = [], validation.tokens + 1
        for file in held_out:
            chosen.append(replace(file, tokens=min(file.tokens, left)))
            left -= chosen[-1].tokens
            if left == 0:
                break
    content = [(cache.content_hash(Path(f.file)), f.begin, f.tokens) for f in chosen]
    fingerprint = cache.fingerprint(VERSION, content, tokenizer.fingerprint)
    shards = Shards(name, Path(), fingerprint, tokenizer)
    shards.publish(chosen, complete=True)
    return shards


def _expanded(pattern: str) -> list[str]:
    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    if not found:
        raise UserError(f"no shard is called {pattern}", hint="a path is relative to this folder")
    return found
