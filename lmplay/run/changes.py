"""What a command changes for its runs: values of the plan, and values of an experiment's Config.

Later ones win: an experiment's file, the plan, the variant, what the command changes.
"""

import json
from dataclasses import dataclass

from lmplay.catalog.entry import Entry, is_of
from lmplay.errors import UserError, nearest
from lmplay.plan import Plan, has_key

_RESERVED = ("budget", "initial_model", "size")  # what is no setting, but part of a run's name


@dataclass(frozen=True)
class Changes:
    """Dotted keys to values, as JSON has them."""

    values: dict[str, object]

    def of_optimizer(self, name: str) -> "Changes":
        """These and another optimizer; in a run's name, its defaults go without saying.

        Raises:
            UserError: they set its name too.
        """
        for key in ("optimizer", "optimizer.name"):
            if key in self.values:
                problem = f"--optimizer {name} and --set {key} are two answers"
                raise UserError(problem, hint="give one")
        return Changes({"optimizer": name} | self.values)

    @property
    def of_plan(self) -> dict[str, object]:
        """Those that a plan has a key for."""
        return {key: value for key, value in self.values.items() if has_key(key)}

    @property
    def of_config(self) -> dict[str, object]:
        """All others: fields of Config."""
        return {key: value for key, value in self.values.items() if not has_key(key)}


def read_changes(texts: list[str], tokens: int | None = None) -> Changes:
    """What `--set KEY=VALUE` and `--tokens` mean; a value that is no JSON is a string.

    Raises:
        UserError: one of them has no key or no value.
    """
    values = dict(_parsed(text) for text in texts)
    return Changes(values if tokens is None else values | {"tokens": tokens})


def refuse_unfit(entry: Entry, plan: Plan, changes: dict[str, object]) -> None:
    """Raise a UserError where Config lacks a field, or the model could not use its value.

    Args:
        changes: of Config.
    """
    for key in changes:
        if key in _RESERVED:
            problem = f"--set {key}: in a run's name this word has a meaning of its own"
            raise UserError(problem, hint="call the field of Config otherwise")
        if key not in entry.fields:
            known = [*entry.fields, *Plan.model_fields, "optimizer.lr", "schedule.name"]
            known.remove("name")  # the file's own
            hint = nearest(key, known) + f"{entry.name} has {', '.join(entry.fields)}"
            raise UserError(f"--set {key}: neither in Config nor in the plan", hint=hint)
    for key in ("vocab_size", "end"):
        if key in changes:
            raise UserError(
                f"--set {key}: it is always the tokenizer's own",
                hint="change the tokenizer, such as --set tokenizer=bpe:8192",
            )
    for key, value in (plan.model | changes).items():
        if not is_of(value, entry.fields.get(key, "")):
            where = f"--set {key}" if key in changes else f"plan {plan.name}: model.{key}"
            problem = f"{where} should be {entry.fields[key]}, not {json.dumps(value)}"
            raise UserError(problem, hint="--describe shows the fields")
    if changes.get("max_len", plan.max_len) < plan.max_len:
        raise UserError(
            f"--set max_len={changes['max_len']}: the plan's rows have {plan.max_len} tokens",
            hint="--set sequence_length=N changes both",
        )


def _parsed(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: no key=value", hint="such as --set optimizer.lr=1e-3")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
