"""Sources to documents: what a row says, what of it is learned, and which rows are held out."""

import glob
import hashlib
import heapq
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lmplay.data.local_files import Place, SourceFile, file_rows, of_split, source_files
from lmplay.data.recall import NUM_TEXTS, TEXT_BYTES, recall_turns
from lmplay.data.shard_cache import content_hash, remembered, remembers
from lmplay.data.shard_cache import fingerprint as fingerprint_of
from lmplay.data.tokenizers import valid
from lmplay.errors import NO_DATA, UserError, nearest
from lmplay.network import bounded
from lmplay.plan import Dataset

if TYPE_CHECKING:
    import numpy as np

Split = Literal["train", "validation"]
HELD_OUT_SPAN = (
    1 << 27
)  # bytes of text at a hub dataset's start that its held-out records come from
_STRETCH = 128  # bytes; shorter ones come twice by chance, as "Once upon a time" does
_FEW_BITS = 4  # one place of 16 begins a stretch
_ODD = 0x9E3779B97F4A7C15  # a multiplier that mixes all bits upwards
_HUB_SECONDS = 60.0  # without one new row, all attempts together
_HUB_ROWS = 128  # read in one call
_HUB_HINT = (
    "check the network; set HF_TOKEN for a gated dataset, HF_ENDPOINT for a mirror, "
    "HF_HUB_OFFLINE=1 to use only what was downloaded; or use --data PATH, or --plan quick, "
    "which needs no network"
)
_OFFLINE_HINT = (
    "{variable} is set: unset it to download; or use --data PATH, or --plan quick, which needs no "
    "network"
)
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_NAME_COLUMNS = (
    "name its columns in the plan, or with --data: --set 'datasets.data.text=[\"NAME\"]'; "
    "prompt and truth, or messages, can be set likewise"
)
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Document:
    """One record: a text (`prompt`, with no truth), or a prompt and the truth that follows it.

    `row` is the record's place in its source. `turns` are further prompts and truths.
    """

    prompt: str
    truth: str | None = None
    row: int = 0
    turns: tuple[tuple[str, str], ...] = ()

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
    def _utf8(self) -> bytes:
        return self.text.encode()

    @property
    def num_bytes(self) -> int:
        """Of the whole text as UTF-8."""
        return len(self._utf8)

    @cached_property
    def place(self) -> float:
        """From its own text alone, a number in [0, 1): records below a fraction are held out."""
        digest = hashlib.blake2b(self._utf8, digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def documents(
    dataset: Dataset,
    split: Split,
    fraction: float,
    skip: int = 0,
    others: Callable[[Document], object] | None = None,
) -> Iterator[Document]:
    """The documents of a split in the source's order, in bounded memory; blank ones are left out.

    Where the source has its own held-out split, that is "validation"; else the records whose
    `place` is below `fraction` are. So a record's side depends on its own text only, and adding
    data moves none. From a hub dataset, "validation" ends with the first HELD_OUT_SPAN bytes of
    text, so that training need not wait for the rest; records held out later are never used.

    Args:
        fraction: as `held_out_fraction` gives it.
        skip: rows of the source to pass over, such as a `Document.row` to go on from.
        others: gets the documents of the other split that are met on the way.
    Raises:
        UserError: a missing file, column or split; damaged rows; code NO_DATA where the source
            cannot be reached.
    """
    own = has_own_validation(dataset)
    source = _records(dataset, split if own else "train", skip)
    if split == "validation":
        source = _span(dataset, source)
    for document in source:
        if own or (document.place < fraction) == (split == "validation"):
            yield document
        elif others is not None:
            others(document)


class FairSample:
    """Documents from all over a source: those lowest in the order of `place`.

    The first ones in the source's own order would be its first book or topic only. What is kept
    is no more than it takes to reach `num_bytes` of text, so memory is bounded.
    """

    def __init__(self, num_bytes: int):
        self._num_bytes, self._size = num_bytes, 0
        self._kept: list[tuple[float, int, Document]] = []  # a heap, the highest place on top
        self._numbers = count()

    def add(self, document: Document) -> None:
        heapq.heappush(self._kept, (-document.place, -next(self._numbers), document))
        self._size += document.num_bytes
        while self._size - self._kept[0][2].num_bytes >= self._num_bytes:
            self._size -= heapq.heappop(self._kept)[2].num_bytes

    def __iter__(self) -> Iterator[Document]:
        """The documents by `place`, of equal ones the first added first."""
        in_order = sorted(self._kept, key=lambda kept: kept[:2], reverse=True)
        return (document for _, _, document in in_order)


def held_out_fraction(dataset: Dataset, fraction: float) -> float:
    """The share that is held out: `fraction`, or just enough for one record of a small source.

    That record is the one of the lowest place. Remembered in the cache.
    """
    if has_own_validation(dataset):
        return fraction

    def lowest() -> float:
        lowest = 1.0
        for document in _span(dataset, _records(dataset, "train")):
            lowest = min(lowest, document.place)
            if lowest < fraction:
                return fraction
        return lowest + 2.0**-53

    return float(remembered(_held_out_key(dataset, fraction), lowest))


def share_trained_on(dataset: Dataset, fraction: float, num_bytes: int) -> float:
    """The share of held-out text that is also in the training text; remembered in the cache.

    Args:
        dataset: local files.
        num_bytes: of held-out text that is looked at.
    """
    import numpy as np

    def compute() -> float:
        sample = FairSample(num_bytes)
        for document in documents(dataset, "validation", fraction):
            sample.add(document)
        stretches = [_stretches(document) for document in sample]
        held_out = np.unique(np.concatenate(stretches)) if stretches else np.empty(0)
        if not len(held_out):
            return 0.0
        found = np.zeros(len(held_out), bool)
        for document in documents(dataset, "train", fraction):
            trained_on = _stretches(document)
            at = np.searchsorted(held_out, trained_on).clip(max=len(held_out) - 1)
            found[at[held_out[at] == trained_on]] = True
        return float(found.mean())

    own = has_own_validation(dataset)
    both = [source_fingerprint(dataset, split) for split in ("train", "validation")[: 1 + own]]
    key = fingerprint_of("stretches", both, columns_of(dataset), num_bytes, own or fraction)
    return float(remembered(key, compute))


def _stretches(document: Document) -> "np.ndarray":
    """Hashes of stretches of a text that begin where their first bytes say so.

    A copy has the same ones wherever it stands and however its lines are broken. What is shorter
    than a stretch counts as a whole.
    """
    import numpy as np

    octets = np.frombuffer(" ".join(document.text.split()).encode(), np.uint8)
    if len(octets) < _STRETCH:
        return np.array([document.place * 2**53], np.uint64)
    eights = np.lib.stride_tricks.sliding_window_view(octets, 8).copy().view(np.uint64).ravel()
    mixed = eights[: 1 - _STRETCH + 7] * _ODD
    (starts,) = (mixed >> np.uint64(64 - _FEW_BITS) == 0).nonzero()
    hashes = np.zeros(len(starts), np.uint64)
    for at in range(0, _STRETCH, 8):
        hashes = (hashes ^ eights[starts + at]) * _ODD
        hashes ^= hashes >> np.uint64(32)
    return hashes


def is_fraction_known(dataset: Dataset, fraction: float) -> bool:
    """Whether `held_out_fraction` can tell without reading the source."""
    return has_own_validation(dataset) or remembers(_held_out_key(dataset, fraction))


def has_own_validation(dataset: Dataset) -> bool:
    """True where the source brings a held-out split of its own."""
    if dataset.files is not None:
        return bool(_files(dataset, "validation"))
    return dataset.hub is not None and dataset.validation_split is not None


def source_fingerprint(dataset: Dataset, split: Split = "train") -> str:
    """Equal where the rows of a split are: local content is hashed, hub datasets are named.

    Raises:
        UserError: a file is missing; code NO_DATA where there is no standard library.
    """
    if dataset.hub is not None:
        of_hub = dataset.validation_split if split == "validation" else dataset.split
        return fingerprint_of("hub", dataset.hub, dataset.config, dataset.revision, of_hub)
    if dataset.builtin == "recall":
        return fingerprint_of("recall", NUM_TEXTS, recall_turns(0))
    if dataset.builtin is not None:
        return _library_fingerprint()
    if dataset.shards is not None:
        return fingerprint_of("shards", [content_hash(path) for path in shard_paths(dataset)])
    parts = [(f.kind, content_hash(f.path)) for f in _files(dataset, split)]
    return fingerprint_of("files", parts)


def content_of(dataset: Dataset) -> str:
    """Equal where the text and what is learned of it are, whatever the files are called.

    Raises:
        UserError: as of `source_fingerprint`.
    """
    held_out = has_own_validation(dataset) and source_fingerprint(dataset, "validation")
    parts = [source_fingerprint(dataset), held_out, columns_of(dataset), dataset.learn_prompt]
    return fingerprint_of("content", parts)


def shard_paths(dataset: Dataset) -> list[Path]:
    """The files of a dataset of token shards, sorted, each once.

    Raises:
        UserError: a pattern fits none.
    """
    found: set[Path] = set()
    for pattern in dataset.shards or []:
        fit = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        if not fit:
            hint = "a path is relative to this folder"
            raise UserError(f"no shard is called {pattern}", hint)
        found.update(map(Path, fit))
    return sorted(found)


def columns_of(dataset: Dataset) -> list:
    """What a plan says about the columns: text, prompt, truth, messages."""
    return [dataset.text, dataset.prompt, dataset.truth, dataset.messages]


def expected_bytes(dataset: Dataset) -> int | None:
    """About how many bytes of text training reads, for a progress bar; None where unknown."""
    if dataset.builtin == "recall":
        return NUM_TEXTS * TEXT_BYTES
    if dataset.builtin is not None:
        return sum(path.stat().st_size for _, path in _library())
    if dataset.files is not None:
        files = _files(dataset, "train")
        if all(f.kind == "text" and f.path.suffix.lower() != ".gz" for f in files):
            return sum(f.path.stat().st_size for f in files)
    return None


def open_hub(dataset: Dataset, split: str, skip: int) -> Iterator[dict]:
    """The rows of a hub dataset in its order, streamed: the one place that calls `datasets`."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    rows = datasets.load_dataset(
        dataset.hub, dataset.config, split=split, revision=dataset.revision, streaming=True
    )
    return iter(rows.skip(skip) if skip else rows)


def _held_out_key(dataset: Dataset, fraction: float) -> str:
    return fingerprint_of("held out", source_fingerprint(dataset), columns_of(dataset), fraction)


def _records(dataset: Dataset, split: Split, skip: int = 0) -> Iterator[Document]:
    """Every document of a split of the source itself, held out by hash or not."""
    number = skip if dataset.hub is not None else 0  # of the next row
    for render, rows in _sources(dataset, split, skip):
        for row in rows:
            document = render(row, number) if number >= skip else None
            number += 1
            if document is not None:
                yield document


def _sources(dataset: Dataset, split: Split, skip: int):
    if dataset.builtin == "recall":
        yield _recalled, range(NUM_TEXTS)
    elif dataset.builtin is not None:
        rows = ({"text": _source_code(path)} for _, path in _library())
        yield _Renderer(dataset, "the standard library"), rows
    elif dataset.hub is not None:
        name = (dataset.validation_split if split == "validation" else None) or dataset.split
        yield _Renderer(dataset, f"the hub dataset {dataset.hub}"), _hub_rows(dataset, name, skip)
    else:
        for file in _files(dataset, split):
            place = Place(file.path)
            render = _Renderer(dataset, place)
            yield render, file_rows(file, render.needed, place)


def _files(dataset: Dataset, split: Split) -> list[SourceFile]:
    found = of_split(_all_files(dataset), split)
    if found or (split == "validation" and dataset.validation_split is None):
        return found
    names = ", ".join(dataset.files or [])
    if split == "train":
        raise UserError(
            f"{names} holds only files to test or validate with",
            hint="name the files to train on one by one, with --data for each",
        )
    raise UserError(
        f"{names}: no file's name starts with {dataset.validation_split!r}",
        hint="without validation_split, records are held out by their hash",
    )


def _all_files(dataset: Dataset) -> list[SourceFile]:
    files = source_files(dataset.files or [], dataset.validation_split)
    if dataset.validation_files is None:
        return files
    held_out = [
        replace(file, split="validation") for file in source_files(dataset.validation_files)
    ]
    elsewhere = {file.path.resolve() for file in held_out}
    files = [file for file in files if file.path.resolve() not in elsewhere]
    apart = [replace(f, split="other") if f.split == "validation" else f for f in files]
    if not of_split(apart, "train"):  # what is named is meant
        apart = [replace(file, split=None) for file in files]
    return [*apart, *held_out]


def files_in_words(dataset: Dataset) -> str | None:
    """One line on what is read, held out and left out; None where there is nothing to tell."""
    if dataset.files is None or len(files := _all_files(dataset)) < 2:
        return None
    read, held_out = (of_split(files, split) for split in ("train", "validation"))
    reasons: dict[str, list[SourceFile]] = {}
    for file in files:
        if file not in read and file not in held_out:
            other = f"{file.split} split" if file.split else "there are files called train"
            reasons.setdefault(file.left_out or other, []).append(file)
    parts = [f"reads {_some(read)}"]
    parts += [f"holds out {_some(held_out)}"] if held_out else []
    parts += [f"left out: {_some(found)} ({reason})" for reason, found in reasons.items()]
    return "; ".join(parts)


def _some(files: list[SourceFile]) -> str:
    names = ", ".join(file.path.name for file in files[:4])
    return f"{names} and {len(files) - 4} more" if len(files) > 4 else names


def _span(dataset: Dataset, source: Iterable[Document]) -> Iterator[Document]:
    left = HELD_OUT_SPAN
    for document in source:
        yield document
        if dataset.hub is not None:
            left -= document.num_bytes
            if left <= 0:
                return


def _hub_rows(dataset: Dataset, split: str, skip: int) -> Iterator[dict]:
    """Rows from `skip` on; after a failure the source is opened again where it broke off."""
    rows, done = None, 0

    def read() -> list[dict]:
        nonlocal rows
        source, rows = rows, None  # a source that fails or hangs is not used again
        if source is None:
            source = open_hub(dataset, split, skip + done)
        batch = list(islice(source, _HUB_ROWS))
        rows = source
        return batch

    problem = f"cannot read {dataset.hub} ({split}) from the Hugging Face hub"
    offline = next((name for name in _OFFLINE if os.environ.get(name, "0") not in ("", "0")), None)
    hint = _OFFLINE_HINT.format(variable=offline) if offline else _HUB_HINT
    while True:
        try:
            batch = bounded(read, _HUB_SECONDS, problem, hint)
        except ValueError as error:  # an unknown configuration or split, with the known ones
            raise UserError(f"{problem}: {error}", "mend the dataset in the plan") from error
        if not batch:
            return
        yield from batch
        done += len(batch)


def _recalled(_, number: int) -> Document:
    (prompt, truth), *turns = recall_turns(number)
    return Document(prompt, truth, number, tuple(turns))


def _library() -> list[tuple[str, Path]]:
    folder = Path(sysconfig.get_path("stdlib"))
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        inside = [Path(path, name) for name in files if name.endswith(".py")]
        found += [(file.relative_to(folder).as_posix(), file) for file in inside]
    if not found:
        raise UserError(
            f"this Python has no source of its standard library in {folder}",
            hint="train on your own text: --data PATH",
            code=NO_DATA,
        )
    return sorted(found)


@cache
def _library_fingerprint() -> str:
    return fingerprint_of("files", [(name, content_hash(path)) for name, path in _library()])


def _source_code(path: Path) -> str:
    import tokenize

    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""  # a file that is broken on purpose
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", "train on your own text: --data PATH", NO_DATA
        ) from None


class _Renderer:
    """Rows of one file to documents, by the columns that the plan names or the file has."""

    def __init__(self, dataset: Dataset, where: str | Place):
        self._dataset, self._where = dataset, where
        self._text, self._prompt, self._truth, self._messages = columns_of(dataset)
        self._known = False
        self._learned: list[str] = []  # columns without which a row says nothing

    def needed(self, names: list[str]) -> list[str]:
        """The columns to read of those that there are."""
        if not self._known:
            self._known = True
            if not any(columns_of(self._dataset)):
                self._detect(names)
        if self._messages:
            needed = [self._messages]
        elif self._prompt:
            needed = [*self._prompt, self._truth]
        else:
            needed = self._text
        self._learned = [self._truth] if self._truth else needed
        for name in needed:
            if name not in names:
                raise UserError(
                    f"{self._where} has no column {name!r}; it has {', '.join(names)}",
                    hint=nearest(name, names) + _NAME_COLUMNS,
                )
        return needed

    def __call__(self, row: dict, number: int) -> Document | None:
        if not self._known:
            self.needed(list(row))
        if row.keys().isdisjoint(self._learned):
            raise UserError(
                f"{self._where} has no column {self._learned[0]!r}; it has {', '.join(row)}",
                hint="leave such rows out of the file, or give them the column",
            )
        if self._messages:
            prompt, truth = self._chat(row)
        elif self._prompt:
            prompt = self._joined(row, self._prompt)
            prompt = prompt + "\n\n" if prompt else ""
            truth = self._string(row, self._truth)
        else:
            prompt, truth = self._joined(row, self._text), None
        if not (prompt if truth is None else truth).strip():
            return None
        return Document(valid(prompt), truth if truth is None else valid(truth), number)

    def _detect(self, names: list[str]) -> None:
        if "messages" in names:
            self._messages = "messages"
        elif "prompt" in names and "truth" in names:
            self._prompt, self._truth = ["prompt"], "truth"
        elif "text" in names:
            self._text = ["title", "text"] if "title" in names else ["text"]
        else:
            raise UserError(
                f"{self._where} has none of the columns messages, prompt and truth, text; "
                f"it has {', '.join(names)}",
                hint=_NAME_COLUMNS,
            )

    def _joined(self, row: dict, columns: list[str]) -> str:
        texts = (self._string(row, column) for column in columns)
        return "\n\n".join(text for text in texts if text.strip())

    def _string(self, row: dict, column: str) -> str:
        value = row.get(column)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise UserError(
                f"column {column!r} of {self._where} holds {type(value).__name__}, not text",
                hint="a column of text is needed; " + _NAME_COLUMNS,
            )
        return value

    def _chat(self, row: dict) -> tuple[str, str]:
        """All before the last assistant turn, and that turn; what follows it is left out."""
        turns = row.get(self._messages) or []
        if isinstance(turns, dict):  # a table of columns, as older datasets give it
            turns = [
                dict(zip(turns, values, strict=True))
                for values in zip(*turns.values(), strict=True)
            ]
        if not isinstance(turns, list) or not all(
            isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns
        ):
            raise UserError(
                f"column {self._messages!r} of {self._where} is no list of role and content",
                hint="name a column of chats as messages in the plan",
            )
        last = max((i for i, t in enumerate(turns) if t["role"] == "assistant"), default=None)
        if last is None:
            return "", ""
        said = [
            f"{self._string(t, 'role').capitalize()}:\n{self._string(t, 'content')}\n\n"
            for t in turns[:last]
        ]
        return "".join([*said, "Assistant:\n"]), self._string(turns[last], "content")
