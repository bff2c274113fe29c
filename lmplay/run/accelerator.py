"""accelerate, as a run uses it: one device or a group of processes, and autocast."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    patch_environment,
)

from lmplay.errors import UserError

# that processes wait for one another: some prove a model at its size, or compile it, in minutes
PATIENCE = timedelta(minutes=15)


def make_accelerator(device: torch.device, precision: str) -> Accelerator:
    """accelerate for placement, process group and autocast; accumulation and loss stay ours.

    Raises:
        UserError: ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set, which would scale gradients, or
            the processes that were started did not become one group.
    """
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} would scale gradients twice",
            hint="unset it; --mini-batch-size sets the rows that go through the model at once",
        )
    wanted = {} if device.index is None else {"ACCELERATE_TORCH_DEVICE": str(device)}
    # else a second run of this process keeps the first's device and precision
    AcceleratorState._reset_state(reset_partial_state=True)
    with patch_environment(**wanted):
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            # the first process's would take the place of the others' in each forward pass
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    started = os.environ.get("WORLD_SIZE", "1")
    if str(accelerator.num_processes) != started:
        raise UserError(
            f"WORLD_SIZE={started} processes were started, but this one is in a group of "
            f"{accelerator.num_processes}",
            hint="start them with lmp-trainer --gpus N, torchrun or accelerate launch",
        )
    return accelerator


def leave_processes() -> None:
    """Leave the process group before Python ends: threads that it still runs then abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
