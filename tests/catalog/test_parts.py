"""What several ideas change in different parts of one statement is all in it; else they collide."""

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


def of_one_line(base, *ideas):
    lines = [f"{text}\n".splitlines(keepends=True) for text in (base, *ideas)]
    return "".join(merged(*lines)).removesuffix("\n")


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


def test_what_both_add_at_one_place_is_there_once():
    both = [CALL.replace("turn", f"tokens_BT, {more}turn") for more in ("", "e_BTC, ")]

    assert merged([CALL], *([call] for call in both)) == [both[1]]


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
    ("base", "ideas", "expected"),
    [
        (  # arguments in their places, keywords by name
            "self.key = linear(config.width, config.width)",
            [
                "self.key = linear(config.width, config.key_width)",
                "self.key = linear(config.read_width, config.width)",
                "self.key = linear(config.width, config.width, bias=True)",
            ],
            "self.key = linear(config.read_width, config.key_width, bias=True)",
        ),
        (
            "y = attend(q, k, v, is_causal=T > 1)",
            [
                "y = attend(q, k, v, attn_mask=bias)",
                "y = attend(q, k, v, is_causal=T > 1, scale=s)",
            ],
            "y = attend(q, k, v, attn_mask=bias, scale=s)",
        ),
        ("f(a, b)", ["f(a, g(b))", "h(a, b)"], "h(a, g(b))"),
        ("x = x + y", ["x = self.weight * x + y", "x = x + 2 * y"], "x = self.weight * x + 2 * y"),
        (  # what a function gives back, and what takes it
            "def forward(self, x: Tensor, turn, cache=None) -> Tensor:",
            [
                "def forward(self, sources: list[Tensor], turn, cache=None) -> list[Tensor]:",
                "def forward(self, x: Tensor, turn, kv, cache=None) -> tuple[Tensor, Tensor]:",
            ],
            "def forward(self, sources: list[Tensor], turn, kv, cache=None)"
            " -> tuple[list[Tensor], Tensor]:",
        ),
        ("return x", ["return sources", "return x, kv", "return x, v"], "return sources, kv, v"),
        (
            "x = block(x, turn)",
            ["sources = block(sources, turn)", "x, kv = block(x, turn, kv)"],
            "sources, kv = block(sources, turn, kv)",
        ),
        ("for b in blocks:", ["for b in blocks[:n]:", "for c in blocks:"], "for c in blocks[:n]:"),
        (  # one idea only puts it under a condition
            "    k = self.key(x)",
            ["    if has_keys:\n        k = self.key(x)", "    k = self.key(m)"],
            "    if has_keys:\n        k = self.key(m)",
        ),
    ],
)
def test_each_part_is_changed_by_one_idea(base, ideas, expected):
    assert of_one_line(base, *ideas) == expected
    if "kv" not in expected:
        assert of_one_line(base, *ideas[::-1]) == expected


def test_a_line_that_became_two_is_merged_with_the_one_of_them_that_is_like_it():
    loop = ["    for block in self.blocks:\n", f"    {CALL}", "        x_BTC = norm(x_BTC)\n"]
    streams = [
        loop[0],
        "            s_BTC = block(s_BTC, turn, cache)\n",
        "        x_BTC = s_BTC.mean(-2)\n",
        loop[2],
    ]
    handed = [loop[0], loop[1].replace("turn", "turn, kept"), loop[2]]

    assert merged(loop, streams, handed) == [
        loop[0],
        "            s_BTC = block(s_BTC, turn, kept, cache)\n",
        "        x_BTC = s_BTC.mean(-2)\n",
        loop[2],
    ]


def test_the_words_of_all_ideas_are_in_the_docstring():
    base = ["class A:\n", '    """Plain."""\n', "\n", "    def forward(x):\n"]
    longer = [base[0], '    """Plain.\n', "\n", "    Much more.\n", '    """\n', *base[2:]]
    other = [base[0], '    """Other."""\n', *base[2:]]

    assert merged(base, longer, other) == [
        *longer[:4],
        "\n",
        "    Other.\n",
        *longer[4:],
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("block(x_BTC, turn, cache, a(1))[0]", "block(x_BTC, turn, cache, b(2))[1]"),
        ("block(x_BTC, turn, kept)", "block(x_BTC, turn)"),  # changes and takes away
        ("block(x_BTC, kept, cache)", "block(x_BTC, other, cache)"),
        ("block(x_BTC, e_BTC, turn, cache)", "block(x_BTC, turn, e_BTC, cache)"),  # one name twice
        ("block(x_BTC, turn, cache, keep=1)", "block(x_BTC, turn, cache, keep=2)"),
        ("layer(x_BTC, turn, cache)", "other(x_BTC, turn, cache)"),  # another function each
        ("block(x_BTC, turn, cache) + 1", "block(x_BTC, turn, cache) + e_BTC"),
        ("block(x_BTC, turn, cache)  # why", "block(x_BTC, e_BTC, turn, cache)"),
    ],
)
def test_all_else_collides_as_ever(one, other):
    call = "block(x_BTC, turn, cache)"

    with pytest.raises(Conflict):
        merged([CALL], [CALL.replace(call, one)], [CALL.replace(call, other)])


def test_what_begins_a_block_stands_before_its_own_line():
    base = ["    q = rotate(q)\n", "    k = rotate(k)\n", "    end()\n"]
    under = ["    if self.rotary:\n", f"    {base[0]}", f"    {base[1]}", base[2]]
    normed = ["    q = norm(q)\n", "    q = rotate(q, turn)\n", *base[1:]]

    for ideas in ([under, normed], [normed, under]):
        assert merged(base, *ideas) == [
            "    q = norm(q)\n",
            "    if self.rotary:\n",
            "        q = rotate(q, turn)\n",
            *under[2:],
        ]


def test_nothing_is_added_between_lines_that_another_idea_wrote_anew():
    base = ["    a()\n", "    b()\n", "    c()\n"]
    anew = ["    if x:\n", "        a()\n", "        b()\n", "    c()\n"]

    with pytest.raises(Conflict):
        merged(base, anew, ["    a()\n", "    between()\n", "    b()\n", "    c()\n"])


def test_a_statement_that_the_region_cuts_is_left_alone():
    base = ["x = f(\n", "    a, b\n", ")\n"]
    one, other = (["x = f(\n", f"    a, {name}, b\n", ")\n"] for name in ("c", "d"))

    with pytest.raises(Conflict):
        merged(base, one, other)
