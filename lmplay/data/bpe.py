"""Byte-level BPE: where a text can be cut, and training, bounded in time and open to signals."""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")
BPE_BYTES = 50_000_000  # of text, at most, that a bpe:N is trained on
_WORD = 256  # characters, at most, of a word that BPE is trained on
_TELL_SECONDS = 10.0
_PIECE = 1 << 16  # characters, about, that are encoded in one go where a text can be cut
_GAP = re.compile(r"(?<=\S) (?=\S)")


def train_bpe(
    name: str, size: int, texts: Iterable[str], end: str, note: Callable[[str], object]
) -> str:
    """A tokenizer.json of `size` tokens; the same text gives the same one.

    Args:
        name: what a plan calls it.
        texts: of which the first BPE_BYTES count; no lone surrogates in them.
        end: what ends a document, the first of the tokens.
        note: gets a sentence now and then.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    num_read = 0

    def pieces() -> Iterator[str]:
        nonlocal num_read
        for text in _first(texts, BPE_BYTES):
            num_read += len(text)
            yield from _with_short_words(text)

    def tell(seconds: float) -> None:
        note(f"training {name}: {num_read / 1e6:,.1f} M characters, {seconds:.0f} s so far")

    _open_to_signals(lambda: trained.train_from_iterator(pieces(), trainer), tell)
    return trained.to_str()


def _first(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
    """Whole texts until `num_bytes` are reached."""
    for text in texts:
        yield text
        num_bytes -= len(text.encode())
        if num_bytes <= 0:
            return


def _with_short_words(text: str) -> Iterator[str]:
    """The text for a trainer of BPE, whose time grows with the square of a word's length."""
    at = 0
    for word in re.finditer(rf"\S{{{_WORD + 1},}}", text):
        yield from pieces_of(text[at : word.start()])
        yield from (word[0][i : i + _WORD] for i in range(0, len(word[0]), _WORD))
        at = word.end()
    yield from pieces_of(text[at:])


def pieces_of(text: str) -> list[str]:
    """Parts of a text whose tokens, joined, are those of the whole in byte-level BPE.

    A blank between two characters that are none begins a word, whatever stands before it.
    """
    pieces = []
    at = 0
    while len(text) - at > _PIECE and (gap := _GAP.search(text, at + _PIECE)):
        pieces.append(text[at : gap.start()])
        at = gap.start()
    return [*pieces, text[at:]]


def _open_to_signals(function: Callable[[], T], tell: Callable[[float], object]) -> T:
    """What the function gives, while a signal ends this thread, to which native code is deaf.

    Meanwhile `tell` gets the seconds so far, now and then.
    """
    made: Future[T] = Future()
    began = time.monotonic()

    def run() -> None:
        try:
            made.set_result(function())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([made], _TELL_SECONDS).done:
        tell(time.monotonic() - began)
    return made.result()
