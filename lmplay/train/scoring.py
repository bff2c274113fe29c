"""The forward pass of training and of validation."""

import torch
from torch import Tensor

from lmplay.data.batches import Batch
from lmplay.model.objective import Sums
from lmplay.run.run import Run


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
