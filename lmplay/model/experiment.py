"""The contract of an experiment file: what it must hold and how it is loaded."""

import dataclasses
import hashlib
import math
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from lmplay.catalog.entry import Entry, is_of, read_source
from lmplay.errors import UserError, nearest
from lmplay.model.initialization import with_own_streams

_MOST = {  # of sizes that are never 0
    "width": 1 << 20,
    "num_heads": 1 << 16,
    "num_blocks": 1 << 12,
}
_TEXTS = ("vocab_size", "max_len", "end")  # what the plan's text says


@dataclass(frozen=True)
class Experiment:
    """An experiment file that was run once, so that its Config and Model can be made."""

    entry: Entry
    module: ModuleType = field(repr=False)

    @property
    def name(self) -> str:
        """The name typed: a file's or a variant's."""
        return self.entry.name

    @property
    def summary(self) -> str:
        """The docstring's first line."""
        return self.entry.summary

    @property
    def source(self) -> str:
        """The whole file."""
        return self.entry.source

    @property
    def variant(self) -> dict[str, object]:
        """Config values of this name."""
        return self.entry.variant

    @property
    def tiny(self) -> dict[str, object]:
        """Config values for checks and tests; the last token ends a document, if Config asks."""
        values = self.entry.tiny
        has_end = "end" in self.fields and "vocab_size" in values
        return {"end": values["vocab_size"] - 1} | values if has_end else values

    @property
    def fields(self) -> list[str]:
        """Names of Config's fields."""
        return [field.name for field in dataclasses.fields(self.module.Config)]

    def config(self, **values: object):
        """Config with these values over the file's own, the variant's already among the defaults.

        Raises:
            UserError: a value has no field, or Config refuses it.
        """
        for key in values:
            if key not in self.fields:
                hint = nearest(key, self.fields) + "--describe shows the fields"
                raise UserError(f"{self.entry.file} has no Config value {key!r}", hint=hint)
        for key, value in values.items():
            if not is_of(value, wanted := self.entry.fields.get(key, "")):
                raise UserError(f"{self.name}: {key} should be {wanted}, not {value!r:.60}")
            if type(value) is float and not math.isfinite(value):
                raise UserError(f"{self.name}: {key}={value} is no finite number")
            if type(value) is not int:
                continue
            if key in _MOST and not 0 < value <= _MOST[key]:
                raise UserError(f"{self.name}: {key}={value} is not between 1 and {_MOST[key]:,}")
            if value < 0:
                raise UserError(f"{self.name}: {key}={value} is below 0", hint="a size is above it")
        given = self.variant | values
        try:
            return self.module.Config(**given)
        except (TypeError, ValueError) as error:
            fields = dataclasses.fields(self.module.Config)
            sizes = {f.name: given.get(f.name, f.default) for f in fields if f.name not in _TEXTS}
            told = [f"{key}={size}" for key, size in sizes.items() if type(size) is int]
            hint = f"--set KEY=VALUE changes one of {', '.join(told)}"
            raise UserError(f"{self.name}: {error}", hint=hint) from None
        except ArithmeticError as error:  # such as a division by the value
            given = ", ".join(f"{key}={value!r}" for key, value in values.items())
            raise UserError(f"{self.name} cannot be had with {given}: {error}") from None

    def model(self, config, seed: int | None = None, device: torch.device | str = "cpu"):
        """A fresh Model.

        Args:
            config: what `config` made.
            seed: fixes the weights, each by its name, on every device alike; None leaves them to
                torch's generators.
            device: where it ends up. "meta" makes shapes without numbers.
        """
        if torch.device(device).type == "meta":
            with torch.device("meta"):
                return self.module.Model(config)
        if seed is None:
            return self.module.Model(config).to(device)
        return with_own_streams(self.module.Model, config, seed).to(device)


def load_experiment(entry: Entry) -> Experiment:
    """Run the file of `entry` and hold it to the contract.

    Raises:
        UserError: the file does not import, or breaks the contract (the rule and the line).
    """
    module = _run(entry)
    for name, rule in {
        "Config": "a frozen dataclass called Config",
        "Model": "an nn.Module called Model",
    }.items():
        if not isinstance(getattr(module, name, None), type):
            raise UserError(f"{entry.path} breaks the contract: it needs {rule}")
    if not dataclasses.is_dataclass(module.Config) or not module.Config.__dataclass_params__.frozen:
        _broken(entry, "Config", "is not a frozen dataclass")
    if not issubclass(module.Model, nn.Module):
        _broken(entry, "Model", "is not an nn.Module")
    experiment = Experiment(entry, module)
    for name in ("vocab_size", "max_len"):
        if name not in experiment.fields:
            _broken(entry, "Config", f"lacks the field {name}")
    for name, values in {**entry.variants, "TINY": entry.tiny}.items():
        for key in values:
            if key not in experiment.fields:
                hint = nearest(key, experiment.fields)
                raise UserError(f"{entry.path}: {name} sets {key!r}, not in Config", hint=hint)
    return experiment


def load_source(source: str, path: Path, variant: dict[str, object]) -> Experiment:
    """The experiment of a run's own copy, under the name `path` gives it."""
    entry = read_source(source, path)[0]
    return load_experiment(dataclasses.replace(entry, variant=variant))


def _run(entry: Entry) -> ModuleType:
    name = f"lmplay_experiment_{hashlib.sha256(entry.source.encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name, entry.docstring)
    module.__file__ = str(entry.path)
    sys.modules[name] = module  # dataclasses look themselves up there
    try:
        exec(compile(entry.source, str(entry.path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(entry.path)]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(
            f"{entry.path}{where} does not import: {type(error).__name__}: {error}",
            hint="an experiment imports torch and the standard library only",
        ) from error
    return module


def _broken(entry: Entry, name: str, problem: str) -> None:
    lines = entry.source.splitlines()
    line = next((i for i, text in enumerate(lines, 1) if text.startswith(f"class {name}")), 1)
    raise UserError(f"{entry.path}, line {line} breaks the contract: {name} {problem}")
