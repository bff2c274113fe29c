"""A text is cut exactly as GPT-2's pattern cuts it, without the lookahead."""

import regex
from hypothesis import example, given
from hypothesis import strategies as st

from lmplay.data.gaps import CUT, CUT_GAPS, NEXT, SHORT_GAPS, cut, has_short_gaps, is_plain

GPT2_PATTERN = (  # Radford et al. 2019, the code of GPT-2
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)

# what decides how GPT-2 cuts a text: kinds of character, contractions, all white space
PIECES = st.sampled_from(
    ["a", "é", "Ab", "1", "½", "'", "'s", "'ll", "ve", "-", "é̄", "北", "🙂", "\0"]
)
BLANKS = st.sampled_from([c for c in map(chr, range(0x3001)) if c.isspace()])
GAPS = st.one_of(st.text(" \n\t\r", min_size=1, max_size=4), BLANKS)
CUTS = st.lists(st.one_of(PIECES, GAPS)).map("".join)


@given(texts=st.lists(CUTS, min_size=1, max_size=3))
@example(texts=["if x:\n    two  blanks\n\nand it's a line\n\n", " \n"])
@example(texts=["two  blanks\n\nand it's a line\n", " a"])
def test_neither_short_gaps_nor_cut_ones_need_the_lookahead(texts):
    if all(map(is_plain, texts)):
        joined = NEXT.join(texts)
        if has_short_gaps(joined):
            pieces = [regex.findall(SHORT_GAPS, text) for text in texts]
            assert pieces == [regex.findall(GPT2_PATTERN, text) for text in texts]
        cuts = [text.split(CUT) for text in cut(joined).split(NEXT)]
        pieces = [[p for part in parts for p in regex.findall(CUT_GAPS, part)] for parts in cuts]
        assert pieces == [regex.findall(GPT2_PATTERN, text) for text in texts]


def test_a_text_is_plain_unless_white_space_beyond_ascii_stands_in_a_gap():
    for text in ("", "It was  said:\n\n“he\tdidn't”.\n", "if x:\n    y", "a\xa0b", "a\u2003b\n"):
        assert is_plain(text)
    for text in ("a\xa0 b", "a\u2003\u2003b", "a \u3000b", f"a{CUT}b", f"a{NEXT}b"):
        assert not is_plain(text)


def test_common_text_has_short_gaps_and_code_has_not():
    assert has_short_gaps("It was  said:\n\n“he\tdidn't”.\n")
    for text in ("if x:\n    y", "a\n\n\nb", "end\n\n", f"end\n\n{NEXT}b"):
        assert not has_short_gaps(text)
    for pattern in (SHORT_GAPS, CUT_GAPS):
        assert regex.findall(pattern, "a   b") != regex.findall(GPT2_PATTERN, "a   b")
