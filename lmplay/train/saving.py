"""Checkpoints of a run that trains, in one process or several."""

from torch import Tensor

from lmplay.run.checkpoint import Checkpoint, rng_state, save_checkpoint
from lmplay.run.fsdp import gather_state
from lmplay.run.run import Run
from lmplay.train.update import Update


def save(run: Run, update: Update) -> None:
    """Write a checkpoint of everything that the next step depends on."""
    rng = gathered_rng(run)
    is_main = run.accelerator.is_main_process
    model = gather_state(run.model.state_dict(keep_vars=True), is_main, "cpu")
    optimizer = gather_state(update.optimizer.state_dict(), is_main, "cpu")
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
