"""Documents to shards in the cache: what is held out, and what is trained on."""

import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from filelock import FileLock, Timeout

from lmplay.data import shard_cache as cache
from lmplay.data.document import Document, FairSample, batches
from lmplay.data.overlap import share_trained_on
from lmplay.data.rendering import columns_of
from lmplay.data.shard_writer import VERSION, Encoded, Shard, Writer, read_index
from lmplay.data.shards import Shards, open_foreign
from lmplay.data.sources import (
    HELD_OUT_SPAN,
    Split,
    documents,
    expected_bytes,
    files_in_words,
    has_own_validation,
    held_out_fraction,
    is_fraction_known,
    source_fingerprint,
    syntax_in_words,
)
from lmplay.data.tokenizers import Tokenizer
from lmplay.disk import TEMPORARY
from lmplay.machine import num_cores
from lmplay.plan import Dataset, Validation

SHARD_TOKENS = 1 << 24
_BATCH_CHARACTERS = 1 << 18  # that a core makes to tokens at once
_BATCH_RECORDS = 1024
_MOST_BYTES = 16  # of text for a held-out token: several times the usual
_MUCH_TRAINED_ON = 0.05  # of the text held out; some stretches are everywhere
_MUCH_TWICE = 0.5  # where it is a part of the same text, in which code and tables repeat themselves
_POLL_SECONDS = 1.0  # while another process prepares

Progress = Callable[[str, int, int, int | None], object]
"""Called with the dataset's name, bytes of text done, tokens done, and bytes in all or None."""
Note = Callable[[str], object]
Write = Callable[[list[Shard], threading.Event], None]
"""Writes the shards behind those that are done; stops early once the event is set."""
T = TypeVar("T")
R = TypeVar("R")


def prepare(
    dataset: Dataset,
    name: str,
    tokenizer: Tokenizer,
    validation: Validation,
    on_progress: Progress,
    note: Note = lambda text: None,
    shard_tokens: int = SHARD_TOKENS,
) -> tuple[Shards, Shards]:
    """The tokens to validate with, and those to train on: from the cache, or prepared now.

    A hub's training text is prepared while it is used. Of what is held out, a fair sample of
    `validation.tokens` targets is kept.

    Args:
        dataset: where the text comes from.
        name: of the dataset, the start of its folders' names in the cache.
        tokenizer: whose tokens these are.
        validation: what is held out.
        on_progress: called now and then, from another thread for a hub dataset.
        note: gets a sentence the user should see, the same one perhaps more than once.
        shard_tokens: size of a shard; another size is another order of training.
    Raises:
        UserError: the source is missing, empty or damaged, the disk is full; code NO_DATA where
            the network is.
    """
    if dataset.shards is not None:
        return open_foreign(dataset, name, tokenizer, validation)
    for line in (files_in_words(dataset), syntax_in_words(dataset)):
        if line is not None:
            note(f"{name}: {line}")
    if not is_fraction_known(dataset, validation.fraction):
        note_download(dataset, name, note)
    fraction = held_out_fraction(dataset, validation.fraction)
    most = validation.tokens
    held_out = _Side(dataset, name, tokenizer, "validation", fraction, shard_tokens, most)
    training = _Side(dataset, name, tokenizer, "train", fraction, shard_tokens, None)
    if None in (held_out.shards.num_tokens, training.shards.num_tokens):
        note_download(dataset, name, note)
    in_one_pass = dataset.hub is None and not has_own_validation(dataset)
    sample: FairSample | None = None  # of what is held out, once training has read past it all

    def write_training(done: list[Shard], stop: threading.Event) -> None:
        nonlocal sample
        writer = training.writer(done=done)
        expected = expected_bytes(dataset)
        aside = FairSample(most * _MOST_BYTES) if in_one_pass and not done else None
        others = None if aside is None else aside.add
        source = documents(dataset, "train", fraction, writer.row, others)
        for encoded in _encoded(tokenizer, writer.encode, source):
            if stop.is_set():
                return
            writer.add(encoded)
            on_progress(name, writer.num_bytes, writer.num_tokens, expected)
        writer.finish()
        sample = aside

    def write_held_out(done: list[Shard], stop: threading.Event) -> None:
        writer = held_out.writer(done=[])  # a sample is written in one go
        texts = documents(dataset, "validation", fraction)
        source = sample or FairSample(most * _MOST_BYTES, texts)
        lossless = True
        for batch in batches(source, _BATCH_CHARACTERS, _BATCH_RECORDS):
            lossless = lossless and all(
                _gives_back(tokenizer, document, most * _MOST_BYTES) for document in batch
            )
            writer.add(writer.encode(batch))
            if writer.full:
                break
        writer.finish(lossless=lossless)

    if in_one_pass:
        training.fill(write_training, note)
        held_out.fill(write_held_out, note)
    else:  # what is wrong with the smaller side is told first
        held_out.fill(write_held_out, note)
        training.fill(write_training, note, in_background=dataset.hub is not None)
    if not held_out.shards.is_lossless():
        note(f"{name}: {tokenizer.name} loses text, it does not give it back: no bits per byte")
    if dataset.files is not None:
        share = share_trained_on(dataset, fraction, most * _MOST_BYTES, sample=sample)
        if share >= (_MUCH_TWICE if in_one_pass else _MUCH_TRAINED_ON):
            held_out.shards.trained_on = share
            note(
                f"{name}: {share:.0%} of the text held out is also in the training text: "
                "the validation loss is too good to be true"
            )
    return held_out.shards, training.shards


def note_shared_text(
    datasets: dict[str, Dataset], held_out: dict[str, Shards], validation: Validation, note: Note
) -> None:
    """Say where text that is held out of one dataset is trained on in another, and mark it.

    Args:
        datasets: of a plan; local files are looked at.
        held_out: what `prepare` gave of each.
        validation: as `prepare` was given it.
    """
    local = {name: each for name, each in datasets.items() if each.files is not None}
    fractions = {n: held_out_fraction(each, validation.fraction) for n, each in local.items()}
    for name, dataset in local.items():
        others = [(local[other], fractions[other]) for other in local if other != name]
        num_bytes = validation.tokens * _MOST_BYTES
        share = share_trained_on(dataset, fractions[name], num_bytes, others) if others else 0.0
        if share >= _MUCH_TRAINED_ON:
            held_out[name].trained_on = max(share, held_out[name].trained_on)
            note(
                f"{name}: {share:.0%} of the text held out is also in the training text of other "
                "datasets: the validation loss is too good to be true"
            )


def _gives_back(tokenizer: Tokenizer, document: Document, most: int) -> bool:
    """Whether what is written of a held-out document, not more than `most` bytes, comes back."""
    texts = [text[:most] for text, _ in document.parts(learn_prompt=True)]
    return all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


def note_download(dataset: Dataset, name: str, note: Note) -> None:
    """Say that a hub dataset is about to be read, and how large it is."""
    if dataset.hub is not None:
        size = f" ({dataset.download})" if dataset.download else ""
        note(f"{name}: streaming {dataset.hub}{size} from the hub; --plan quick downloads nothing")


class _Side:
    """The folder in the cache that one side of a dataset is prepared in."""

    def __init__(
        self,
        dataset: Dataset,
        name: str,
        tokenizer: Tokenizer,
        split: Split,
        fraction: float,
        shard_tokens: int,
        limit: int | None,
    ):
        own = has_own_validation(dataset)
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
        self._folder = cache.cache_root() / f"{safe_name}-{fingerprint[:12]}"
        self.shards = Shards(name, self._folder, fingerprint, tokenizer)
        self.shards.publish(*read_index(self._folder))
        self.writer = partial(
            Writer,
            self._folder,
            tokenizer,
            learn_prompt=dataset.learn_prompt,
            shard_tokens=shard_tokens,
            limit=limit,
            about={"dataset": name, "files": dataset.files, "split": split, "settings": settings},
            publish=self.shards.publish,
        )

    def fill(self, write: Write, note: Note, in_background: bool = False) -> None:
        """Have it written where it is not complete."""
        if self.shards.num_tokens is not None:
            return
        cache.make_folder(self._folder)
        if in_background:
            self.shards.run_in_background(lambda stop: self._write_or_follow(write, note, stop))
        else:
            self._write_or_follow(write, note, threading.Event())

    def _write_or_follow(self, write: Write, note: Note, stop: threading.Event) -> None:
        """Finish the folder, or follow the process that does: whoever holds the lock writes."""
        lock = FileLock(self._folder / "lock")
        has_waited = False
        while not stop.is_set():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not has_waited:
                    name = self.shards.name
                    note(f"{name}: another process prepares this text; using what it makes")
                has_waited = True
                stop.wait(_POLL_SECONDS)
                self.shards.publish(*read_index(self._folder))
                if self.shards.num_tokens is not None:
                    return
                continue
            try:
                done, complete = read_index(self._folder)
                self.shards.publish(done, complete)
                if not complete:
                    for left_over in self._folder.glob(f"{TEMPORARY}*"):
                        left_over.unlink(missing_ok=True)
                    write(done, stop)
            finally:
                lock.release()
            return


def _encoded(
    tokenizer: Tokenizer,
    encode: Callable[[list[Document]], Encoded],
    source: Iterable[Document],
) -> Iterator[Encoded]:
    """The documents as tokens, made on all cores while this thread takes more of them."""
    if tokenizer.is_parallel:  # it shares a batch out among the cores by itself
        shares, threads = min(16, num_cores()), 1
    else:
        shares, threads = 1, num_cores()
    texts = batches(source, shares * _BATCH_CHARACTERS, shares * _BATCH_RECORDS)
    return _in_threads(threads, encode, texts)


def _in_threads(num_threads: int, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What a map gives, made ahead in threads while this one takes items and gives results."""
    threads = ThreadPoolExecutor(num_threads)
    made: deque[Future[R]] = deque()
    try:
        for item in items:
            made.append(threads.submit(function, item))
            while made and (made[0].done() or len(made) > 2 * num_threads):
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
