"""What earlier positions left behind, so that a step of generation runs on one position."""

from torch import Tensor, nn

# T new positions, S positions given back


class Cache:
    """The memory of one generation: an experiment fills it, the harness counts the positions.

    Args:
        capacity: positions there will be at most; buffers are not made larger ahead of need.

    A pass runs on any number of positions while `length` is 0, and on exactly one afterwards.
    Rows are never padded: every row has `length` positions. Each use by a module within one pass
    has a slot of its own, found again in the next pass by the order of that module's uses; so a
    module that stands at several depths has a memory at each, and a forward that asks for
    `state(self)` asks once.
    """

    def __init__(self, capacity: int | None = None):
        self.length = 0  # positions seen in earlier passes
        self._capacity = capacity
        self._buffers: dict[tuple[nn.Module, int], list[_Buffer]] = {}
        self._states: dict[tuple[nn.Module, int], dict] = {}
        self._num_appends: dict[nn.Module, int] = {}  # of each module in this pass
        self._num_states: dict[nn.Module, int] = {}

    @property
    def used(self) -> bool:
        """Whether any module has kept anything here; without that a step knows no past."""
        return bool(self._buffers or self._states)

    @property
    def num_bytes(self) -> int:
        """Of what is kept for later passes; room that is not used yet is left out."""
        kept = [tensor for state in self._states.values() for tensor in state.values()]
        kept += [buffer.kept for buffers in self._buffers.values() for buffer in buffers]
        return sum(tensor.nbytes for tensor in kept)

    def append(
        self, module: nn.Module, *tensors: Tensor, keep: int | None = None
    ) -> tuple[Tensor, ...]:
        """Add new positions behind the earlier ones.

        Args:
            module: the caller.
            tensors: positions are the last dimension but one, (..., T, D); each is kept in the
                dtype and on the device that its first pass had.
            keep: how far a position looks back, itself included; None for all the way. Memory is
                then bounded by it.
        Returns:
            A tuple, one for each of `tensors`, with all positions so far; or with the new ones and
            the `keep - 1` before them, that is the last `keep` when T is 1, and all T in the
            first pass, where each position still needs its own past. Valid until the next pass.
        """
        slot = self._slot(module, self._num_appends)
        buffers = self._buffers.get(slot)
        if buffers is None:
            buffers = self._buffers[slot] = [_Buffer(self._capacity) for _ in tensors]
        return tuple(b.append(t, keep) for b, t in zip(buffers, tensors, strict=True))

    def state(self, module: nn.Module) -> dict:
        """A dict for this use of `module`, empty at first, for it to read and fill in each pass."""
        return self._states.setdefault(self._slot(module, self._num_states), {})

    def opened(self) -> list[tuple[nn.Module, tuple[Tensor, ...]]] | None:
        """The memory itself, for a pass over one position that does without `append`.

        Returns:
            For each append, in the order of the first pass, its module and its tensors, in which
            position `length` is to be written and those behind it, one at least, mean nothing.
            `fill` then says that all were written. None where a module keeps a state, or others
            than the positions so far.
        """
        buffers = [buffer for slot in self._buffers.values() for buffer in slot]
        if self._states or any(b.keep is not None or b.end != self.length for b in buffers):
            return None
        for buffer in buffers:
            buffer.reserve(1, spare=1)
        return [(slot[0], tuple(b.data for b in of)) for slot, of in self._buffers.items()]

    def fill(self) -> None:
        """Count the position that was written to each opened tensor, as if it were appended."""
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer.num_new = 1

    def advance(self, num_positions: int) -> None:
        """Count the positions of a pass that has ended; the harness calls this, not a model."""
        self.length += num_positions
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer.advance()
        self._num_appends.clear()
        self._num_states.clear()

    @staticmethod
    def _slot(module: nn.Module, counts: dict[nn.Module, int]) -> tuple[nn.Module, int]:
        number = counts.get(module, 0)
        counts[module] = number + 1
        return module, number


class _Buffer:
    """Positions in one preallocated tensor: `end` of them were kept, `num_new` are of this pass."""

    def __init__(self, capacity: int | None):
        self.capacity = capacity
        self.keep: int | None = None
        self.data: Tensor | None = None
        self.end = 0
        self.num_new = 0

    @property
    def kept(self) -> Tensor:
        num_kept = self.end if self.keep is None else min(self.end, self.keep - 1)
        return self.data.narrow(-2, self.end - num_kept, num_kept)

    def append(self, new: Tensor, keep: int | None) -> Tensor:
        T = new.shape[-2]
        self.keep = keep
        if self.data is None:
            num_kept = T if keep is None else min(T, keep)
            self._make_room(new, 0, num_kept)
            self._write(new.narrow(-2, T - num_kept, num_kept))
            return new
        start = self.reserve(T)
        self._write(new)
        return self.data.narrow(-2, start, self.end + T - start)

    def reserve(self, T: int, spare: int = 0) -> int:
        """Have room for T more positions; where what they see begins."""
        start = 0 if self.keep is None else max(0, self.end - self.keep + 1)
        if self.end + T + spare <= self.data.shape[-2]:
            return start
        self._make_room(self.data, start, T + spare)
        return 0

    def _write(self, new: Tensor) -> None:
        self.num_new = new.shape[-2]
        self.data.narrow(-2, self.end, self.num_new).copy_(new)

    def advance(self) -> None:
        self.end += self.num_new
        self.num_new = 0

    def _make_room(self, like: Tensor, start: int, T: int) -> None:
        """Bring what is still needed to the front of a buffer with room for T more, and spare."""
        num_kept = self.end - start
        needed = num_kept + T
        size = max(64, 2 * needed)
        if self.keep is None and self.capacity is not None:
            size = max(needed, min(size, self.capacity))
        old = self.data
        if old is None or old.shape[-2] < size or start < num_kept:
            self.data = like.new_empty(*like.shape[:-2], size, like.shape[-1])
        if num_kept:
            self.data.narrow(-2, 0, num_kept).copy_(old.narrow(-2, start, num_kept))
        self.end = num_kept
