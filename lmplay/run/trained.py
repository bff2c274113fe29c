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


def open_trained(
    folder: RunFolder, step: int | None, device: str, precision: str, weights: str | None = None
) -> Trained:
    """The model of a run at one of its checkpoints, from the run's own copies.

    Args:
        step: which checkpoint; None is the newest.
        device: as `resolve_device` takes it.
        precision: as `resolve_precision` takes it; weights stay fp32 under autocast.
        weights: an average of them that the run keeps, such as "ema"; None is the newest.
    Raises:
        UserError: no such checkpoint or average, or the weights do not fit the run's own source.
    """
    facts = folder.read()
    if facts.status == "leaked":
        note(f"{folder.path} was stopped, its numbers are worth nothing: {facts.exit_reason}")
    where = resolve_device(device)
    used = resolve_precision(precision, where)
    path = Path(f"{facts.file}.py")
    experiment = load_source(folder.read_source(), path, {})
    config = experiment.config(**facts.config)
    model = experiment.model(config)
    if weights is not None:
        _refuse_unknown(weights, facts)
    checkpoint = read_checkpoint(folder, step, weights_only=True, averages=weights is not None)
    load_weights(model, checkpoint.model, f"{folder.path} at step {checkpoint.step}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied one once
            parameter.copy_(checkpoint.averages.get(f"{weights}/{name}", parameter))
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


def _refuse_unknown(average: str, facts: Facts) -> None:
    kept = [name for name, span in facts.plan["averages"].items() if span is not None]
    if average not in kept:
        known = f"it keeps {', '.join(kept)}" if kept else "train with --set averages.ema=0.02"
        raise UserError(f"{facts.label} keeps no average {average!r}", hint=known)
