"""A training plan: all that is held equal when ideas are compared. JSON in, a checked Plan out."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from lmplay.errors import UserError, nearest
from lmplay.roots import files, looks_like_path, roots

Precision = Literal["fp32", "bf16", "fp16", "amp"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
        description="The source's own held-out split; without it, records are held out by hash.",
    )
    download: str | None = Field(None, description="About how much is downloaded, such as 20 GB.")
    files: list[str] | None = Field(
        None, description="Text, JSONL, Parquet or Arrow files, .gz too, or folders of them."
    )
    shards: list[str] | None = Field(
        None, description="Token shards in the layout of modded-nanogpt; wildcards are expanded."
    )
    builtin: Literal["python-stdlib"] | None = Field(
        None, description="The source of the Python that is running; needs no download."
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
            raise ValueError(f"needs exactly one of hub, files, shards, builtin; has {given}")
        if (self.prompt is None) != (self.truth is None):
            raise ValueError("prompt and truth are given together or not at all")
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
        if isinstance(self.mixing, list):
            if len(self.mixing) != len(self.datasets):
                raise ValueError(f"{len(self.mixing)} shares for {len(self.datasets)} datasets")
            if min(self.mixing) <= 0:
                raise ValueError("every share is above 0")
        return self


class Optimizer(_Strict):
    name: str = Field(description="A class of torch.optim, such as AdamW.")
    lr: float = Field(gt=0, description="Learning rate at the top of the schedule.")
    weight_decay: float = Field(0.0, ge=0, description="On matrices only, never on vectors.")
    options: dict[str, bool | int | float | str | list[float]] = Field(
        {}, description="Further arguments of the class, such as betas."
    )


class Schedule(_Strict):
    name: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "constant", description="Shape after the warm-up; linear and cosine fall to `final`."
    )
    warmup: float = Field(0.0, ge=0, le=1, description="Share of the steps spent rising from 0.")
    decay: float = Field(0.2, ge=0, le=1, description="wsd: share of the steps spent falling.")
    final: float = Field(0.0, ge=0, le=1, description="Share of the learning rate at the end.")


class Validation(_Strict):
    tokens: PositiveInt = Field(description="Size of the held-out text, at most.")
    fraction: float = Field(
        0.005, gt=0, lt=1, description="Share of the records held out, by their hash."
    )
    every_tokens: PositiveInt = Field(description="Training tokens between two validations.")


class Checkpoints(_Strict):
    every_tokens: PositiveInt = Field(description="Training tokens between two checkpoints.")
    keep: PositiveInt = Field(3, description="How many checkpoints stay.")


class Plan(_Strict):
    """A resolved plan; `read_plan` makes it."""

    name: str = Field("", description="Filled in from the file's name.")
    description: str = ""
    tokenizer: str = Field(
        description="gpt2, cl100k_base, o200k_base, bpe:N, byte, or a Hugging Face tokenizer."
    )
    sequence_length: PositiveInt = Field(description="Tokens in a row.")
    batch_size: PositiveInt = Field(description="Rows in a step.")
    model: dict[str, bool | int | float | str] = Field(
        {}, description="Config values that every experiment on this plan shares."
    )
    datasets: dict[str, Dataset] = Field({}, description="Datasets of this plan, by name.")
    stages: list[Stage] = Field(min_length=1)
    tokens: PositiveInt | None = Field(
        None,
        description="Budget, rounded up to whole steps; the last stage goes on until it is spent. "
        "Without it every stage runs its epochs.",
    )
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    clip: float | None = Field(1.0, gt=0, description="Largest gradient norm; null for no limit.")
    precision: Precision = Field("amp", description="amp is bf16 where it works, else fp16.")
    validation: Validation
    checkpoints: Checkpoints

    @property
    def tokens_per_step(self) -> int:
        """Targets in a full step."""
        return self.batch_size * self.sequence_length


def plan_paths() -> dict[str, Path]:
    """Name to file of every plan that can be found."""
    return files("plans", ".json")


def read_plan(
    name: str, changes: dict[str, object] | None = None, data: list[str] | None = None
) -> Plan:
    """The plan called `name`, or in the file `name`, checked.

    Args:
        name: a plan's name, or a path to a JSON file. A plan may name another one in "extends":
            it is that plan with some keys changed; objects are merged, all else is replaced.
        changes: dotted path to value, such as {"optimizer.lr": 1e-3}, applied last.
        data: paths that take the place of the plan's datasets, all stages in one.
    Raises:
        UserError: no such plan or file (with the nearest name), text that is not JSON, or a value
            that breaks a rule (with its key's path).
    """
    path = _path_of(name)
    raw = _read_extended(path, seen=())
    if data:
        raw["datasets"] = {"data": {"files": data}}
        raw["stages"] = [{"datasets": ["data"]}]
    for key, value in (changes or {}).items():
        _set(raw, key, value)
    raw["name"] = path.stem
    _add_shared_datasets(raw, path)
    try:
        return Plan.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise _explained(error, path) from None


def plan_schema() -> dict:
    """The JSON Schema of a plan file, for editors and scripts."""
    schema = Plan.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "A plan to start from."}
    schema["required"] = []  # any key may come from the plan that it extends
    return schema


def has_key(dotted: str) -> bool:
    """True where a plan can have this dotted path, so that `--set` knows what is meant."""
    model: type[BaseModel] | None = Plan
    for part in dotted.split("."):
        if model is None or part not in model.model_fields:
            return False
        annotation = model.model_fields[part].annotation
        is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation if is_model else None
        if not is_model and part in ("model", "options"):
            return True
    return True


def _path_of(name: str) -> Path:
    if looks_like_path(name, ".json"):
        if not Path(name).is_file():
            raise UserError(f"there is no plan file {name}", hint="try --plan list")
        return Path(name)
    paths = plan_paths()
    if name not in paths:
        hint = nearest(name, paths) + "--plan list shows them all"
        raise UserError(f"no plan called {name!r}", hint=hint)
    return paths[name]


def _read_extended(path: Path, seen: tuple[Path, ...]) -> dict:
    if path in seen:
        raise UserError(f"{path}: plan extends itself", hint="break the circle of 'extends'")
    raw = _read_json(path)
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    base = _read_extended(_path_of(parent), (*seen, path))
    return _merged(base, raw)


def _read_json(path: Path) -> dict:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object", hint="--plan schema shows the keys")
    return raw


def _merged(base: dict, changes: dict) -> dict:
    both = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        both[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return both


def _set(raw: dict, dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for part in parents:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise UserError(f"{dotted}: {part} is not an object", hint="--plan NAME --describe")
    raw[last] = value


def _add_shared_datasets(raw: dict, path: Path) -> None:
    """Give the plan the definitions of `_datasets.json` that its stages name and it lacks."""
    shared: dict[str, dict] = {}
    for root in [path.resolve().parent.parent, *roots()]:
        definitions = root / "plans" / "_datasets.json"
        if definitions.is_file():
            shared = {**_read_json(definitions), **shared}
    own = raw.setdefault("datasets", {})
    stages = raw.get("stages")
    wanted = [
        name
        for stage in (stages if isinstance(stages, list) else [])
        if isinstance(stage, dict) and isinstance(stage.get("datasets"), list)
        for name in stage["datasets"]
    ]
    for name in wanted:
        if name in own:
            continue
        if name not in shared:
            known = {**shared, **own}
            hint = (
                nearest(str(name), known) + "define it under 'datasets' or in plans/_datasets.json"
            )
            raise UserError(f"{path}: no dataset called {name!r}", hint=hint)
        own[name] = shared[name]
    raw["datasets"] = {name: own[name] for name in own if name in wanted}


def _explained(error: ValidationError, path: Path) -> UserError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, last = [part for part in first["loc"]]
        hint = nearest(str(last), _keys_at(parents)) + "--plan schema shows the keys"
        return UserError(f"{path}: unknown key {where}", hint=hint)
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] in ("missing", "value_error") else f" (it is {first['input']!r})"
    return UserError(f"{path}: {where}: {message}{shown}", hint="--plan schema shows the rules")


def _keys_at(parents: list) -> list[str]:
    """The keys a plan knows at this place; numbers and dataset names on the way are skipped."""
    model: type[BaseModel] = Plan
    kinds = {"datasets": Dataset, "stages": Stage}
    for part in parents:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if part in kinds and model is Plan:
            model = kinds[part]
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)
