"""Plan files: JSON in, extended and changed, a checked Plan out, or what is wrong in words."""

import json
import os
from pathlib import Path

from pydantic import ValidationError

from lmplay.errors import UserError, nearest
from lmplay.plan import SCHEMA_HINT, Dataset, Plan, Stage, object_at, set_key
from lmplay.roots import file_called, files, looks_like_path, roots

MOST_BYTES = 1_000_000  # of a plan file; the bundled ones have about a thousand


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
        raise UserError(f"{path} is nested too deeply", hint=SCHEMA_HINT) from None
    if data:
        raw["datasets"] = {"data": {"files": data, "validation_files": validation_data or None}}
        raw["stages"] = [{"datasets": ["data"]}]
    of_datasets = [key for key in changes if key.startswith("datasets.")]
    for key in sorted(changes.keys() - set(of_datasets)):  # an object before what is in it
        set_key(raw, key, changes[key])
    stem = path.stem if looks_like_path(name, ".json") else name
    raw["name"] = "+".join([stem, *map(_stem, data or [])])
    _add_shared_datasets(raw, path, folders)
    for key in of_datasets:
        _know_dataset(raw, key)
        set_key(raw, key, changes[key])
    try:
        return Plan.model_validate(raw)
    except ValidationError as error:
        raise _explained(error, raw, path, changes) from None


def plan_schema() -> dict:
    """The JSON Schema of a plan file, for editors and scripts."""
    schema = Plan.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "A plan to start from."}
    for definition in (schema, *schema["$defs"].values()):
        if definition["title"] != "Stage":  # a list is replaced, so its items are whole
            definition.pop("required", None)  # any key may come from the plan that it extends
    return schema


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
        raise UserError(f"{path} should hold an object, not {_shown(raw)}", hint=SCHEMA_HINT)
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
        return UserError(f"{blamed} is missing", hint=SCHEMA_HINT)
    if first["type"] == "value_error":
        return UserError(f"{blamed}: {first['ctx']['error']}", hint=SCHEMA_HINT)
    words = {"model_type": "an object", "dict_type": "an object"}
    words |= {"too_short": "a longer list", "too_long": "a shorter list"}
    expected = [words.get(p["type"]) or p["msg"].removeprefix("Input should be ") for p in same]
    should = " or ".join(dict.fromkeys(expected))
    return UserError(f"{blamed} should be {should}, not {_shown(first['input'])}", hint=SCHEMA_HINT)


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
    model = model or object_at(Plan, parents[0])
    return [*model.model_fields, *(["extends"] if model is Plan else [])]


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list" if value else "an empty list"
    return _printable(json.dumps(value, default=repr))


def _printable(text: str) -> str:
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return short if short.isprintable() else ascii(short)
