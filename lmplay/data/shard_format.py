"""The layout of a token shard on disk, one for our own files and for foreign ones.

256 int32 (magic, version, number of tokens, zeros), then the tokens, all little-endian: uint16
under modded-nanogpt's magic, uint32 under llm.c's for larger vocabularies.
Source: Andrej Karpathy's llm.c and Keller Jordan's modded-nanogpt, their data loaders.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from lmplay.errors import UserError

_HEADER_BYTES = 1024
_KINDS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type of the layout that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_shard(file: BinaryIO, tokens: np.ndarray) -> None:
    """Write a whole shard; the array's dtype, one of `token_dtype`, tells which kind."""
    magic, version = next(key for key, dtype in _KINDS.items() if dtype == tokens.dtype)
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    file.write(header.tobytes())
    file.write(memoryview(tokens).cast("B"))


def shard_bytes(num_tokens: int, dtype: np.dtype) -> int:
    """The size of such a file."""
    return _HEADER_BYTES + num_tokens * dtype.itemsize


def shard_header(path: Path) -> tuple[int, np.dtype]:
    """The number of tokens in a shard and their type.

    Raises:
        UserError: the file is no shard, or not as long as its header says.
    """
    hint = "a shard is 256 int32 (magic 20240520, version 1, count), then uint16 tokens"
    try:
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(_HEADER_BYTES), dtype="<i4")
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is no token shard: it is too short", hint) from None
    if len(header) < 256:
        raise UserError(f"{path} is no token shard: it is too short", hint)
    magic, version, num_tokens = (int(value) for value in header[:3])
    dtype = _KINDS.get((magic, version))
    if dtype is None:
        raise UserError(
            f"{path} is no token shard: it begins with {magic}, version {version}", hint
        )
    if num_tokens < 0 or size != shard_bytes(num_tokens, dtype):
        raise UserError(
            f"{path} is damaged: {num_tokens:,} tokens make {shard_bytes(num_tokens, dtype):,} "
            f"bytes, it has {size:,}",
            hint="download or write it again",
        )
    return num_tokens, dtype


def map_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped and read-only."""
    num_tokens, dtype = shard_header(path)
    if num_tokens == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=_HEADER_BYTES, shape=(num_tokens,))
