"""A parameter's start is its own: drawn from a stream keyed by the seed and the parameter's name.

Built from one stream of random numbers, two models start apart as soon as one of them draws once
more. Here every draw that a constructor makes gets a stream of its own, so that two experiments
share the starting value of what they share by name and shape, and the difference of two paired runs
is the idea's. What is drawn stays what the file says.
"""

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OVERWRITING = {
    *("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "geometric_"),
    *("log_normal_", "copy_", "fill_", "zero_"),
}


def with_own_streams(model: type[nn.Module], config: object, seed: int) -> nn.Module:
    """`model(config)` on the CPU, each of its random numbers drawn from the stream of a parameter.

    It is built on the meta device first, to learn which draw ends in which parameter or buffer.
    Torch's own generators are neither read nor changed.

    Args:
        config: a dataclass; the same one makes the same draws in the same order.
        seed: the same seed gives the same model.
    """
    with _Drawing(_streams(_Build(model, repr(config), config)), seed):
        return model(config)


@dataclass(frozen=True)
class _Build:
    """A constructor and its config, which may hold lists: told apart by its text."""

    model: type[nn.Module]
    text: str
    config: object = field(compare=False)


@functools.lru_cache(maxsize=64)
def _streams(build: _Build) -> list[str]:
    """The name of each draw's stream, in the order of the draws."""
    tracing = _Tracing()
    with torch.device("meta"), tracing:
        model = build.model(build.config)
    return tracing.streams(model)


class _Tracing(TorchDispatchMode):
    """Follows each draw to the storages that it ends in."""

    def __init__(self):
        super().__init__()
        self.holds: dict[int, set[int]] = {}  # by storage: the draws that its values come from
        self.filled: list[int] = []  # by draw: the storage that it filled
        self.storages = []  # kept, or another tensor's storage could get one's number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        changed = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        kept = given
        if name in _OVERWRITING and _is_whole(given[0]):
            kept = given[1:]
        sources = set().union(*(self.holds.get(_number(tensor), set()) for tensor in kept))
        if _draws(func, kwargs):
            sources.add(len(self.filled))
            self.filled.append(_number(changed[0]))
        for tensor in changed:
            self.holds[_number(tensor)] = sources
            self.storages.append(tensor.untyped_storage())
        return made

    def streams(self, model: nn.Module) -> list[str]:
        """The name of each draw's stream.

        A draw belongs to the parameter or buffer whose storage it filled, else to the first one
        that its numbers reached; a second draw of one tensor counts on from the first. One that
        nothing is left of, such as a default that was drawn over, goes by its place in the order.
        """
        tensors = [*model.named_parameters(), *model.named_buffers()]
        owners: dict[int, str] = {}
        for is_own in (True, False):
            for name, tensor in tensors:
                number = _number(tensor)
                for draw in sorted(self.holds.get(number, ())):
                    if not is_own or self.filled[draw] == number:
                        owners.setdefault(draw, name)
        named, counts = [], Counter()
        for draw in range(len(self.filled)):
            owner = owners.get(draw, "")
            named.append(f"{owner}/{counts[owner]}")
            counts[owner] += 1
        return named


class _Drawing(TorchDispatchMode):
    """Has each draw made from its stream; torch's generator is as before afterwards."""

    def __init__(self, streams: list[str], seed: int):
        super().__init__()
        self.streams = streams
        self.seed = seed
        self.num_draws = 0

    def __enter__(self):
        self.before = torch.default_generator.get_state()
        return super().__enter__()

    def __exit__(self, *error):
        torch.default_generator.set_state(self.before)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _draws(func, kwargs):
            known = self.num_draws < len(self.streams)
            stream = self.streams[self.num_draws] if known else f"draw {self.num_draws}"
            torch.default_generator.manual_seed(_stream_seed(self.seed, stream))
            self.num_draws += 1
        return func(*args, **(kwargs or {}))


def _draws(func, kwargs: dict | None) -> bool:
    """Whether an operation draws from torch's generator; one of its own is the file's business."""
    has_own = (kwargs or {}).get("generator") is not None
    return torch.Tag.nondeterministic_seeded in func.tags and not has_own


def _is_whole(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _number(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _stream_seed(seed: int, stream: str) -> int:
    digest = hashlib.blake2b(f"lmplay/{seed}/{stream}".encode(), digest_size=7).digest()
    return int.from_bytes(digest)
