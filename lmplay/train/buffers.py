"""Buffers that a forward pass changes, such as counters of what experts were given."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lmplay.run.run import Run


class Buffers:
    """A model's buffers as they were before a step; costs nothing where it has none.

    The rule for a forward pass while training: what it adds to a buffer is a sum over its rows.
    Then a step adds the same, whatever its parts and however many processes share it, but for rows
    that only make the processes' shares equal, which count too.
    """

    def __init__(self, run: Run):
        self._run = run
        self._before = {name: b.detach().clone() for name, b in run.model.named_buffers()}

    @torch.no_grad()
    def add_up(self) -> None:
        """Add to the buffers of each process what the others' rows gave; all must take part."""
        if self._run.world_size == 1:
            return
        for buffer, before in self._pairs():
            wide = torch.int32 if buffer.dtype == torch.bool else buffer.dtype
            change = buffer.to(wide) - before.to(wide)
            torch.distributed.all_reduce(change)
            buffer.copy_(before.to(wide) + change)

    @torch.no_grad()
    def keep_where(self, taken: Tensor) -> None:
        """Undo the change of a step that was not taken, by a flag that the host does not read."""
        for buffer, before in self._pairs():
            buffer.copy_(torch.where(taken, buffer, before))

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the change."""
        for buffer, before in self._pairs():
            buffer.copy_(before)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, buffer in self._run.model.named_buffers():
            yield buffer, self._before[name]
