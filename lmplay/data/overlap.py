"""How much of the held-out text is trained on too."""

from collections.abc import Sequence

import numpy as np

from lmplay.data.document import Document, FairSample, batches
from lmplay.data.rendering import columns_of
from lmplay.data.shard_cache import fingerprint, remembered
from lmplay.data.sources import documents, has_own_validation, source_fingerprint
from lmplay.plan import Dataset

_STRETCH = 128  # bytes; shorter ones come twice by chance, as "Once upon a time" does
_TRIPLE = (0x9D, 0x65, 0xB3)  # what a stretch's first three bytes are multiplied with
_FEW = 8  # of 256: one place of 32 begins a stretch
_ODD = 0x9E3779B97F4A7C15  # a multiplier that mixes all bits upwards
_BATCH_CHARACTERS = 1 << 18  # looked through at once, however short the documents are


def share_trained_on(
    dataset: Dataset,
    fraction: float,
    num_bytes: int,
    others: Sequence[tuple[Dataset, float]] = (),
    sample: FairSample | None = None,
) -> float:
    """The share of held-out text that is also in the training text; remembered in the cache.

    Args:
        dataset: local files.
        num_bytes: of held-out text that is looked at.
        others: local files whose training text is looked at instead of the dataset's own, each
            with its own fraction.
        sample: of that size, where held-out text was read already.
    """
    trained_on = list(others) or [(dataset, fraction)]

    def compute() -> float:
        looked_at = sample or FairSample(num_bytes, documents(dataset, "validation", fraction))
        stretches = [_stretches([document]) for document in looked_at]
        held_out = np.unique(np.concatenate(stretches)) if stretches else np.empty(0)
        if not len(held_out):
            return 0.0
        found = np.zeros(len(held_out), bool)
        learned = (document for each, of in trained_on for document in documents(each, "train", of))
        for batch in batches(learned, _BATCH_CHARACTERS):
            hashes = _stretches(batch)
            at = np.searchsorted(held_out, hashes).clip(max=len(held_out) - 1)
            found[at[held_out[at] == hashes]] = True
        return float(found.mean())

    own = has_own_validation(dataset)
    both = [source_fingerprint(dataset, split) for split in ("train", "validation")[: 1 + own]]
    theirs = [(source_fingerprint(each), columns_of(each), of) for each, of in others]
    key = fingerprint("stretches", both, columns_of(dataset), num_bytes, own or fraction, theirs)
    return float(remembered(key, compute))


def _stretches(documents: list[Document]) -> np.ndarray:
    """Hashes of stretches of these texts, and over their borders, that begin where bytes say so.

    A copy has the same ones wherever it stands and however its lines are broken. A text that is
    shorter than a stretch counts as a whole.
    """
    short = [document.place * 2**53 for document in documents if document.num_bytes < _STRETCH]
    whole = np.array(short, np.uint64)
    octets = np.frombuffer(b" ".join(document.utf8 for document in documents), np.uint8)
    is_gap = octets <= ord(" ")
    octets = octets[~(is_gap & np.append(False, is_gap[:-1]))].clip(min=ord(" "))
    num_places = len(octets) - _STRETCH + 1
    if num_places < 1:
        return whole
    mixed = sum(octets[at : at + num_places] * np.uint8(by) for at, by in enumerate(_TRIPLE))
    (starts,) = (mixed < _FEW).nonzero()
    windows = np.lib.stride_tricks.sliding_window_view(octets, _STRETCH)[starts].view(np.uint64)
    powers = np.uint64(_ODD) ** np.arange(1, _STRETCH // 8 + 1, dtype=np.uint64)
    return np.concatenate([whole, (windows * powers).sum(axis=1)])
