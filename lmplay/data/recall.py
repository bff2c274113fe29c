"""Associative recall: texts of letters and their values, made on the spot and alike everywhere."""

import hashlib
from string import ascii_lowercase, ascii_uppercase

NUM_TEXTS = 1 << 16
NUM_PAIRS = 63
FEWEST = 2  # letters of a text; some have all of the alphabet
TEXT_BYTES = 2 * NUM_PAIRS + 1  # a row of 128 tokens holds one and its end


def recall_turns(number: int) -> list[tuple[str, str]]:
    """Prompts and answers, one behind another, of the text with this number.

    A text has some small letters, each of which stands for a large one. It is a colon and pairs of
    a letter, drawn anew each time, and what that stands for: where a letter was named before, its
    value is an answer, as Z is in :aQbZcRb. How many letters, which and in what order is drawn from
    the number alone. Texts of few letters teach what those of many ask for.
    Source: Arora et al. 2023, arXiv:2312.04927, section 3 (multi-query associative recall), here
    with questions among the pairs.
    """
    rest = int.from_bytes(hashlib.shake_128(b"recall %d" % number).digest(96), "big")

    def drawn(choices: int) -> int:
        nonlocal rest
        rest, place = divmod(rest, choices)
        return place

    letters, values = list(ascii_lowercase), list(ascii_uppercase)
    num_letters = FEWEST + drawn(len(letters) - FEWEST + 1)
    value_of = {}
    for _ in range(num_letters):
        letter = letters.pop(drawn(len(letters)))
        value_of[letter] = values.pop(drawn(len(values)))
    own, named, turns, prompt = list(value_of), [], [], ":"
    for place in range(NUM_PAIRS):
        is_last = place == NUM_PAIRS - 1
        letter = named[drawn(len(named))] if is_last else own[drawn(num_letters)]
        prompt += letter
        if letter in named:
            turns.append((prompt, value_of[letter]))
            prompt = ""
        else:
            named.append(letter)
            prompt += value_of[letter]
    return turns
