"""A training plan: all that is held equal when ideas are compared."""

import json
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    model_validator,
)

from lmplay.errors import UserError
from lmplay.machine import PRECISIONS

SCHEMA_HINT = "--plan schema shows what a plan can hold"
FEW_HELD_OUT = 1000  # tokens: the loss on fewer says little


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Precision = Literal[PRECISIONS]
Count = Annotated[int, BeforeValidator(_whole), Field(gt=0, lt=2**53)]  # 4.6e9 is one too


def _rising(ramp: list[tuple[float, int]]) -> list[tuple[float, int]]:
    shares = [share for share, _ in ramp]
    if shares[0] != 0 or shares != sorted(set(shares)):
        raise ValueError(f"a ramp begins at 0 and rises; its shares are {shares}")
    return ramp


_MOST_TOKENS = 2**30  # in a step; the largest batches so far are a few millions
_Point = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Count], Field(strict=False)]
# [[0, 16], [0.5, 32]]: 16 at first, 32 once half of the run's tokens were trained on
Ramp = Annotated[list[_Point], Field(min_length=1), AfterValidator(_rising)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Dataset(_Strict):
    """One source of text: exactly one of `hub`, `files`, `shards`, `builtin`.

    What a row holds is told by its columns: `messages`, else `prompt` and `truth`, else `text`.
    Where none is named, the first of these that the source has: messages; prompt and truth;
    title and text; text.
    """

    hub: str | None = Field(None, description="Hugging Face dataset, such as wikimedia/wikipedia.")
    config: str | None = Field(None, description="The hub dataset's configuration.")
    revision: str | None = Field(None, description="The hub dataset's commit, tag or branch.")
    split: str = Field("train", description="The hub dataset's split to train on.")
    validation_split: str | None = Field(
        None,
        description="Held-out split on the hub, or how the names of held-out files start; "
        "without it, records are held out by their hash.",
    )
    download: str | None = Field(
        None, description="How much there is to download, in words: about 20 GB."
    )
    files: list[str] | None = Field(
        None, description="Text, JSONL, Parquet or Arrow files, .gz too, or folders of them."
    )
    validation_files: list[str] | None = Field(
        None, description="Files or folders to hold out, whatever they are called."
    )
    shards: list[str] | None = Field(
        None, description="Token shards in the layout of modded-nanogpt; wildcards are expanded."
    )
    builtin: Literal["python-stdlib", "recall"] | None = Field(
        None,
        description="The source of the Python that is running, or texts of pairs and questions "
        "about them; needs no download.",
    )
    text: list[str] | None = Field(None, description="Columns joined by a blank line.")
    prompt: list[str] | None = Field(None, description="Columns that make the prompt.")
    truth: str | None = Field(None, description="Column with the answer; only it is learned.")
    messages: str | None = Field(None, description="Column with a chat: a list of role, content.")
    learn_prompt: bool = Field(False, description="Learn the prompt too, not only the truth.")

    @model_validator(mode="after")
    def _one_source(self):
        given = [k for k in ("hub", "files", "shards", "builtin") if getattr(self, k) is not None]
        if len(given) != 1:
            has = " and ".join(given) or "none"
            raise ValueError(f"needs exactly one of hub, files, shards, builtin; it has {has}")
        for key in ("config", "revision", "split"):
            if self.hub is None and getattr(self, key) != Dataset.model_fields[key].default:
                raise ValueError(f"{key} belongs to a hub dataset; this one has {given[0]}")
        if self.validation_files is not None and self.files is None:
            raise ValueError(f"validation_files belongs to files; this one has {given[0]}")
        if (self.prompt is None) != (self.truth is None):
            raise ValueError("prompt and truth are given together or not at all")
        kinds = [k for k in ("messages", "prompt", "text") if getattr(self, k) is not None]
        if len(kinds) > 1:
            raise ValueError(f"has {' and '.join(kinds)}, but a row holds one of these")
        return self


class Stage(_Strict):
    """A stretch of training on some datasets, mixed row by row."""

    datasets: list[str] = Field(min_length=1, description="Names of datasets.")
    mixing: Literal["first_exhausted", "all_exhausted"] | list[float] = Field(
        "first_exhausted",
        description="Rows in turn until the first (or all) are used up, or shares in the order of "
        "the datasets, until the first is used up.",
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the mixture; fractions are fine.")

    @model_validator(mode="after")
    def _shares_fit(self):
        if len(set(self.datasets)) < len(self.datasets):
            raise ValueError("datasets names one of them twice")
        if isinstance(self.mixing, list):
            if len(self.mixing) != len(self.datasets):
                raise ValueError(
                    f"mixing has {len(self.mixing)} shares, datasets {len(self.datasets)} names"
                )
            if min(self.mixing) <= 0:
                raise ValueError("every share is above 0")
        return self


Options = dict[str, bool | int | float | str | list[float]]


class RoleRule(_Strict):
    """What differs from the plan's optimizer for the parameters of one role."""

    name: str | None = Field(None, description="Another optimizer; it has options of its own.")
    lr: float | None = Field(None, gt=0, description="Learning rate at the top of the schedule.")
    weight_decay: float | None = Field(None, ge=0, description="On every parameter of the role.")
    options: Options = Field({}, description="Over those of the plan's optimizer, by name.")


class Optimizer(_Strict):
    name: str = Field(description="An optimizer, such as AdamW.")
    lr: float = Field(gt=0, description="Learning rate at the top of the schedule.")
    weight_decay: float = Field(0.0, ge=0, description="On matrices only, never on vectors.")
    decay_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="What is left of weight decay over the run: all, or a fall to 0."
    )
    options: Options = Field(
        {},
        description="Further arguments, such as betas; of any optimizer: cautious, hyperball, "
        "and decay (decoupled, independent, corrected, cautious).",
    )
    roles: dict[str, RoleRule] = Field(
        {},
        description="What differs for matrix, table, head, conv, vector, or a role that an "
        "experiment names.",
    )


class Schedule(_Strict):
    name: Literal["constant", "linear", "cosine", "wsd", "one_cycle", "inverse_sqrt"] = Field(
        "constant",
        description="Shape after the warm-up; linear, cosine and one_cycle fall to `final`.",
    )
    warmup: float = Field(0.0, ge=0, le=1, description="Share of the steps spent rising from 0.")
    decay: float = Field(0.2, ge=0, le=1, description="wsd: share of the steps spent falling.")
    cooldown: Literal["linear", "1-sqrt"] = Field(
        "linear", description="wsd: how it falls; 1-sqrt falls fast at first."
    )
    final: float = Field(0.0, ge=0, le=1, description="Share of the learning rate at the end.")

    @model_validator(mode="after")
    def _phases_fit(self):
        if self.name == "wsd" and self.warmup + self.decay > 1:
            raise ValueError("warmup and decay are together more than all of the steps")
        return self


class Scaling(_Strict):
    """By which rules `--sizes` carries what the plan says to models of other sizes."""

    by_width: Literal["all", "mup"] = Field(
        "all",
        description="all: every rate is as one over the width. mup: the rates of matrices and head "
        "are, and their decay is as the width.",
    )
    by_tokens: Literal["none", "power", "sde"] = Field(
        "none",
        description="power: batch, rates and decay follow the tokens by power laws. sde: rates, "
        "decay and averages fall with their root at the same batch.",
    )


class Averages(_Strict):
    """Averages of the weights, each over a share of the run, judged and saved beside them."""

    ema: float | None = Field(None, gt=0, le=1, description="Exponential average over this share.")
    lawa: float | None = Field(
        None, gt=0, le=1, description="Mean of five snapshots, evenly over this last share."
    )
    tail_ema: float | None = Field(
        None,
        gt=0,
        le=0.3,
        description="Exponential average over this share, begun three of them before the end: a "
        "blend with the weights, whose rows keep their lengths.",
    )


class Validation(_Strict):
    tokens: Count = Field(description="Size of the held-out text, at most.")
    fraction: float = Field(
        0.005, gt=0, lt=1, description="Share of the records held out, by their hash."
    )
    every_tokens: Count = Field(description="Training tokens between two validations.")


class Checkpoints(_Strict):
    every_tokens: Count = Field(description="Training tokens between two checkpoints.")
    keep: Count = Field(3, description="How many checkpoints stay.")


class Plan(_Strict):
    """A resolved plan; `read_plan` makes it."""

    name: str = Field("", description="Filled in from the file's name.")
    description: str = ""
    tokenizer: str = Field(
        description="gpt2, cl100k_base, o200k_base, bpe:N, byte, or a Hugging Face tokenizer."
    )
    sequence_length: Count | Ramp = Field(
        description="Tokens in a row; or a ramp, as for batch_size, through parts of the longest: "
        "a row is cut in equal parts, and nothing else changes."
    )
    batch_size: Count | Ramp = Field(
        description="Rows in a step, of the longest length; or a ramp: [[0, 16], [0.5, 32]] is 32 "
        "once half of the tokens were trained on."
    )
    model: dict[str, bool | int | float | str] = Field(
        {}, description="Config values that every experiment on this plan shares."
    )
    datasets: dict[str, Dataset] = Field({}, description="Datasets of this plan, by name.")
    stages: list[Stage] = Field(min_length=1)
    tokens: Count | None = Field(
        None,
        description="Budget, rounded up to whole steps; the last stage goes on until it is spent. "
        "Without it every stage runs its epochs.",
    )
    seconds: float | None = Field(
        None,
        gt=0,
        description="Most seconds of training, validations left out: the run ends with the step "
        "that reaches them, whatever is left of its tokens.",
    )
    freeze: list[str] = Field(
        [],
        description="Names of parameters that training leaves as they are; * and ? stand for more "
        "of a name, as in blocks.0.*",
    )
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    scaling: Scaling = Field(Scaling(), description="How --sizes carries rates, decay and batch.")
    averages: Averages = Field(
        Averages(),
        description="Averages of the weights, by the share of the run's tokens that they are over, "
        'as in {"ema": 0.02}; training goes on without them.',
    )
    clip: float | None = Field(1.0, gt=0, description="Largest gradient norm; null for no limit.")
    precision: Precision = Field(
        "amp",
        description="amp is the fastest that the device has in hardware: bf16, else fp16 on a GPU "
        "and fp32 on a CPU.",
    )
    validation: Validation
    checkpoints: Checkpoints
    margin: PositiveFloat | Annotated[str, Field(pattern=r"^\d+(\.\d+)?%$")] | None = Field(
        None,
        description="Within which two final losses count as equal: nats per token, or as 5% what "
        "that much more compute is worth.",
    )

    @model_validator(mode="after")
    def _steps_make_sense(self):
        most = max(rows for _, rows in self.batch_sizes) * self.max_len
        if most > _MOST_TOKENS:
            raise ValueError(f"batch_size: a step of {most:,} tokens is more than {_MOST_TOKENS:,}")
        for _, length in self.sequence_lengths:
            if self.max_len % length:
                raise ValueError(
                    f"sequence_length: rows of {self.max_len} cannot be cut in parts of {length}"
                )
        return self

    @property
    def sequence_lengths(self) -> list[tuple[float, int]]:
        """Tokens in a row, each from a share of the run's tokens on."""
        return _points(self.sequence_length)

    @property
    def batch_sizes(self) -> list[tuple[float, int]]:
        """Rows of `max_len` tokens in a step, each from a share of the run's tokens on."""
        return _points(self.batch_size)

    @property
    def max_len(self) -> int:
        """Tokens in the longest row."""
        return max(length for _, length in self.sequence_lengths)


def _points(value: int | Ramp) -> list[tuple[float, int]]:
    return [(0.0, value)] if isinstance(value, int) else value


def changed_plan(plan: Plan, changes: dict[str, object]) -> Plan:
    """The plan with other values at these dotted keys, checked."""
    raw = plan.model_dump(mode="json")
    for key, value in changes.items():
        set_key(raw, key, value)
    return Plan.model_validate_json(json.dumps(raw))


def differences(old: Plan, new: Plan) -> str:
    """What a plan has otherwise than another: width=384, optimizer.lr=0.002."""
    before, after = (dict(_leaves(plan.model_dump(mode="json"))) for plan in (old, new))
    said = [f"{key}={value}" for key, value in after.items() if before.get(key) != value]
    return ", ".join(said)


def _leaves(value: dict, inside: str = "") -> Iterator[tuple[str, object]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{inside}{key}.")
        else:
            yield f"{inside}{key}", inner


def fixed_keys(inside: type[BaseModel] = Plan, before: str = "") -> list[str]:
    """Every dotted key that a plan can have, but for those whose names the plan chooses itself."""
    keys = []
    for name in inside.model_fields:
        keys.append(before + name)
        if inner := object_at(inside, name):
            keys += fixed_keys(inner, f"{before}{name}.")
    return keys


def has_key(dotted: str) -> bool:
    """True where a plan can have this dotted path, so that `--set` knows what is meant."""
    if dotted == "name":
        return False
    start, _, rest = dotted.partition(".")
    if start == "datasets" and rest:
        return rest.rpartition(".")[2] in Dataset.model_fields and rest.count(".") == 1
    if dotted.startswith("optimizer.roles."):
        _, _, role, *key = dotted.split(".")
        is_option = key[:1] == ["options"] and len(key) == 2
        return bool(role) and (is_option or (len(key) == 1 and key[0] in RoleRule.model_fields))
    model: type[BaseModel] | None = Plan
    for part in dotted.split("."):
        if model is None or part not in model.model_fields:
            return False
        model = object_at(model, part)
        if part in ("model", "options"):
            return True
    return True


def object_at(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The kind of object that a plan's object has at a key; None where it has no object there."""
    annotation = model.model_fields[key].annotation
    is_object = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_object else None


def set_key(raw: dict, dotted: str, value: object) -> None:
    """Set the value at a dotted key of a plan that is not checked yet.

    Raises:
        UserError: what is on the way is no object.
    """
    *parents, last = dotted.split(".")
    for part in parents:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise UserError(f"{dotted}: {part} is not an object", hint=SCHEMA_HINT)
    raw[last] = value
