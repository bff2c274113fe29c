"""What TINY cannot show is found at the size of a run: here 80 tokens, where TINY has 16."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmplay.catalog.entry import read_source
from lmplay.model.experiment import load_experiment
from lmplay.proofs.at_size import check_at_size, find_leak, num_rows
from lmplay.proofs.passes import Passes
from lmplay.proofs.proof import Refuted
from lmplay.proofs.real_size import trains_at_its_length

SOURCE = (Path(__file__).parents[2] / "experiments" / "gpt2ish.py").read_text()
SIZE = {"vocab_size": 300, "max_len": 80, "num_blocks": 2, "width": 32, "num_heads": 2}
MASK, APPEND = "is_causal=T > 1", "append(self, k_BHSD, v_BHSD)"
INIT, BLOCKS = "        self.config = config\n", "        for block in self.blocks:\n"


def made(*edits, **values):
    source = SOURCE
    for old, new in edits:
        assert old in source, old
        source = source.replace(old, new)
    experiment = load_experiment(read_source(source, Path("idea.py"))[0])
    return experiment, experiment.config(**SIZE | values)


def stream(line):
    return BLOCKS, f"        {line}\n{BLOCKS}"


def part(line):
    return INIT, f"{INIT}        {line}\n"


def method(name, body):
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return (
        "    def hidden(",
        f"    def {name}(self, tokens_BT, targets_BT):\n{lines}\n    def hidden(",
    )


def method_of(signature, line):
    return "    def hidden(", f"    def {signature}:\n        {line}\n\n    def hidden("


def failed(experiment, config, **how):
    return {p.name: p.detail for p in check_at_size(experiment, config, **how) if p.passed is False}


LONG = "x_BTC + (T > 64) * "
SCALE = """class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a = nn.Parameter(torch.ones(width))

    def forward(self, x_BTC):
        return x_BTC * self.a * (1.1 if len(self.a) > 16 else 1.0)

    def fold(self):
        plain = nn.Linear(len(self.a), len(self.a), bias=False)
        plain.weight = nn.Parameter(self.a.detach().diag())
        return plain


class Attention("""
PLANTED = {
    "a shift the wrong way above 64 tokens": (
        "causal",
        [stream(f"x_BTC = {LONG}x_BTC.roll(-1, 1)")],
    ),
    "no mask above 64 tokens": ("causal", [(MASK, "is_causal=1 < T <= 64")]),
    "no mask at a width of its own": ("causal", [(MASK, "is_causal=T > 1 and D < 16"), (
        "        T = x_BTC.shape[1]\n        q", "        T = x_BTC.shape[1]\n"
        "        D = x_BTC.shape[2] // self.num_heads\n        q")]),
    "no mask for large vocabularies": (
        "causal",
        [("        T = tokens_BT.shape[1]\n", "        T = tokens_BT.shape[1]\n"
          "        self.blocks[0].attention.num_heads = 2\n"),
         stream("x_BTC = x_BTC + (self.config.vocab_size > 256) * x_BTC.flip(1)")],
    ),
    "a chunk of 32 sees all of itself": (
        "causal",
        [stream("x_BTC = x_BTC + (T % 16 == 0 and T > 32) * x_BTC.unflatten(1, (-1, 16)).mean(2)"
                ".repeat_interleave(16, 1) if T % 16 == 0 and T > 32 else x_BTC")],
    ),
    "a mean of all rows above 64 tokens": (
        "rows apart",
        [stream(f"x_BTC = {LONG}x_BTC.mean(0, True)")],
    ),
    "the row before, in training": (
        "rows apart",
        [stream(f"x_BTC = {LONG}self.training * x_BTC.roll(1, 0)")],
    ),
    "rows mixed from the fourth on": (
        "rows apart",
        [stream("x_BTC = x_BTC + (len(x_BTC) > 3) * x_BTC.roll(1, 0)")],
    ),
    "the last of a chunk of 20 sees the next": (
        "causal",
        [stream("y_BTC = torch.zeros_like(x_BTC); y_BTC[:, 19:-1:20] = x_BTC[:, 20::20]; "
                "x_BTC = x_BTC + (T > 64) * y_BTC")],
    ),
    "behind a gate that is shut, above 64 tokens": (
        "causal",
        [part("self.a = nn.Parameter(torch.tensor(-40.0))"),
         stream(f"x_BTC = {LONG}self.a.exp() * x_BTC.flip(1)")],
    ),
    "what ends behind it, above 64 tokens": (
        "causal",
        [("    ff_dropout: float = 0.1", "    end: int = 0\n    ff_dropout: float = 0.1"),
         stream("left_BT = (tokens_BT == 0).float().flip(1).cumsum(1).flip(1); "
                f"x_BTC = {LONG}left_BT[..., None] * x_BTC")],
    ),
    "a step onto the border of a chunk": (
        "cache",
        [stream("x_BTC = x_BTC * (0.5 if T == 1 and start % 40 == 0 else 1)")],
    ),
    "no gradient above 64 tokens": (
        "gradients",
        [stream("x_BTC = x_BTC.detach() if T > 64 else x_BTC")],
    ),
    "a gradient that is not finite above 64 tokens": (
        "gradients",
        [stream(f"x_BTC = {LONG}(x_BTC * 0).sum(-1, True).abs().sqrt()")],
    ),
    "a fold for narrow models only": (
        "fold",
        [("class Attention(", SCALE), part("self.s = Scale(config.width)"),
         stream("x_BTC = self.s(x_BTC)")],
    ),
    "nats among some of a large vocabulary": (
        "likelihood",
        [method("log_likelihood", "z_BTV = self(tokens_BT)\n"
                "c_BT1 = z_BTV.gather(-1, targets_BT[..., None])\n"
                "some_BTN = z_BTV[..., :: 1 + z_BTV.shape[-1] // 100]\n"
                "return torch.cat([c_BT1, some_BTN], -1).logsumexp(-1) - c_BT1[..., 0]")],
    ),
    "nats that see later tokens above 64": (
        "causal",
        [method("log_likelihood", "x_BTC = self.hidden(tokens_BT)\n"
                "x_BTC = x_BTC + (x_BTC.shape[1] > 64) * x_BTC.mean(1, True)\n"
                "return F.cross_entropy(self.head(x_BTC).mT, targets_BT, reduction='none')")],
    ),
    "a prompt that ends with a chunk": (
        "cache",
        [stream("x_BTC = x_BTC * (0.5 if cache is not None and T == 40 else 1)")],
    ),
    "the fortieth step": (
        "cache",
        [stream("s = {} if cache is None else cache.state(self); "
                "s['n'] = s.get('n', x_BTC.new_zeros(())) + 1; "
                "x_BTC = x_BTC * (0.5 if s['n'] == 40 else 1)")],
    ),
    "what is minimised above 64 tokens, over all rows": (
        "rows apart",
        [method("training_loss",
                "nats_BT = F.cross_entropy(self(tokens_BT).mT, targets_BT, reduction='none')\n"
                "return nats_BT * (1 if nats_BT.shape[1] < 64 else nats_BT.detach().mean())")],
    ),
    "a term of many targets, over all rows": (
        "rows apart",
        [method("loss_terms",
                "x_BTC = self.hidden(tokens_BT)\n"
                "terms = [{'x': x_BTC, 'head': self.head, 'targets': targets_BT}]\n"
                "if targets_BT.numel() > 300:\n"
                "    mean_C = x_BTC.softmax(-1).mean((0, 1))\n"
                "    terms += [{'penalty': mean_C.square().sum().expand(targets_BT.shape)}]\n"
                "return terms")],
    ),
    "what is minimised above 64 tokens, by how many rows": (
        "rows apart",
        [method("training_loss",
                "nats_BT = F.cross_entropy(self(tokens_BT).mT, targets_BT, reduction='none')\n"
                "return nats_BT / (1 if nats_BT.shape[1] < 64 else len(nats_BT))")],
    ),
    "targets shifted twice above 64 tokens": (
        "shift",
        [method("training_loss",
                "z_BTV = self(tokens_BT)\n"
                "if z_BTV.shape[1] > 64:\n"
                "    z_BTV, targets_BT = z_BTV[:, :-1], targets_BT[:, 1:]\n"
                "nats_BT = F.cross_entropy(z_BTV.mT, targets_BT, reduction='none')\n"
                "return F.pad(nats_BT, (0, tokens_BT.shape[1] - nats_BT.shape[1]))")],
    ),
    "a weight that wide models leave out": (
        "gradients",
        [part("self.a = nn.Parameter(torch.ones(config.width))"),
         stream("x_BTC = x_BTC * (self.a if len(self.a) < 32 else 1)")],
    ),
    "a frozen weight of wide models": (
        "gradients",
        [part("self.a = nn.Parameter(torch.ones(config.width), config.width < 32)"),
         stream("x_BTC = x_BTC * self.a")],
    ),
    "numbers under two names in wide models": (
        "only weights",
        [("        nn.init.zeros_(self.position_table.weight)\n",
          "        nn.init.zeros_(self.position_table.weight)\n        if config.width > 16:\n"
          "            self.head.weight = nn.Parameter(self.token_table.weight.data)\n")],
    ),
    "a group of nothing in wide models": (
        "optimizer",
        [method_of("parameter_groups(self)",
                   "return [{'params': []}] if self.config.width > 16 else []")],
    ),
    "double precision above 64 tokens": (
        "no float64",
        [stream("x_BTC = x_BTC.double().mul(1).float() if T > 64 else x_BTC")],
    ),
    "a mask on the CPU above 64 tokens": (
        "placement",
        [stream("x_BTC = x_BTC * torch.ones(T)[:, None] if T > 64 else x_BTC")],
    ),
    "a file that is read above 64 tokens": (
        "imports",
        [stream("T > 64 and open('/dev/null').close()")],
    ),
    "an attribute that counts above 64 tokens": (
        "repeat",
        [part("self.n = 0"), stream("self.n += T > 64")],
    ),
    "a buffer that counts above 64 tokens": (
        "repeat",
        [part("self.register_buffer('n', torch.zeros(()))"), stream("self.n += T > 64")],
    ),
    "dropout in eval mode of wide models": (
        "modes",
        [stream("x_BTC = F.dropout(x_BTC, 0.1 * (self.config.width > 16 and not self.training))")],
    ),
    "sharper in eval mode of wide models": (
        "modes",
        [("        x_BTC = self.final_norm(x_BTC)\n", "        x_BTC = self.final_norm(x_BTC)\n"
          "        x_BTC = x_BTC * (1.1 if x_BTC.shape[2] > 16 and not self.training else 1)\n")],
    ),
    "logits that are doubled above 64 tokens": (
        "head",
        [("        logits_BTV = self.head(x_BTC)\n", "        logits_BTV = self.head(x_BTC)\n"
          "        logits_BTV = logits_BTV * (2 if tokens_BT.shape[1] > 64 else 1)\n")],
    ),
    "a counter that opens, above 64 tokens": (
        "causal",
        [part("self.register_buffer('n', torch.zeros(()))"),
         stream("self.n += self.training"),
         stream(f"x_BTC = {LONG}(self.n > 200) * x_BTC.flip(1)")],
    ),
    "no mask late in a run, above 64 tokens": (
        "causal",
        [part("self.progress = 0.0"), method_of("at(self, progress)", "self.progress = progress"),
         stream(f"x_BTC = {LONG}(self.progress > 0.8) * x_BTC.flip(1)")],
    ),
    "rows behind a gate that is shut, above 64 tokens": (
        "rows apart",
        [part("self.a = nn.Parameter(torch.tensor(-40.0))"),
         stream(f"x_BTC = {LONG}self.a.exp() * x_BTC.flip(0)")],
    ),
    "a cache of 32": ("cache", [(APPEND, "append(self, k_BHSD, v_BHSD, keep=32)")]),
    "positions that wrap at 64 in generation": (
        "cache",
        [("torch.arange(start, start + T,", "torch.arange(start % 64, start % 64 + T,")],
    ),
    "nan from position 70 on": (
        "any shape",
        [stream("x_BTC = x_BTC * (70 - positions_T).float().sqrt()[:, None]")],
    ),
    "an exponent that overflows": (
        "any shape",
        [stream("x_BTC = x_BTC * (1.5 * positions_T).float().exp()[:, None]")],
    ),
    "a scale by the length above 64": (
        "any shape",
        [stream("x_BTC = x_BTC / (T if T > 64 else 1)")],
    ),
    "rows of its own likelihood mixed": (
        "rows apart",
        [method("log_likelihood", "z_BTV = self(tokens_BT)\n"
                "z_BTV = z_BTV + (z_BTV.shape[1] > 64) * z_BTV.mean(0, True)\n"
                "return F.cross_entropy(z_BTV.mT, targets_BT, reduction='none')")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_mistake_that_lives_at_real_sizes_only_is_found(name):
    proof, edits = PLANTED[name]

    assert set(failed(*made(*edits))) == {proof}


def test_text_without_an_end_marker_is_given_some():
    ends = "    ff_dropout: float = 0.1", "    end: int = 0\n    ff_dropout: float = 0.1"
    leak = "x_BTC + (tokens_BT == 0).float().cumsum(1).clamp(max=1)[..., None] * x_BTC.flip(1)"
    experiment, config = made(ends, stream(f"x_BTC = {leak}"))
    tokens_BT = torch.randint(1, config.vocab_size, (8, config.max_len))

    assert "causal" in failed(experiment, config, tokens_BT=tokens_BT)


HONEST = {
    "the baseline": [],
    "dropout that looks at tokens": [stream(
        "x_BTC = x_BTC + (self.training * torch.rand(len(tokens_BT.unique()), device=x_BTC.device)"
        ".mean())")],
    "a convolution by fft": [
        part("self.taps = nn.Parameter(torch.randn(config.max_len, config.width) / 8)"),
        stream("f = torch.fft.rfft(x_BTC, n=2 * T, dim=1) * torch.fft.rfft(self.taps[:T], "
               "n=2 * T, dim=0); x_BTC = x_BTC + torch.fft.irfft(f, n=2 * T, dim=1)[:, :T]"),
        ("if cache is not None:\n            k_", "if False:\n            k_")],
    "a running mean": [
        part("self.register_buffer('seen', torch.zeros(()))"),
        stream("x_BTC = x_BTC / (1 + self.seen)"),
        stream("self.seen += self.training * x_BTC.detach().abs().mean()")],
    "attention to the last 32": [
        (APPEND, "append(self, k_BHSD, v_BHSD, keep=32)"),
        ("y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=T > 1)",
         "at_S = torch.arange(k_BHSD.shape[2], device=k_BHSD.device)\n"
         "        back_TS = at_S[-T:, None] - at_S\n"
         "        near_TS = (back_TS >= 0) & (back_TS < 32)\n"
         "        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, near_TS)")],
    "an own likelihood": [method(
        "log_likelihood",
        "return F.cross_entropy(self(tokens_BT).mT, targets_BT, reduction='none')")],
    "sines that make much of rounding": [
        ("x_BTC = self.final_norm(x_BTC)",
         "x_BTC = self.final_norm(x_BTC)\n"
         "        for _ in range(8): x_BTC = (3 * x_BTC).sin() * 2")],
    "gains that overflow where all are large": [
        part("self.gains = nn.Parameter(torch.zeros(400))"),
        stream("x_BTC = x_BTC * self.gains.sum().exp()")],
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_idea_passes_at_real_sizes(name, precision):
    assert not failed(*made(*HONEST[name], ff_dropout=0.2), precision=precision)


def test_a_leak_is_found_in_bf16_too():
    assert "causal" in failed(*made((MASK, "is_causal=1 < T <= 64")), precision="bf16")


@pytest.mark.parametrize(("short", "is_refused"), [(1e-9, False), (1e-3, True)])
def test_a_gradient_that_only_rounding_makes_may_be_missing_in_long_rows(short, is_refused):
    """As of a number that is added to all channels in front of a norm."""
    sizes = {32: {"weight": 1.0, "shift": short}, 256: {"weight": 1.0, "shift": 0.0}}
    passes = SimpleNamespace(
        tokens_BT=torch.zeros(2, 256), gradients=lambda rows, length: sizes[length]
    )

    with pytest.raises(Refuted) if is_refused else nullcontext():
        trains_at_its_length(passes)


def test_what_leaks_faintly_in_bf16_alone_is_found():
    faint = "x_BTC + (1e-4 if torch.is_autocast_enabled('cpu') else 0) * x_BTC.roll(-1, 1)"
    found = failed(*made(stream(f"x_BTC = {faint}")), precision="bf16")

    assert set(found) == {"causal"}


def test_a_proof_says_at_which_size_it_was_made():
    experiment, config = made()
    proofs = check_at_size(experiment, config, "bf16")

    assert {p.where for p in proofs} == {"8 x 80 tokens in fp32", "4 x 80 tokens in bf16"}


def test_long_rows_are_fewer_but_two_at_least():
    assert [num_rows(T) for T in (256, 1024, 2048, 8192, 100_000)] == [8, 8, 4, 2, 2]


def passes_of(*edits, seed=0):
    experiment, config = made(*edits, ff_dropout=0.2)
    torch.manual_seed(0)
    tokens_BT = torch.randint(300, (8, 80))
    return Passes(experiment, experiment.model(config, seed=0), config, tokens_BT, seed=seed)


def test_a_live_model_is_left_as_it_was():
    passes = passes_of(*HONEST["a running mean"])
    before = {name: tensor.clone() for name, tensor in passes.model.state_dict().items()}

    assert find_leak(passes) is None
    assert passes.model.training
    for name, tensor in passes.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_leak_names_the_position_and_the_cut():
    proof = find_leak(passes_of(stream("x_BTC = x_BTC + x_BTC.roll(-1, 1)")))
    words = proof.detail.split()

    assert proof.name == "causal" and proof.detail.startswith("position ")
    assert int(words[1]) == int(words[words.index("from") + 1]) - 1


def test_cuts_differ_from_look_to_look():
    assert passes_of(seed=1).cut_B.tolist() != passes_of(seed=2).cut_B.tolist()


def test_a_leak_that_only_eval_mode_has_is_found_while_training():
    seen = part("self.register_buffer('n', torch.full((), 9.0))")
    proof = find_leak(
        passes_of(seen, stream("x_BTC = x_BTC + (not self.training) * self.n * x_BTC.flip(1)"))
    )

    assert proof.name == "causal" and proof.where.endswith("in eval mode")


def test_a_model_that_has_learned_to_see_its_targets_is_found():
    see = method(
        "log_likelihood",
        "x_BTC = self.hidden(tokens_BT)\n"
        "x_BTC = x_BTC + 9 * (x_BTC.shape[1] > 64) * self.head.weight[targets_BT]\n"
        "return F.cross_entropy(self.head(x_BTC).mT, targets_BT, reduction='none')",
    )
    proof = find_leak(passes_of(see))

    assert proof.name == "likelihood" and "sees what it is asked" in proof.detail


def test_fewer_rows_are_proved_where_memory_does_not_suffice_for_all():
    scarce = stream("if x_BTC.shape[:2].numel() > 100: raise MemoryError")
    experiment, config = made(scarce)
    found = {(p.name, p.where) for p in check_at_size(experiment, config) if p.passed}

    assert {where for _, where in found} == {"2 x 40 tokens in fp32"}
    assert {"causal", "rows apart", "any shape", "cache"} <= {name for name, _ in found}
