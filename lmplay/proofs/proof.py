"""What a proof is: a claim about a specimen, and what was found."""

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lmplay.proofs.specimen import Specimen

CLOSE = 1e-4  # how far logits may move, against the largest, where the order of additions differs
EXACT = 1e-5  # and where only rounding may move them
NO_MEMORY = "there is not enough memory to tell"


@dataclass(frozen=True)
class Proof:
    """One claim about an experiment, and what was found."""

    name: str
    passed: bool | None  # None: the claim does not apply to this experiment
    detail: str  # one line, with the numbers


class Refuted(Exception):
    """The claim is false, and why."""


class Exempt(Exception):
    """The claim does not apply, and why."""


def prove(claims: Mapping[str, Callable[["Specimen"], str]], specimen: "Specimen") -> list[Proof]:
    """Every claim by its name, whatever the others find; the random state of the CPU is put back.

    A claim returns what was found, or raises Refuted or Exempt; any other error refutes it too.
    """
    proofs = []
    for name, claim in claims.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                proofs.append(Proof(name, True, claim(specimen)))
            except Refuted as found:
                proofs.append(Proof(name, False, str(found)))
            except Exempt as reason:
                proofs.append(Proof(name, None, str(reason)))
            except Exception as error:
                if _is_full(error):
                    proofs.append(Proof(name, None, NO_MEMORY))
                else:
                    where = _where(error, specimen.experiment.module.__file__)
                    proofs.append(Proof(name, False, where))
    return proofs


def how_far(changed: Tensor, answer: Tensor) -> float:
    """The largest difference, against the largest answer where that is above 1; nan stays nan."""
    scale = max(1.0, answer.abs().max().item())
    return (changed - answer).abs().max().item() / scale


def nan_first(size: float) -> float:
    """A key that makes nan the largest."""
    return math.inf if math.isnan(size) else size


def _is_full(error: Exception) -> bool:
    """Whether a device or the host ran out of memory: not all of torch says so by a type."""
    said = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def _where(error: Exception, file: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"
