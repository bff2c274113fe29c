"""Where prepared data lies, and how a file appears there whole or not at all."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from lmplay import disk, roots
from lmplay.errors import NO_DATA, UserError

_REMEMBERED_BYTES = 1 << 20  # smaller files are hashed by each process


def cache_root() -> Path:
    """The folder of everything that is prepared, made where it is missing."""
    root = roots.cache_root()
    make_folder(root)
    return root


def make_folder(folder: Path) -> None:
    """Make a folder of the cache, with its parents."""
    try:
        disk.make_folder(folder)
    except OSError as error:
        raise _unwritable(folder, error) from None


def write_whole(path: Path, write: Callable[[BinaryIO], object], num_bytes: int = 0) -> None:
    """Let `write` fill a file that appears at `path` by one rename, after fsync.

    Args:
        path: the file, replaced where it exists.
        write: called once with the open file.
        num_bytes: size known beforehand; the disk's free space is held to it.
    Raises:
        UserError: code NO_DATA; the disk is full or the folder cannot be written. Whatever was
            at `path` is unchanged.
    """
    try:
        free = shutil.disk_usage(path.parent).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, "")
        with disk.atomic_file(path) as file:
            write(file)
    except OSError as error:
        if error.errno not in disk.NO_ROOM:
            raise _unwritable(path, error) from None
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"the disk is full: {path} needs {num_bytes:,} bytes, {free:,} are free",
            hint="make room, or set LMP_DATASETS to a folder on another disk; what is whole stays",
            code=NO_DATA,
        ) from None


def write_json(path: Path, value: object) -> None:
    """Write JSON by `write_whole`."""
    text = json.dumps(value, indent=1).encode()
    write_whole(path, lambda file: file.write(text), len(text))


def read_json(path: Path) -> dict:
    """The object in a JSON file of ours; {} where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def remembered(key: str, compute: Callable[[], object]) -> object:
    """The JSON value of a pure function of `key`, computed once for this cache."""
    path = cache_root() / "remembered.json"
    known = read_json(path)
    if key in known:
        return known[key]
    value = compute()
    with FileLock(path.with_suffix(".lock")):
        write_json(path, {**read_json(path), key: value})
    return value


def remembers(key: str) -> bool:
    """Whether `remembered` need not compute."""
    return key in read_json(cache_root() / "remembered.json")


def content_hash(path: Path) -> str:
    """The SHA-256 of a file; it is read again only when its size or one of its times has changed.

    The time of its last change of state too, which `touch -r` and `cp -p` cannot set back.
    """
    state = path.stat()
    return _hash(path.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def fingerprint(*parts: object) -> str:
    """16 hex digits that are equal where the parts are."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(maxsize=1 << 16)
def _hash(path: Path, size: int, *times: int) -> str:
    def compute() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if size < _REMEMBERED_BYTES:
        return compute()
    return str(remembered(f"sha256 {path} {size} {times}", compute))


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror}",
        hint="set LMP_DATASETS to a folder that can be written",
        code=NO_DATA,
    )
