"""Stacks: what merging edits promises, on lines of any kind and on real experiments."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmplay.catalog import entries as catalog
from lmplay.catalog.entries import canonical_name, diff, resolve
from lmplay.catalog.entry import definitions, read_source
from lmplay.catalog.merge import Conflict, edits_of, merge
from lmplay.errors import UserError
from lmplay.model.experiment import load_experiment
from lmplay.proofs.specimen import Specimen
from lmplay.proofs.stacking import holds_every_idea
from lmplay.proofs.tiny import check, checked

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


code = st.lists(st.sampled_from(["\n", "class A:\n", "    def f:\n", "        x\n"]), max_size=12)


@given(code, code)
def test_edits_of_lines_that_repeat_lead_from_one_to_the_other(base, new):
    edits = edits_of(base, new)

    assert merge(base, {"new": new}) == new
    assert all(a.stop < b.start for a, b in itertools.pairwise(edits))


@pytest.mark.parametrize("names", [("method", "tail"), ("tail", "method")])
def test_a_method_between_two_that_end_alike_leaves_the_end_of_its_neighbour_alone(names):
    ends = ["        return x\n", "\n"]
    first = ["class A:\n", "    def first(x):\n", "        x = 1\n", *ends]
    second = ["    def second(x):\n", "        x = 2\n", *ends, "\n", *["# much more\n"] * 9]
    method = [*first, "    def method(x):\n", "        x = 3\n", *ends, *second]
    tail = [*first[:3], "        x = 4 * x\n", *first[3:], *second]
    ideas = {"method": method, "tail": tail}

    merged = merge([*first, *second], {name: ideas[name] for name in names})
    assert merged == [*tail[:6], *method[5:9], *second]


def test_what_is_added_to_a_method_that_another_idea_removes_conflicts():
    ends = ["        return x\n", "\n"]
    first = ["class A:\n", "    def first(x):\n", "        x = 1\n", *ends]
    second = ["    def second(x):\n", "        x = 2\n", *ends]
    rest = ["    def third(x):\n", "        x = 3\n", *ends, *["# much more\n"] * 9]
    longer = [*first, *second[:2], "        x = 4 * x\n", *second[2:], *rest]

    with pytest.raises(Conflict):
        merge([*first, *second, *rest], {"removed": [*first, *rest], "longer": longer})


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
    "token_shift": [
        (
            "        u_BTC = self.attention_norm(x_BTC)\n",
            "        u_BTC = self.attention_norm(x_BTC)\n"
            "        u_BTC = self.shifted(u_BTC, cache)\n",
        ),
        (
            "\n\nclass Model",
            "\n    def shifted(self, u_BTC: Tensor, cache) -> Tensor:\n"
            "        T = u_BTC.shape[1]\n"
            "        all_BSC = u_BTC if cache is None else cache.append(self, u_BTC)[0]\n"
            "        before_BTC = F.pad(all_BSC, (0, 0, 1, 0))[:, -T - 1 : -1]\n"
            "        u_BTC = u_BTC + 0.5 * before_BTC\n"
            "        return u_BTC\n\n\nclass Model",
        ),
    ],
    "query_key_norm": [
        (
            "        v_BHSD = self.split(v_BTC)\n",
            "        v_BHSD = self.split(v_BTC)\n"
            "        q_BHTD = F.rms_norm(q_BHTD, q_BHTD.shape[-1:])\n"
            "        k_BHSD = F.rms_norm(k_BHSD, k_BHSD.shape[-1:])\n",
        ),
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


def with_edits(source, *names):
    """What a person would write who puts these ideas into one file, by hand."""
    for name in reversed(names):  # so that lines at one place stand in the order of the names
        for old, new in IDEAS[name]:
            assert source.count(old) == 1, (name, old)
            source = source.replace(old, new)
    return source


@pytest.fixture
def ideas(tmp_path, monkeypatch):
    """The ideas above as experiments that can be named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    base = resolve("gpt2ish")
    for name in IDEAS:
        source = with_edits(base.source, name)
        plain = read_source(source, Path("x.py"))[0]
        body = source[source.index("from dataclasses") :]
        body = body[: body.index("VARIANTS")] + body[body.index("TINY") :]
        old, new = definitions(base.source), definitions(plain.source)
        changed = [key for key in new if new[key] != old.get(key)]
        head = f'"""{name}.\n\nIdea: a test.\nSource: a test.\n'
        head += f'Changed from gpt2ish: {", ".join(changed)}.\n"""\n\n'
        (tmp_path / "experiments" / f"{name}.py").write_text(head + body)
    return list(IDEAS)


def failed(name):
    return [proof for proof in check(load_experiment(resolve(name))) if proof.passed is False]


def test_every_idea_of_the_tests_passes_the_check(ideas):
    assert {name: failed(name) for name in ideas} == {name: [] for name in ideas}


# whose texts above overlap, or stand apart in the other order only
BY_HAND = {"gated_attention", "query_scale"}, {"token_shift", "cap"}


@pytest.mark.parametrize("number", [2, 3])
def test_small_ideas_merge_to_the_file_that_a_person_would_write(number):
    base, num_same = resolve("gpt2ish").source, 0
    alone = {name: with_edits(base, name).splitlines(keepends=True) for name in IDEAS}
    for names in itertools.islice(itertools.permutations(IDEAS, number), 0, None, number):
        merged = merge(base.splitlines(keepends=True), {name: alone[name] for name in names})
        if not any(pair <= set(names) for pair in BY_HAND):
            assert "".join(merged) == with_edits(base, *names), names
            num_same += 1

    assert num_same > 20


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.combinations(IDEAS, 2)), ids="+".join)
@pytest.mark.every_experiment
def test_small_ideas_stack_in_pairs_and_pass_the_check(ideas, pair):
    codes = [resolve("+".join(names)).source.split('"""', 2)[2] for names in (pair, pair[::-1])]

    assert failed("+".join(pair)) == []
    assert sorted(codes[0].splitlines()) == sorted(codes[1].splitlines())  # proved in one order


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
    with pytest.raises(Conflict, match="gated_attention and gate define gate in Attention, self"):
        resolve("gated_attention+gate")


def variation(tmp_path, name, of, *edits):
    """An experiment `name` beside those of the tests: `of` with some of its text replaced."""
    source = (tmp_path / f"experiments/{of}.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tmp_path / f"experiments/{name}.py").write_text(source)


def test_two_ideas_that_use_one_local_name_conflict_where_one_would_read_the_others(
    ideas, tmp_path
):
    first = "        k_BTC = self.key(x_BTC)\n", "        q_BTC = q_BTC * self.query_scale\n"
    inside = first[0], first[0] + "        g_BTC = k_BTC.tanh()\n        k_BTC = k_BTC + g_BTC\n"
    plain = "        self.query_scale = nn.Parameter(torch.ones(config.width))\n", ""
    early = "        g_BTC = self.gate(x_BTC)\n", ""
    start = "        T = x_BTC.shape[1]\n        q_", "        T = x_BTC.shape[1]\n" + early[0]
    variation(tmp_path, "inside", "query_scale", inside, plain, (first[1], ""))
    variation(tmp_path, "around", "gated_attention", early, (start[0], start[1] + "        q_"))
    assert "g_BTC" in resolve("gated_attention+inside").source  # one after the other

    with pytest.raises(Conflict) as raised:
        resolve("around+inside")
    assert "around and inside use the name g_BTC in Attention.forward" in raised.value.problem
    assert "+ g_BTC = self.gate" in raised.value.problem
    assert "+ g_BTC = k_BTC.tanh()" in raised.value.problem


@pytest.mark.parametrize(
    ("taken", "edits"),
    [
        (
            "q_BTC",
            [
                ("        q_BTC = self.query(x_BTC)\n", "        a_BTC = self.query(x_BTC)\n"),
                ("        q_BHTD = self.split(q_BTC)\n", "        q_BHTD = self.split(a_BTC)\n"),
            ],
        ),
        (
            "query",
            [
                (
                    "        self.query = nn.Linear(config.width, config.width)\n",
                    "        self.ask = nn.Linear(config.width, config.width)\n",
                ),
                ("        q_BTC = self.query(x_BTC)\n", "        q_BTC = self.ask(x_BTC)\n"),
            ],
        ),
    ],
)
def test_what_one_idea_takes_away_and_another_reads_is_a_conflict(ideas, tmp_path, taken, edits):
    square = "        h_BTF = F.relu(h_BTF).square()\n", "        h_BTF = F.gelu(h_BTF)\n"
    told = "Changed from gpt2ish: MLP.", "Changed from gpt2ish: Attention."
    key = "        k_BTC = self.key(x_BTC)\n"
    read = {"q_BTC": f"{key}        k_BTC = k_BTC + q_BTC\n"}
    read["query"] = f"{key}        k_BTC = k_BTC + self.query(x_BTC)\n"
    variation(tmp_path, "taker", "squared_relu", square, told, *edits)
    variation(tmp_path, "reader", "squared_relu", square, told, (key, read[taken]))
    with pytest.raises(Conflict) as raised:
        resolve("taker+reader")

    assert f"taker takes away {taken}, which reader reads:\ntaker:\n  - " in raised.value.problem
    assert "reader:\n  + k_BTC = k_BTC + " in raised.value.problem


def test_what_one_idea_has_no_use_for_and_another_reads_is_put_back():
    norms = resolve("layer_norm+qk_norm").source
    chosen = resolve("no_positions+sparse_indexer")

    assert "self.attention_norm = nn.LayerNorm(" in norms
    assert "self.query_norm = RMSNorm(config.head_width, config.norm_eps)" in norms
    order = [
        norms.index(f"\n\n\n{head}") for head in ("def linear(", "class RMSNorm(", "def rotary(")
    ]
    assert order == sorted(order)
    assert list(chosen.fields)[5:8] == ["mlp_multiple", "rope_base", "norm_eps"]
    assert "def rotary(" in chosen.source and "turn = rotary(positions_T, q_" in chosen.source


def test_what_one_idea_stores_and_the_others_pass_by_is_a_conflict(ideas, tmp_path):
    square = "        h_BTF = F.relu(h_BTF).square()\n", "        h_BTF = F.gelu(h_BTF)\n"
    told = "Changed from gpt2ish: MLP.", "Changed from gpt2ish: Attention."
    line = "        y_BTC = self.output(y_BTC)\n"
    by = line, line.replace("(y_BTC)", "(y_BTHD.flatten(2))")
    variation(tmp_path, "passing_by", "squared_relu", square, told, by)
    with pytest.raises(Conflict) as raised:
        resolve("gated_attention+passing_by")

    told = "gated_attention stores y_BTC in Attention.forward, which nothing reads there any more:"
    assert raised.value.problem.startswith(f"{told}\ngated_attention:\n  + y_BTC = y_BTC * g_BTC")


def test_what_is_stored_on_one_of_two_ways_may_be_read_behind_both(ideas, tmp_path):
    square = "        h_BTF = F.relu(h_BTF).square()\n", "        h_BTF = F.gelu(h_BTF)\n"
    line = "        y_BTC = self.down(h_BTF)\n"
    ways = (
        "        if self.training:\n    {}        else:\n            y_BTC = 2 * self.down(h_BTF)\n"
    )
    variation(tmp_path, "ways", "squared_relu", square, (line, ways.format(line)))
    variation(
        tmp_path, "scaled", "squared_relu", square, (line, line.replace("h_BTF)", "3 * h_BTF)"))
    )

    source = resolve("ways+scaled").source
    assert "            y_BTC = self.down(3 * h_BTF)\n        else:" in source


def test_what_two_ideas_replace_in_the_same_way_counts_once_with_the_names_it_adds(ideas, tmp_path):
    line = "        self.down = nn.Linear(4 * config.width, config.width)\n"
    both = line, line.replace("width)\n", "width, bias=False)\n        self.more = nn.Identity()\n")
    for name in ("squared_relu", "query_scale"):
        variation(tmp_path, f"{name}_too", name, both)

    assert resolve("squared_relu_too+query_scale_too").source.count("self.more =") == 1


def test_a_stack_credits_every_source_in_full(ideas, tmp_path):
    for name, source in (("squared_relu", "A\\\\B et al.,\n    section 2."), ("cap", 'the "C".')):
        variation(tmp_path, f"{name}_too", name, ("Source: a test.", f"Source: {source}"))
    docstring = resolve("squared_relu_too+cap_too+query_scale").docstring

    assert 'Source: A\\B et al., section 2; the "C"; a test.\n' in docstring
    assert docstring.startswith("squared_relu_too + cap_too + query_scale: stacked on gpt2ish.\n")
    assert (
        "in this order: squared_relu_too's, then cap_too's, then\n    query_scale's." in docstring
    )


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("ue+squared_relu", "squared_relu"),
        ("ue+value_norm+squared_relu", "value_norm+squared_relu"),
        ("squared_relu+uw6", "squared_relu+no_block_norms"),
        ("ue+uw1", "gpt2ish"),
    ],
)
def test_a_stack_folds_to_the_stack_of_what_its_ideas_fold_to(ideas, name, plain):
    entry = resolve(name)
    found = {proof.name: proof for proof in check(load_experiment(entry))}

    assert f"\nFolds to: {plain}.\n" in entry.docstring
    assert found["fold"].passed


@pytest.mark.parametrize(("name", "plain"), [("focus", "focus"), ("foc1_1", "gpt2ish")])
def test_what_folds_in_one_variant_only_folds_in_stacks_of_that_variant_only(name, plain):
    found = {proof.name: proof for proof in check(load_experiment(resolve(f"{name}+ue")))}

    assert found["fold"].passed and f"become {plain}'s" in found["fold"].detail


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


def test_an_idea_whose_start_of_zero_and_one_is_its_parent_is_found_in_a_stack():
    specimen = Specimen.tiny(load_experiment(resolve("x0_lambdas+gated_attention")))

    assert "without any of them it does something else" in holds_every_idea(specimen)


@pytest.mark.parametrize("name", ["shared_layers+residual_weights", "moe+poly_norm"])
def test_no_parameter_is_missed_that_another_idea_takes_away(name):
    """Of a block, or a gate."""
    specimen = Specimen.tiny(load_experiment(resolve(name)))

    assert "their parameters are there" in holds_every_idea(specimen)


@pytest.mark.parametrize("name", ["squared_relu", "query_scale"])
def test_an_idea_without_effect_fails_the_check_of_a_stack_of_three(ideas, name):
    entry = resolve("squared_relu+query_scale+value_norm")
    source = entry.source
    for old, new in IDEAS[name][-1:]:
        source = source.replace(new, old)
    found = {p.name: p for p in check(load_experiment(replace(entry, source=source)))}

    assert found["ideas"].passed is False
    assert found["ideas"].detail == f"without {name} it would do the same"


def test_ideas_that_change_only_the_start_or_the_loss_or_the_update_pass_the_check(ideas, tmp_path):
    gelu = "        h_BTF = F.relu(h_BTF).square()\n", "        h_BTF = F.gelu(h_BTF)\n"
    table = "        self.token_table.weight.data *= config.token_std\n"
    hidden = "    def hidden(self"
    told = "Changed from gpt2ish: MLP.", "Changed from gpt2ish: Model."
    methods = {
        "update": "    @torch.no_grad()\n    def after_step(self) -> None:\n"
        "        self.head.weight.clamp_(-0.1, 0.1)\n\n",
        "loss": "    def training_loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:\n"
        "        logits_BTV = self(tokens_BT).transpose(1, 2)\n"
        '        nats_BT = F.cross_entropy(logits_BTV, targets_BT, reduction="none")\n'
        "        return nats_BT + 1e-3 * logits_BTV.logsumexp(1).square()\n\n",
        "groups": "    def parameter_groups(self) -> list[dict]:\n"
        '        return [{"params": [self.head.weight], "lr_scale": 0.5}]\n\n',
    }
    variation(
        tmp_path,
        "start",
        "squared_relu",
        gelu,
        told,
        (table, table.replace("config.token_std", "0.5")),
    )
    for name, method in methods.items():
        variation(tmp_path, name, "squared_relu", gelu, told, (hidden, method + hidden))

    for name in ("start", *methods):
        assert failed(f"{name}+query_scale") == failed(f"squared_relu+{name}") == [], name


def test_a_remembered_pass_of_a_stack_is_that_of_its_ideas(tmp_path, monkeypatch):
    monkeypatch.setenv("LMP_DATASETS", str(tmp_path))
    entry = resolve("value_norm+ue")
    of_another = replace(entry.ideas[0], source=entry.ideas[0].source + "# more\n")
    for one in (entry, entry, replace(entry, ideas=(of_another, entry.ideas[1]))):
        checked(load_experiment(one))

    assert len(list((tmp_path / "checks").iterdir())) == 2


def test_tiny_has_no_value_for_what_an_idea_took_out_of_config():
    stacked = resolve("avey+z_loss")

    assert "num_heads" not in stacked.fields
    assert stacked.tiny == resolve("avey").tiny


def test_a_stranger_with_the_ancestors_name_in_the_working_directory_is_not_its_parent(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2ish.py").write_text('"""A stranger."""\n')

    assert catalog.parent_of(resolve("value_norm+ue")).path == resolve("gpt2ish").path


def test_a_stack_is_one_text_in_every_process():
    ask = (
        "from lmplay.catalog.entries import resolve; print(resolve('stick_breaking+canon').source)"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", ask],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in "0123"
    }

    assert len(texts) == 1


def test_best_is_the_stack_that_its_docstring_names():
    stack = resolve("stick_breaking+layer_token_embedding+ngram_memory")

    assert definitions(resolve("best").source) == definitions(stack.source)


PAIRS = list(itertools.combinations(BUNDLED, 2))
if "LMP_ALL" not in os.environ:  # some hundred of them, with a check each, take minutes
    PAIRS = [pair for pair in PAIRS if crc32("+".join(pair).encode()) % 32 == 0]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.every_experiment
def test_bundled_pairs_stack_or_show_both_hunks_or_are_refused_by_the_check(pair):
    try:
        found = failed("+".join(pair))
    except Conflict as conflict:
        assert conflict.problem and conflict.merged
    except UserError as error:
        is_ancestor = any(parent in pair for name in pair for parent in ancestors(name))
        is_of_config = error.problem.startswith("+".join(pair) + ": ")
        assert error.code == 2 and ("TINY[" in error.problem or is_of_config or is_ancestor)
    else:
        # the check refuses what stacks line by line but takes away what the other idea reads
        assert all(proof.detail for proof in found)


def ancestors(name):
    """The names of what an experiment is copied from, up to the root."""
    entry = catalog.parent_of(resolve(name))
    return [] if entry is None else [entry.name, *ancestors(entry.name)]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ue+ue", "ue is in it twice"),
        ("ue+ue16x", "ue is in it twice"),
        ("gpt2ish+ue", "gpt2ish adds nothing"),
        ("ue+nothing", "no experiment called 'nothing'"),
        ("ue+", "no experiment called ''"),
        ("gpt2ish_small_init+ue", "no 'token_std' any more"),
        ("./ue.py+value_norm", "no experiment file ./ue.py+value_norm"),
        ("ue+value_norm.py", "no experiment file ue+value_norm.py"),
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
