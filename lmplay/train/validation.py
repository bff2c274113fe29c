"""The validation text, scored."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lmplay.data.batches import Data
from lmplay.fault_points import reach
from lmplay.run.rng import unchanged_rng
from lmplay.run.run import Run
from lmplay.train.scoring import score


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
                reach("validate.part")
                if run.world_size == 1 and stopping():
                    return None
                num_targets += batch.num_targets
                for part in batch.of_rank(rank, run.world_size, size):
                    scored = score(run, part)
                    missing = torch.full_like(scored.loss, float("nan"))
                    found = (scored.loss, scored.hits, scored.variance)
                    sums.append(torch.stack([missing if s is None else s for s in found]))
    except Exception as error:
        if not run.can_go_on(error):
            raise
        sums = None
    finally:
        run.objective.train()
    if sums is None:  # out here nothing holds on to what filled the memory
        return validate(run, data, stopping)
    sums_N3 = run.accelerator.gather(torch.stack(sums))
    nats, hits, variance = sums_N3.cpu().double().sum(0).tolist()
    bits = nats / math.log(2)
    return {
        "step": run.step,
        "tokens": run.tokens,
        "loss": nats / num_targets,
        "loss_error": None if math.isnan(variance) else math.sqrt(variance) / num_targets,
        "bits_per_byte": bits / data.validation_bytes if data.is_lossless else None,
        "accuracy": None if math.isnan(hits) else hits / num_targets,
        "seconds": run.seconds,
    }
