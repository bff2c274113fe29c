"""GPT-2's pattern without its lookahead, which a regular expression does slowly.

The pattern ends in `\\s+(?!\\S)|\\s+`: white space before a word is one piece but for its last
character. Where the gaps of a text are short, or marked, a plain `\\s` or `\\s+` finds the same.

Source: the pattern is that of GPT-2's code (Radford et al. 2019).
"""

import re

CUT, NEXT = "\0", "\1"  # in no text that is cut: where it is, and where the next one begins
SHORT_GAPS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"
CUT_GAPS = SHORT_GAPS + "+"
_WIDE = [c for c in map(chr, range(0x80, 0x3001)) if c.isspace()]
_WIDE_GAP = re.compile(r"[{0}]\s|\s[{0}]".format("".join(_WIDE)))


def is_plain(text: str) -> bool:
    """Whether `cut` can tell the text's gaps: no white space beyond ASCII beside other white space.

    And none of the characters that `cut` marks with.
    """
    if CUT in text or NEXT in text:
        return False
    return not any(blank in text for blank in _WIDE) or not _WIDE_GAP.search(text)


def has_short_gaps(text: str) -> bool:
    """Whether SHORT_GAPS finds the pieces that GPT-2's pattern finds.

    Those of a gap of one or two characters are each character by itself.

    Args:
        text: one that `is_plain`, or several with NEXT between them.
    Returns:
        False also where that is not certain.
    """
    import numpy as np

    is_gap = np.frombuffer(text.encode(), np.uint8) <= ord(" ")
    return not is_gap[-2:].all() and not (is_gap[:-2] & is_gap[1:-1] & is_gap[2:]).any()


def cut(text: str) -> str:
    """Put CUT before the last character of each gap that has several and does not end a text.

    Then CUT_GAPS finds the pieces that GPT-2's pattern finds. `text` is as for `has_short_gaps`.
    """
    import numpy as np

    data = np.frombuffer(text.encode(), np.uint8)
    is_gap = (data == ord(" ")) | ((data - ord("\t")) <= ord("\r") - ord("\t"))
    is_last = is_gap[:-2] & is_gap[1:-1] & ~is_gap[2:] & (data[2:] != ord(NEXT))
    places = is_last.nonzero()[0] + 1
    if not len(places):
        return text
    made = np.full(len(data) + len(places), ord(CUT), np.uint8)
    kept = np.ones(len(made), bool)
    kept[places + np.arange(len(places))] = False
    made[kept] = data
    return made.tobytes().decode()
