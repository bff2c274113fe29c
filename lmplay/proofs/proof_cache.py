"""What was proved before is remembered, as long as nothing changes that a proof runs."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from lmplay.disk import make_folder, write_json
from lmplay.proofs.proof import NO_MEMORY, Proof
from lmplay.roots import cache_root

PACKAGE = Path(__file__).parent.parent
RUN_BY_PROOFS = ("*.py", "catalog/*.py", "model/*.py", "proofs/*.py")  # what proofs may import


def remembered(of: list[object], found: Callable[[], list[Proof]]) -> list[Proof]:
    """What was found of this before, if all of it passed; else what is found now.

    A pass is remembered, in the user's cache, by its mark. A failure is never remembered, nor what
    lacked memory.

    Args:
        of: as `mark` takes it.
    """
    path = cache_root() / "checks" / f"{mark(of)}.json"
    with suppress(OSError, ValueError, TypeError):
        return [Proof(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    proofs = found()
    if all(proof.passed is not False and proof.detail != NO_MEMORY for proof in proofs):
        with suppress(OSError):  # a cache that cannot be written costs a second next time
            make_folder(path.parent)
            write_json(path, [dataclasses.asdict(proof) for proof in proofs])
    return proofs


def mark(of: list[object]) -> str:
    """The hash of `of`, of every file of lmplay that takes part in a proof, and of torch's version.

    Args:
        of: what else the proofs depend on, by its text: sources, Config values, the machine.
    """
    marks = [*map(str, of), hash_of_sources(PACKAGE), torch.__version__.partition("+")[0]]
    return hashlib.sha256("\0".join(marks).encode()).hexdigest()


@functools.cache
def hash_of_sources(package: Path) -> str:
    """Of every file that a proof may run: the ruler, the cache, folding, the proofs themselves."""
    whole = hashlib.sha256()
    for pattern in RUN_BY_PROOFS:
        for path in sorted(package.glob(pattern)):
            whole.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()
