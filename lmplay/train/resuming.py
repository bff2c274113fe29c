"""How a run goes on: what it keeps, what is refused, what is said of it."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lmplay.data.batches import text_of
from lmplay.errors import UserError
from lmplay.optim.averages import WeightAverages
from lmplay.run.checkpoint import Checkpoint
from lmplay.run.facts import Facts
from lmplay.run.fsdp import scatter_optimizer_state
from lmplay.run.request import Request
from lmplay.run.rng import restore_rng
from lmplay.run.run import load_weights
from lmplay.seeds import stream_seed
from lmplay.train.saving import scattered_rng
from lmplay.train.update import Update

# facts without which the numbers of a run that goes on are not the same bit by bit
_EXACT = (
    "device_name", "versions", "threads", "compiled", "mini_batch_size", "world_size", "fsdp",
)  # fmt: skip


def note_edits(request: Request, earlier: Facts, note: Callable[[str], None]) -> None:
    """Say where the run's own copies and the files of today differ.

    Raises:
        UserError: the text is another one.
    """
    folder, plan = request.folder, request.plan.model_dump(mode="json")
    if earlier.data.content != text_of(request.plan):
        mine, theirs = (_sources(p["datasets"]) for p in (plan, earlier.plan))
        what = f"{theirs}, not on {mine}" if mine != theirs else f"{theirs}, which has changed"
        raise UserError(
            f"{folder.path} was trained on {what}",
            hint="--out-dir gives this run a place of its own; --resume none keeps the old aside",
        )
    edited = []
    if folder.read_source() != request.entry.source:
        edited.append(str(request.entry.path))
    elsewhere = {"datasets": plan["datasets"], "margin": None}  # moved, and of verdicts only
    if earlier.plan | elsewhere != plan | elsewhere:
        edited.append(f"plan {request.plan.name}")
    named, own = Path(request.plan.tokenizer), folder.tokenizer_json
    if named.is_file() and own.is_file() and _text_of(named) != _text_of(own):
        edited.append(f"tokenizer {named}")
    if edited:
        note(
            f"edited since this run began: {', '.join(edited)}. The run keeps its own copy; "
            "--resume none trains the edited one and keeps this run aside"
        )


def continued(now: Facts, earlier: Facts, note: Callable[[str], None]) -> Facts:
    """What run.json says of a run that goes on; says what makes the rest differ bit by bit.

    Raises:
        UserError: the files of the data have changed.
    """
    if earlier.data != now.data:
        mine, theirs = asdict(now.data), asdict(earlier.data)
        changed = [key for key, value in mine.items() if theirs[key] != value]
        raise UserError(
            f"the data has changed since this run began: {', '.join(changed)}",
            hint="--resume none starts again with the new data and keeps the old run aside",
        )
    differs = [key for key in _EXACT if getattr(earlier, key) != getattr(now, key)]
    if differs:
        note(f"not the same bit by bit from here on: other {', '.join(differs)}")
    return replace(
        now,
        started=earlier.started,
        design=earlier.design or now.design,
        rate=earlier.rate or now.rate,
        failures=earlier.failures,
        initial_model=earlier.initial_model,
        changed_midway=sorted({*earlier.changed_midway, *differs}),
    )


def take_up(checkpoint: Checkpoint, update: Update, averages: WeightAverages) -> None:
    """Make the run of this update what it was when the checkpoint was saved."""
    run = update.run
    load_weights(run.model, checkpoint.model, str(run.folder.path))
    update.optimizer.load_state_dict(
        scatter_optimizer_state(checkpoint.optimizer, update.optimizer)
    )
    update.load_state(checkpoint.state["scaler"])
    if rng := scattered_rng(run, checkpoint.rng):
        restore_rng(rng)
    else:  # it was saved by fewer processes
        stream = f"dropout/{run.accelerator.process_index}/{checkpoint.step}"
        torch.manual_seed(stream_seed(run.seed, stream))
    run.step = checkpoint.step
    run.tokens = checkpoint.state["tokens"]
    run.seconds = checkpoint.state["seconds"]
    run.set_progress(checkpoint.state["progress"])
    averages.load_state_dict(checkpoint.averages, run.progress)


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _sources(datasets: dict[str, dict]) -> str:
    kinds = ("hub", "files", "shards", "builtin")
    named = [dataset[kind] for dataset in datasets.values() for kind in kinds if dataset[kind]]
    return ", ".join(" ".join(name) if isinstance(name, list) else name for name in named)
