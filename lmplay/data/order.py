"""The order of training: which row comes when, by arithmetic alone.

Nothing here depends on a library's random numbers, so the order is the same everywhere, and any
place in it is found without walking there. Every function is pure.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

_VERSION = 1  # of the permutation; another one is another order
_ROUNDS = 6
_MASK = (1 << 64) - 1


def permuted(index: int, n: int, seed: int, *names: object) -> int:
    """Where a keyed bijection on 0 <= index < n sends `index`, in constant time.

    A balanced Feistel network over the next power of four, walked until it lands below n.
    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(seed, names)
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        index = left << half | right
        if index < n:
            return index


def num_rows(num_tokens: int, T: int) -> int:
    """Rows of T targets in a stream; its first token is no target, the last row may be short."""
    return -(-max(0, num_tokens - 1) // T)


def rows_before(position: int, T: int) -> int:
    """How many rows have their last target before this position of the stream."""
    return max(0, -(-position // T) - 1)


class Rows:
    """The rows of one stream of tokens, shard by shard, permuted within each.

    Row r has the targets at positions r*T + 1 to r*T + T, the stream's last row those that are
    left. It belongs to the shard that holds its last target, so a prefix of the shards decides
    the order of a prefix of the rows. While a source still grows, each shard in `ends` is known
    to have a successor, so no row of it is the stream's last, and its rows are settled.
    """

    def __init__(self, ends: Sequence[int], complete: bool, T: int):
        """
        Args:
            ends: for each shard, the number of tokens up to its end.
            complete: whether the last of them ends the stream.
        """
        self.ends, self.complete, self.T = ends, complete, T
        total = ends[-1] if ends else 0
        self.num_known = num_rows(total, T) if complete else rows_before(total, T)

    def row(self, position: int, seed: int, name: str, epoch: int) -> int:
        """The row that comes at this position of an epoch, 0 <= position < num_known."""
        shard = bisect_right(self.ends, (position + 1) * self.T)
        last = len(self.ends) - 1
        shard = min(shard, last)
        first = rows_before(self.ends[shard - 1], self.T) if shard else 0
        settled = shard < last or not self.complete
        after = rows_before(self.ends[shard], self.T) if settled else self.num_known
        return first + permuted(position - first, after - first, seed, name, epoch, shard)


class Mixture:
    """Rows of several datasets as one sequence.

    In turn, or, with shares, so that after every row each dataset has had its share to within
    less than one row for each dataset. A dataset that is used up begins again.
    """

    def __init__(self, mixing: str | list[float], num_datasets: int):
        self.until_all = mixing == "all_exhausted"
        self._m = num_datasets
        self._shares = None
        if isinstance(mixing, list):
            exact = [Fraction(share) for share in mixing]
            # of what the datasets before it leave over
            self._shares = [share / sum(exact[i:]) for i, share in enumerate(exact)]

    def at(self, k: int) -> tuple[int, int]:
        """The dataset of row k, and how many rows of it came before."""
        if self._shares is None:
            return k % self._m, k // self._m
        for dataset, share in enumerate(self._shares):
            before = _rounded(k * share)
            if _rounded((k + 1) * share) > before:
                return dataset, before
            k -= before
        raise AssertionError("the last share is 1")

    def drawn(self, k: int, dataset: int) -> int:
        """How many of the first k rows are of this dataset."""
        if self._shares is None:
            return (k + self._m - 1 - dataset) // self._m
        for share in self._shares[:dataset]:
            k -= _rounded(k * share)
        return _rounded(k * self._shares[dataset])

    def used_up(self, dataset: int, rows: int) -> int:
        """The fewest rows of the mixture that hold this many of the dataset's."""
        low, high = 0, 1
        while self.drawn(high, dataset) < rows:
            low, high = high, high * 2
        while low < high:
            middle = (low + high) // 2
            if self.drawn(middle, dataset) < rows:
                low = middle + 1
            else:
                high = middle
        return low

    def epoch(self, sizes: Sequence[int], complete: Sequence[bool]) -> tuple[int, bool]:
        """The rows of one epoch, and whether that is final.

        Args:
            sizes: rows known of each dataset.
            complete: whether those are all; an epoch made of fewer can only be longer.
        """
        ends = [self.used_up(i, size) for i, size in enumerate(sizes)]
        if self.until_all:
            return max(ends), all(complete)
        first = min(range(self._m), key=ends.__getitem__)
        return ends[first], complete[first]


@lru_cache(maxsize=256)
def _round_keys(seed: int, names: tuple) -> tuple[int, ...]:
    text = repr((_VERSION, seed, *names)).encode()
    digest = hashlib.blake2b(text, digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "big") for i in range(0, len(digest), 8))


def _mixed(value: int) -> int:
    """Source: Steele et al. 2014, "Fast splittable pseudorandom number generators", SplitMix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def _rounded(value: Fraction) -> int:
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)
