"""Stacks: what merging edits promises, on lines of any kind and on real experiments."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmplay import catalog
from lmplay.catalog import canonical_name, diff, read_source, resolve
from lmplay.check import check
from lmplay.errors import UserError
from lmplay.experiment import load_experiment
from lmplay.stack import Conflict, edits_of, merge

BASE = [f"line {i}\n" for i in range(12)]
BUNDLED = sorted(e.name for e in catalog.entries().values() if e.name == e.file and e.parent)


@st.composite
def edited(draw, word):
    """BASE with some lines replaced, removed, or followed by new ones; every new line is unique."""
    lines = []
    for number, line in enumerate(["", *BASE]):
        kept = [line] * (number > 0)
        change = draw(st.sampled_from(["keep"] * 6 + ["replace", "remove", "insert"]))
        if change == "replace" and number:
            kept = [f"{word} {number}\n"]
        elif change == "remove":
            kept = []
        lines += kept
        if change == "insert":
            lines += [f"{word} after {number}\n"] * draw(st.integers(1, 2))
    return lines


def collide(a, b):
    """By the definition: replaced lines are shared, or an insertion is strictly inside some."""
    for x, y in itertools.product(edits_of(BASE, a), edits_of(BASE, b)):
        if x.lines == y.lines and (x.start, x.stop) == (y.start, y.stop):
            continue
        shared = set(range(x.start, x.stop)) & set(range(y.start, y.stop))
        inside = [p.start == p.stop and q.start < p.start < q.stop for p, q in ((x, y), (y, x))]
        if shared or any(inside):
            return True
    return False


def applied(*versions):
    """Gap by gap and line by line: what is inserted there, in order; what stands for the line."""
    all_edits = [edit for lines in versions for edit in edits_of(BASE, lines)]
    merged = []
    for at in range(len(BASE) + 1):
        merged += [line for e in all_edits if e.start == e.stop == at for line in e.lines]
        starting = {e.lines for e in all_edits if e.start == at < e.stop}
        merged += [line for lines in starting for line in lines]
        if at < len(BASE) and not any(e.start <= at < e.stop for e in all_edits):
            merged.append(BASE[at])
    return merged


@given(edited("a"))
def test_a_stack_of_one_is_the_file_and_nothing_stacked_on_it_changes_nothing(a):
    assert merge(BASE, {"a": a}) == a
    assert merge(BASE, {"a": a, "nothing": BASE}) == merge(BASE, {"nothing": BASE, "a": a}) == a
    assert merge(BASE, {"a": a, "again": a}) == a or any(
        e.is_insertion and e.lines[0].startswith(" ") for e in edits_of(BASE, a)
    )


@given(edited("a"), edited("b"))
def test_edits_collide_where_the_definition_says_and_else_both_are_applied(a, b):
    if collide(a, b):
        with pytest.raises(Conflict) as raised:
            merge(BASE, {"a": a, "b": b})
        assert "<<<<<<< a" in raised.value.merged and ">>>>>>> b" in raised.value.merged
    else:
        assert merge(BASE, {"a": a, "b": b}) == applied(a, b)


@given(edited("a"), edited("b"))
def test_order_matters_only_where_both_insert_at_one_place(a, b):
    places = [{e.start for e in edits_of(BASE, v) if e.is_insertion} for v in (a, b)]
    if collide(a, b) or places[0] & places[1]:
        return

    assert merge(BASE, {"a": a, "b": b}) == merge(BASE, {"b": b, "a": a})


@given(edited("a"), edited("b"))
def test_a_conflict_shows_both_sides_and_keeps_the_rest(a, b):
    if not collide(a, b):
        return
    with pytest.raises(Conflict) as raised:
        merge(BASE, {"a": a, "b": b})

    lines = raised.value.merged.splitlines(keepends=True)
    for own, other in (("a", "b"), ("b", "a")):
        added = [line for line in lines if line.startswith(own)]
        wanted = [line for line in (a if own == "a" else b) if line.startswith(own)]
        assert added == wanted, other
    assert raised.value.code == 2 and "--write" in raised.value.hint


# small ideas on the baseline, each a list of (old, new): once in the file
IDEAS = {
    "squared_relu": [
        ("        h_BTF = F.gelu(h_BTF)\n", "        h_BTF = F.relu(h_BTF).square()\n")
    ],
    "gated_attention": [
        (
            "        self.output = nn.Linear(config.width, config.width)\n"
            "        self.dropout = nn.Dropout(config.ff_dropout)\n\n    def split",
            "        self.output = nn.Linear(config.width, config.width)\n"
            "        self.dropout = nn.Dropout(config.ff_dropout)\n"
            "        self.gate = nn.Linear(config.width, config.width)\n\n    def split",
        ),
        (
            "        y_BTC = y_BTHD.flatten(2)\n",
            "        y_BTC = y_BTHD.flatten(2)\n"
            "        g_BTC = self.gate(x_BTC)\n"
            "        y_BTC = y_BTC * g_BTC.sigmoid()\n",
        ),
    ],
    "query_scale": [
        (
            "        self.dropout = nn.Dropout(config.ff_dropout)\n\n    def split",
            "        self.dropout = nn.Dropout(config.ff_dropout)\n"
            "        self.query_scale = nn.Parameter(torch.ones(config.width))\n\n    def split",
        ),
        (
            "        q_BTC = self.query(x_BTC)\n",
            "        q_BTC = self.query(x_BTC)\n        q_BTC = q_BTC * self.query_scale\n",
        ),
    ],
    "parallel": [
        (
            "        u_BTC = self.mlp_norm(x_BTC)\n        y_BTC = self.mlp(u_BTC)\n",
            "        y_BTC = self.mlp(u_BTC)\n",
        ),
        ("        self.mlp_norm = nn.LayerNorm(config.width)\n", ""),
    ],
    "embedding_norm": [
        (
            "        nn.init.zeros_(self.position_table.weight)\n",
            "        nn.init.zeros_(self.position_table.weight)\n"
            "        self.embedding_norm = nn.LayerNorm(config.width)\n",
        ),
        (
            "        x_BTC = self.dropout(x_BTC)\n        for",
            "        x_BTC = self.dropout(x_BTC)\n"
            "        x_BTC = self.embedding_norm(x_BTC)\n        for",
        ),
    ],
    "cap": [
        (
            "class Model(nn.Module):\n",
            "class Head(nn.Module):\n"
            '    """Logits within -15 and 15."""\n\n'
            "    def __init__(self, config: Config):\n"
            "        super().__init__()\n"
            "        self.linear = nn.Linear(config.width, config.vocab_size)\n\n"
            "    def forward(self, x_BTC: Tensor) -> Tensor:\n"
            "        z_BTV = self.linear(x_BTC)\n"
            "        return config_cap * torch.tanh(z_BTV / config_cap)\n\n\n"
            "config_cap = 15.0\n\n\n"
            "class Model(nn.Module):\n",
        ),
        (
            "        self.head = nn.Linear(config.width, config.vocab_size)\n",
            "        self.head = Head(config)\n",
        ),
    ],
}


@pytest.fixture
def ideas(tmp_path, monkeypatch):
    """The ideas above as experiments that can be named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    base = resolve("gpt2ish")
    for name, edits in IDEAS.items():
        source = base.source
        for old, new in edits:
            assert source.count(old) == 1, (name, old)
            source = source.replace(old, new)
        plain = read_source(source, Path("x.py"))[0]
        body = source[source.index("from dataclasses") :]
        body = body[: body.index("VARIANTS")] + body[body.index("TINY") :]
        old, new = catalog.definitions(base.source), catalog.definitions(plain.source)
        changed = [key for key in new if new[key] != old.get(key)]
        head = f'"""{name}.\n\nIdea: a test.\nSource: a test.\n'
        head += f'Changed from gpt2ish: {", ".join(changed)}.\n"""\n\n'
        (tmp_path / "experiments" / f"{name}.py").write_text(head + body)
    return list(IDEAS)


def failed(name):
    return [proof for proof in check(load_experiment(resolve(name))) if proof.passed is False]


def test_every_idea_of_the_tests_passes_the_check(ideas):
    assert {name: failed(name) for name in ideas} == {name: [] for name in ideas}


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.combinations(IDEAS, 2)), ids="+".join)
def test_small_ideas_stack_in_pairs_and_pass_the_check(ideas, pair):
    for order in (pair, pair[::-1]):
        assert failed("+".join(order)) == []


@pytest.mark.slow
def test_all_of_them_stack_at_once(ideas):
    entry = resolve("+".join(ideas))

    assert failed(entry.name) == []
    assert entry.parent == "gpt2ish" and "Head" in entry.changed
    for name in ideas:
        for _, new in IDEAS[name]:
            for line in new.splitlines():
                assert line in entry.source


def test_two_ideas_that_change_one_line_conflict_and_the_report_shows_both(ideas, tmp_path):
    other = (tmp_path / "experiments/squared_relu.py").read_text()
    (tmp_path / "experiments/silu.py").write_text(
        other.replace("F.relu(h_BTF).square()", "F.silu(h_BTF)")
    )
    with pytest.raises(Conflict) as raised:
        resolve("squared_relu+silu")

    for words in (
        "- " + " " * 8 + "h_BTF = F.gelu",
        "h_BTF = F.relu",
        "h_BTF = F.silu",
        "gpt2ish.py",
    ):
        assert words in raised.value.problem
    marked = raised.value.merged
    assert (
        marked.index("<<<<<<< squared_relu")
        < marked.index("=======")
        < marked.index(">>>>>>> silu")
    )
    assert marked.startswith('"""squared_relu + silu')


def test_two_ideas_that_give_one_name_to_two_things_conflict(ideas, tmp_path):
    other = (tmp_path / "experiments/gated_attention.py").read_text()
    moved = (
        other.replace("        self.gate = nn.Linear(config.width, config.width)\n", "")
        .replace(
            "        self.num_heads = config.num_heads\n",
            "        self.num_heads = config.num_heads\n"
            "        self.gate = nn.Linear(config.width, config.width)\n",
        )
        .replace("        g_BTC = self.gate(x_BTC)\n        y_BTC = y_BTC * g_BTC.sigmoid()\n", "")
    )
    (tmp_path / "experiments/gate.py").write_text(moved)
    with pytest.raises(Conflict, match="both add gate to Attention, self"):
        resolve("gated_attention+gate")


def test_a_method_after_the_block_that_both_extend_comes_after_both():
    base = ["class A:\n", "    def f(self):\n", "        x = 1\n", "\n", "\n", "end\n"]
    a = [*base[:3], "        a = 1\n", "\n", "    def g(self):\n", "        return 2\n", *base[3:]]
    b = [*base[:3], "        b = 1\n", *base[3:]]

    merged = "".join(merge(base, {"a": a, "b": b}))
    assert merged.startswith(
        "class A:\n    def f(self):\n        x = 1\n        a = 1\n        b = 1\n\n    def g"
    )


def test_an_idea_that_a_merge_swallowed_fails_the_check():
    entry = resolve("value_norm+ue")
    for source, name in (("ue", "value_norm"), ("value_norm", "ue")):
        swallowed = replace(entry, source=resolve(source).source, changed=resolve(source).changed)
        found = {proof.name: proof for proof in check(load_experiment(swallowed))}

        assert found["ideas"].passed is False and name in found["ideas"].detail


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.combinations(BUNDLED, 2)), ids="+".join)
def test_bundled_pairs_stack_and_pass_the_check_or_show_both_hunks(pair):
    try:
        found = failed("+".join(pair))
    except Conflict as conflict:
        assert all(f"{name}:" in conflict.problem for name in pair)
    else:
        assert found == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ue+ue", "ue is in it twice"),
        ("ue+ue16x", "ue is in it twice"),
        ("gpt2ish+ue", "gpt2ish adds nothing"),
        ("ue+nothing", "no experiment called 'nothing'"),
        ("ue+", "no experiment called ''"),
        ("gpt2ish_small_init+ue", "no 'token_std' any more"),
    ],
)
def test_what_is_no_stack_is_told(name, told):
    with pytest.raises(UserError) as raised:
        resolve(name)

    assert told in raised.value.problem and raised.value.code == 2


def test_variants_of_a_stack_keep_their_values():
    entry = resolve("value_norm+ue16x")
    small = resolve("gpt2ish_small_init+value_norm")

    assert entry.variant == {"front_mul": 16} and small.variant == {"token_std": 0.2}
    assert load_experiment(entry).config(vocab_size=9).front_mul == 16
    assert read_source(entry.source, Path("mine.py"))[1].variant == entry.variant
    assert canonical_name(resolve("ue8x+value_norm")) == "ue+value_norm"
    assert resolve("ue8x+value_norm").source == resolve("ue+value_norm").source


def test_an_idea_on_an_idea_stacks_by_their_nearest_common_ancestor(ideas, tmp_path):
    parent = (tmp_path / "experiments/squared_relu.py").read_text()
    child = parent.replace("Changed from gpt2ish: MLP.", "Changed from squared_relu: MLP.").replace(
        "        y_BTC = self.down(h_BTF)\n", "        y_BTC = 2 * self.down(h_BTF)\n"
    )
    (tmp_path / "experiments/doubled.py").write_text(child)
    entry = resolve("doubled+gated_attention")

    assert entry.parent == "gpt2ish" and failed(entry.name) == []
    assert "2 * self.down" in entry.source and "square()" in entry.source
    with pytest.raises(UserError, match="squared_relu adds nothing"):
        resolve("doubled+squared_relu")


def test_the_diff_of_a_stack_is_that_to_the_ancestor():
    text = diff(resolve("value_norm+ue"))

    assert text.startswith("--- gpt2ish.py\n+++ value_norm+ue.py\n")
    assert "+class UnifiedEmbedding" in text and "+    norm_values: bool = True" in text
