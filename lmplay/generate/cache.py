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

    def advance(self, num_positions: int) -> None:
        """Count the positions of a pass that has ended; the harness calls this, not a model."""
        self.length += num_positions
        self._num_appends.clear()
        self._num_states.clear()

    @staticmethod
    def _slot(module: nn.Module, counts: dict[nn.Module, int]) -> tuple[nn.Module, int]:
        number = counts.get(module, 0)
        counts[module] = number + 1
        return module, number


class _Buffer:
    """Positions in one preallocated tensor; `start` to `end` of it are still needed."""

    def __init__(self, capacity: int | None):
        self.capacity = capacity
        self.data: Tensor | None = None
        self.end = 0

    def append(self, new: Tensor, keep: int | None) -> Tensor:
        if self.data is None:
            T = new.shape[-2]
            num_kept = T if keep is None else min(T, keep)
            self._make_room(new, 0, num_kept, keep)
            self._write(new.narrow(-2, T - num_kept, num_kept))
            return new
        start = 0 if keep is None else max(0, self.end - keep + 1)
        T = new.shape[-2]
        if self.end + T > self.data.shape[-2]:
            self._make_room(new, start, T, keep)
            start = 0
        self._write(new)
        return self.data.narrow(-2, start, self.end - start)

    def _write(self, new: Tensor) -> None:
        T = new.shape[-2]
        self.data.narrow(-2, self.end, T).copy_(new)
        self.end += T

    def _make_room(self, new: Tensor, start: int, T: int, keep: int | None) -> None:
        """Bring what is still needed to the front of a buffer with room for T more, and spare."""
        num_kept = self.end - start
        needed = num_kept + T
        size = max(64, 2 * needed)
        if keep is None and self.capacity is not None:
            size = max(needed, min(size, self.capacity))
        old = self.data
        if old is None or old.shape[-2] < size or start < num_kept:
            like = new if old is None else old
            self.data = like.new_empty(*new.shape[:-2], size, new.shape[-1])
        if num_kept:
            self.data.narrow(-2, 0, num_kept).copy_(old.narrow(-2, start, num_kept))
        self.end = num_kept
