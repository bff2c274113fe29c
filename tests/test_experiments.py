"""What every bundled experiment keeps, and what each idea promises. A new one is tested by being
there."""

import ast
import dataclasses
import functools
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import experiment, num_parameters, on_meta, random_tokens, tiny, trained
from torch import Tensor, nn

from lmplay.catalog.entries import parent_of
from lmplay.catalog.entry import Entry, read_file
from lmplay.model.experiment import load_experiment
from lmplay.model.folding import folded
from lmplay.model.objective import Objective
from lmplay.proofs.tiny import check

FOLDER = Path(__file__).parent.parent / "experiments"
FILES = [read_file(path)[0] for path in sorted(FOLDER.glob("[!_]*.py"))]
NAMES = [entry for file in FILES for entry in read_file(file.path)]
CHILDREN = [entry for entry in FILES if entry.parent]
FOLDING = [entry for entry in NAMES if "def fold(" in entry.source]

every_file = pytest.mark.parametrize("entry", FILES, ids=attrgetter("name"))
every_name = pytest.mark.parametrize("entry", NAMES, ids=attrgetter("name"))
every_folding = pytest.mark.parametrize("entry", FOLDING, ids=attrgetter("name"))
every_child = pytest.mark.parametrize("entry", CHILDREN, ids=attrgetter("name"))

NAMES_OF_COUNTS = ("COUNTS", "CONTROLS")
# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "gpt2ish": 120_560_209,
    "gpt2ish_med": 406_336_593,
    "gpt2ish_large": 838_409_297,
    "s_gpt2ish": 47_277_073,
    "test_runner": 6_848_721,
    "gpt2ish_small_init": 120_560_209,
    "ue": 396_051_793,
    "ue8x": 396_051_793,
    "ue16x": 709_549_393,
    "ue1x": 121_741_393,
    "ue1_5": 131_375_185,
    "ue1_6": 425_145_937,
    "ue1_7": 739_632_721,
    "ue1_8": 560_636_497,
    "value_norm": 120_560_977,
    "normv1_0": 120_560_977,
    "normv1_1": 120_560_849,
    "normv1_2": 120_560_337,
    "normk": 120_560_977,
    "normkv": 120_561_745,
}

OWN_SIZES = {
    "gpt2": {"num_blocks"},  # a name that people know for its size
    "gated_deltanet": {"chunk"},  # one decay a head, so longer chunks stay in range
}


@every_name
@pytest.mark.every_experiment
def test_every_proof_holds(entry: Entry):
    failed = [proof for proof in check(load_experiment(entry)) if proof.passed is False]

    assert not failed


@every_file
@pytest.mark.every_experiment
def test_compiled_it_is_one_graph_or_the_docstring_says_why_not(entry: Entry):
    objective, tokens_BT = Objective(tiny(entry.name)).train(), random_tokens(B=2, T=16)
    torch._dynamo.reset()  # of what other tests left, which counts against a limit
    objective.compile(backend="eager", fullgraph=True)
    try:
        objective(tokens_BT, tokens_BT.roll(-1, 1))
        is_one = True
    except torch._dynamo.exc.Unsupported:
        is_one = False
    torch._dynamo.reset()

    assert is_one != ("it is several graphs" in " ".join(entry.docstring.split()))


@functools.cache
def counts() -> dict[str, int]:
    """Those of this file and of tests/experiments; CONTROLS are not in the original."""
    found = dict(COUNTS)
    for path in sorted(FOLDER.parent.glob("tests/experiments/test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in NAMES_OF_COUNTS:
                found |= ast.literal_eval(node.value)
    return found


@pytest.mark.parametrize("name", counts())
def test_the_parameter_count_is_the_catalogues(name: str):
    assert num_parameters(on_meta(name)) == counts()[name]


def target_of(entry: Entry, model: nn.Module, **values) -> nn.Module:
    """A fresh model of what this one folds to, which is itself where none of its modules folds."""
    folds = any(hasattr(module, "fold") for module in model.modules())
    target = experiment(entry.folds_to if folds else entry.name)
    mine = dataclasses.asdict(model.config)
    shared = {key: mine[key] for key in target.fields if key in mine}
    return target.model(target.config(**shared), **values)


@every_folding
@pytest.mark.every_experiment
def test_a_trained_model_answers_as_the_one_that_it_folds_to(entry: Entry):
    model = tiny(entry.name)
    start = {key: weight.clone() for key, weight in model.state_dict().items()}
    model = trained(model, num_steps=3)
    plain = target_of(entry, model, seed=9).eval()
    plain.load_state_dict(folded(model).state_dict())
    tokens_BT = random_tokens(B=3, T=16)
    answer_BTV = model(tokens_BT)

    assert not [key for key, weight in model.named_parameters() if torch.equal(weight, start[key])]
    assert (plain(tokens_BT) - answer_BTV).abs().max() < 1e-5 * answer_BTV.abs().max()


@every_folding
@pytest.mark.every_experiment
def test_folding_gives_the_size_and_the_shapes_of_what_it_folds_to(entry: Entry):
    model = on_meta(entry.name)
    plain = target_of(entry, model, device="meta").state_dict()

    assert {key: weight.shape for key, weight in folded(model).state_dict().items()} == {
        key: weight.shape for key, weight in plain.items()
    }


@every_file
def test_the_docstring_names_the_idea_and_its_source(entry: Entry):
    title, _, rest = entry.docstring.partition("\n\n")

    assert re.fullmatch(r"[A-Z][^\n:]*: [^\n]+\.", title)
    sections = re.findall(r"^(\w[\w ]*): ", rest, re.MULTILINE)
    expected = ["Idea", "Source"]
    expected += ["Family"] if entry.family else []
    expected += ["Folds to"] if "def fold(" in entry.source else []
    expected += [f"Changed from {entry.parent}"] if entry.parent else []
    assert sections == expected


@every_file
def test_the_file_reads_top_to_bottom(entry: Entry):
    docstring, *body = ast.parse(entry.source).body
    kinds = [type(node).__name__ for node in body]
    at = next(i for i, node in enumerate(body) if isinstance(node, ast.ClassDef))  # Config
    tables = [node for node in body[:at] if isinstance(node, ast.Assign)]
    names = [ast.unparse(node.targets[0]) for node in tables]

    assert isinstance(docstring, ast.Expr)
    assert names in (["VARIANTS", "TINY"], ["TINY"])
    assert set(kinds[: at - len(tables)]) <= {"Import", "ImportFrom"}
    assert body[at - len(tables) : at] == tables
    assert [body[at].name, body[-1].name] == ["Config", "Model"]
    assert set(kinds[at:]) <= {"ClassDef", "FunctionDef", "Assign"}


@every_child
def test_tiny_is_the_parents_where_both_have_a_key(entry: Entry):
    parent = parent_of(entry).tiny
    shared = entry.tiny.keys() & parent

    assert entry.tiny["num_blocks"] >= parent["num_blocks"]  # some take what an earlier one made
    for key in shared - {"num_blocks"}:
        assert entry.tiny[key] == parent[key], key
    assert parent.keys() & entry.fields.keys() <= entry.tiny.keys()


@every_child
def test_config_values_that_the_parent_has_keep_its_defaults(entry: Entry):
    def defaults(e: Entry) -> dict[str, object]:
        return {f.name: f.default for f in dataclasses.fields(load_experiment(e).module.Config)}

    mine, theirs = defaults(entry), defaults(parent_of(entry))
    shared = mine.keys() & theirs.keys() - OWN_SIZES.get(entry.name, set())

    assert {key: mine[key] for key in shared} == {key: theirs[key] for key in shared}


@every_name
def test_a_variants_values_are_not_the_files_own(entry: Entry):
    default = load_experiment(read_file(entry.path)[0]).config(vocab_size=61)

    assert all(getattr(default, key) != value for key, value in entry.variant.items())


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("gpt2ish", {"width": 20, "num_heads": 3}, "width=20 is not a multiple of num_heads=3"),
        ("ue", {"front_mul": 0}, "front_mul=0"),
        ("ue", {"mid_mul": 0}, "mid_mul=0"),
        ("ue", {"unify": "token"}, "unify='token'"),
        ("value_norm", {"norm_values": False}, "nothing to norm"),
        ("value_norm", {"start_block": 6}, "hold none of 6 blocks"),
    ],
)
def test_config_refuses_nonsense_and_says_the_value(name, values, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        experiment(name).module.Config(vocab_size=61, **values)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("ue", r"token_table\."),
        ("ue1_5", r"(token|position)_table\."),
        ("value_norm", r".*\.value_norm\."),
        ("normkv", r".*\.(key|value)_norm\."),
    ],
)
def test_with_one_seed_what_an_idea_leaves_alone_starts_as_in_the_baseline(name, own):
    baseline = tiny("gpt2ish", seed=3).state_dict()
    start = tiny(name, seed=3).state_dict()
    shared = [key for key in start if not re.match(own, key)]

    assert len(shared) >= len(baseline) - 2
    for key in shared:
        assert torch.equal(start[key], baseline[key]), key


def test_ue_folds_a_table_longer_than_one_part():
    table = tiny("ue", vocab_size=2500).token_table
    plain = table.fold()

    torch.testing.assert_close(plain.weight, table(torch.arange(2500)))


def at_every_place(self, ids_A: Tensor) -> Tensor:
    """A unified embedding the plain way: the network at each place, whatever the token."""
    wide_AW = self.wide_table(ids_A)
    return self.network(wide_AW)


def gradients(model: nn.Module, tokens_BT: Tensor, plain_way: bool, low: bool = False) -> Tensor:
    """Of the unified table, in one line."""
    if plain_way:
        model.token_table.forward = at_every_place.__get__(model.token_table)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        sums = Objective(model)(tokens_BT, tokens_BT.roll(-1, 1))
    (sums.objective / tokens_BT.numel()).backward()
    return torch.cat([weight.grad.flatten() for weight in model.token_table.parameters()])


@pytest.mark.parametrize(
    "tokens_BT",
    [
        random_tokens(B=3, T=16),
        random_tokens(B=3, T=16, V=2),
        torch.full((2, 5), 7),
        torch.randperm(61, generator=torch.Generator().manual_seed(0))[:16].view(1, 16),
        torch.tensor([[60]]),
    ],
    ids=["mixed", "two tokens", "one token", "all different", "one place"],
)
def test_running_the_network_on_distinct_tokens_changes_neither_output_nor_gradient(tokens_BT):
    ours, plain = tiny("ue").double(), tiny("ue").double()

    torch.testing.assert_close(
        ours.token_table(tokens_BT), at_every_place(plain.token_table, tokens_BT)
    )
    torch.testing.assert_close(
        gradients(ours, tokens_BT, plain_way=False), gradients(plain, tokens_BT, plain_way=True)
    )


def test_in_bf16_a_frequent_tokens_gradient_is_as_exact_as_the_plain_way():
    tokens_BT = random_tokens(B=4, T=256, V=3)
    exact, plain, ours = (
        gradients(tiny("ue", max_len=256), tokens_BT, plain_way, low)
        for plain_way, low in ((True, False), (True, True), (False, True))
    )

    assert (ours - exact).norm() < 2 * (plain - exact).norm()


def test_ue_starts_at_the_spread_of_its_control():
    start = {"vocab_size": 500, "width": 192, "num_heads": 3}
    unified = tiny("ue", **start).token_table(torch.arange(500))
    control = tiny("gpt2ish_small_init", **start).token_table(torch.arange(500))

    assert unified.std().item() == pytest.approx(control.std().item(), rel=0.1)


def stretched(model: nn.Module, part: str, block: int) -> nn.Module:
    """The same model with one block's keys or values ten times longer."""
    layer = getattr(model.blocks[block].attention, part)
    for weight in layer.parameters():
        weight.data *= 10
    return model


@pytest.mark.parametrize(
    ("name", "normed"),
    [
        ("gpt2ish", set()),
        ("value_norm", {("value", 0), ("value", 1)}),
        ("normv1_1", {("value", 1)}),
        ("normv1_2", {("value", 0)}),
        ("normk", {("key", 0), ("key", 1)}),
        ("normkv", {("key", 0), ("key", 1), ("value", 0), ("value", 1)}),
    ],
)
def test_the_length_of_what_is_normed_has_no_say(name, normed):
    tokens_BT = random_tokens(B=2, T=16)
    before = tiny(name)(tokens_BT)
    unmoved = {
        (part, block)
        for part in ("key", "value")
        for block in (0, 1)
        if torch.allclose(stretched(tiny(name), part, block)(tokens_BT), before, atol=1e-3)
    }

    assert unmoved == normed


def test_each_head_is_normed_for_itself():
    attention = tiny("value_norm").blocks[0].attention
    x_BTC = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    v_BHTD = attention.value_norm(attention.split(attention.value(x_BTC)))

    torch.testing.assert_close(v_BHTD, F.layer_norm(attention.split(attention.value(x_BTC)), (8,)))
    assert attention.value_norm.weight.shape == (8,)
