"""Labels are identity: two different sets of changes never share one, however few stand together.

What a key or a value is called depends on nothing but itself and on what plans can hold.
"""

import json
from collections import Counter
from functools import cache
from urllib.parse import quote

_READABLE = "".join(chr(code) for code in range(32, 127) if chr(code) not in "%,+@")


def label_of(experiment: str, changes: dict[str, object]) -> str:
    """What tables call a run: "ue16x,lr=0.001"; keys are sorted.

    Args:
        experiment: its name; a stack's joins its ideas with a plus.
        changes: dotted key to value, of the plan or of Config.
    """
    parts = [f"{short_key(key)}={value_name(changes[key], _READABLE)}" for key in sorted(changes)]
    return ",".join([escaped(experiment, safe=_READABLE + "+"), *parts])


def short_key(key: str) -> str:
    """The last part of a plan's key where no other key of any plan ends so; else the whole key.

    A key of Config has no dots; one that reads like a shortened key is written "Config.lr".
    """
    from lmplay.plan import has_key  # here: pydantic

    short = _short_keys()
    if key in short:
        return short[key]
    if key in short.values() and not has_key(key):
        return f"Config.{key}"
    return escaped(key, safe=_READABLE.replace("=", ""))


def value_name(value: object, safe: str = "") -> str:
    """A value as text: equal ones alike (1e-3 and 0.001, 512 and 512.0), a string never a number.

    A list is its items, each followed by a plus but for the last of several; a ramp of a plan,
    [[0, 16], [0.5, 32]], is 16@0+32@0.5.

    Args:
        safe: what is not escaped as in a URL, besides letters, digits and "_.-~".
    """
    value = _normal(value)
    is_ramp = isinstance(value, list) and value and all(map(_is_point, value))
    if isinstance(value, list) and (is_ramp or not any(isinstance(item, list) for item in value)):
        names = [_point_name(item) if is_ramp else value_name(item, safe) for item in value]
        return "+".join(names) + "+" * (len(value) == 1)
    if isinstance(value, float):
        return json.dumps(value).replace("e+", "e")
    if isinstance(value, str) and value and not _is_json(value):
        return escaped(value, safe)
    return escaped(json.dumps(value, sort_keys=True), safe)


def escaped(text: str, safe: str) -> str:
    """The text with what is not safe written as in a URL, bytes that are no text too.

    Where blanks are safe, for people to read, letters of every script are.
    """
    is_read = " " in safe
    return "".join(
        letter
        if is_read and ord(letter) > 127 and letter.isprintable()
        else quote(letter, safe, errors="surrogateescape")
        for letter in text
    )


def _is_point(value: object) -> bool:
    return isinstance(value, list) and [type(item) in (int, float) for item in value] == [True] * 2


def _point_name(point: list[float]) -> str:
    return f"{value_name(point[1])}@{value_name(point[0])}"


@cache
def _short_keys() -> dict[str, str]:
    """Each key of a plan that can be shortened, with what it is shortened to."""
    from lmplay.plan import fixed_keys

    last_parts = {key: key.rpartition(".")[2] for key in fixed_keys()}
    count = Counter(last_parts.values())
    return {key: last for key, last in last_parts.items() if count[last] == 1}


def _normal(value: object) -> object:
    """Equal values as one: a whole number is an int, or a float where it has more digits."""
    if isinstance(value, dict):
        return {str(key): _normal(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if type(value) is int and 2**53 <= abs(value) < 1e300 and int(float(value)) == value:
        return float(value)
    return value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
