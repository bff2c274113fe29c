"""The curvature's diagonal as Sophia wants it: from tokens that the model itself draws.

Source: Liu et al. 2023, arXiv:2305.14342, algorithm 2 (Gauss-Newton-Bartlett).
"""

from dataclasses import replace

import torch

from lmplay.data.batches import Batch
from lmplay.optim.joint import JointOptimizer
from lmplay.run.run import Run
from lmplay.seeds import stream_seed
from lmplay.train.scoring import sent
from lmplay.train.update import average_gradients


def estimate_curvature(run: Run, optimizer: JointOptimizer, batch: Batch, size: int) -> None:
    """Give the optimizer the squared gradient of the mean loss on drawn tokens, times their number.

    What is drawn follows from the run's seed and step and from a token's place in the batch, so
    that parts, processes and restarts change nothing. Dropout is off. No gradient is left behind.

    Args:
        size: rows that go through the model at once.
    """
    draw = torch.Generator().manual_seed(stream_seed(run.seed, f"curvature/{run.step}"))
    draws_BT = torch.rand(batch.tokens_BT.shape, generator=draw)
    rank, count = run.accelerator.process_index, run.world_size
    share = 1 / max(batch.num_targets, 1)
    parts = zip(
        batch.of_rank(rank, count, size),
        replace(batch, tokens_BT=draws_BT).of_rank(rank, count, size),
        strict=True,
    )
    run.objective.eval()
    try:
        with run.no_sync():
            for part, draws in parts:
                given = (part.tokens_BT, part.targets_BT, draws.tokens_BT)
                scored = run.objective(*(sent(each, run.device) for each in given))
                run.accelerator.backward(scored.objective * share * count)
    finally:
        run.objective.train()
    params = [p for p in run.model.parameters() if p.grad is not None]
    if count > 1:
        average_gradients(params)
    scaler = run.accelerator.scaler
    scale = 1.0 if scaler is None else scaler.get_scale()
    squares = {p: batch.num_targets * (p.grad / scale).square() for p in params}
    optimizer.take_curvature({p: s.nan_to_num_(0.0, 0.0) for p, s in squares.items()})
    run.model.zero_grad(set_to_none=True)
