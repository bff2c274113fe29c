"""Arguments that several ideas add to one line are all in it; whatever else they change is not."""

import pytest

from lmplay.catalog.merge import Conflict, merge

CALL = "        x_BTC = block(x_BTC, turn, cache)\n"
HEAD = "    def forward(self, x_BTC: Tensor, turn: tuple[Tensor, Tensor], cache=None) -> Tensor:\n"
LONG = [
    "    def forward(\n",
    "        self, x_BTC: Tensor, e_BTC: Tensor, turn: tuple[Tensor, Tensor], cache=None\n",
    "    ) -> Tensor:\n",
    "        x_BTC = x_BTC + e_BTC\n",
]


def merged(base, *ideas):
    return merge(base, {str(number): lines for number, lines in enumerate(ideas)})


def test_each_idea_hands_on_what_it_adds():
    one, other = CALL.replace("turn", "e_BTC, turn"), CALL.replace("turn,", "turn, first,")
    more = other.replace("x_BTC = ", "x_BTC, first = ")

    assert merged([CALL], [one], [other]) == [
        "        x_BTC = block(x_BTC, e_BTC, turn, first, cache)\n"
    ]
    assert merged([CALL], [one], [more])[0].startswith("        x_BTC, first = block(x_BTC, e_BTC,")


def test_what_one_idea_takes_away_is_gone_and_what_another_adds_is_there():
    one, other = CALL.replace("turn, ", ""), CALL.replace("turn,", "turn, first,")

    assert merged([CALL], [one], [other]) == [CALL.replace("turn", "first")]
    assert merged([CALL], [other], [one]) == [CALL.replace("turn", "first")]


def test_what_they_add_at_one_place_keeps_their_order_in_head_and_call_alike():
    heads = [[HEAD.replace("cache", f"{name}: int, cache")] for name in ("b", "a")]
    calls = [[CALL.replace("cache", f"{name}, cache")] for name in ("b", "a")]

    assert merged([CALL], *calls) == [CALL.replace("cache", "b, a, cache")]
    assert " b: int, a: int, cache=None" in "".join(merged([HEAD], *heads))


def test_heads_of_several_lines_are_written_as_ruff_would_with_what_stands_below():
    other = [HEAD.replace("cache=None)", "cache=None, found: list[Tensor] | None = None)")]
    lines = merged([HEAD], LONG, other)

    assert lines == [
        "    def forward(\n",
        "        self,\n",
        "        x_BTC: Tensor,\n",
        "        e_BTC: Tensor,\n",
        "        turn: tuple[Tensor, Tensor],\n",
        "        cache=None,\n",
        "        found: list[Tensor] | None = None,\n",
        "    ) -> Tensor:\n",
        "        x_BTC = x_BTC + e_BTC\n",
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("block(x_BTC)", "block(x_BTC, e_BTC, turn, kept, cache)"),  # takes what is around it
        ("block(x_BTC, turn, cache, a(1))[0]", "block(x_BTC, turn, cache, b(2))[1]"),
        ("block(x_BTC, turn, kept)", "block(x_BTC, e_BTC, turn, cache)"),  # changes one
        ("block(x_BTC, e_BTC, turn, cache)", "block(x_BTC, turn, e_BTC, cache)"),  # one name twice
        ("layer(x_BTC, turn, cache)", "other(x_BTC, turn, cache)"),  # another function each
        ("block(x_BTC, turn, cache) + 1", "block(x_BTC, turn, cache) + e_BTC"),
        ("block(x_BTC, turn, cache)  # why", "block(x_BTC, e_BTC, turn, cache)"),
    ],
)
def test_all_else_collides_as_ever(one, other):
    call = "block(x_BTC, turn, cache)"

    with pytest.raises(Conflict):
        merged([CALL], [CALL.replace(call, one)], [CALL.replace(call, other)])


def test_a_statement_that_the_region_cuts_is_left_alone():
    base = ["x = f(\n", "    a, b\n", ")\n"]
    one, other = (["x = f(\n", f"    a, {name}, b\n", ")\n"] for name in ("c", "d"))

    with pytest.raises(Conflict):
        merged(base, one, other)
