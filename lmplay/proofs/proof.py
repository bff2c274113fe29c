"""What a proof is: a claim about a specimen, and what was found."""

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lmplay.proofs.specimen import Specimen

CLOSE = 1e-4  # how far logits may move, against the largest, where the order of additions differs
EXACT = 1e-5  # and where only rounding may move them
# what names a fault comes before what suffers from it
TELLING = [
    *("imports", "ruler", "likelihood", "terms", "causal", "rows apart", "repeat", "seed"),
    *("only weights", "state dict", "no float64", "placement", "cache", "head", "fold", "modes"),
    *("shift", "optimizer", "gradients", "loss at start", "any shape", "learns"),
]
NO_MEMORY = "there is not enough memory to tell"


@dataclass(frozen=True)
class Proof:
    """One claim about an experiment, and what was found."""

    name: str
    passed: bool | None  # None: the claim does not apply to this experiment
    detail: str  # one line, with the numbers
    where: str = "TINY"  # the size, or the device

    def at(self, where: str) -> "Proof":
        """The same, of another size or device."""
        return replace(self, where=where)


class Refuted(Exception):
    """The claim is false, and why.

    Args:
        unless: names of proofs; where one of them fails, this one was bound to, and says so.
    """

    def __init__(self, why: str, unless: tuple[str, ...] = ()):
        super().__init__(why)
        self.unless = unless


class Exempt(Exception):
    """The claim does not apply, and why."""


def prove(claims: Mapping[str, Callable[["Specimen"], str]], specimen: "Specimen") -> list[Proof]:
    """Every claim by its name, whatever the others find; the random state of the CPU is put back.

    A claim returns what was found, or raises Refuted or Exempt; any other error refutes it too.
    """
    proofs, follows = [], {}
    for name, claim in claims.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                proofs.append(Proof(name, True, claim(specimen)))
            except Refuted as found:
                proofs.append(Proof(name, False, str(found)))
                follows[name] = found.unless
            except Exempt as reason:
                proofs.append(Proof(name, None, str(reason)))
            except Exception as error:
                if _is_full(error):
                    proofs.append(Proof(name, None, NO_MEMORY))
                else:
                    where = _where(error, specimen.experiment.module.__file__)
                    proofs.append(Proof(name, False, where))
    return without_followers(proofs, follows)


def without_followers(proofs: list[Proof], follows: dict[str, tuple[str, ...]]) -> list[Proof]:
    """The proofs, of which those that failed because another did accuse no more.

    Args:
        follows: for each that failed, the names of those it may have failed because of.
    """
    failed = {proof.name for proof in proofs if proof.passed is False}
    causes = {name for name in failed if not failed & set(follows.get(name, ()))}
    made = []
    for proof in proofs:
        because = [name for name in follows.get(proof.name, ()) if name in causes]
        if because:
            proof = Proof(proof.name, None, f"means nothing where {because[0]} fails")
        made.append(proof)
    return made


def most_telling(proofs: list[Proof]) -> Proof | None:
    """Of the proofs that failed, the one that names the fault best."""
    failed = [proof for proof in proofs if proof.passed is False]
    return min(failed, key=lambda proof: _rank(proof.name), default=None)


def names_the_fault(proof: Proof | None) -> bool:
    """Whether a proof that failed says all that is wrong, so that no larger model tells more."""
    return proof is not None and _rank(proof.name) <= TELLING.index("seed")


def _rank(name: str) -> int:
    return TELLING.index(name) if name in TELLING else len(TELLING)


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
