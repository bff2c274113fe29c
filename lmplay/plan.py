"""A training plan: all that is held equal when ideas are compared. JSON in, a checked Plan out."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from lmplay.errors import UserError, nearest
from lmplay.machine import PRECISIONS
from lmplay.roots import file_called, files, looks_like_path, roots

MOST_BYTES = 1_000_000  # of a plan file; the bundled ones have about a thousand
FEW_HELD_OUT = 1000  # tokens: the loss on fewer says little
_SCHEMA = "--plan schema shows what a plan can hold"


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


def plan_paths() -> dict[str, Path]:
    """Name to file of every plan that can be found."""
    return files("plans", ".json")


def read_plan(
    name: str,
    changes: dict[str, object] | None = None,
    data: list[str] | None = None,
    validation_data: list[str] | None = None,
) -> Plan:
    """The plan called `name`, or in the file `name`, checked.

    Args:
        name: a plan's name, or a path to a JSON file. A plan may name another one in "extends" (or
            its file, from the folder of its own): it is that plan with some keys changed; objects
            are merged, all else is replaced. Datasets that its stages name and it does not define
            come from `_datasets.json` beside it, else in the `plans` folder of a root.
        changes: dotted path to value, such as {"optimizer.lr": 1e-3}, applied last.
        data: paths that take the place of the plan's datasets, all in one stage; the plan's name
            then ends in theirs, such as quick+novels.
        validation_data: paths to hold out from `data`, instead of a share of it.
    Raises:
        UserError: no such plan or file (with the nearest name), text that is not JSON, or a value
            that breaks a rule (with its key's path).
    """
    if validation_data and not data:
        hint = "name the text to train on with --data"
        raise UserError("--validation-data is held out from --data, which is missing", hint)
    for name_of_file in [*(data or []), *(validation_data or [])]:
        if _is_no_text(name_of_file):
            raise UserError(f"the name {name_of_file!a} is no UTF-8", hint="rename it first")
    changes = changes or {}
    path = _path_of(name, Path())
    try:
        raw, folders = _read_extended(path)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply", hint=_SCHEMA) from None
    if data:
        raw["datasets"] = {"data": {"files": data, "validation_files": validation_data or None}}
        raw["stages"] = [{"datasets": ["data"]}]
    of_datasets = [key for key in changes if key.startswith("datasets.")]
    for key in sorted(changes.keys() - set(of_datasets)):  # an object before what is in it
        _set(raw, key, changes[key])
    stem = path.stem if looks_like_path(name, ".json") else name
    raw["name"] = "+".join([stem, *map(_stem, data or [])])
    _add_shared_datasets(raw, path, folders)
    for key in of_datasets:
        _know_dataset(raw, key)
        _set(raw, key, changes[key])
    try:
        return Plan.model_validate(raw)
    except ValidationError as error:
        raise _explained(error, raw, path, changes) from None


def changed_plan(plan: Plan, changes: dict[str, object]) -> Plan:
    """The plan with other values at these dotted keys, checked."""
    raw = plan.model_dump(mode="json")
    for key, value in changes.items():
        _set(raw, key, value)
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


def plan_schema() -> dict:
    """The JSON Schema of a plan file, for editors and scripts."""
    schema = Plan.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "A plan to start from."}
    for definition in (schema, *schema["$defs"].values()):
        if definition["title"] != "Stage":  # a list is replaced, so its items are whole
            definition.pop("required", None)  # any key may come from the plan that it extends
    return schema


def fixed_keys(inside: type[BaseModel] = Plan, before: str = "") -> list[str]:
    """Every dotted key that a plan can have, but for those whose names the plan chooses itself."""
    keys = []
    for name in inside.model_fields:
        keys.append(before + name)
        if inner := _object_at(inside, name):
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
        model = _object_at(model, part)
        if part in ("model", "options"):
            return True
    return True


def _object_at(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    annotation = model.model_fields[key].annotation
    is_object = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_object else None


def _path_of(name: str, folder: Path) -> Path:
    if looks_like_path(name, ".json"):
        path = Path(os.path.abspath(folder / name))
        if not os.path.isfile(path):
            raise UserError(f"there is no plan file {name!r}", hint="--plan list shows the plans")
        if not path.stem.strip("."):
            raise UserError(f"{name!r} is no name for a plan", hint="rename the file")
        return path
    path = file_called(name, "plans", ".json")
    if path is None:
        if name in (known := plan_paths()):
            raise UserError(f"{known[name]} is no file", hint="take it out of plans/")
        hint = nearest(name, known) + "--plan list shows them all"
        raise UserError(f"no plan called {name!r}", hint=hint)
    return path


def _read_extended(path: Path) -> tuple[dict, list[Path]]:
    """The keys of a plan over those of the plans it extends, and the folders of these files."""
    keys: dict = {}
    seen: list[Path] = []
    while True:
        if path in seen:
            circle = " -> ".join(str(file) for file in [*seen, path])
            raise UserError(f"a plan extends itself: {circle}", hint="break the circle")
        raw = _read_json(path)
        seen.append(path)
        parent = raw.pop("extends", None)
        keys = _merged(raw, keys)
        if parent is None:
            return keys, [file.parent for file in seen]
        if not isinstance(parent, str):
            problem = f"{path}: extends should be a plan's name or file, not {_shown(parent)}"
            raise UserError(problem, hint="--plan list shows the plans")
        path = _path_of(parent, path.parent)


def _read_json(path: Path) -> dict:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path} has {size:,} bytes; a plan has at most {MOST_BYTES:,}")
        text = path.read_text(encoding="utf-8-sig")
        raw = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        hint = "JSON has no comments, no comma after the last item, and double quotes only"
        raise UserError(f"{path} is not JSON: {error}", hint=hint) from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} should hold an object, not {_shown(raw)}", hint=_SCHEMA)
    return raw


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found: dict[str, object] = {}
    for key, value in pairs:
        key.encode()  # a lone surrogate is a ValueError here, and trouble wherever it is printed
        if key in found:
            raise ValueError(f"the key {_printable(key)} is in one object twice")
        found[key] = value
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _merged(base: dict, changes: dict) -> dict:
    both = dict(base)
    for key, new in changes.items():
        old = base.get(key)
        are_objects = isinstance(old, dict) and isinstance(new, dict)
        both[key] = _merged(old, new) if are_objects else new
    return both


def _set(raw: dict, dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for part in parents:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise UserError(f"{dotted}: {part} is not an object", hint=_SCHEMA)
    raw[last] = value


def _stem(text: str) -> str:
    """What a plan's name says of a file or folder of --data: its name up to the first dot."""
    name = os.path.basename(os.path.abspath(os.path.expanduser(text)))
    return name.lstrip(".").partition(".")[0] or "data"


def _is_no_text(name: str) -> bool:
    """Whether a name holds bytes that no text has, which run.json could not keep."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def _know_dataset(raw: dict, dotted: str) -> None:
    """Refuse to change a dataset that no stage names."""
    name, known = dotted.split(".")[1], raw.get("datasets")
    if isinstance(known, dict) and name not in known:
        hint = nearest(name, known) + f"the plan has {', '.join(known)}"
        raise UserError(f"{dotted}: no stage has a dataset called {name!r}", hint=hint)


def _add_shared_datasets(raw: dict, path: Path, folders: list[Path]) -> None:
    """Give the plan the shared definitions that its stages name and it lacks; drop unused ones."""
    own, stages = raw.get("datasets", {}), raw.get("stages")
    if not isinstance(own, dict) or not isinstance(stages, list):
        return  # the validation says so
    lists = [stage.get("datasets") for stage in stages if isinstance(stage, dict)]
    named = [n for names in lists if isinstance(names, list) for n in names if isinstance(n, str)]
    known = dict(own)
    for folder in [*folders, *(root / "plans" for root in roots())]:
        if (folder / "_datasets.json").is_file():
            known = {**_read_json(folder / "_datasets.json"), **known}
    for name in named:
        if name not in known:
            hint = nearest(name, known) + "define it under datasets or in plans/_datasets.json"
            raise UserError(f"{path}: no dataset called {name!r}", hint=hint)
    raw["datasets"] = {name: known[name] for name in named}


def _explained(error: ValidationError, raw: dict, path: Path, changes: dict) -> UserError:
    """The worst problem; unknown keys before all else, since a misspelt key also leaves a gap."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    places = [_place(problem, raw) for problem in problems]
    # A union has one problem for each of its types; the deepest is of the type that was meant.
    related = [place for place in places if place[: len(places[0])] == places[0]]
    place = max(related, key=len)
    same = [problem for problem, other in zip(problems, places, strict=True) if other == place]

    same.sort(key=lambda problem: problem["type"] != "value_error")  # our own words first
    first, where = same[0], _printable(".".join(place))
    is_changed = any(where == key or where.startswith(f"{key}.") for key in changes)
    blamed = where if is_changed else f"{path}: {where}" if where else str(path)
    if not where and changes:  # a rule over several keys, of which it names one
        blamed = f"{path} with {', '.join(changes)} changed"
    if first["type"] == "extra_forbidden":
        known = _keys_at(place[:-1])
        hint = f"{nearest(place[-1][:60], known)}the keys here are {', '.join(known)}"
        return UserError(f"{blamed} is an unknown key", hint=hint)
    if first["type"] == "missing":
        return UserError(f"{blamed} is missing", hint=_SCHEMA)
    if first["type"] == "value_error":
        return UserError(f"{blamed}: {first['ctx']['error']}", hint=_SCHEMA)
    words = {"model_type": "an object", "dict_type": "an object"}
    words |= {"too_short": "a longer list", "too_long": "a shorter list"}
    expected = [words.get(p["type"]) or p["msg"].removeprefix("Input should be ") for p in same]
    should = " or ".join(dict.fromkeys(expected))
    return UserError(f"{blamed} should be {should}, not {_shown(first['input'])}", hint=_SCHEMA)


def _place(problem: dict, raw: object) -> list[str]:
    """The keys on the way to a problem; pydantic puts names of types among them."""
    place = []
    for part in problem["loc"]:
        if isinstance(raw, dict | list):
            inside = raw if isinstance(raw, dict) else range(len(raw))
            if part in inside:
                place.append(str(part))
                raw = raw[part]
    return [*place, str(problem["loc"][-1])] if problem["type"] == "missing" else place


def _keys_at(parents: list[str]) -> list[str]:
    """The keys that a plan knows at this place."""
    model = {"datasets": Dataset, "stages": Stage}.get(parents[0]) if parents else Plan
    model = model or _object_at(Plan, parents[0])
    return [*model.model_fields, *(["extends"] if model is Plan else [])]


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list" if value else "an empty list"
    return _printable(json.dumps(value, default=repr))


def _printable(text: str) -> str:
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return short if short.isprintable() else ascii(short)
