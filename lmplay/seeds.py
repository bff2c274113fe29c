"""Seeds of separate streams of randomness, all made from the one seed of a run."""

import hashlib


def stream_seed(seed: int, purpose: str) -> int:
    """The seed of one stream of randomness (weights, dropout), apart from the others."""
    digest = hashlib.blake2b(f"lmplay/{seed}/{purpose}".encode(), digest_size=7).digest()
    return int.from_bytes(digest)
