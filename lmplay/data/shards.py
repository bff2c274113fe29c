"""Streams of tokens in shards, our own or foreign ones: mapped, and read by windows."""

import atexit
import hashlib
import re
import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from lmplay.data import shard_cache as cache
from lmplay.data.shard_format import map_shard, shard_header
from lmplay.data.shard_writer import INDEX, VERSION, Shard, digest, mask_path
from lmplay.data.sources import shard_paths
from lmplay.data.tokenizers import Tokenizer
from lmplay.errors import NO_DATA, UserError
from lmplay.plan import Dataset, Validation

_HELD_OUT = re.compile(r"(?<![a-z])(val|valid|validation|dev)(?![a-z])", re.IGNORECASE)


class Shards:
    """A stream of tokens: END, then every document with an END after it.

    A source may still grow: a shard appears only once it is settled whether another follows.

    Attributes:
        name: of the dataset.
        fingerprint: equal where the stream is.
        trained_on: of held-out text, the share that is also trained on, where that is too much.
    """

    def __init__(self, name: str, folder: Path, fingerprint: str, tokenizer: Tokenizer):
        self.name, self.fingerprint, self.trained_on = name, fingerprint, 0.0
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

    def is_lossless(self) -> bool:
        """Whether the tokenizer gave the text back; True for foreign shards, which have none."""
        ours = bool(self._state[0][-1].sha256)
        return not ours or cache.read_json(self._folder / INDEX).get("lossless", True)

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


def open_foreign(
    dataset: Dataset, name: str, tokenizer: Tokenizer, validation: Validation
) -> tuple[Shards, Shards]:
    """Shards that somebody else made, to validate with and to train on.

    Those with the word val, valid, validation or dev in their name are held out, else the end of
    the last. At most `validation.tokens` targets are scored.

    Raises:
        UserError: a file is missing or no shard; nothing is left to train on.
    """
    paths = shard_paths(dataset)
    files = [Shard(str(path.resolve()), shard_header(path)[0]) for path in paths]
    files = [file for file in files if file.tokens]
    held_out = [file for file in files if _HELD_OUT.search(Path(file.file).name)]
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
    scored, left = [], validation.tokens + 1
    for file in held_out:
        scored.append(replace(file, tokens=min(file.tokens, left)))
        left -= scored[-1].tokens
        if left == 0:
            break
    return _opened(scored, name, tokenizer), _opened(training, name, tokenizer)


def _opened(files: list[Shard], name: str, tokenizer: Tokenizer) -> Shards:
    content = [(cache.content_hash(Path(f.file)), f.begin, f.tokens) for f in files]
    fingerprint = cache.fingerprint(VERSION, content, tokenizer.fingerprint)
    shards = Shards(name, Path(), fingerprint, tokenizer)
    shards.publish(files, complete=True)
    return shards
