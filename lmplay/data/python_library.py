"""The source of the standard library of the Python that is running: text that is everywhere."""

import os
import sysconfig
from functools import cache
from pathlib import Path

from lmplay.data.shard_cache import content_hash, fingerprint
from lmplay.errors import NO_DATA, UserError

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def library() -> list[tuple[str, Path]]:
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
def library_fingerprint() -> str:
    return fingerprint("files", [(name, content_hash(path)) for name, path in library()])


def source_code(path: Path) -> str:
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
