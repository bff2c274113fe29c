"""The proofs catch what they are there to catch: each broken copy of the baseline fails the right
one, so that no leak passes because the proof was empty."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lmplay.catalog.entry import read_file
from lmplay.errors import UserError
from lmplay.model.experiment import Experiment, load_experiment
from lmplay.model.folding import folded
from lmplay.proofs import tiny as check_module
from lmplay.proofs.tiny import Proof, check, checked

GPT2ISH = Path(__file__).parents[2] / "experiments" / "gpt2ish.py"
VALUE_NORM = GPT2ISH.with_name("value_norm.py")


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> Callable[..., Experiment]:
    """The baseline (or another file) with some of its text replaced."""

    def make(*edits: tuple[str, str], source: str = GPT2ISH.read_text()) -> Experiment:
        for old, new in edits:
            assert source.count(old) >= 1, f"the baseline no longer says {old!r}"
            source = source.replace(old, new)
        path = tmp_path_factory.mktemp("experiments") / "idea.py"
        path.write_text(source)
        return load_experiment(read_file(path)[0])

    return make


def verdicts(experiment: Experiment) -> dict[str, bool | None]:
    return {proof.name: proof.passed for proof in check(experiment)}


def proved(experiment: Experiment, name: str) -> Proof:
    """One proof, without waiting for the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_module, "PROOFS", {name: check_module.PROOFS[name]})
        return check(experiment)[0]


def stream(line: str) -> tuple[str, str]:
    """A line that changes the stream before the first block."""
    old = "        x_BTC = self.dropout(x_BTC)\n"
    return old, f"{old}        {line}\n"


def part(line: str) -> tuple[str, str]:
    """A line in Model's __init__."""
    old = "        self.config = config\n"
    return old, f"{old}        {line}\n"


def late(lines: str) -> tuple[str, str]:
    """Lines at the end of Model's __init__."""
    old = "        nn.init.zeros_(self.position_table.weight)\n"
    return old, old + lines


def method(name: str, body: str) -> tuple[str, str]:
    """A method of Model, over tokens_BT and targets_BT."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    head = f"    def {name}(self, tokens_BT, targets_BT):\n"
    return "    def hidden(", f"{head}{lines}\n    def hidden("


def fold(body: str) -> tuple[str, str]:
    """A fold of the MLP."""
    old = "class MLP(nn.Module):\n"
    return old, f"{old}    def fold(self):\n        {body}\n        return self\n\n"


MASK = "is_causal=T > 1"
NO_MASK = (MASK, "is_causal=False")
VECTOR = "self.a = nn.Parameter(torch.{}(config.width))"
SHIFTED_LOSS = """logits_BTV = self(tokens_BT)
nats_BT = F.cross_entropy(logits_BTV[:, :-1].mT, {}, reduction="none")
return F.pad(nats_BT, (0, 1))"""
RANDOM = ("import torch\n", "import random\n\nimport torch\n")
PEEK = """        self.peek = nn.Linear(config.width, config.width, bias=False)
        nn.init.zeros_(self.peek.weight)
"""
HEAD = """class Head(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean())


class Model(nn.Module):"""

AT = "    def at(self, progress):\n        self.progress = progress\n\n    def hidden("
FROM_THE_MIDDLE = [part("self.progress = 0.0"), ("    def hidden(", AT)]


def terms(
    *more: str, x: str = "self.hidden(tokens_BT)", head: str = "self.head", targets="targets_BT"
):
    """loss_terms whose first one is the ruler's, unless it is told otherwise."""
    first = f"{{'x': {x}, 'head': {head}, 'targets': {targets}}}"
    return method("loss_terms", f"return [{', '.join([first, *more])}]")


BROKEN = {
    "no mask from the middle of a run": (
        "causal",
        [*FROM_THE_MIDDLE, (MASK, "is_causal=T > 1 and self.progress < 0.4")],
    ),
    "no mask at the end of a run": (
        "causal",
        [*FROM_THE_MIDDLE, (MASK, "is_causal=T > 1 and self.progress < 1")],
    ),
    "rows mixed at the end of a run": (
        "rows apart",
        [*FROM_THE_MIDDLE, stream("x_BTC = x_BTC + (self.progress == 1) * x_BTC.mean(0, True)")],
    ),
    "positions that restart at the end of a run": (
        "cache",
        [*FROM_THE_MIDDLE, ("arange(start,", "arange(start * (self.progress < 1),"),
         ("start + T,", "start * (self.progress < 1) + T,")],
    ),
    "a first term of another state": ("terms", [terms(x="2 * self.hidden(tokens_BT)")]),
    "a first term of another head": ("terms", [terms(head="nn.Identity()")]),
    "a first term of other targets": ("terms", [terms(targets="tokens_BT")]),
    "a penalty for the whole batch": ("terms", [terms("{'penalty': self.head.bias.sum()}")]),
    "a term that nobody knows": ("terms", [terms("{'penalty': 0.0 * tokens_BT, 'scale': 2}")]),
    "terms that begin with a penalty": (
        "terms",
        [method("loss_terms", "return [{'penalty': 0.0 * tokens_BT}]")],
    ),
    "no mask": ("causal", [NO_MASK]),
    "no mask in training": ("causal", [(MASK, "is_causal=not self.training")]),
    "no mask with gradients": ("causal", [(MASK, "is_causal=not torch.is_grad_enabled()")]),
    "mean over positions": ("causal", [stream("x_BTC = x_BTC + x_BTC.mean(1, True)")]),
    "sum from the end": ("causal", [stream("x_BTC = x_BTC + x_BTC.flip(1).cumsum(1).flip(1)")]),
    "spread over positions": ("causal", [stream("x_BTC = x_BTC / x_BTC.std((1, 2), True, True)")]),
    "means behind a norm that takes them away": (
        "causal",
        [("x_BTC = self.final_norm(x_BTC)", "x_BTC = self.final_norm(x_BTC)\n"
          "        x_BTC = x_BTC + x_BTC.mean((1, 2), keepdim=True)")],
    ),
    "the next token, faintly": ("causal", [stream("x_BTC = x_BTC + 1e-3 * x_BTC.roll(-1, 1)")]),
    "the last token only": ("causal", [stream("x_BTC = x_BTC + x_BTC[:, -1:]")]),
    "inside patches of four": (
        "causal",
        [stream("x_BTC = x_BTC + x_BTC[:, 3::4].repeat_interleave(4, 1)")],
    ),
    "a choice among all positions": (
        "causal",
        [stream("x_BTC = x_BTC * (x_BTC > x_BTC.median(1, True).values)")],
    ),
    "behind a zero-initialised projection": (
        "causal",
        [late(PEEK), stream("x_BTC = x_BTC + self.peek(x_BTC.roll(-1, 1))")],
    ),
    "behind a gate at zero": (
        "causal",
        [part(VECTOR.format("zeros")), stream("x_BTC = x_BTC + self.a * x_BTC.flip(1)")],
    ),
    "behind a rectified gate at zero": (
        "causal",
        [part(VECTOR.format("zeros")), stream("x_BTC = x_BTC + F.relu(-self.a) * x_BTC.flip(1)")],
    ),
    "behind a scale of a millionth": (
        "causal",
        [
            part("self.a = nn.Parameter(torch.full((config.width,), 1e-6))"),
            stream("x_BTC = x_BTC + self.a * x_BTC.flip(1)"),
        ],
    ),
    "tokens that change nothing": ("causal", [stream("x_BTC = 0 * x_BTC")]),
    "mean over rows": ("rows apart", [stream("x_BTC = x_BTC + x_BTC.mean(0, True)")]),
    "the row before": ("rows apart", [stream("x_BTC = x_BTC + x_BTC.roll(1, 0)")]),
    "batch norm": (
        "rows apart",
        [
            part("self.norm = nn.BatchNorm1d(config.width)"),
            stream("x_BTC = self.norm(x_BTC.mT).mT"),
        ],
    ),
    "targets shifted twice": (
        "shift",
        [method("training_loss", SHIFTED_LOSS.format("targets_BT[:, 1:]"))],
    ),
    "targets not shifted": (
        "shift",
        [method("training_loss", SHIFTED_LOSS.format("tokens_BT[:, :-1]"))],
    ),
    "weight without a gradient": (
        "gradients",
        [part("self.a = nn.Parameter(torch.ones(2), requires_grad=False)")],
    ),
    "detached weight": (
        "gradients",
        [part(VECTOR.format("ones")), stream("x_BTC = x_BTC * self.a.detach()")],
    ),
    "unused weight": ("gradients", [part(VECTOR.format("ones"))]),
    "two factors at zero": (
        "gradients",
        [
            part(VECTOR.format("zeros")),
            part("self.b = nn.Parameter(torch.zeros(config.width))"),
            stream("x_BTC = x_BTC * (1 + self.a * self.b)"),
        ],
    ),
    "infinite gradient": (
        "gradients",
        [part(VECTOR.format("zeros")), stream("x_BTC = x_BTC + self.a.abs().sqrt()")],
    ),
    "logits that hardly move": (
        "learns",
        [("x_BTC = self.final_norm(x_BTC)", "x_BTC = 1e-9 * self.final_norm(x_BTC)")],
    ),
    "dropout in eval mode": ("modes", [stream("x_BTC = F.dropout(x_BTC, self.dropout.p)")]),
    "noise in training": (
        "modes",
        [stream("x_BTC = x_BTC + self.training * torch.randn_like(x_BTC)")],
    ),
    "every cached step at position 0": ("cache", [("arange(start, start + T,", "arange(T,")]),
    "cached keys that are lost": (
        "cache",
        [("append(self, k_BHSD, v_BHSD)", "append(self, k_BHSD, v_BHSD, keep=2)")],
    ),
    "forward after the head": (
        "head",
        [("logits_BTV = self.head(x_BTC)", "logits_BTV = 2 * self.head(x_BTC)")],
    ),
    "head over positions": (
        "head",
        [("class Model(nn.Module):", HEAD), ("self.head = nn.Linear(", "self.head = Head(")],
    ),
    "nan in a weight": (
        "loss at start",
        [late("        nn.init.constant_(self.head.bias, float('nan'))\n")],
    ),
    "one loss for the whole batch": (
        "loss at start",
        [method("training_loss", "return F.cross_entropy(self(tokens_BT).mT, targets_BT)")],
    ),
    "only at full length": (
        "any shape",
        [("self.position_table(positions_T)", "self.position_table.weight")],
    ),
    "length seen": ("any shape", [stream("x_BTC = x_BTC / T")]),
    "table in a list": ("only weights", [part("self.tables = [torch.ones(3)]")]),
    "buffer that no checkpoint keeps": (
        "only weights",
        [part("self.register_buffer('mask', torch.ones(3), persistent=False)")],
    ),
    "weight on one device": (
        "only weights",
        [part("self.a = nn.Parameter(torch.ones(3, device='cpu'))")],
    ),
    "positions made on the CPU": ("placement", [(", device=tokens_BT.device", "")]),
    "a number made on the CPU": ("placement", [stream("x_BTC = x_BTC * torch.tensor(2.0)")]),
    "a table fetched from the CPU": (
        "placement",
        [stream("x_BTC = x_BTC + torch.zeros(T).to(x_BTC.device)[:, None]")],
    ),
    "a mask made on the CPU for generating alone": (
        "placement",
        [stream("x_BTC = x_BTC if self.training else x_BTC * torch.ones(T)[:, None]")],
    ),
    "double precision": ("no float64", [stream("x_BTC = (x_BTC.double() * 1).float()")]),
    "double weight": (
        "no float64",
        [part("self.a = nn.Parameter(torch.ones(3, dtype=torch.float64))")],
    ),
    "start without the seed": (
        "seed",
        [RANDOM, late("        nn.init.constant_(self.head.bias, random.random())\n")],
    ),
    "a number outside the state": (
        "state dict",
        [RANDOM, part("self.a = random.random()"), stream("x_BTC = x_BTC * self.a")],
    ),
    "numpy": ("imports", [("import torch\n", "import numpy\nimport torch\n")]),
    "lmplay": ("imports", [("import torch\n", "import torch\nfrom lmplay import errors\n")]),
    "a fold that rounds": (
        "fold",
        [fold("self.up.weight.data = self.up.weight.data.bfloat16().float()")],
    ),
    "a fold to nothing named": ("fold", [fold("pass")]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_experiment_fails_the_proof_that_is_about_it(edited, name):
    proof, edits = BROKEN[name]

    assert proved(edited(*edits), proof).passed is False


NEXT_BUT_ONE = """x_BTC = self.hidden(tokens_BT)
nats_BT = F.cross_entropy(self.head(x_BTC).mT, targets_BT, reduction="none")
after_BT = F.cross_entropy(self.second(x_BTC)[:, :-1].mT, targets_BT[:, 1:], reduction="none")
return nats_BT + 0.3 * F.pad(after_BT, (0, 1))"""
ATTEND = "y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=T > 1)"
WINDOW = """S = k_BHSD.shape[2]
        at_S = torch.arange(S, device=k_BHSD.device)
        back_TS = at_S[S - T :, None] - at_S
        near_TS = (back_TS >= 0) & (back_TS < 4)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=near_TS)"""
APPEND = """        if cache is not None:
            k_BHSD, v_BHSD = cache.append(self, k_BHSD, v_BHSD)
"""
RECUR = """state = {} if cache is None else cache.state(self)
        kv_BHDD, parts = state.get("kv", 0), []
        for t in range(T):
            kv_BHDD = 0.9 * kv_BHDD + k_BHSD[:, :, t, :, None] * v_BHSD[:, :, t, None]
            parts.append(q_BHTD[:, :, t, None] @ kv_BHDD)
        state["kv"] = kv_BHDD
        y_BHTD = torch.cat(parts, 2)"""
TIED = """        nn.init.normal_(self.token_table.weight, std=0.02)
        self.head.weight = self.token_table.weight
        for block in self.blocks:
            nn.init.zeros_(block.mlp.down.weight)
            nn.init.zeros_(block.attention.output.weight)
"""
UNIT = """    @torch.no_grad()
    def after_step(self):
        self.head.weight.copy_(F.normalize(self.head.weight, dim=-1))

    def hidden("""

OWN_NATS = "return F.cross_entropy(self(tokens_BT).mT, targets_BT, reduction='none')"
# masked diffusion: each target is hidden with a drawn chance, and is what the model says of a text
# in which the others stand; a bound
DIFFUSION = """chance_B1 = torch.rand(len(targets_BT), 1, device=targets_BT.device) * 0.98 + 0.02
hidden_BT = torch.rand(targets_BT.shape, device=targets_BT.device) < chance_B1
known_BT = targets_BT.masked_fill(hidden_BT | (targets_BT < 0), self.config.vocab_size)
nats_BT = F.cross_entropy(self(known_BT).mT, targets_BT, reduction="none")
return nats_BT * hidden_BT / chance_B1"""
MASK_TOKEN = [
    ("nn.Embedding(config.vocab_size, config", "nn.Embedding(config.vocab_size + 1, config")
]

SOUND = {
    "a window that widens over a run": [
        *FROM_THE_MIDDLE,
        stream("x_BTC = x_BTC * (1 + self.progress)"),
    ],
    "a second head as a term": [
        late("        self.second = nn.Linear(config.width, config.vocab_size)\n"),
        terms("{'x': self.hidden(tokens_BT), 'head': self.second, 'targets': targets_BT}"),
    ],
    "a model that knows the end marker": [
        ("    num_blocks: int = 6", "    end: int = 0\n    num_blocks: int = 6"),
        stream("x_BTC = x_BTC + (tokens_BT == self.config.end).cumsum(1)[..., None]"),
        ("if cache is not None:\n            k_", "if False:\n            k_"),
    ],
    "tied table, projections at zero": [late(TIED)],
    "a second head for the token after": [
        late("        self.second = nn.Linear(config.width, config.vocab_size)\n"),
        method("training_loss", NEXT_BUT_ONE),
    ],
    "attention to the last four": [
        (ATTEND, WINDOW),
        ("append(self, k_BHSD, v_BHSD)", "append(self, k_BHSD, v_BHSD, keep=4)"),
    ],
    "a recurrent state": [(ATTEND, RECUR), (APPEND, "")],
    "a layer scale of a millionth": [
        part("self.a = nn.Parameter(torch.full((config.width,), 1e-6))"),
        ("x_BTC = self.final_norm(x_BTC)", "x_BTC = self.final_norm(x_BTC) + self.a * x_BTC"),
    ],
    "weights of unit length": [("    def hidden(", UNIT)],
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_idea_of_another_shape_passes(edited, name):
    assert False not in verdicts(edited(*SOUND[name])).values()


def test_the_baseline_unedited_fails_nothing(edited):
    found = verdicts(edited())

    assert set(found.values()) == {True, None}
    assert {name for name, passed in found.items() if passed is None} == {
        "changed from",
        "terms",
        "fold",
        "likelihood",
    }


@pytest.mark.parametrize(
    "said",
    ["Config, Attention", "Config, Attention, Block, Model", "Config, Attention, MLP"],
    ids=["too few", "too many", "another"],
)
def test_a_docstring_that_lists_other_changes_is_refused_with_the_true_list(tmp_path, said):
    source = VALUE_NORM.read_text().replace("Config, Attention, Block.", f"{said}.")
    (tmp_path / "value_norm.py").write_text(source)
    experiment = load_experiment(read_file(tmp_path / "value_norm.py")[0])

    assert proved(experiment, "changed from").detail == (
        "should be: Changed from gpt2ish: Config, Attention, Block."
    )


def test_a_definition_that_was_removed_has_changed(tmp_path):
    source = VALUE_NORM.read_text()
    parent = GPT2ISH.read_text() + "\n\ndef helper():\n    pass\n"
    (tmp_path / "gpt2ish.py").write_text(parent)
    (tmp_path / "value_norm.py").write_text(source)
    experiment = load_experiment(read_file(tmp_path / "value_norm.py")[0])

    assert "Config, Attention, Block, helper." in proved(experiment, "changed from").detail


def test_a_tensor_made_on_the_cpu_is_reported_with_its_line(edited):
    experiment = edited((", device=tokens_BT.device", ""))
    line = experiment.source[: experiment.source.index("torch.arange")].count("\n") + 1

    detail = proved(experiment, "placement").detail
    assert detail == f"line {line}: arange makes a tensor on the CPU; give it device=x.device"


@pytest.mark.parametrize(
    ("line", "waits"),
    [
        ("x_BTC = x_BTC + 0", "nothing"),
        ("x_BTC = x_BTC[:, torch.arange(T, device=x_BTC.device)]", "nothing"),
        ("x_BTC = x_BTC * (1 if x_BTC.sum() > 0 else 2)", "item"),
        ("x_BTC = x_BTC + 0 * x_BTC[x_BTC > 0].sum()", "index"),
        ("x_BTC = x_BTC + 0 * tokens_BT.unique()[0]", "unique"),
    ],
)
def test_what_the_host_has_to_wait_for_is_told(edited, line, waits):
    detail = proved(edited(stream(line)), "placement").detail

    assert detail.endswith(f"the host has to wait for {waits}")


def test_a_leak_is_reported_with_position_and_size(edited):
    experiment = edited(NO_MASK)

    assert proved(experiment, "causal").detail.startswith("position 0 moves by ")


def test_a_crash_is_reported_with_its_line_and_the_other_proofs_go_on(edited):
    experiment = edited(stream("x_BTC = x_BTC @ x_BTC[:, :3]"))
    line = experiment.source[: experiment.source.index("x_BTC @ x_BTC")].count("\n") + 1
    found = {proof.name: proof for proof in check(experiment)}

    assert found["causal"].detail.startswith(f"line {line}: RuntimeError: ")
    assert found["only weights"].passed


def test_a_likelihood_that_sees_its_targets_is_none(edited):
    found = verdicts(edited(NO_MASK, method("log_likelihood", OWN_NATS)))

    assert found["likelihood"] is False and found["causal"] is False


def test_a_likelihood_of_the_whole_text_may_see_later_tokens(edited):
    found = verdicts(edited(NO_MASK, method("log_likelihood", DIFFUSION), *MASK_TOKEN))

    assert {name for name, passed in found.items() if passed is None} >= {"causal", "shift"}
    assert False not in found.values()


def test_a_model_that_keeps_nothing_in_the_cache_is_exempt_from_cached_generation(edited):
    found = verdicts(edited(("if cache is not None:\n            k_", "if False:\n            k_")))

    assert found["cache"] is None
    assert False not in found.values()


def test_a_model_without_hidden_is_exempt_from_having_a_head(edited):
    experiment = edited(
        ("    def hidden(self, tokens_BT: Tensor", "    def inner(self, tokens_BT: Tensor"),
        ("self.hidden(", "self.inner("),
    )
    found = verdicts(experiment)

    assert found["head"] is None
    assert False not in found.values()


def test_zero_initialised_layers_in_a_row_are_trained_once_they_open(edited):
    zeros = "".join(
        f"        nn.init.zeros_({layer}.weight)\n"
        for layer in ("self.head", "self.blocks[0].mlp.down", "self.blocks[1].attention.output")
    )

    assert proved(edited(late(zeros)), "gradients").passed


def test_projections_after_a_step_are_made_while_learning(edited):
    project = "    def after_step(self):\n        self.head.weight.data.zero_()\n\n    def hidden("

    assert proved(edited(("    def hidden(", project)), "learns").passed is False


def test_a_variant_cannot_bring_back_a_large_scale(edited):
    path = edited().entry.path
    large = load_experiment(next(e for e in read_file(path) if e.name == "gpt2ish_large"))

    assert proved(large, "only weights") == proved(edited(), "only weights")


def test_a_file_without_tiny_is_refused(edited):
    with pytest.raises(UserError, match="has no TINY"):
        check(edited(("TINY = {", "SMALL = {")))


def test_checking_leaves_the_random_state_as_it_was(edited):
    before = torch.random.get_rng_state()
    check(edited())

    assert torch.equal(torch.random.get_rng_state(), before)


def test_checking_twice_finds_the_same(edited):
    assert check(edited()) == check(edited())


@pytest.fixture
def remembering(monkeypatch, tmp_path):
    """How often `check` ran, with the memory in an empty folder."""
    monkeypatch.setenv("LMP_DATASETS", str(tmp_path))
    ran = []

    def counting(experiment, values):
        ran.append(experiment.name)
        return [Proof("causal", "leak" not in experiment.source, "")]

    monkeypatch.setattr(check_module, "check", counting)
    return ran


def test_a_pass_is_remembered_and_given_back_whole(edited, remembering):
    first = checked(edited())
    second = checked(edited())

    assert first == second == [Proof("causal", True, "")]
    assert len(remembering) == 1


def test_a_failure_is_found_again_each_time(edited, remembering):
    for _ in range(2):
        proofs = checked(edited(("class MLP", "# leak\nclass MLP")))

        assert proofs[0].passed is False
    assert len(remembering) == 2


@pytest.mark.parametrize(
    "edit",
    [("class MLP", "# other\nclass MLP"), ('"width": 16', '"width": 32')],
    ids=["source", "config"],
)
def test_another_source_or_config_is_checked_anew(edited, remembering, edit):
    checked(edited())
    checked(edited(edit))

    assert len(remembering) == 2


def test_two_names_for_one_setting_share_a_pass(remembering):
    for entry in read_file(VALUE_NORM)[:2]:  # value_norm and normv1_0
        checked(load_experiment(entry))

    assert len(remembering) == 1


def test_another_torch_is_checked_anew(edited, remembering, monkeypatch):
    checked(edited())
    monkeypatch.setattr(torch, "__version__", "99.0")
    checked(edited())

    assert len(remembering) == 2


def test_a_damaged_memory_is_no_pass(edited, remembering, tmp_path):
    checked(edited())
    (path,) = tmp_path.rglob("*.json")
    path.write_text('[{"name": "causal"')
    checked(edited())

    assert len(remembering) == 2


def test_a_memory_that_cannot_be_written_stops_nothing(edited, remembering, tmp_path):
    (tmp_path / "checks").write_text("a file where the folder would be")

    assert checked(edited())[0].passed


class Wide(nn.Module):
    """x W + the helper's bias; folds to a Linear with both, while the helper folds away."""

    def __init__(self, helper: nn.Module):
        super().__init__()
        self.helper = helper
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x_NC):
        return x_NC @ self.weight.T + self.helper.bias

    def fold(self):
        plain = nn.Linear(3, 3)
        plain.weight = self.weight
        plain.bias = nn.Parameter(self.helper.bias.detach().clone())
        return plain


class Helper(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3))

    def fold(self):
        return None


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.helper = Helper()
        self.first = Wide(self.helper)
        self.again = self.first
        self.second = nn.Sequential(Wide(self.helper), nn.Tanh())

    def forward(self, x_NC):
        return self.second(self.again(self.first(x_NC)))


def test_folding_puts_plain_modules_in_place_and_removes_what_only_helped():
    model, x_NC = Whole(), torch.randn(5, 3)
    before = model(x_NC)
    plain = folded(model)

    torch.testing.assert_close(plain(x_NC), before)
    assert plain.first is plain.again
    assert {type(m).__name__ for m in plain.modules()} == {"Whole", "Linear", "Sequential", "Tanh"}
    assert isinstance(model.first, Wide), "folding works on a copy"
