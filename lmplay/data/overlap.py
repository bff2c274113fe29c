"""How much of the held-out text is trained on too."""

from collections.abc import Sequence

import numpy as np

from lmplay.data.document import Document, FairSample
from lmplay.data.rendering import columns_of
from lmplay.data.shard_cache import fingerprint, remembered
from lmplay.data.sources import documents, has_own_validation, source_fingerprint
from lmplay.plan import Dataset

_STRETCH = 128  # bytes; shorter ones come twice by chance, as "Once upon a time" does
_FEW_BITS = 4  # one place of 16 begins a stretch
_ODD = 0x9E3779B97F4A7C15  # a multiplier that mixes all bits upwards


def share_trained_on(
    dataset: Dataset, fraction: float, num_bytes: int, others: Sequence[tuple[Dataset, float]] = ()
) -> float:
    """The share of held-out text that is also in the training text; remembered in the cache.

    Args:
        dataset: local files.
        num_bytes: of held-out text that is looked at.
        others: local files whose training text is looked at instead of the dataset's own, each
            with its own fraction.
    """
    trained_on = list(others) or [(dataset, fraction)]

    def compute() -> float:
        sample = FairSample(num_bytes)
        for document in documents(dataset, "validation", fraction):
            sample.add(document)
        stretches = [_stretches(document) for document in sample]
        held_out = np.unique(np.concatenate(stretches)) if stretches else np.empty(0)
        if not len(held_out):
            return 0.0
        found = np.zeros(len(held_out), bool)
        for document in (d for each, of in trained_on for d in documents(each, "train", of)):
            learned = _stretches(document)
            at = np.searchsorted(held_out, learned).clip(max=len(held_out) - 1)
            found[at[held_out[at] == learned]] = True
        return float(found.mean())

    own = has_own_validation(dataset)
    both = [source_fingerprint(dataset, split) for split in ("train", "validation")[: 1 + own]]
    theirs = [(source_fingerprint(each), columns_of(each), of) for each, of in others]
    key = fingerprint("stretches", both, columns_of(dataset), num_bytes, own or fraction, theirs)
    return float(remembered(key, compute))


def _stretches(document: Document) -> np.ndarray:
    """Hashes of stretches of a text that begin where their first bytes say so.

    A copy has the same ones wherever it stands and however its lines are broken. What is shorter
    than a stretch counts as a whole.
    """
    octets = np.frombuffer(" ".join(document.text.split()).encode(), np.uint8)
    if len(octets) < _STRETCH:
        return np.array([document.place * 2**53], np.uint64)
    eights = np.lib.stride_tricks.sliding_window_view(octets, 8).copy().view(np.uint64).ravel()
    mixed = eights[: 1 - _STRETCH + 7] * _ODD
    (starts,) = (mixed >> np.uint64(64 - _FEW_BITS) == 0).nonzero()
    hashes = np.zeros(len(starts), np.uint64)
    for at in range(0, _STRETCH, 8):
        hashes = (hashes ^ eights[starts + at]) * _ODD
        hashes ^= hashes >> np.uint64(32)
    return hashes
