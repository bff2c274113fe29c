"""Whether compiling a model is worth its time."""

from collections.abc import Callable

import torch
from torch.nn import Module

from lmplay.machine import matmul_rate
from lmplay.model.experiment import Experiment

LONG = 600.0  # s of a run; compiling takes up to a minute
MANY = 400  # nodes in the graph of a model of two blocks: gpt2ish's has 91, rpa's 1,451


def is_repaid(
    experiment: Experiment, device: torch.device, precision: str, flops: Callable[[], float]
) -> bool:
    """Whether compiling costs less time than it saves, as far as that can be known before.

    On the CPU it never does: compiled steps take as long as ours do without, and up to twice the
    memory, at both sizes of benchmarks/train.py in bf16. On CUDA, where it was not measured, it is
    expected to in mixed precision, in a run that lasts, and for a model that becomes one graph:
    neither broken, nor so long, as one with a loop over positions, that compiling takes minutes.

    Args:
        flops: counts those of the whole run in this process, where it comes to that. About half of
            a matrix product's rate is reached.
    """
    if precision == "fp32" or not _can_build(device):
        return False
    if flops() / (0.5 * matmul_rate(device, precision)) < LONG:
        return False
    graphs, nodes = _traced(experiment)
    return graphs == 1 and nodes <= MANY


def _can_build(device: torch.device) -> bool:
    from torch.utils._triton import has_triton

    return device.type == "cuda" and has_triton()


def _traced(experiment: Experiment) -> tuple[int, int]:
    """Graphs of the model at its tiny size, and the nodes in them; none is compiled."""
    from torch._dynamo import utils as dynamo

    nodes: list[int] = []

    def count(graph: torch.fx.GraphModule, _) -> Module:
        nodes.append(len(graph.graph.nodes))
        return graph

    config = experiment.config(**experiment.tiny)
    model = experiment.model(config)
    model.compile(backend=count)
    try:
        model(torch.zeros(1, config.max_len, dtype=torch.long))
    except Exception:  # the check has proven the model itself, so it is the tracing that failed
        nodes.clear()
    for ours in (dynamo.counters, dynamo.compilation_time_metrics):
        ours.clear()  # `compiled_so_far` tells of what was compiled to train
    return len(nodes), sum(nodes)
