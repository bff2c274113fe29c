"""The training loop, and the validation that measures it."""

import math
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lmplay.data.batches import Batch, Data
from lmplay.model.objective import Objective, Sums
from lmplay.optim.schedules import factor
from lmplay.run.checkpoint import Checkpoint, restore_rng, rng_state, save_checkpoint, unchanged_rng
from lmplay.run.fsdp import whole
from lmplay.run.opening import Run
from lmplay.run.records import Record
from lmplay.train.curves import Curves
from lmplay.train.update import Update


class Stopped(Exception):
    """A signal asked for the end; the run was saved. `code` is the exit code that says which."""

    def __init__(self, code: int):
        super().__init__(f"stopped by signal {code - 128}")
        self.code = code


class Signals:
    """While entered, SIGINT, SIGTERM and SIGHUP set `code`, SIGUSR1 asks for a checkpoint.

    A second one leaves at once. A SIGHUP that is ignored, as under nohup, stays so.
    """

    def __init__(self):
        self.code: int | None = None
        self.save = False

    def __enter__(self):
        wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, _frame):
        if number == signal.SIGUSR1:
            self.save = True
        elif self.code is None:
            self.code = 128 + number
        else:
            raise SystemExit(128 + number)


@dataclass
class Session:
    """An opened run together with what training it takes."""

    run: Run
    data: Data
    update: Update
    curves: Curves
    validations: Record | None  # validation.csv; None on every process but the first
    signals: Signals
    show: Callable[[str, dict], None]  # told of what `Display.row` shows
    validated: int  # step of the newest validation; -1 if there is none
    saved: int  # step of the newest checkpoint; -1 if there is none


def train(session: Session) -> None:
    """Take every step of the plan that this run has not taken yet; validate and save when due.

    Raises:
        Stopped: a signal came; the run was saved at the end of its last whole step.
        NotFinite: a loss or gradient was not finite; the newest checkpoint is the last good one.
    """
    finish_step(session)  # a run that begins, or was stopped before its validation
    while session.run.step < session.data.num_steps:
        batch = session.data.batch(session.run.step)
        take_step(session, batch)
        show_rows(session)
        finish_step(session)


def take_step(session: Session, batch: Batch) -> None:
    """One update from one batch: the gradient of sum(loss) / count(targets), whatever the parts.

    A signal between two parts drops the step. So does a device without enough memory, and then
    the parts become half as large; and a compiler that fails, and then the model runs without.
    """
    run, plan = session.run, session.run.plan
    before = rng_state()
    done, num_steps = run.step, session.data.num_steps
    lr = plan.optimizer.lr * factor(plan.schedule, done, done + 1, num_steps)
    share = run.world_size / max(batch.num_targets, 1)  # the processes' gradients are averaged
    parts = batch.of_rank(run.accelerator.process_index, run.world_size, run.mini_batch_size)
    try:
        for part in parts:
            if session.signals.code is not None and run.world_size == 1:
                return drop_step(session, before)
            with nullcontext() if part is parts[-1] else run.no_sync():
                scored = score(run, part)
                run.accelerator.backward(scored.objective * share)
            session.curves.add(scored)
    except Exception as error:
        if not run.can_go_on(error):
            raise
        return drop_step(session, before)
    norm = session.update(session.curves.objective, lr)
    session.curves.close_step(batch.num_targets, lr, norm, session.update.healthy)


def drop_step(session: Session, rng: dict) -> None:
    """Forget the step under way: the state is that of the step before, and it is taken again."""
    session.curves.drop_step()
    session.run.model.zero_grad(set_to_none=True)
    restore_rng(rng)


def finish_step(session: Session) -> None:
    """Validate and save where the plan, the end or a signal asks for it."""
    run, plan, signals = session.run, session.run.plan, session.signals
    is_last = run.step == session.data.num_steps
    if session.validated < run.step and (is_last or _due(run, plan.validation.every_tokens)):
        show_rows(session, now=True)
        session.show("validating", {"step": run.step})
        row = validate(run, session.data, lambda: signals.code is not None)
        if row is not None:
            if session.validations is not None:
                session.validations.write(row)
            session.validated = run.step
            session.show("validation", row)
        session.curves.restart_clock()
    code, asked = agreed(session)
    due = is_last or asked or code or (run.step > 0 and _due(run, plan.checkpoints.every_tokens))
    if due and session.saved < run.step:
        show_rows(session, now=True)
        for record in (session.curves.record, session.validations):
            if record is not None:
                record.sync()
        save(run, session.update)
        session.saved = run.step
        session.show("checkpoint", {"step": run.step})
        session.curves.restart_clock()
    if code:
        raise Stopped(code)


def agreed(session: Session) -> tuple[int, bool]:
    """The exit code that a signal asked for (0 for none) and whether one asked for a checkpoint.

    Several processes decide together, when they look at the device anyway, or they would wait for
    each other at different steps.
    """
    run, signals = session.run, session.signals
    asked = [signals.code or 0, int(signals.save)]
    if run.world_size > 1:
        if run.step % session.curves.cadence:
            return 0, False
        asked_R2 = run.accelerator.gather(torch.tensor([asked], device=run.device))
        asked = asked_R2.amax(0).tolist()
    signals.save = False
    return asked[0], bool(asked[1])


def show_rows(session: Session, now: bool = False) -> None:
    """Write and show the rows of the steps since the last look at the device."""
    for row in session.curves.look(now):
        session.show("train", row)


def score(run: Run, part: Batch) -> Sums:
    """The one forward, on rows that may still be on the host."""
    return run.objective(sent(part.tokens_BT, run.device), sent(part.targets_BT, run.device))


def sent(rows_BT: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which the host does not wait where that is safe.

    It is from pinned memory to CUDA. On MPS such a copy may read what was freed meanwhile, as of
    torch 2.13 (pytorch/pytorch, issues 139550 and 189690).
    """
    if device.type == "cuda":
        return rows_BT.pin_memory().to(device, non_blocking=True)
    return rows_BT.to(device)


def first_bad_place(run: Run, batch: Batch) -> str | None:
    """Where a step that failed, run again without an update, first gives what is not finite.

    A module, else the last parameter whose gradient it is; None if this process sees none, as where
    dropout had to do with it.
    """
    bad: list[str] = []

    def look(name: str):
        return lambda module, given, made: bad.extend([name] * _is_bad(made))

    model = run.whole_model()
    modules = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(look(name)) for name, module in modules]
    objective = Objective(model)  # neither compiled, which drops hooks, nor averaging gradients
    try:
        for part in batch.of_rank(run.accelerator.process_index, run.world_size, 1):
            with run.accelerator.autocast():
                scored = objective(part.tokens_BT.to(run.device), part.targets_BT.to(run.device))
            if not bad:
                scored.objective.backward()
        gradients = [(name, p.grad) for name, p in model.named_parameters()]
        bad += [f"the gradient of {name}" for name, grad in reversed(gradients) if _is_bad(grad)]
    except RuntimeError:  # a model that cannot stand its own numbers has been seen by then
        pass
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return bad[0] if bad else None


def _is_bad(made: object) -> bool:
    tensors = [t for t in tree_leaves(made) if isinstance(t, Tensor) and t.is_floating_point()]
    return not all(t.isfinite().all() for t in tensors)


@torch.no_grad()
def validate(run: Run, data: Data, stopping: Callable[[], bool] = lambda: False) -> dict | None:
    """Score the whole validation text: no gradient, no dropout, no effect on training.

    Returns:
        A row of validation.csv; None if `stopping` became true before the end.
    """
    sums: list[Tensor] | None = []
    num_targets = 0
    rank, size = run.accelerator.process_index, run.mini_batch_size
    run.objective.eval()
    try:
        with unchanged_rng():
            torch.manual_seed(0)  # a likelihood that draws numbers draws the same ones each time
            for batch in data.validation_batches(size * run.world_size):
                if run.world_size == 1 and stopping():
                    return None
                num_targets += batch.num_targets
                for part in batch.of_rank(rank, run.world_size, size):
                    scored = score(run, part)
                    hits = scored.loss * float("nan") if scored.hits is None else scored.hits
                    sums.append(torch.stack([scored.loss, hits]))
    except Exception as error:
        if not run.can_go_on(error):
            raise
        sums = None
    finally:
        run.objective.train()
    if sums is None:  # out here nothing holds on to what filled the memory
        return validate(run, data, stopping)
    sums_N2 = run.accelerator.gather(torch.stack(sums))
    nats, hits = sums_N2.cpu().double().sum(0).tolist()
    return {
        "step": run.step,
        "tokens": run.tokens,
        "loss": nats / num_targets,
        "bits_per_byte": nats / math.log(2) / data.validation_bytes,
        "accuracy": None if math.isnan(hits) else hits / num_targets,
        "seconds": run.seconds,
    }


def save(run: Run, update: Update) -> None:
    """Write a checkpoint of everything that the next step depends on."""
    rng = gathered_rng(run)
    is_main = run.accelerator.is_main_process
    model = whole(run.model.state_dict(keep_vars=True), is_main, "cpu")
    optimizer = whole(update.optimizer.state_dict(), is_main, "cpu")
    if is_main:
        checkpoint = Checkpoint(
            step=run.step,
            model=model,
            optimizer=optimizer,
            rng=rng,
            state={"tokens": run.tokens, "seconds": run.seconds, "scaler": update.state()},
        )
        save_checkpoint(run.folder, checkpoint, run.plan.checkpoints.keep)
    run.accelerator.wait_for_everyone()


def gathered_rng(run: Run) -> dict[str, Tensor]:
    """The generators of every process: the first one's by name, the others' as rank1/..."""
    mine = rng_state()
    if run.world_size == 1:
        return mine
    everyone: dict[str, Tensor] = {}
    for name in sorted(mine):
        states = run.accelerator.gather(mine[name][None].to(run.device)).cpu()
        for rank, state in enumerate(states):
            everyone[f"rank{rank}/{name}" if rank else name] = state.clone()
    return everyone


def scattered_rng(run: Run, everyone: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's generators among those of a checkpoint; empty if it had fewer processes."""
    rank = run.accelerator.process_index
    prefix = f"rank{rank}/" if rank else ""
    mine = {name.removeprefix(prefix): t for name, t in everyone.items() if name.startswith(prefix)}
    return {name: state for name, state in mine.items() if not name.startswith("rank")}


def _due(run: Run, every_tokens: int) -> bool:
    """True at the start and where the planned tokens reach another multiple of `every_tokens`."""
    per_step = run.plan.tokens_per_step
    return run.step * per_step // every_tokens != (run.step - 1) * per_step // every_tokens
