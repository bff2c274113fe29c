"""The size of a model, and the arithmetic of training it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lmplay.model.abilities import (
    follows_progress,
    has_terms,
    reader,
    takes_cache,
    trains_by_itself,
)
from lmplay.model.cache import Cache
from lmplay.model.experiment import Experiment
from lmplay.model.folding import folded
from lmplay.model.freezing import freeze
from lmplay.model.trace import Trace

PROGRESS = (0.0, 0.5, 1.0)  # where a model that changes over a run is looked at


@dataclass(frozen=True)
class Counts:
    """The size of a model and the arithmetic of training it."""

    trained: int  # parameters that training changes
    matmul: int  # of these, matrices that every position is multiplied with
    lookup: int  # of these, tables of which a position reads one row; the rest are vectors
    frozen: int  # that training leaves as they are
    folded: int  # that are left once what only training needs is folded away
    flops_per_token: float  # forward and backward, attention with the keys really attended


def count(experiment: Experiment, config, patterns: Sequence[str] = ()) -> Counts:
    """Count parameters, and the FLOPs per token of a row of `max_len` tokens.

    A network that runs on the distinct tokens of a batch is counted as if every token were
    distinct, and a frozen matrix as if it were trained: upper bounds.

    Args:
        patterns: of what the plan freezes, as `freeze` takes them.
    Raises:
        UserError: as `freeze` does.
    """
    model, traces = traced(experiment, config, config.max_len)
    freeze(model, patterns)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    multiplied = set().union(*(trace.multiplied for trace in traces))
    looked_up = set().union(*(trace.looked_up for trace in traces))
    lookup = [p for p in trained if id(p) in looked_up - multiplied]
    matmul = [p for p in trained if p.dim() > 1 and id(p) not in looked_up - multiplied]
    return Counts(
        trained=sum(p.numel() for p in trained),
        matmul=sum(p.numel() for p in matmul),
        lookup=sum(p.numel() for p in lookup),
        frozen=sum(p.numel() for p in frozen),
        folded=sum(p.numel() for p in folded(model).parameters()),
        flops_per_token=_flops_per_token(traces, config.max_len),
    )


def flops_per_token(experiment: Experiment, config, T: int) -> float:
    """FLOPs of training on one token of a row of T tokens, forward and backward.

    Training costs three times the forward pass: two matrix products in the backward pass for each
    one in the forward pass. Attention is counted by the keys really attended, found from masks,
    `is_causal` or a block mask, and so the same whether it is one fused call or written out. A mask
    whose numbers depend on the model's own is taken as causal in a fused call. A model with
    `loss_terms` or a
    `training_loss` is counted with these. One that changes over a run has the mean of its
    beginning, middle (twice) and end.
    """
    return _flops_per_token(traced(experiment, config, T)[1], T)


def cache_bytes(experiment: Experiment, config, T: int) -> int | None:
    """What generation keeps of a row of T tokens, in fp32; None where it keeps nothing."""
    try:
        return _cache_bytes(experiment, config, T, "meta")
    except (RuntimeError, NotImplementedError):  # no numbers
        return _cache_bytes(experiment, config, T, "cpu")


def _cache_bytes(experiment: Experiment, config, T: int, device: str) -> int | None:
    model, cache = experiment.model(config, device=device).eval(), Cache()
    if not takes_cache(model):
        return None
    with torch.no_grad(), Trace(model) as trace:
        reader(model)(trace.tokens(_distinct_ids(config, T), device), cache=cache)
        cache.advance(T)
    return cache.num_bytes if cache.used else None


def traced(experiment: Experiment, config, T: int) -> tuple[nn.Module, list[Trace]]:
    """A model without numbers, and the traces of a row of T tokens: one for each of PROGRESS.

    A model whose forward pass needs numbers, to decide what to do next, has them.
    """
    try:
        return _traced(experiment, config, T, "meta")
    except (RuntimeError, NotImplementedError):  # no numbers
        return _traced(experiment, config, T, "cpu")


def _traced(experiment: Experiment, config, T: int, device: str) -> tuple[nn.Module, list[Trace]]:
    model, traces = experiment.model(config, device=device), []
    for progress in PROGRESS if follows_progress(model) else PROGRESS[:1]:
        if follows_progress(model):
            model.at(progress)
        with torch.no_grad(), Trace(model) as trace:
            tokens_BT = trace.tokens(_distinct_ids(config, T), device)
            trace.note_logits(model(tokens_BT))
            if has_terms(model):
                trace.products.clear()  # training runs these instead
                for term in model.loss_terms(tokens_BT, tokens_BT):
                    if "head" in term:
                        trace.note_logits(term["head"](term["x"]))
            elif trains_by_itself(model):
                trace.products.clear()
                model.training_loss(tokens_BT, tokens_BT)
        traces.append(trace)
    return model, traces


def _distinct_ids(config, T: int) -> torch.Tensor:
    """A row of tokens without the end marker, all different where the vocabulary suffices."""
    ids_BT = torch.arange(T)[None] % config.vocab_size
    end = getattr(config, "end", None)
    if end is not None:
        ids_BT[ids_BT == end] = (end + 1) % config.vocab_size
    return ids_BT


def _flops_per_token(traces: list[Trace], T: int) -> float:
    flops = [sum(product.counted for product in trace.products) for trace in traces]
    mean = (flops[0] + 2 * flops[1] + flops[2]) / 4 if len(flops) == 3 else flops[0]
    return 3 * mean / T
