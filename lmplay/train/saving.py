"""Checkpoints of a run that trains, in one process or several."""

import math
import shutil
from collections.abc import Callable

from torch import Tensor

from lmplay.errors import BAD_CHECKPOINT, UserError
from lmplay.optim.averages import WeightAverages
from lmplay.optim.known import KNOWN
from lmplay.run.checkpoint import Checkpoint, save_checkpoint, without_ties
from lmplay.run.fsdp import gather_state
from lmplay.run.rng import rng_state
from lmplay.run.run import Run
from lmplay.train.update import Update


def save(run: Run, update: Update, averages: WeightAverages) -> None:
    """Write a checkpoint of everything that the next step depends on."""
    rng = gathered_rng(run)
    is_main = run.accelerator.is_main_process
    if is_main:
        run.folder.refuse_deleted()
    model = gather_state(run.model.state_dict(keep_vars=True), is_main, "cpu")
    optimizer = gather_state(update.optimizer.state_dict(), is_main, "cpu")
    averaged = gather_state(averages.state_dict(), is_main, "cpu")
    if is_main:
        checkpoint = Checkpoint(
            step=run.step,
            model=model,
            optimizer=optimizer,
            rng=rng,
            state={
                "tokens": run.tokens,
                "seconds": run.seconds,
                "progress": run.progress,
                "scaler": update.state(),
            },
            averages=averaged,
        )
        save_checkpoint(run.folder, checkpoint, run.plan.checkpoints.keep)
    run.accelerator.wait_for_everyone()


def checkpoint_bytes(run: Run, update: Update, averages: WeightAverages) -> int:
    """About what a checkpoint takes on the disk, once the optimizer remembers every parameter."""
    weights, _ = without_ties(run.model.state_dict(keep_vars=True))
    moments = 0
    for group in update.optimizer.param_groups:
        most = int(KNOWN[group["optimizer"]].state.split()[-1])  # of "24 to 42"
        moments += most * sum(p.numel() for p in group["params"])
    return sum(tensor.nbytes for tensor in weights.values()) + moments + averages.most_bytes


def refuse_full_disk(
    run: Run, update: Update, averages: WeightAverages, note: Callable[[str], None]
) -> None:
    """Say how large checkpoints will be, before hours are spent that could not be saved.

    Raises:
        UserError: there is no room for one (code BAD_CHECKPOINT).
    """
    size, keep = checkpoint_bytes(run, update, averages), max(2, run.plan.checkpoints.keep)
    free = shutil.disk_usage(run.folder.path).free
    each = f"a checkpoint takes about {megabytes(size)}"
    if free < size:
        raise UserError(
            f"{each}, and {megabytes(free)} are free in {run.folder.path}",
            hint="make room, or choose another place with --out-dir",
            code=BAD_CHECKPOINT,
        )
    there = len(list(run.folder.checkpoints.glob("step-*")))
    needed = max(1, keep + 1 - there) * size  # a new one is written before an old one goes
    short = f", but only {megabytes(free)} are free: make room" if needed > free else ""
    note(f"{each}, and the newest {keep} stay{short}")


def megabytes(size: int) -> str:
    """A number of bytes in words: at least 1 MB."""
    return f"{max(1, math.ceil(size / 1e6)):,} MB"


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
