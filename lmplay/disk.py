"""A file or a folder appears whole or not at all, and what has appeared survives a power cut."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lmplay.fault_points import reach

TEMPORARY = ".tmp-"  # begins the name of what is being written
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write in, which appears at `path` by one rename when the block ends.

    After an error, whatever was at `path` is unchanged and nothing is left beside it. A file that
    is replaced passes on its mode; a link stays one.

    Raises:
        OSError: the disk is full or fails, the folder is missing or cannot be written, or `path`,
            which the error names, is a folder, a device or a pipe.
    """
    named, path = str(path), path.resolve()
    if path.exists() and not path.is_file():  # a device, which a link may lead to, is not replaced
        raise PermissionError(errno.EPERM, "it is there, and no file", named)
    temporary = _beside(path)
    try:
        with naming(named), open(temporary, "xb") as file:
            yield file
            file.flush()
            reach("file.fsync")
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        reach("file.rename")
        os.replace(temporary, path)
        reach("file.published")
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, named) from None  # what the user knows of
        raise
    sync_folder(path.parent)


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """While entered, an error of the disk that names no file names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `path` by one rename when the block ends.

    All files directly in it are on the disk by then. After an error nothing is left.

    Raises:
        OSError: as of `atomic_file`, or `path` is there and not empty.
    """
    make_folder(path.parent)
    temporary = _beside(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        sync_folder(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file by `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 by `atomic_file`; what no UTF-8 can hold is spelled out as an escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: object) -> None:
    """Write JSON by `atomic_file`; numbers must be finite."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def overwrite_json(path: Path, value: object) -> None:
    """Write JSON over a file that is there, without any more room on the disk than it has.

    Whoever reads meanwhile, or after a power cut, may see half of it: where no second file can be
    written, this is better than what was there before.

    Raises:
        OSError: the file is missing or smaller than this, or the disk fails.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    with open(path, "r+b") as file:
        room = os.fstat(file.fileno()).st_size
        data = text.encode("utf-8", errors="backslashreplace").ljust(room)
        if len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Make a folder and those above it, on the disk too, so that a power cut leaves them."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Wait until the names in this folder, not only its files, are on the disk."""
    if os.name == "nt":  # cannot open folders, and needs no such call
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    # short, whatever the file's own name: that may be as long as the file system allows
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")
