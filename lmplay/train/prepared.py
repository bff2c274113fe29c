"""What a run is made of, read and proved before anything of it is written."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from lmplay.data.batches import Data, open_data
from lmplay.data.tokenizers import Tokenizer, vocabulary_of
from lmplay.disk import make_folder, write_text
from lmplay.errors import UserError
from lmplay.fault_points import reach
from lmplay.memory import keep_memory
from lmplay.model.experiment import Experiment, load_experiment, load_source
from lmplay.model.freezing import freeze
from lmplay.model.scale import Scale, scale
from lmplay.optim.refusals import refuse_wrong_updates
from lmplay.plan import Plan
from lmplay.proofs.at_size import check_at_size, num_rows
from lmplay.proofs.device import machine_of, refuse_wrong
from lmplay.proofs.proof import Proof, most_telling
from lmplay.proofs.proof_cache import remembered
from lmplay.proofs.tiny import checked
from lmplay.run.facts import Facts
from lmplay.run.folder import RunFolder
from lmplay.run.request import Request
from lmplay.train.clock import Clock
from lmplay.train.display import Display
from lmplay.train.leak_watch import keep_rows, text_rows
from lmplay.train.resuming import note_edits


@dataclass(frozen=True)
class Prepared:
    """A run's plan, source, values and text."""

    plan: Plan
    experiment: Experiment
    scale: Scale
    tokenizer: Tokenizer
    data: Data
    clock: Clock

    @property
    def config(self) -> object:
        """The Config of the model."""
        return self.scale.config

    def write_copies(self, folder: RunFolder) -> None:
        """Write the source and the tokenizer into the run's folder, from which they are read."""
        make_folder(folder.path)
        write_text(folder.experiment_py, self.experiment.source)
        self.tokenizer.save(folder.tokenizer_json)


def prepare(
    request: Request, earlier: Facts | None, stack: ExitStack, display: Display
) -> Prepared:
    """Read what was asked for, or the own copies of a run that began.

    Args:
        earlier: run.json of the run that is to go on.
        stack: closes the data at its end.
    Raises:
        UserError: a proof of the tiny model fails, or something cannot be had or does not fit.
    """
    if earlier is None:
        plan, experiment = request.plan, load_experiment(request.entry)
        refuse_unproven(experiment, request.config)
        refuse_unknown_names(request, experiment)
    else:
        refuse_leaked(request, earlier)
        note_edits(request, earlier, display.note)
        source = request.folder.read_source()
        experiment = load_source(source, Path(f"{earlier.file}.py"), request.entry.variant)
        plan = Plan.model_validate_json(json.dumps(earlier.plan))
        plan = plan.model_copy(update={"datasets": request.plan.datasets})  # where it is now
    own = request.folder.tokenizer_json if earlier is not None else None
    file = own if own is not None and own.is_file() else None
    tokenizer, data = open_data(plan, request.seed, display.note, display.preparing, file)
    stack.callback(data.close)
    if earlier is None:
        made = scale(experiment, plan, tokenizer.vocab_size, tokenizer.end, request.config)
        for key in [key for key, (_, value) in made.differs.items() if value is None]:
            name = experiment.name
            display.note(f"{name} has no Config value {key!r}: the plan's is not used")
    else:
        made = Scale(experiment.config(**earlier.config), earlier.scale_differs)
        torch.set_num_threads(earlier.threads)
    return Prepared(plan, experiment, made, tokenizer, data, Clock(plan, data.num_rows))


def prove(prepared: Prepared, accelerator: Accelerator, precision: str, display: Display) -> None:
    """Prove that this device computes the model, and updates weights, as it should.

    Raises:
        UserError: it does not.
    """
    reach("prove")
    keep_memory()
    device, experiment = accelerator.device, prepared.experiment
    with accelerator.local_main_process_first():  # which remembers it for the others
        refuse_wrong(device, precision, experiment, prepared.config, display.note)
        refuse_leak_at_size(prepared, device, precision, display)
    refuse_wrong_updates(prepared.plan.optimizer, device)


def refuse_unproven(experiment: Experiment, values: dict[str, object]) -> None:
    """Raise a UserError where a proof fails, with the one that names the fault best."""
    if failed := most_telling(checked(experiment, values)):
        raise UserError(
            f"{experiment.name} fails the check: {failed.name}: {failed.detail}",
            hint=f"lmp-trainer --exp {experiment.entry.spelling} --check shows every proof",
        )


def refuse_leaked(request: Request, earlier: Facts) -> None:
    """Raise a UserError where a run was stopped because its model saw what it must not."""
    if earlier.status == "leaked":
        raise UserError(
            f"{request.folder.path} does not go on: {earlier.exit_reason}",
            hint="mend the experiment; --resume none trains it anew and keeps this run aside",
        )


def refuse_leak_at_size(
    prepared: Prepared, device: torch.device, precision: str, display: Display
) -> None:
    """Raise a UserError where a fresh model of the run's own size fails a proof, on its device."""
    experiment, config, plan = prepared.experiment, prepared.config, prepared.plan
    tokens_BT = text_rows(prepared.data, num_rows(config.max_len))
    keep_rows(plan, tokens_BT)

    def found() -> list[Proof]:
        display.note(f"proving {experiment.name} at its own size, once")
        return check_at_size(experiment, config, precision, device, tokens_BT)

    text = prepared.data.validation_fingerprint
    of = [experiment.source, config, text, machine_of(device), precision]
    if failed := most_telling(remembered(of, found)):
        raise UserError(
            f"{experiment.name} fails the check at {failed.where}: {failed.name}: {failed.detail}",
            hint=f"the same command with --exp {experiment.entry.spelling} --check shows it all",
        )


def refuse_unknown_names(request: Request, experiment: Experiment) -> None:
    """Raise a UserError where the plan freezes what the model does not have, or all of it."""
    plan = request.plan
    if plan.freeze:
        config = scale(experiment, plan, *vocabulary_of(plan.tokenizer), request.config).config
        freeze(experiment.model(config, device="meta"), plan.freeze)
