"""Associative recall: texts of pairs and questions, made on the spot and the same everywhere."""

import hashlib
from collections.abc import Sequence
from string import ascii_letters

NUM_TEXTS = 1 << 15
NUM_PAIRS = 32
NUM_ASKED = 31
TEXT_BYTES = 2 * NUM_PAIRS + 1 + 2 * NUM_ASKED  # a row of 128 tokens holds one and its end


def recall_turns(number: int) -> list[tuple[str, str]]:
    """Prompts and answers, one behind another, of the text with this number.

    The first prompt names the value of each of NUM_PAIRS letters and asks for one of them, the
    others ask for one more each: aQbZ:b is answered by Z. Letters, values and what is asked are
    without repetition, and drawn from the number alone.
    Source: Arora et al. 2023, arXiv:2312.04927, section 3 (multi-query associative recall).
    """
    rest = int.from_bytes(hashlib.blake2b(b"recall %d" % number).digest(), "big")

    def drawn(choices: Sequence[str], count: int) -> list[str]:
        nonlocal rest
        left, chosen = list(choices), []
        for _ in range(count):
            rest, place = divmod(rest, len(left))
            chosen.append(left.pop(place))
        return chosen

    keys, values = drawn(ascii_letters, NUM_PAIRS), drawn(ascii_letters, NUM_PAIRS)
    pairs = [key + value for key, value in zip(keys, values, strict=True)]
    asked = drawn(pairs, NUM_ASKED)
    fronts = ["".join(pairs) + ":", *[""] * (NUM_ASKED - 1)]
    return [(front + pair[0], pair[1]) for front, pair in zip(fronts, asked, strict=True)]
