"""What run.json says of a run: the fields of `Facts` are the one list of its keys."""

import dataclasses
import json
from dataclasses import dataclass, field, replace
from functools import cache
from types import UnionType
from typing import Literal, Self, get_args, get_origin, get_type_hints

from lmplay.run.design import Design, Rate

Status = Literal["running", "stopped", "failed", "leaked", "finished"]


@dataclass(frozen=True, kw_only=True)
class League:
    """The budget that a run's tokens were sized for."""

    kind: str  # seconds or flops
    baseline: str  # the label of the run that has the plan's own tokens
    cost: float | None = None  # of a token, the baseline's being 1; None before it is known


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a run was trained and validated on; runs are comparable where these agree."""

    content: str  # of the text, whatever its files are called
    fingerprint: str  # of the tokens that are trained on, in their order
    validation_fingerprint: str
    tokenizer: str
    vocab_size: int
    validation_tokens: int
    validation_bytes: int
    trained_on: float = 0.0  # share of the held-out text that is also in the training text


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """What compiling the model took."""

    graphs: int
    breaks: int  # between graphs
    seconds: float

    def __str__(self):
        graphs = f"{self.graphs or 'no'} graph{'s' if self.graphs > 1 else ''}"
        breaks = f"{self.breaks or 'no'} break{'s' if self.breaks > 1 else ''}"
        return f"compiled: {graphs}, {breaks}, in {self.seconds:.0f} s"


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """How the weights of a run that did not begin by chance came about, as names of tensors."""

    name: str  # of the trained model, as labels call it
    path: str
    step: int | None
    copied: int
    unfolded: list[str]  # modules that reproduced a plain one
    fresh: list[str]  # that the trained model lacks
    unused: list[str]  # that only the trained model has
    logits_differ: float  # at most, relative to the largest

    def __str__(self):
        parts = [f"{self.copied} tensors copied"]
        if self.unfolded:
            parts.append(f"unfolded: {', '.join(self.unfolded)}")
        for kind, names in (("fresh", self.fresh), ("unused", self.unused)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{kind}: {', '.join(names[:3])}{more}")
        parts.append(f"logits within {self.logits_differ:.1e} of its")
        return f"starts from {self.path}: {'; '.join(parts)}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """run.json. What has a default here is what a run that begins says; a file says everything."""

    schema_version: int = 1
    experiment: str
    file: str  # the name of the experiment's file, without .py
    stack: list[str]  # its ideas, where it is a stack
    docstring_summary: str
    plan_name: str
    seed: int
    changes: dict[str, object]  # what differs from the plan and the experiment
    label: str
    budget: League | None = None
    design: Design | None = None  # of the comparison that the run was trained for
    rate: Rate | None = None  # its place among runs at several learning rates
    plan: dict[str, object]  # as resolved
    config: dict[str, object]
    scale_differs: dict[str, list]  # key of the plan's model to the plan's value and the own one
    bound: bool  # the likelihood is the model's own: exact or a bound
    data: DataFacts
    flops_per_token: float
    parameters: dict[str, int]
    num_steps: int
    num_tokens: int
    tokens_per_step: int  # in the largest step
    device: str
    device_name: str
    threads: int
    platform: str
    versions: dict[str, str]
    git_commit: str | None
    precision: str
    matmul_flops: float | None = None  # per second, of all processes: an MFU of 100 %
    world_size: int
    mini_batch_size: int
    compiled: bool
    compilation: Compilation | None = None
    fsdp: bool
    initial_model: Beginning | None = None
    changed_midway: list[str] = field(default_factory=list)  # since then not bit by bit
    command: list[str]
    started: str  # ISO 8601
    status: Status = "running"
    exit_reason: str | None = None
    failures: int = 0  # times that a loss or gradient was not finite

    def running(self) -> Self:
        """The same of a run that a process is training."""
        return replace(self, status="running", exit_reason=None)

    def stopped(self, reason: str) -> Self:
        """The same of a run that was asked to stop and can go on."""
        return replace(self, status="stopped", exit_reason=reason)

    def failed(self, reason: str, is_numeric: bool = False) -> Self:
        """The same of a run that an error ended; `is_numeric` where a number was not finite."""
        failures = self.failures + is_numeric
        return replace(self, status="failed", exit_reason=reason, failures=failures)

    def leaked(self, reason: str) -> Self:
        """The same of a run whose model saw what it must not: it is never compared."""
        return replace(self, status="leaked", exit_reason=reason)

    def finished(self, num_steps: int) -> Self:
        """The same of a run that took its last step, which may be earlier than was planned."""
        return replace(self, status="finished", exit_reason=None, num_steps=num_steps)

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """What the bytes of a run.json say.

        Raises:
            ValueError: it is no JSON, lacks a key, has an unknown one or a value of another type.
        """
        try:
            facts = _read(cls, json.loads(text), "")
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if facts.status not in get_args(Status):
            raise ValueError(f"status is {facts.status!r}")
        return facts


def _read(cls: type, values: object, inside: str):
    """An object of this dataclass; `inside` is the path of its keys, "data.", for the message."""
    kinds = _kinds(cls)
    if not isinstance(values, dict):
        raise ValueError(f"{inside.rstrip('.') or 'it'} holds no JSON object")
    if missing := [inside + key for key in kinds if key not in values]:
        more = f" and {len(missing) - 3} more keys" if len(missing) > 3 else ""
        raise ValueError(f"it lacks {', '.join(missing[:3])}{more}")
    if unknown := values.keys() - kinds:
        raise ValueError(f"{inside}{min(unknown)} is an unknown key")
    made = {}
    for key, (types, part) in kinds.items():
        value = values[key]
        if type(value) not in types:
            wanted = " or ".join(_WORDS[kind] for kind in types)
            raise ValueError(f"{inside}{key} should be {wanted}")
        made[key] = value if part is None or value is None else _read(part, value, f"{key}.")
    return cls(**made)


_WORDS = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false",
    list: "a list", dict: "an object", type(None): "null",
}  # fmt: skip


@cache
def _kinds(cls: type) -> dict[str, tuple[tuple[type, ...], type | None]]:
    """The types that JSON has for each field, and the dataclass that it is, if it is one."""
    return {name: _kind(hint) for name, hint in get_type_hints(cls).items()}


def _kind(hint: object) -> tuple[tuple[type, ...], type | None]:
    types, part = [], None
    for option in get_args(hint) if isinstance(hint, UnionType) else [hint]:
        kind = get_origin(option) or option
        if dataclasses.is_dataclass(kind):
            part, kind = kind, dict
        types += [float, int] if kind is float else [str if kind is Literal else kind]
    return tuple(types), part
