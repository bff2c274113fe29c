"""Bundled experiments for tests: their models at the size of TINY, and at full size."""

import functools

import torch
from torch import Tensor, nn

from lmplay.catalog.entries import resolve
from lmplay.model.experiment import Experiment, load_experiment
from lmplay.model.objective import Objective


@functools.cache
def experiment(name: str) -> Experiment:
    return load_experiment(resolve(name))


def tiny(name: str, seed: int = 0, **values) -> nn.Module:
    """The model at the size of TINY, without dropout."""
    made = experiment(name)
    dropouts = {name: 0.0 for name in ("embed_dropout", "ff_dropout") if name in made.fields}
    config = made.config(**{**made.tiny, **dropouts, **values})
    return made.model(config, seed=seed)


def on_meta(name: str, **values) -> nn.Module:
    """The model at full size, without numbers."""
    made = experiment(name)
    return made.model(made.config(vocab_size=50257, **values), device="meta")


def num_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def random_tokens(B: int, T: int, V: int = 61) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, num_steps: int = 5) -> nn.Module:
    tokens_BT = random_tokens(B=4, T=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(num_steps):
        optimizer.zero_grad()
        Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
        optimizer.step()
    return model.eval()


def moved(changed: Tensor, answer: Tensor) -> float:
    """The largest difference, against the largest answer."""
    return ((changed - answer).abs().max() / answer.abs().max()).item()
