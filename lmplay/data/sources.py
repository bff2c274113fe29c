"""Sources to documents: their files and rows in order, and which of them are held out."""

import glob
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lmplay.data.document import Document
from lmplay.data.hub import hub_rows
from lmplay.data.local_files import (
    Place,
    SourceFile,
    file_rows,
    of_split,
    rows_in_text,
    source_files,
)
from lmplay.data.python_library import library, library_fingerprint, source_code
from lmplay.data.recall import NUM_TEXTS, TEXT_BYTES, recall_turns
from lmplay.data.rendering import Renderer, columns_of
from lmplay.data.shard_cache import content_hash, remembered, remembers
from lmplay.data.shard_cache import fingerprint as fingerprint_of
from lmplay.errors import UserError
from lmplay.plan import Dataset

Split = Literal["train", "validation"]
HELD_OUT_SPAN = 1 << 27  # bytes of text at a hub dataset's start that held-out records come from


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
        return library_fingerprint()
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
        path = Path(pattern).expanduser()  # a file's own name may hold brackets
        fit = [path] if path.is_file() else glob.glob(str(path), recursive=True)
        if not fit:
            hint = "a path is relative to this folder"
            raise UserError(f"no shard is called {pattern}", hint)
        found.update(map(Path, fit))
    return sorted(found)


def expected_bytes(dataset: Dataset) -> int | None:
    """About how many bytes of text training reads, for a progress bar; None where unknown."""
    if dataset.builtin == "recall":
        return NUM_TEXTS * TEXT_BYTES
    if dataset.builtin is not None:
        return sum(path.stat().st_size for _, path in library())
    if dataset.files is not None:
        files = _files(dataset, "train")
        if all(f.kind == "text" and f.path.suffix.lower() != ".gz" for f in files):
            return sum(f.path.stat().st_size for f in files)
    return None


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
        rows = ({"text": source_code(path)} for _, path in library())
        yield Renderer(dataset, "the standard library"), rows
    elif dataset.hub is not None:
        name = (dataset.validation_split if split == "validation" else None) or dataset.split
        yield Renderer(dataset, f"the hub dataset {dataset.hub}"), hub_rows(dataset, name, skip)
    else:
        for file in _files(dataset, split):
            place = Place(file.path)
            render = Renderer(dataset, place)
            yield render, file_rows(file, render.needed, place)


def _files(dataset: Dataset, split: Split) -> list[SourceFile]:
    found = of_split(_all_files(dataset), split)
    if found or (split == "validation" and dataset.validation_split is None):
        return found
    names = ", ".join(dataset.files or [])
    if split == "train" and dataset.validation_files is not None:
        raise UserError(
            f"nothing of {names} is left to train on: all of it is named to be held out",
            hint="hold out another text; without --validation-data a share of it is held out",
        )
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


def syntax_in_words(dataset: Dataset) -> str | None:
    """One line on a file of which more than text is learned: its commas and quotes too."""
    files = _files(dataset, "train") if dataset.files is not None else []
    found = next(((file, told) for file in files if (told := rows_in_text(file))), None)
    return found and f"{found[0].path.name} is read as plain text, but holds {found[1]}"


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


def _recalled(_, number: int) -> Document:
    (prompt, truth), *turns = recall_turns(number)
    return Document(prompt, truth, number, tuple(turns), learn_end=False)
