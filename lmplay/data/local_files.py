"""Local files to rows: which file belongs to which split, and what a row of it is."""

import codecs
import gzip
import json
import os
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from lmplay.errors import UserError, nearest

PASSAGE = 16 * 1024  # characters
_LONGEST_ROW = 1 << 20  # characters of a line that is looked at
# a whole name, or one of a numbered set: "Train Dreams.txt" is a book
_SPLIT = re.compile(r"(train|test|validation|valid|val)(-[0-9]+-of-[0-9]+)?", re.IGNORECASE)
_CANONICAL = {"valid": "validation", "val": "validation"}
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|authors|contributing)(\.\w+)?|"
    r"dataset_infos?\.json|(sha256|md5)sums?(\.txt)?",
    re.IGNORECASE,
)
_COPY_OF_ANOTHER = re.compile(r".*~|#.*#|.*\.(sw[a-p]|bak|orig|part|tmp|crdownload)", re.IGNORECASE)
_SAVED = re.compile(r"dataset_info\.json|state\.json|dataset_dict\.json|cache-\w+\.arrow")
_MARKS = {  # the longer ones first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FOREIGN = {  # how files begin that are no text, whatever they are called
    b"%PDF-": "a PDF",
    b"PK\3\4": "a zip archive, as office documents are",
    b"\x1f\x8b": "packed by gzip, and lacks the suffix .gz",
    b"BZh": "packed by bzip2",
    b"\xfd7zXZ": "packed by xz",
    b"(\xb5/\xfd": "packed by zstd",
    b"PAR1": "a Parquet file, and lacks the suffix .parquet",
}
_READABLE = "text, JSONL, Parquet and Arrow can be read, packed by gzip too"
_COPY = "copy or download it again, or leave it out"
_TABLES = (".parquet", ".arrow")
_LINES = (".jsonl", ".ndjson", ".json")


@dataclass
class Place:
    """Where in a source the row at hand stands, for whoever finds fault with it."""

    source: object  # its name
    unit: str = "row"
    number: int = 0  # from 1; 0 before the first

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number:,}" if self.number else str(self.source)


@dataclass(frozen=True)
class SourceFile:
    """A file and the split that its name tells: "train", "validation", another, or none.

    `left_out` is why it is not read, whatever its split.
    """

    path: Path
    split: str | None
    left_out: str | None = None

    @property
    def kind(self) -> str:
        """The suffix without .gz; "text" for all that is read as plain text."""
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        if suffixes and suffixes[-1] == ".gz":
            suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in (*_TABLES, *_LINES) else "text"


def source_files(paths: list[str], held_out: str | None = None) -> list[SourceFile]:
    """The files at these paths, in this order; those in a folder sorted by their path in it.

    In a folder, hidden files are passed over; what holds no text, an editor's copies, and what is
    about the data (README, licence, metadata of the datasets library) beside other files, are
    marked as left out.
    A file's split is told by its whole name, or by a folder's on the way: train, test, validation
    (valid, val), also as train-00000-of-00002. Files given one by one are taken as they are where
    none of them would be left to train on.

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
            inside = [_judged(file) for file in _walk(path, held_out)]
            if all(file.left_out for file in inside):  # a folder of READMEs is a text too
                inside = [replace(f, left_out=_no_text(f)) for f in inside if f.path.is_file()]
            if all(file.left_out for file in inside):
                why = [f"{file.path.name}: {file.left_out}" for file in inside[:3]]
                raise UserError(f"the folder {text} holds no text", hint="; ".join(why))
            found += inside
        else:
            found.append(SourceFile(path, _split_name(path.name, held_out)))
    found = _once(found)
    if not of_split(found, "train") and not any(Path(p).expanduser().is_dir() for p in paths):
        return [replace(file, split=None) for file in found]
    return found


def _once(files: list[SourceFile]) -> list[SourceFile]:
    """The files, of which those that are another one under a further name are left out."""
    first: dict[str, SourceFile] = {}
    for file in files:
        if file.left_out is None:
            first.setdefault(os.path.realpath(file.path), file)
    return [
        file
        if file.left_out or (known := first[os.path.realpath(file.path)]) is file
        else replace(file, left_out=f"it is {known.path}")
        for file in files
    ]


def existing(text: str) -> Path:
    """The file or folder that a user means.

    Raises:
        UserError: there is none.
    """
    try:
        path = Path(text).expanduser()
        is_there = bool(text) and (path.is_file() or path.is_dir())
    except (OSError, RuntimeError) as error:  # a name too long, nobody's home
        raise UserError(f"{text!r} cannot be a file: {getattr(error, 'strerror', error)}") from None
    if text and not is_there and os.path.lexists(path):
        what = "a link that leads nowhere" if path.is_symlink() else "no file and no folder"
        raise UserError(f"{text!r} is {what}", hint="name a file or a folder of text")
    if not is_there:
        where = "" if path.is_absolute() else f"a path is relative to {Path.cwd()}"
        hint = "; ".join(filter(None, [where, _beside(path)]))
        raise UserError(f"there is no file {text!r}", hint or f"see {_nearest_folder(path)}")
    return path


def of_split(files: list[SourceFile], split: str) -> list[SourceFile]:
    """The files of a split; those of "train" are the rest where none is called so."""
    files = [file for file in files if file.left_out is None]
    named = [file for file in files if file.split == split]
    if named or split != "train":
        return named
    return [file for file in files if file.split is None]


def file_rows(
    file: SourceFile, choose: Callable[[list[str]], list[str]], place: Place | None = None
) -> Iterator[dict]:
    """The rows of one file in order, in bounded memory.

    A row of plain text is a passage of about 16 KiB that ends at a blank line where possible, so
    that memory stays bounded and a share of a single large file can be held out. (Whole passages
    joined are the file.)

    Args:
        file: what to read; .gz is unpacked on the way.
        choose: from the names of the columns to those to read; called where a file tells them.
        place: kept at the row that is given.
    Raises:
        UserError: the file is damaged or not what its name says, with the place in it.
    """
    place = place or Place(file.path)
    try:
        if file.kind in _LINES:
            with _open(file.path) as opened:
                yield from _json_rows(opened, place)
            return
        if file.kind == ".parquet":
            rows = _parquet_rows(file.path, choose)
        elif file.kind == ".arrow":
            rows = _arrow_rows(file.path, choose)
        else:
            rows = _text_rows(file.path)
        for place.number, row in enumerate(rows, start=1):
            yield row
    except UnicodeError as error:
        encoding, why = _encoding(file.path), getattr(error, "reason", error)
        if encoding != "utf-8-sig":
            problem = f"{file.path} is not whole, though its mark says {encoding.upper()}: {why}"
            raise UserError(problem, hint=_COPY) from None
        raise UserError(
            f"{file.path} is not UTF-8: {_bad_byte(file.path)}{why}",
            hint=f"convert it first: {_conversion(file)}",
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        why = " ".join(str(error).split())  # arrow writes several lines
        raise UserError(f"cannot read {file.path}: {why}", hint=_COPY) from None


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


def rows_in_text(file: SourceFile) -> str | None:
    """What a file holds that is read as plain text though it is rows, and how to read these."""
    if file.kind != "text":
        return None
    if {".csv", ".tsv"} & {suffix.lower() for suffix in file.path.suffixes[-2:]}:
        return "a table: its columns are read of .jsonl and .parquet"
    try:
        with _open(file.path) as opened:
            first = json.loads(opened.readline(_LONGEST_ROW))
    except (UserError, OSError, EOFError, zlib.error, ValueError, RecursionError):
        return None  # reading it says what is wrong
    return "lines of JSON: call it .jsonl" if isinstance(first, dict) else None


def _beside(path: Path) -> str:
    """Which name in the same folder may have been meant."""
    try:
        names = [found.name for found in path.parent.iterdir()]
    except OSError:
        return ""
    return nearest(path.name, names).strip()


def _nearest_folder(path: Path) -> Path:
    """How far the way to a file leads."""
    return next(folder for folder in path.parents if folder.is_dir())


def _cut(text: str) -> int:
    for mark in ("\n\n", "\n"):
        at = text.rfind(mark, PASSAGE // 4, PASSAGE)
        if at >= 0:
            return at + len(mark)
    return PASSAGE


def _walk(folder: Path, held_out: str | None) -> list[SourceFile]:
    """All files that are not hidden, in linked folders too, each folder once."""
    found, seen = [], set()
    for here, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for path in (Path(here, name) for name in names if not name.startswith(".")):
            splits = (_split_name(p, held_out) for p in path.relative_to(folder).parts)
            found.append(SourceFile(path, next((s for s in splits if s), None)))
    return sorted(found, key=lambda file: file.path.relative_to(folder).parts)


def _judged(file: SourceFile) -> SourceFile:
    if not file.path.is_file():
        leads = "a link that leads nowhere" if file.path.is_symlink() else "no file"
        return replace(file, left_out=leads)
    if _COPY_OF_ANOTHER.fullmatch(file.path.name):
        return replace(file, left_out="a copy by an editor, or unfinished")
    if _ABOUT.fullmatch(file.path.name):
        return replace(file, left_out="about the data")
    if _SAVED.fullmatch(file.path.name) and (
        file.path.name == "dataset_dict.json" or any(file.path.parent.glob("data-*.arrow"))
    ):
        return replace(file, left_out="of the datasets library")
    return replace(file, left_out=_no_text(file))


def _no_text(file: SourceFile) -> str | None:
    what = None if file.kind in _TABLES else _instead_of_text(file.path)
    return what and f"no text: it is {what}"


def _split_name(name: str, held_out: str | None) -> str | None:
    if held_out is not None and name.startswith(held_out):
        return "validation"
    match = _SPLIT.fullmatch(name.partition(".")[0])
    split = match[1].lower() if match else None
    split = _CANONICAL.get(split, split)
    return "other" if held_out is not None and split == "validation" else split


def _instead_of_text(path: Path) -> str | None:
    """What a file is that holds no text."""
    try:
        if _encoding(path) != "utf-8-sig":
            return None
        with _open_binary(path) as file:
            start = file.read(8192)
    except (OSError, EOFError, zlib.error):
        return None  # reading it says what is wrong
    found = next((what for mark, what in _FOREIGN.items() if start.startswith(mark)), None)
    return found or ("binary, with a NUL byte" if b"\0" in start else None)


def _encoding(path: Path) -> str:
    """UTF-8, or what the mark at the start of the file says."""
    with _open_binary(path) as file:
        return encoding_of(file.read(4))


def encoding_of(start: bytes) -> str:
    """The encoding of a text that begins so: what its mark says, else UTF-8."""
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")


def _bad_byte(path: Path) -> str:
    """The place of the first byte that is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, offset = 1, 0
    with _open_binary(path) as file:
        while chunk := file.read(1 << 20):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                at = offset + len(chunk) - len(error.object) + error.start
                return f"line {line + before.count(10):,}, byte {at:,}: "
            line += chunk.count(b"\n")
            offset += len(chunk)
    return "its end: "


def _conversion(file: SourceFile) -> str:
    """The command that makes UTF-8 of a file; the new one is still read as what it is."""
    path, packed = file.path, file.path.suffix.lower() == ".gz"
    name = path.with_suffix("").name if packed else path.name
    stem, dot, suffix = name.partition(".")  # which tell the split and the kind
    new = path.with_name(f"{stem}.utf8{dot}{suffix}")
    read = f"gzip -dc {shlex.quote(str(path))} | iconv" if packed else "iconv"
    given = "" if packed else f" {shlex.quote(str(path))}"
    made = f"{read} -f latin1 -t utf-8{given} > {shlex.quote(str(new))}"
    return f"{made}, and name that, or in a folder take the old one out"


def _open_binary(path: Path):
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _open(path: Path) -> TextIO:
    if what := _instead_of_text(path):
        raise UserError(f"{path} holds no text: it is {what}", hint=_READABLE)
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding=_encoding(path))
    return open(path, encoding=_encoding(path))


def _text_rows(path: Path) -> Iterator[dict]:
    with _open(path) as opened:
        yield from ({"text": passage} for passage in passages(opened))


def _json_rows(file: TextIO, place: Place) -> Iterator[dict]:
    place.unit = "line"
    for place.number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = f"{error.msg}, column {error.colno}" if hasattr(error, "colno") else str(error)
            raise UserError(f"{place} is not JSON: {why}", _json_hint(place, line)) from None
        if not isinstance(row, dict):
            raise UserError(f"{place} is no JSON object", _json_hint(place, line))
        yield row


def _json_hint(place: Place, line: str) -> str:
    """The command that makes lines of a list, or of objects that go over several lines."""
    objects = {"[": ".[]", "{": "."}.get(line[:1])
    if place.number > 1 or not objects or not line.rstrip().endswith(("[", "{", ",", "]")):
        return "one object a line is needed; mend that line or take it out"
    return jq_command(Path(str(place.source)), objects)


def jq_command(path: Path, objects: str) -> str:
    """How to make one object a line of what jq calls `objects` in a file."""
    old, new = (shlex.quote(str(p)) for p in (path, path.with_name(f"{path.stem}.lines.jsonl")))
    wanted = shlex.quote(objects)
    read = f"gzip -dc {old} | jq -c {wanted}"
    if path.suffix.lower() != ".gz":
        read = f"jq -c {wanted} {old}"
    return f"one object a line is needed: {read} > {new}, and name that"


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
