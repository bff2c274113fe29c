"""What is offered where a name is wrong."""

import pytest

from lmplay.errors import nearest


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("eu", "ue"),  # letters that changed places win over names that are merely alike
        ("UE", "ue"),
        ("gpt2is", "gpt2ish"),
        ("widht", "width"),
        ("muonn", "Muon"),
        ("adamw", "AdamW"),
    ],
)
def test_a_slip_of_the_fingers_is_understood(name, meant):
    known = ["reglu", "ue", "gpt2ish", "width", "Muon", "AdamW", "due"]

    assert nearest(name, known) == f"did you mean {meant!r}? "


@pytest.mark.parametrize("name", ["", "nope", "xyz"])
def test_where_no_name_is_near_none_is_offered(name):
    assert nearest(name, ["opt_e2e", "quick", "ue"]) == ""
