"""Checkpoints: a run's whole state on the disk, published by one rename, checked when read.

Weights, optimizer tensors and random states are safetensors, all else is JSON; no pickle is ever
written or read.
"""

import json
import math
import os
import re
import secrets
import shutil
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmplay.disk import make_folder, sync_folder
from lmplay.errors import BAD_CHECKPOINT, UserError
from lmplay.fault_points import reach
from lmplay.run.folder import RunFolder

FORMAT = 1

_MODEL = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_RNG = "rng.safetensors"
_AVERAGES = "averages.safetensors"
_STATE = "state.json"
_MANIFEST = "manifest.json"
_FILES = (_MODEL, _OPTIMIZER, _RNG, _AVERAGES, _STATE)

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})(~[0-9a-f]{8})?")  # ~: replaced by one of its step
_LEFTOVER = re.compile(r"\.(?:tmp|trash)-step-[0-9]+-([1-9][0-9]{0,8})-[0-9a-f]{8}")
_CORRUPT = ".corrupt-"

_MAX_HEADER = 10 << 20  # bytes; reading one takes a dozen times as much memory
_MAX_JSON = 64 << 20  # bytes
_CHUNK = 1 << 20  # bytes; hashed while they are still in the processor's cache

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}


@dataclass
class Checkpoint:
    """All that a run needs to go on as if it had never stopped.

    `optimizer` has the shape of torch's `Optimizer.state_dict()`, or is a list of such. Its leaves,
    like those of `state`, are None, bool, int, float and str in lists, tuples and dicts;
    `optimizer` may hold tensors too. Everything comes back with its type and its exact value.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict | list[dict]
    rng: dict[str, Tensor]
    state: dict
    averages: dict[str, Tensor] = field(default_factory=dict)  # ema/NAME is one of NAME


class _Damaged(Exception):
    """Why a checkpoint cannot be used: the file's name, then the reason."""


def save_checkpoint(folder: RunFolder, checkpoint: Checkpoint, keep: int) -> Path:
    """Save, prune, and give back the checkpoint's folder, checkpoints/step-<n>.

    The caller holds the run's lock. Killed at any moment, by a power cut too, the run has the
    earlier checkpoints or the new one, whole. An earlier checkpoint of the same step is replaced.

    Args:
        keep: how many checkpoints stay. The newest two that are whole stay in any case, and so
            does whatever has no manifest of ours.
    Raises:
        UserError: the disk is full or fails (code BAD_CHECKPOINT); earlier checkpoints are intact.
        TypeError, ValueError: a value that a checkpoint cannot hold; nothing was written.
    """
    step, parent = checkpoint.step, folder.checkpoints
    contents = _contents(checkpoint)
    needed = sum(len(head) + sum(t.nbytes for t in tensors) for head, tensors in contents.values())
    temporary, target = _own(parent, "tmp", step), parent / f"step-{step}"
    try:
        make_folder(parent)
        _remove_leftovers(parent)
        if shutil.disk_usage(parent).free < needed:
            raise OSError("the disk is full")
        reach("save.folder")
        os.mkdir(temporary)
        files = {name: _write(temporary / name, *contents[name]) for name in _FILES}
        manifest = _sealed({"format": FORMAT, "step": step, "files": files})
        _write(temporary / _MANIFEST, manifest, [])
        for name in (_MODEL, _OPTIMIZER, _RNG, _AVERAGES):
            with safe_open(temporary / name, framework="pt") as file:
                file.keys()  # what the library cannot read must not take a good one's place
        reach("save.whole")
        sync_folder(temporary)
        _publish(temporary, target)
        reach("save.verify")
        _manifest(target, step)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | _Damaged):
            raise _unsaved(error, parent, step, needed) from error
        raise
    _prune(parent, target, step, keep)
    return target


def newest_checkpoint(folder: RunFolder, note: Callable[[str], None]) -> Checkpoint | None:
    """The whole checkpoint of the highest step; None if the run never had one.

    The caller holds the run's lock: a damaged checkpoint is renamed to .corrupt-*, and `note` gets
    one sentence that names the file and the reason. Modification times mean nothing.

    Raises:
        UserError: there are checkpoints, but none is whole (code BAD_CHECKPOINT).
    """
    parent = folder.checkpoints
    with suppress(OSError):
        _remove_leftovers(parent)  # of a run's last save too, after which none comes
    candidates = _candidates(parent)
    for step, path in candidates:
        try:
            return _load(path, step, _FILES)
        except _Damaged as damage:
            aside = parent / f"{_CORRUPT}{path.name}-{secrets.token_hex(4)}"
            try:
                os.replace(path, aside)
                note(f"{path}: {damage}; set aside as {aside.name}")
            except OSError as error:
                note(f"{path}: {damage}; it cannot be set aside ({error.strerror})")
    names = os.listdir(parent) if parent.is_dir() else []
    if candidates or any(name.startswith(_CORRUPT) for name in names):
        raise UserError(
            f"no checkpoint in {parent} is whole",
            hint=f"--resume none starts anew; what is damaged stays in {_CORRUPT}*",
            code=BAD_CHECKPOINT,
        )
    return None


def read_checkpoint(
    folder: RunFolder, step: int | None, weights_only: bool, averages: bool = False
) -> Checkpoint:
    """A checkpoint to generate from or to export; writes nothing, so a live run may own it.

    Args:
        step: which one; None is the newest whole one, with a warning if a newer one is damaged.
        weights_only: `optimizer`, `rng` and `averages` are left empty, and their files are not
            looked at.
        averages: these are read all the same.
    Raises:
        UserError: there is none, or what was asked for is damaged (code BAD_CHECKPOINT).
    """
    candidates = _candidates(folder.checkpoints)
    chosen = [(n, path) for n, path in candidates if step in (None, n)]
    wanted = (_MODEL, _STATE, *((_AVERAGES,) if averages else ())) if weights_only else _FILES
    damages = []
    for number, path in chosen:
        try:
            checkpoint = _load(path, number, wanted)
        except _Damaged as damage:
            damages.append(f"{path}: {damage}")
            continue
        for text in damages:
            warnings.warn(f"{text}; step {number} is used", stacklevel=2)
        return checkpoint
    if damages:
        raise UserError(damages[0], hint=_others(candidates), code=BAD_CHECKPOINT)
    what = "no checkpoint yet" if step is None else f"no checkpoint of step {step}"
    raise UserError(f"{folder.path} has {what}", hint=_others(candidates), code=BAD_CHECKPOINT)


# Saving


def _contents(checkpoint: Checkpoint) -> dict[str, tuple[bytes, list[Tensor]]]:
    """For each file but the manifest, its first bytes and the tensors that follow them."""
    weights, aliases = without_ties(checkpoint.model)
    averages, shared = without_ties(checkpoint.averages)
    optimizer_tensors: dict[str, Tensor] = {}
    state = {
        "step": checkpoint.step,
        "state": _encode(checkpoint.state, ("state",), None),
        "optimizer": _encode(checkpoint.optimizer, (), optimizer_tensors),
    }
    text = json.dumps(state, indent=1, allow_nan=False).encode()
    if len(text) > _MAX_JSON:
        raise ValueError(f"{_STATE} would have {len(text):,} bytes, more than {_MAX_JSON:,}")
    return {
        _MODEL: _safetensors(weights, {"format": "pt", "aliases": json.dumps(aliases)}),
        _OPTIMIZER: _safetensors(optimizer_tensors, {"format": "pt"}),
        _RNG: _safetensors(checkpoint.rng, {"format": "pt"}),
        _AVERAGES: _safetensors(averages, {"format": "pt", "aliases": json.dumps(shared)}),
        _STATE: (text, []),
    }


def without_ties(model: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict with each shared tensor once, and the name it has for each name left out."""
    weights: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in model.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            weights[name] = tensor
    return weights, aliases


def _encode(value: object, path: tuple, tensors: dict[str, Tensor] | None) -> object:
    """JSON that says the type too: an object with a key of "$..." stands for what JSON lacks."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, Tensor) and tensors is not None:
        name = "/".join(map(str, path)).removeprefix("state/")
        while name in tensors:
            name += "'"
        tensors[name] = value
        return {"$tensor": name}
    if kind in (list, tuple):
        items = [_encode(item, (*path, index), tensors) for index, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _encode(item, (*path, key), tensors) for key, item in value.items()}
        return {
            "$dict": [
                [_encode(key, path, None), _encode(item, (*path, key), tensors)]
                for key, item in value.items()
            ]
        }
    where = "/".join(map(str, path))
    raise TypeError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: only "
        f"None, bool, int, float, str, list, tuple, dict"
        + (" and tensors" if tensors is not None else "")
    )


def _safetensors(
    tensors: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[bytes, list[Tensor]]:
    """A safetensors file as its header and its tensors, widest elements first for alignment.

    Written here and not by the library, which has the file hashed only by reading it again.
    Source: the format's description, github.com/huggingface/safetensors.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].dtype.itemsize, pair[0]))
    end = 0
    for name, tensor in ordered:
        if name in header:
            raise ValueError(f"a tensor cannot be called {name}")
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            what = f"a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}"
            raise TypeError(f"{name} is {what}, which a checkpoint cannot hold")
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise ValueError(f"{len(tensors):,} tensors are too many for one file of a checkpoint")
    return struct.pack("<Q", len(text)) + text, [tensor for _, tensor in ordered]


def _write(path: Path, head: bytes, tensors: list[Tensor]) -> dict:
    """Write and sync a file; its entry in the manifest, hashed on the way."""
    digest, size = sha256(), 0
    reach("save.open")
    with open(path, "xb") as file:
        for piece in _pieces(head, tensors):
            file.write(piece)
            reach("save.write")
            digest.update(piece)
            size += len(piece)
        file.flush()
        reach("save.fsync")
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _pieces(head: bytes, tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    yield head
    for tensor in tensors:
        if tensor.numel():
            plain = tensor.detach().cpu().resolve_conj().resolve_neg()
            octets = memoryview(plain.reshape(-1).view(torch.uint8).numpy())
            for start in range(0, len(octets), _CHUNK):
                yield octets[start : start + _CHUNK]


def _sealed(body: dict) -> bytes:
    """The manifest's bytes: `body` and its own checksum, in the one spelling that is accepted."""
    seal = sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": seal}, indent=1).encode() + b"\n"


def _publish(temporary: Path, target: Path) -> None:
    if os.path.lexists(target):
        # still read as a checkpoint of this step, should we die before the next line
        os.replace(target, target.with_name(f"{target.name}~{secrets.token_hex(4)}"))
    reach("save.rename")
    os.replace(temporary, target)
    reach("save.published")
    sync_folder(target.parent)


def _unsaved(error: Exception, parent: Path, step: int, needed: int) -> UserError:
    try:
        free = f"{shutil.disk_usage(parent).free:,} are free"
    except OSError:
        free = "the folder is gone"
    reason = getattr(error, "strerror", None) or error
    return UserError(
        f"cannot save step {step} in {parent}: {reason} ({needed:,} bytes are needed, {free})",
        hint="make room and start the same command again; earlier checkpoints are intact",
        code=BAD_CHECKPOINT,
    )


def _prune(parent: Path, saved: Path, step: int, keep: int) -> None:
    """Delete what is beyond `keep`, but neither the newest two that are whole nor what is not ours.

    A file system that refuses costs room, not the checkpoint that was just saved.
    """
    others = [(n, path) for n, path in _candidates(parent) if path != saved and _is_ours(path, n)]
    heirs = {number: parent / f"step-{number}" for number, _ in others}
    victims = [
        (number, path)
        for number, path in others
        if path != heirs[number] and (number == step or _is_whole(heirs[number], number))
    ]
    others = [other for other in others if other not in victims]
    kept = whole = 1
    for number, path in others if len(others) >= max(keep, 2) else []:
        if whole < 2:
            is_whole = _is_whole(path, number)  # a damaged one stays: nothing is lost by that
            whole += is_whole
            kept += is_whole
        elif kept < keep:
            kept += 1
        else:
            victims.append((number, path))
    with suppress(OSError):
        trash = [_own(parent, "trash", number) for number, _ in victims]
        for (_, path), gone in zip(victims, trash, strict=True):
            reach("save.prune")
            os.replace(path, gone)
        if trash:
            sync_folder(parent)
        for gone in trash:
            reach("save.trash")
            shutil.rmtree(gone, ignore_errors=True)


def _own(parent: Path, kind: str, step: int) -> Path:
    """A name that tells whose it is, so that what a dead process left is known for that."""
    return parent / f".{kind}-step-{step}-{os.getpid()}-{secrets.token_hex(4)}"


def _remove_leftovers(parent: Path) -> None:
    for name in os.listdir(parent):
        match = _LEFTOVER.fullmatch(name)
        # our own number too: it is a dead process's that had it before, or a save that failed
        if match and (int(match[1]) == os.getpid() or not _lives(int(match[1]))):
            shutil.rmtree(parent / name, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# Reading


def _candidates(parent: Path) -> list[tuple[int, Path]]:
    """Step and path of all that may be checkpoints, newest first; the replaced after its heir."""
    names = os.listdir(parent) if parent.is_dir() else []
    found = [(int(match[1]), match[0]) for match in map(_STEP.fullmatch, names) if match]
    return [(step, parent / name) for step, name in sorted(found, key=lambda c: (-c[0], c[1]))]


def _others(candidates: list[tuple[int, Path]]) -> str:
    steps = sorted({step for step, _ in candidates})
    return f"its checkpoints: {', '.join(map(str, steps))}" if steps else "train it first"


def _is_ours(path: Path, step: int) -> bool:
    try:
        _manifest(path, step)
    except (_Damaged, UserError):
        return False
    return True


def _is_whole(path: Path, step: int) -> bool:
    try:
        files = _manifest(path, step)
        for name in _FILES:
            _check(path / name, files[name])
    except (_Damaged, UserError):
        return False
    return True


def _load(path: Path, step: int, names: tuple[str, ...]) -> Checkpoint:
    """A checkpoint with what these of its files hold."""
    files = _manifest(path, step)
    for name in names:
        _check(path / name, files[name])

    def tensors(name: str) -> dict[str, Tensor]:
        return _read_tied(path / name) if name in names else {}

    weights, averages, rng = (tensors(name) for name in (_MODEL, _AVERAGES, _RNG))
    moments = tensors(_OPTIMIZER)
    try:
        facts = json.loads(_small_file(path / _STATE, _MAX_JSON))
        own_step, state = facts["step"], _decode(facts["state"], {})
        optimizer = _decode(facts["optimizer"], moments) if _OPTIMIZER in names else {}
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise _Damaged(f"{_STATE} makes no sense: {error!r}") from None
    if own_step != step or not isinstance(state, dict) or not isinstance(optimizer, dict | list):
        raise _Damaged(f"{_STATE} is not that of step {step}")
    return Checkpoint(step, weights, optimizer, rng, state, averages)


def _read_tied(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, those that it has under a second name too."""
    tensors, metadata = _read_tensors(path)
    try:
        for name, kept in json.loads(metadata.get("aliases", "{}")).items():
            tensors[name] = tensors[kept]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _Damaged(f"{path.name} has ties that lead nowhere: {error}") from None
    return tensors


def _decode(value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: _decode(item, tensors) for key, item in value.items()}
    ((tag, content),) = value.items()
    match tag:
        case "$float":
            return float(content)
        case "$tensor":
            return tensors[content]
        case "$tuple":
            return tuple(_decode(item, tensors) for item in content)
        case "$dict":
            return {_decode(key, {}): _decode(item, tensors) for key, item in content}
    raise ValueError(f"unknown {tag}")


def _manifest(path: Path, step: int) -> dict[str, dict]:
    """The manifest's files, after it was held against its own checksum and against the step."""
    if path.is_symlink():
        raise _Damaged("the folder is a symbolic link")
    raw = _small_file(path / _MANIFEST, _MAX_JSON)
    try:
        body = json.loads(raw)
        del body["sha256"]
        is_sealed = _sealed(body) == raw
        is_newer = body["format"] > FORMAT
        names, own_step = set(body["files"]), body["step"]
        entries = [(entry["bytes"], entry["sha256"]) for entry in body["files"].values()]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise _Damaged(f"{_MANIFEST} is no manifest") from None
    if not is_sealed:
        raise _Damaged(f"{_MANIFEST} does not match its own checksum")
    if is_newer:
        problem = f"{path} was written by a newer lmplay"
        raise UserError(problem, hint="install that one", code=BAD_CHECKPOINT)
    if own_step != step:
        raise _Damaged(f"{_MANIFEST} says step {own_step}")
    if names != set(_FILES) or not all(type(n) is int and type(h) is str for n, h in entries):
        raise _Damaged(f"{_MANIFEST} lists other files than a checkpoint has")
    return body["files"]


def _check(path: Path, entry: dict) -> None:
    """Hold a file against its size and checksum in the manifest."""
    size = _size(path)
    if size != entry["bytes"]:
        raise _Damaged(f"{path.name} has {size:,} bytes instead of {entry['bytes']:,}")
    with _reading(path), open(path, "rb") as file:
        found = file_digest(file, "sha256").hexdigest()
    if found != entry["sha256"]:
        raise _Damaged(f"{path.name} does not match its checksum")


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = _size(path)
    with _reading(path), open(path, "rb") as file:
        head = file.read(8)
    if len(head) < 8 or struct.unpack("<Q", head)[0] > min(size - 8, _MAX_HEADER):
        raise _Damaged(f"{path.name} is no safetensors file: its header is too long")
    try:
        with safe_open(path, framework="pt") as file:
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError) as error:
        raise _Damaged(f"{path.name} is no safetensors file: {error}") from None
    # copied, since these lie in the file itself, and a checkpoint may go
    return {name: tensor.clone() for name, tensor in mapped.items()}, metadata


def _small_file(path: Path, limit: int) -> bytes:
    size = _size(path)
    if size > limit:
        raise _Damaged(f"{path.name} has {size:,} bytes, more than {limit:,}")
    with _reading(path), open(path, "rb") as file:
        return file.read(limit)


def _size(path: Path) -> int:
    with _reading(path):
        facts = path.lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise _Damaged(f"{path.name} is a link or no file at all")
    return facts.st_size


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        hint = "run as the one who trained it"  # nothing is damaged, so nothing is set aside
        raise UserError(f"{path} may not be read", hint=hint, code=BAD_CHECKPOINT) from None
    except FileNotFoundError:
        raise _Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise _Damaged(f"{path.name} cannot be read: {error.strerror}") from None
