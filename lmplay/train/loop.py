"""The training loop."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lmplay.data.batches import Batch, Data
from lmplay.fault_points import reach
from lmplay.optim.averages import WeightAverages
from lmplay.optim.schedules import factor
from lmplay.run.records import Record, average_column
from lmplay.run.rng import restore_rng, rng_state
from lmplay.run.run import Run
from lmplay.train.buffers import Buffers
from lmplay.train.clock import Clock
from lmplay.train.curvature import estimate_curvature
from lmplay.train.curves import Curves
from lmplay.train.leak_watch import refuse_leak
from lmplay.train.saving import save
from lmplay.train.scoring import score
from lmplay.train.signals import Signals, Stopped, agreed
from lmplay.train.update import Update
from lmplay.train.validation import validate


@dataclass
class Session:
    """An opened run together with what training it takes."""

    run: Run
    data: Data
    clock: Clock
    update: Update
    averages: WeightAverages
    curves: Curves
    validations: Record | None  # validation.csv; None on every process but the first
    signals: Signals
    show: Callable[[str, dict], None]  # told of what `Display.row` shows
    validated: int  # step of the newest validation; -1 if there is none
    saved: int  # step of the newest checkpoint; -1 if there is none
    is_over: bool = False  # all steps are taken, or the plan's seconds are spent


def train(session: Session) -> None:
    """Take every step that this run has not taken yet; validate and save when due.

    The steps are the plan's, as far as its seconds reach.

    Raises:
        Stopped: a signal came; the run was saved at the end of its last whole step.
        Leaked: the model saw what it must not.
        NotFinite: a loss or gradient was not finite; the newest checkpoint is the last good one.
    """
    finish_step(session)  # a run that begins, or was stopped before its validation
    while not session.is_over:
        advance(session)
        show_rows(session)
        finish_step(session)


def advance(session: Session) -> None:
    """Take the next step. If it is dropped, it is the next one still."""
    run = session.run
    now = session.clock.at(run.step)
    batch = session.data.rows(now.first_row, now.num_rows, now.row_length)
    after, all_tokens = now.tokens_before + now.tokens, session.clock.num_tokens
    of_full = factor(run.plan.schedule, now.tokens_before, after, all_tokens)
    norm = take_step(session, batch, of_full)
    if norm is not None:
        run.step += 1
        run.tokens += batch.num_targets
        run.set_progress(session.clock.at(run.step).progress)
        session.averages.take(run.progress)
        lr = run.plan.optimizer.lr * of_full
        session.curves.close_step(batch.num_targets, lr, norm, session.update.healthy)


def take_step(session: Session, batch: Batch, of_full: float) -> Tensor | None:
    """One update from one batch: the gradient of sum(loss) / count(targets), whatever the parts.

    A signal between two parts drops the step. So does a device without enough memory, and then
    the parts become half as large; and a compiler that fails, and then the model runs without.

    Args:
        of_full: the share of every full rate.
    Returns:
        The gradient's norm; None if the step was dropped.
    """
    run, plan = session.run, session.run.plan
    rng, buffers = rng_state(), Buffers(run)
    share = run.world_size / max(batch.num_targets, 1)  # the processes' gradients are averaged
    size = run.mini_batch_size * (plan.max_len // batch.tokens_BT.shape[1])  # more short rows
    parts = batch.of_rank(run.accelerator.process_index, run.world_size, size)
    # where an optimizer wants each process's own gradients, none are averaged here
    synced = None if session.update.local else parts[-1]
    try:
        if session.update.optimizer.needs_curvature:
            estimate_curvature(run, session.update.optimizer, batch, size)
        for part in parts:
            reach("step.part")
            if session.signals.code is not None and run.world_size == 1:
                return drop_step(session, rng, buffers)
            with nullcontext() if part is synced else run.no_sync():
                scored = score(run, part)
                run.accelerator.backward(scored.objective * share)
            session.curves.add(scored)
    except Exception as error:
        if not run.can_go_on(error):
            raise
        return drop_step(session, rng, buffers)
    buffers.add_up()
    reach("step.update")
    norm = session.update(session.curves.objective, of_full)
    buffers.keep_where(session.update.taken)
    reach("step.taken")
    return norm


def drop_step(session: Session, rng: dict, buffers: Buffers) -> None:
    """Forget the step under way: the state is that of the step before, and it is taken again."""
    session.curves.drop_step()
    session.run.model.zero_grad(set_to_none=True)
    restore_rng(rng)
    buffers.restore()


def finish_step(session: Session) -> None:
    """Validate and save where the plan, the end or a signal asks for it."""
    run, plan, clock, signals = session.run, session.run.plan, session.clock, session.signals
    is_last = session.is_over = run.step == clock.num_steps or is_late(session)
    due = is_last or clock.is_due(run.step, plan.validation.every_tokens)
    if due and session.validated < run.step:
        show_rows(session, now=True)
        refuse_leak(run, session.data, is_last)
        session.show("validating", {"step": run.step})
        with session.update.optimizer.averaged():
            row = validate_all(session)
            if row is not None:
                if session.validations is not None:
                    session.validations.write(row)
                session.validated = run.step
                session.show("validation", row)
        session.curves.restart_clock()
    code, asked = agreed(run, signals, session.curves.cadence)
    due = is_last or (run.step > 0 and clock.is_due(run.step, plan.checkpoints.every_tokens))
    if (due or asked or code) and session.saved < run.step:
        show_rows(session, now=True)
        for record in (session.curves.record, session.validations):
            if record is not None:
                record.sync()
        with session.update.optimizer.averaged():
            reach("save.begin")
            save(run, session.update, session.averages)
        session.saved = run.step
        session.show("checkpoint", {"step": run.step})
        session.curves.restart_clock()
    if code:
        raise Stopped(code)


def validate_all(session: Session) -> dict | None:
    """A row of validation.csv: the weights as they are, and the loss of each average of them."""
    run, signals = session.run, session.signals

    def judged() -> dict | None:
        return validate(run, session.data, lambda: signals.code is not None)

    row = judged()
    for name in session.averages.names:
        if row is None:
            break
        with session.averages.applied(name):
            run.reshard()
            of_average = judged()
        run.reshard()
        row = of_average and row | {average_column(name): of_average["loss"]}
    return row


def is_late(session: Session) -> bool:
    """Whether the plan's seconds of training are spent, as the first process counts them.

    Several processes look together, when they look at the device anyway.
    """
    run, limit = session.run, session.run.plan.seconds
    is_alone = run.world_size == 1
    if limit is None or (not is_alone and run.step % session.curves.cadence):
        return False
    seconds = torch.tensor([run.seconds], dtype=torch.float32, device=run.device)
    seconds_R = seconds if is_alone else run.accelerator.gather(seconds)
    return seconds_R[0].item() >= limit


def show_rows(session: Session, now: bool = False) -> None:
    """Write and show the rows of the steps since the last look, and count their seconds."""
    session.run.seconds, rows = session.curves.look(now)
    for row in rows:
        session.show("train", row)
