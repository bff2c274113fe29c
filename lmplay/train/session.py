"""One run from a request to its result: prepare, prove, begin or go on, train, close."""

import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lmplay.catalog.entries import canonical_name
from lmplay.data.batches import text_of
from lmplay.errors import UserError
from lmplay.machine import resolve_device, resolve_precision, slowness
from lmplay.model.abilities import scores_itself
from lmplay.model.counts import count, flops_per_token
from lmplay.optim.averages import averages_of
from lmplay.optim.joint import optimizer_of
from lmplay.optim.refusals import refuse_fsdp
from lmplay.run.accelerator import make_accelerator
from lmplay.run.checkpoint import newest_checkpoint
from lmplay.run.facts import DataFacts, Facts
from lmplay.run.folder import RunFolder
from lmplay.run.provenance import machine_facts
from lmplay.run.records import (
    TRAIN_COLUMNS,
    VALIDATION_COLUMNS,
    Record,
    average_column,
    read_rows,
)
from lmplay.run.request import Request
from lmplay.run.run import Run, load_weights, open_run, rows_at_once
from lmplay.train.compilation import is_repaid
from lmplay.train.curves import Curves, NotFinite
from lmplay.train.display import Display
from lmplay.train.fault import first_bad_place
from lmplay.train.initial_model import begin_from
from lmplay.train.leak_watch import Leaked
from lmplay.train.loop import Session, train
from lmplay.train.prepared import Prepared, prepare, prove
from lmplay.train.reporter import Reporter
from lmplay.train.resuming import continued, note_edits, take_up
from lmplay.train.saving import refuse_full_disk
from lmplay.train.signals import Signals, Stopped
from lmplay.train.update import Update


def run_experiment(request: Request, display: Display) -> dict:
    """Train what was asked for, or go on where it stopped.

    Returns:
        What `--json` prints: the run's folder, status, step and last validation.
    Raises:
        UserError: bad input, a failed check, data or a run that cannot be used, a numeric failure.
        Stopped: a signal came, and the run was saved.
    """
    device, folder = resolve_device(request.device), request.folder
    precision = _precision(request, device)
    accelerator = make_accelerator(device, precision)
    if request.fsdp:
        _refuse_fsdp(request, precision, accelerator.num_processes)
    is_main = accelerator.is_main_process
    with ExitStack() as stack:
        lock = stack.enter_context(ExitStack())
        if is_main:
            lock.enter_context(folder.lock())
            lock.callback(folder.remove_unused)  # a run that is refused leaves nothing behind
        if result := finished(request, display):
            display.note(f"{folder.path} is finished; --resume none trains it again")
            return result
        if slow := slowness(precision, device):
            display.note(slow)
        earlier = _earlier(request)
        prepared = prepare(request, earlier, stack, display)
        prove(prepared, accelerator, precision, display)
        if is_main and not request.resume:
            _set_aside(folder, lock, display)
        if is_main and earlier is None:
            prepared.write_copies(folder)
        accelerator.wait_for_everyone()
        run = _open_run(request, earlier, prepared, accelerator, precision)
        facts = _facts(request, prepared, run, precision)
        if earlier is not None:
            facts = continued(facts, earlier, display.note)
        reporter = Reporter(run, prepared, facts, display)
        session = _open_session(run, prepared, reporter, stack)
        if is_main:
            refuse_full_disk(run, session.update, session.averages, display.note)
        if request.initial and session.saved < 0:
            _begin_from(request, reporter)
        _train(session, reporter)
        return _result(folder, reporter.facts)


def finished(request: Request, display: Display) -> dict | None:
    """The result of a run that is finished, with a note where its files were edited since.

    Raises:
        UserError: the run was trained on other data.
    """
    earlier = _earlier(request)
    if earlier is None or earlier.status != "finished":
        return None
    note_edits(request, earlier, display.note)
    return _result(request.folder, earlier)


def _earlier(request: Request) -> Facts | None:
    """run.json of the run that is to go on; None where one is to begin."""
    folder = request.folder
    return folder.read() if request.resume and folder.run_json.is_file() else None


def _precision(request: Request, device: torch.device) -> str:
    """What was asked for; a run that began keeps its own, with another plan or device too."""
    earlier = _earlier(request)
    asked = request.precision or request.plan.precision
    return resolve_precision(asked if earlier is None else earlier.precision, device)


def _refuse_fsdp(request: Request, precision: str, num_processes: int) -> None:
    refuse_fsdp(request.plan.optimizer)
    if num_processes == 1:
        hint = "--gpus N or torchrun starts several"
        raise UserError("--shard needs several processes, and there is one", hint=hint)
    if precision == "fp16":
        raise UserError("--shard and fp16 do not go together", hint="bf16 and fp32 do")


def _set_aside(folder: RunFolder, lock: ExitStack, display: Display) -> None:
    """Rename an earlier run to a hidden name beside it: nothing that was trained is deleted.

    Args:
        lock: holds the run; afterwards, the new one in its place.
    """
    if folder.run_json.is_file():
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        old = folder.path.with_name(f".{folder.path.name}-until-{stamp}")
        folder.path.rename(old)
        lock.close()
        lock.enter_context(folder.lock())
        display.note(f"the earlier run is kept in {old}")


def _open_run(
    request: Request,
    earlier: Facts | None,
    prepared: Prepared,
    accelerator: Accelerator,
    precision: str,
) -> Run:
    rows = request.mini_batch_size or (earlier and earlier.mini_batch_size)
    run = open_run(
        request.folder,
        prepared.plan,
        prepared.experiment,
        request.seed,
        prepared.config,
        accelerator,
        rows or rows_at_once(prepared.plan, accelerator.device),
        _compiles(request, earlier, prepared, accelerator, precision),
        request.fsdp,
    )
    run.may_shrink = request.mini_batch_size is None
    return run


def _compiles(
    request: Request,
    earlier: Facts | None,
    prepared: Prepared,
    accelerator: Accelerator,
    precision: str,
) -> bool:
    """As asked for; else as the run began; else where it is repaid."""
    if request.compiled is not None:
        return request.compiled
    if earlier is not None or request.fsdp:
        return earlier is not None and earlier.compiled

    def flops() -> float:
        of_length = partial(flops_per_token, prepared.experiment, prepared.config)
        clock = prepared.clock
        return clock.mean(of_length) * clock.num_tokens / accelerator.num_processes

    is_worth_it = is_repaid(prepared.experiment, accelerator.device, precision, flops)
    return broadcast_object_list([is_worth_it])[0]  # as the first process measured it


def _facts(request: Request, prepared: Prepared, run: Run, precision: str) -> Facts:
    """What run.json says of a run that begins now."""
    plan, experiment, data = prepared.plan, prepared.experiment, prepared.data
    clock = prepared.clock
    parameters = asdict(count(experiment, prepared.config, plan.freeze))
    of_longest = parameters.pop("flops_per_token")

    def of_length(T: int) -> float:
        is_longest = prepared.config.max_len == T
        return of_longest if is_longest else flops_per_token(experiment, prepared.config, T)

    return Facts(
        experiment=canonical_name(request.entry),
        file=experiment.entry.file,
        stack=[canonical_name(idea) for idea in request.entry.ideas],
        docstring_summary=experiment.summary,
        plan_name=plan.name,
        seed=request.seed,
        changes=request.all_changes,
        label=request.label,
        budget=request.budget,
        design=request.design,
        rate=request.rate,
        plan=plan.model_dump(mode="json"),
        config=asdict(prepared.config),
        scale_differs=prepared.scale.differs,
        bound=scores_itself(run.model),
        data=DataFacts(
            content=text_of(plan),
            fingerprint=data.fingerprint,
            validation_fingerprint=data.validation_fingerprint,
            tokenizer=plan.tokenizer,
            vocab_size=prepared.tokenizer.vocab_size,
            validation_tokens=data.validation_tokens,
            validation_bytes=data.validation_bytes,
            trained_on=data.trained_on,
        ),
        flops_per_token=clock.mean(of_length),
        parameters=parameters,
        num_steps=clock.num_steps,
        num_tokens=clock.num_tokens,
        tokens_per_step=clock.most_tokens,
        **machine_facts(run.device),
        precision=precision,
        world_size=run.world_size,
        mini_batch_size=run.mini_batch_size,
        compiled=run.compiled,
        fsdp=request.fsdp,
        command=sys.argv,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _open_session(run: Run, prepared: Prepared, reporter: Reporter, stack: ExitStack) -> Session:
    """Take up the newest checkpoint, if there is one, and cut the curves back to it."""
    update = Update(run, optimizer_of(run, prepared.clock.num_steps), run.plan.clip)
    averages = averages_of(run, update.optimizer)
    note, folder, clock = reporter.display.note, run.folder, prepared.clock
    with run.accelerator.main_process_first():  # which holds the lock, and moves damaged ones
        checkpoint = newest_checkpoint(folder, note)
    if checkpoint is not None:
        take_up(checkpoint, update, averages)
        note(f"going on at step {run.step:,} of {clock.num_steps:,}")
    saved = -1 if checkpoint is None else run.step
    train_csv = validation_csv = None
    validated = -1
    if run.accelerator.is_main_process:
        train_csv = stack.enter_context(Record(folder.train_csv, TRAIN_COLUMNS, saved))
        columns = (*VALIDATION_COLUMNS, *map(average_column, averages.names))
        validation_csv = Record(folder.validation_csv, columns, saved)
        stack.enter_context(validation_csv)
        rows = read_rows(folder.validation_csv)
        validated = rows[-1]["step"] if rows else -1
    validated = broadcast_object_list([validated])[0]  # else the others validate by themselves
    run.warn = reporter.warn
    return Session(
        run, prepared.data, clock, update, averages, Curves(run, train_csv), validation_csv,
        Signals(), reporter.show, validated, saved,
    )  # fmt: skip


def _begin_from(request: Request, reporter: Reporter) -> None:
    """Give the run the weights that it was asked to begin with."""
    run, initial = reporter.run, request.initial
    beginner = replace(run, model=run.whole_model())
    beginning = begin_from(initial, beginner, reporter.prepared.tokenizer)
    load_weights(run.model, beginner.model.state_dict(), str(initial.path))
    reporter.facts = replace(reporter.facts, initial_model=beginning)
    reporter.display.note(str(beginning))


def _train(session: Session, reporter: Reporter) -> None:
    """Train to the end, and write into run.json how it ended."""
    reporter.begin()
    try:
        with session.signals:
            train(session)
    except BaseException as error:
        ended = _ended_by(error, session, reporter.facts)
        if session.run.folder.run_json.is_file():  # else it was deleted, and stays so
            with suppress(OSError):  # a full disk is the error itself
                reporter.write(ended)
        raise
    run, last = session.run, session.clock.num_steps
    if run.plan.seconds and run.step < last:
        limit = f"{run.plan.seconds:,.10g} seconds are spent"
        reporter.display.note(f"the plan's {limit} at step {run.step:,} of {last:,}")
    reporter.write(reporter.facts.finished(run.step))


def _ended_by(error: BaseException, session: Session, facts: Facts) -> Facts:
    """What an error makes of a run; one whose numbers were not finite is told where they began."""
    is_numeric = isinstance(error, NotFinite)
    if is_numeric:
        bad = session.clock.at(error.step - 1)
        session.run.set_progress(bad.progress)
        batch = session.data.rows(bad.first_row, bad.num_rows, bad.row_length)
        if name := first_bad_place(session.run, batch):
            error.problem += f"; run again, it begins in {name}"
    reason = getattr(error, "problem", str(error)) or type(error).__name__
    if isinstance(error, Stopped | SystemExit | KeyboardInterrupt):
        return facts.stopped(reason)
    if isinstance(error, Leaked):
        return facts.leaked(reason)
    return facts.failed(reason, is_numeric)


def _result(folder: RunFolder, facts: Facts) -> dict:
    rows = read_rows(folder.validation_csv) if folder.validation_csv.is_file() else []
    return {
        "schema_version": 1,
        "run": str(folder.path),
        "experiment": facts.experiment,
        "plan": facts.plan_name,
        "seed": facts.seed,
        "status": facts.status,
        "num_steps": facts.num_steps,
        "parameters": facts.parameters,
        "validation": rows[-1] if rows else None,
    }
