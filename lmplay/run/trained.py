"""A trained model, opened from its run's own copies."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lmplay.console import note
from lmplay.data.tokenizers import Tokenizer, open_tokenizer
from lmplay.errors import UserError
from lmplay.machine import dtype_of, resolve_device, resolve_precision
from lmplay.model.abilities import set_progress
from lmplay.model.experiment import Experiment, load_source
from lmplay.run.checkpoint import read_checkpoint
from lmplay.run.facts import Facts
from lmplay.run.folder import RunFolder
from lmplay.run.run import load_weights


@dataclass
class Trained:
    """A trained model, ready to generate."""

    experiment: Experiment
    model: nn.Module  # in eval mode
    tokenizer: Tokenizer
    config: object
    device: torch.device
    facts: Facts
    step: int
    progress: float  # share of the run's tokens; the model was told
    autocast: Callable[[], AbstractContextManager]


def open_trained(folder: RunFolder, step: int | None, device: str, precision: str) -> Trained:
    """The model of a run at one of its checkpoints, from the run's own copies.

    Args:
        step: which checkpoint; None is the newest.
        device: as `resolve_device` takes it.
        precision: as `resolve_precision` takes it; weights stay fp32 under autocast.
    Raises:
        UserError: no such checkpoint, or its weights do not fit the run's own source.
    """
    facts = folder.read()
    if facts.status == "leaked":
        note(f"{folder.path} was stopped, its numbers are worth nothing: {facts.exit_reason}")
    where = resolve_device(device)
    used = resolve_precision(precision, where)
    path = Path(f"{facts.file}.py")
    if not folder.experiment_py.is_file():
        raise UserError(f"{folder.path} lacks its experiment.py", hint="it is no whole run")
    experiment = load_source(folder.experiment_py.read_text(encoding="utf-8"), path, {})
    config = experiment.config(**facts.config)
    model = experiment.model(config)
    checkpoint = read_checkpoint(folder, step, weights_only=True)
    load_weights(model, checkpoint.model, f"{folder.path} at step {checkpoint.step}")
    progress = checkpoint.state["progress"]
    set_progress(model, progress)
    file = folder.tokenizer_json if folder.tokenizer_json.is_file() else None
    tokenizer = open_tokenizer(facts.plan["tokenizer"], file=file)
    is_mixed = used != "fp32"
    autocast = partial(torch.autocast, where.type, dtype_of(used)) if is_mixed else nullcontext
    return Trained(
        experiment,
        model.to(where).eval(),
        tokenizer,
        config,
        where,
        facts,
        checkpoint.step,
        progress,
        autocast,
    )
