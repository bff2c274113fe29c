"""What --seeds declares."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmplay.errors import UserError
from lmplay.run.design import Design, design_of


@pytest.mark.parametrize(
    ("text", "screen", "looks"),
    [
        ("5", 0, [5]),
        ("1", 0, [1]),
        ("3..12", 0, [3, 5, 8, 12]),
        ("3..8", 0, [3, 5, 8]),
        ("5..12", 0, [5, 8, 12]),
        ("3+8", 3, [8]),
        ("3+3..12", 3, [3, 5, 8, 12]),
    ],
)
def test_seeds_declare_looks(text, screen, looks):
    design = design_of(text)

    assert (design.screen, design.looks, design.seeds_text) == (screen, looks, text)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "five", "12..3", "3..3", "1..4", "1+8", "3+1", "3+"]
)
def test_what_is_no_design_is_refused(text):
    with pytest.raises(UserError, match="--seeds") as raised:
        design_of(text)

    assert raised.value.code == 2 and "3..12" in raised.value.hint


@pytest.mark.parametrize(
    ("text", "why"), [("3..2", "do not rise"), ("4..4", "do not rise"), ("1..4", "too few seeds")]
)
def test_what_is_wrong_with_a_design_is_named(text, why):
    with pytest.raises(UserError, match=why):
        design_of(text)


def test_a_screens_seeds_and_those_of_the_looks_never_meet():
    screen, look = design_of("3+8", first_seed=20).stages

    assert (screen, look) == (range(20, 23), range(23, 31))


@given(first=st.integers(2, 20), more=st.integers(1, 60), seed=st.integers(0, 9))
def test_looks_rise_to_the_last_one_and_later_ones_are_fresh(first, more, seed):
    design = design_of(f"{first}..{first + more}", seed)

    assert design.looks == sorted(set(design.looks)) and design.looks[-1] == first + more
    assert design.later().seeds.start == design.seeds.stop
    assert design_of(design.seeds_text, seed) == design


def test_its_words_declare_it_again():
    assert Design(first_seed=5, looks=[5], rates=[0.5, 1, 2]).words == (
        "--seed 5 --seeds 5 --rates 0.5,1,2"
    )
