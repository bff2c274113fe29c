"""One record of a source, and a fair sample of many."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count


@dataclass(frozen=True)
class Document:
    """One record: a text (`prompt`, with no truth), or a prompt and the truth that follows it.

    `row` is the record's place in its source. `turns` are further prompts and truths. `learn_end`
    is false where the marker behind the text says nothing, so that it is no target.
    """

    prompt: str
    truth: str | None = None
    row: int = 0
    turns: tuple[tuple[str, str], ...] = ()
    learn_end: bool = True

    def parts(self, learn_prompt: bool) -> list[tuple[str, bool]]:
        """The texts in order, each with whether it is learned; they are encoded apart."""
        if self.truth is None:
            return [(self.prompt, True)]
        found = []
        for prompt, truth in ((self.prompt, self.truth), *self.turns):
            found += [(prompt, learn_prompt), (truth, True)]
        return found

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts(learn_prompt=True))

    @cached_property
    def utf8(self) -> bytes:
        """The whole text."""
        return self.text.encode()

    @property
    def num_bytes(self) -> int:
        """Of the whole text as UTF-8."""
        return len(self.utf8)

    @cached_property
    def place(self) -> float:
        """From its own text alone, a number in [0, 1): records below a fraction are held out."""
        digest = hashlib.blake2b(self.utf8, digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


class FairSample:
    """Documents from all over a source: those lowest in the order of `place`.

    The first ones in the source's own order would be its first book or topic only. What is kept
    is no more than it takes to reach `num_bytes` of text, so memory is bounded.
    """

    def __init__(self, num_bytes: int, source: Iterable[Document] = ()):
        self._num_bytes, self._size = num_bytes, 0
        self._kept: list[tuple[float, int, Document]] = []  # a heap, the highest place on top
        self._numbers = count()
        for document in source:
            self.add(document)

    def add(self, document: Document) -> None:
        heapq.heappush(self._kept, (-document.place, -next(self._numbers), document))
        self._size += document.num_bytes
        while self._size - self._kept[0][2].num_bytes >= self._num_bytes:
            self._size -= heapq.heappop(self._kept)[2].num_bytes

    def __iter__(self) -> Iterator[Document]:
        """The documents by `place`, of equal ones the first added first."""
        in_order = sorted(self._kept, key=lambda kept: kept[:2], reverse=True)
        return (document for _, _, document in in_order)


def batches(
    source: Iterable[Document], most_characters: int, most_documents: int = 1024
) -> Iterator[list[Document]]:
    """The documents in lists, each ended by whichever of the two it reaches first."""
    batch, size = [], 0
    for document in source:
        batch.append(document)
        size += len(document.text)
        if size >= most_characters or len(batch) >= most_documents:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
