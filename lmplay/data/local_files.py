"""Local files to rows: which file belongs to which split, and what a row of it is."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lmplay.errors import UserError, nearest

PASSAGE = 16 * 1024  # characters
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?![a-z])", re.IGNORECASE)
_CANONICAL = {"valid": "validation", "val": "validation", "dev": "validation"}
_TABLES = (".parquet", ".arrow")
_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class SourceFile:
    """A file and the split that its name tells: "train", "validation", another, or none."""

    path: Path
    split: str | None

    @property
    def kind(self) -> str:
        """The suffix without .gz; "text" for all that is read as plain text."""
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        if suffixes and suffixes[-1] == ".gz":
            suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in (*_TABLES, *_LINES) else "text"


def source_files(paths: list[str], held_out: str | None = None) -> list[SourceFile]:
    """The files at these paths, in this order; those in a folder sorted by their path in it.

    In a folder, hidden files and files that hold no text are left out. A file's split is told by
    the start of its name, or of a folder's on the way: train, test, validation (valid, val, dev).
    Files given one by one are taken as they are where none of them would be left to train on.

    Args:
        paths: files and folders.
        held_out: how the names of the validation split's files start, where a plan says so.
    Raises:
        UserError: nothing is there.
    """
    found: list[SourceFile] = []
    for text in paths:
        path = existing(text)
        if path.is_dir():
            inside = [
                f for f in _walk(path, held_out) if f.kind != "text" or _looks_like_text(f.path)
            ]
            if not inside:
                raise UserError(f"the folder {text} holds no text")
            found += inside
        else:
            found.append(SourceFile(path, _split_name(path.name, held_out)))
    if not of_split(found, "train") and not any(Path(p).expanduser().is_dir() for p in paths):
        return [SourceFile(file.path, None) for file in found]
    return found


def existing(text: str) -> Path:
    """The file or folder that a user means.

    Raises:
        UserError: there is none.
    """
    path = Path(text).expanduser()
    if not text or not (path.is_file() or path.is_dir()):
        hint = f"a path is relative to {Path.cwd()}; {_beside(path)}"
        raise UserError(f"there is no file {text!r}", hint=hint.removesuffix("; "))
    return path


def of_split(files: list[SourceFile], split: str) -> list[SourceFile]:
    """The files of a split; those of "train" are the rest where none is called so."""
    named = [file for file in files if file.split == split]
    if named or split != "train":
        return named
    return [file for file in files if file.split is None]


def file_rows(file: SourceFile, choose: Callable[[list[str]], list[str]]) -> Iterator[dict]:
    """The rows of one file in order, in bounded memory.

    A row of plain text is a passage of about 16 KiB that ends at a blank line where possible, so
    that memory stays bounded and a share of a single large file can be held out. (Whole passages
    joined are the file.)

    Args:
        file: what to read; .gz is unpacked on the way.
        choose: from the names of the columns to those to read; called where a file tells them.
    Raises:
        UserError: the file is damaged or not what its name says, with the place in it.
    """
    try:
        if file.kind == ".parquet":
            yield from _parquet_rows(file.path, choose)
        elif file.kind == ".arrow":
            yield from _arrow_rows(file.path, choose)
        else:
            with _open(file.path) as opened:
                if file.kind in _LINES:
                    yield from _json_rows(opened, file.path)
                else:
                    yield from ({"text": passage} for passage in passages(opened))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path} is not UTF-8: {error.reason}",
            hint=f"convert it first: iconv -f latin1 -t utf-8 '{file.path}' > '{file.path}.txt'",
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {file.path}: {error}") from None


def passages(file: TextIO) -> Iterator[str]:
    """Cut a text into passages of at most PASSAGE characters; joined they are the text.

    A cut is made after the last blank line of a passage, else after its last line, unless that
    would leave less than a quarter of it. Text added at the end moves no earlier cut.
    """
    rest = ""
    while chunk := file.read(PASSAGE):
        rest += chunk
        while len(rest) > PASSAGE:
            cut = _cut(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _beside(path: Path) -> str:
    """Which name in the same folder may have been meant."""
    try:
        names = [found.name for found in path.parent.iterdir()]
    except OSError:
        return ""
    return nearest(path.name, names).strip()


def _cut(text: str) -> int:
    for mark in ("\n\n", "\n"):
        at = text.rfind(mark, PASSAGE // 4, PASSAGE)
        if at >= 0:
            return at + len(mark)
    return PASSAGE


def _walk(folder: Path, held_out: str | None) -> list[SourceFile]:
    found = []
    for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).parts):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            splits = (_split_name(part, held_out) for part in parts)
            found.append(SourceFile(path, next((s for s in splits if s), None)))
    return found


def _split_name(name: str, held_out: str | None) -> str | None:
    if held_out is not None and name.startswith(held_out):
        return "validation"
    match = _SPLIT.match(name)
    split = match[1].lower() if match else None
    split = _CANONICAL.get(split, split)
    return "other" if held_out is not None and split == "validation" else split


def _looks_like_text(path: Path) -> bool:
    try:
        with _open_binary(path) as file:
            return b"\0" not in file.read(8192)
    except (OSError, EOFError, zlib.error):
        return True  # reading it says what is wrong


def _open_binary(path: Path):
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _open(path: Path) -> TextIO:
    if not _looks_like_text(path):
        with _open_binary(path) as file:
            is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        if is_utf16:
            hint = f"convert it first: iconv -f utf-16 -t utf-8 '{path}' > '{path}.txt'"
            raise UserError(f"{path} is UTF-16, not UTF-8", hint)
        raise UserError(f"{path} holds no text", hint="text, JSONL, Parquet and Arrow can be read")
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _json_rows(file: TextIO, path: Path) -> Iterator[dict]:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is not JSON: {error}",
                hint="one object a line is needed; jq -c '.[]' makes lines of an array",
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number} is no JSON object",
                hint="one object a line is needed; jq -c '.[]' makes lines of an array",
            )
        yield row


def _parquet_rows(path: Path, choose) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            columns = choose(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path} is no whole Parquet file: {error}") from None


def _arrow_rows(path: Path, choose) -> Iterator[dict]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                reader = pa.ipc.open_stream(source)  # what the datasets library saves
                batches = iter(reader)
            except pa.ArrowInvalid:
                source.seek(0)
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            columns = choose(reader.schema.names)
            for batch in batches:
                chosen = batch.select(columns)
                for start in range(0, len(chosen), 256):
                    yield from chosen.slice(start, 256).to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path} is no whole Arrow file: {error}") from None
