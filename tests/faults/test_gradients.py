"""A step's gradient is that of its mean loss, whatever goes through the model at once."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lmplay.catalog.entries import resolve
from lmplay.data.batches import Batch
from lmplay.model.experiment import load_experiment
from lmplay.model.objective import IGNORE, Objective

ROWS, LENGTH, VOCABULARY = 7, 16, 61


def gradient(model, batch: Batch, size: int, world_size: int = 1) -> torch.Tensor:
    """As the loop makes it: sums over parts, divided by the targets of the whole batch."""
    model = copy.deepcopy(model)
    objective = Objective(model)
    for rank in range(world_size):
        for part in batch.of_rank(rank, world_size, size):
            scored = objective(part.tokens_BT, part.targets_BT)
            (scored.objective / batch.num_targets).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def reference(model, batch: Batch) -> torch.Tensor:
    """One pass of plain torch over everything, in fp64."""
    model = copy.deepcopy(model).double()
    logits_BTV = model(batch.tokens_BT)
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE
    )
    losses.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def batch_of(seed: int) -> Batch:
    """Rows with from none to all of their targets, so that a mean of means is another number."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    targets_BT = tokens_BT[:, 1:].clone()
    for row, begin in enumerate(torch.randint(LENGTH + 1, (ROWS,), generator=generator)):
        targets_BT[row, :begin] = IGNORE
    targets_BT[0] = tokens_BT[0, 1:]
    return Batch(tokens_BT[:, :-1], targets_BT, int((targets_BT != IGNORE).sum()))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_gradient_is_the_same_for_every_micro_batch_and_share(trials, figure, dtype, most):
    worst, num = 0.0, 0
    for name in trials(["gpt2ish"], ["gpt2ish", "llama", "value_norm", "gated_attention"]):
        experiment = load_experiment(resolve(name))
        values = {**experiment.tiny, "vocab_size": VOCABULARY, "max_len": LENGTH}
        config = experiment.config(**values)
        model = experiment.model(config, 0).eval().to(dtype)
        for seed in range(trials(1, 5)):
            batch = batch_of(seed)
            expected = reference(model, batch)
            for size in range(1, ROWS + 1):
                for world_size in (1, 2, 3):
                    found = gradient(model, batch, size, world_size).double()
                    error = (found - expected).norm() / expected.norm()
                    worst, num = max(worst, error.item()), num + 1

    assert worst < most
    kind = str(dtype).removeprefix("torch.")
    text = f"relative error at most {worst:.1e} in {kind}, {num} choices; last parts are shorter"
    figure(f"microbatch_gradient_equality_{kind}", text, worst=worst, choices=num)
