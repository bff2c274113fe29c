"""How rows get to a device that the host does not wait for."""

import pytest
import torch
from torch import Tensor

from lmplay.train.scoring import sent


@pytest.mark.parametrize(
    ("device", "calls"),
    [
        ("cuda", ["pin_memory", ("to", "cuda", {"non_blocking": True})]),
        ("mps", [("to", "mps", {})]),
    ],
)
def test_only_pinned_rows_are_copied_while_the_host_goes_on(monkeypatch, device, calls):
    """A copy of other memory makes it wait for CUDA, and on MPS may read what was freed."""
    seen = []

    def pin(rows):
        seen.append("pin_memory")
        return rows

    def to(rows, place, **options):
        seen.append(("to", place.type, options))
        return rows

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    sent(torch.zeros(2, 3, dtype=torch.int64), torch.device(device))

    assert seen == calls
