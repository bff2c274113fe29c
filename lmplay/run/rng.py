"""The state of every global random generator, taken and put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lmplay.errors import BAD_CHECKPOINT, UserError


def rng_state() -> dict[str, Tensor]:
    """The state of every global random generator: torch on each device, `random`, numpy."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached_gauss = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.from_numpy(np.array([version, *words])),  # thrice as fast, at every step
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss]),
        "numpy.gauss": torch.tensor(cached_gauss, dtype=torch.float64),
    }
    for index in range(torch.cuda.device_count()):
        state[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


@contextmanager
def unchanged_rng() -> Iterator[None]:
    """Whatever is drawn inside, the generators go on from where they were before."""
    before = rng_state()
    try:
        yield
    finally:
        restore_rng(before)


def restore_rng(state: dict[str, Tensor]) -> None:
    """Put back what `rng_state` gave; devices that this machine lacks are left out.

    Raises:
        UserError: the state is no such state (code BAD_CHECKPOINT).
    """
    try:
        version, *words = state["python"].tolist()
        gauss = state["python.gauss"]
        random.setstate((version, tuple(words), gauss.item() if gauss.numel() else None))
        keys = state["numpy"].numpy().astype(np.uint32)
        position, has_gauss = state["numpy.position"].tolist()
        cached_gauss = state["numpy.gauss"].item()
        np.random.set_state(("MT19937", keys, position, has_gauss, cached_gauss))
        torch.set_rng_state(state["torch"])
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in state:
                torch.cuda.set_rng_state(state[f"cuda.{index}"], index)
        if torch.backends.mps.is_available() and "mps" in state:
            torch.mps.set_rng_state(state["mps"])
    except (LookupError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        problem = f"the checkpoint's random state does not fit: {error}"
        raise UserError(problem, code=BAD_CHECKPOINT) from None
