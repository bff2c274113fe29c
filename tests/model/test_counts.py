"""Parameters and FLOPs: what the formulas say, however attention is written."""

import pytest

from lmplay.catalog.entries import read_source, resolve
from lmplay.model.counts import cache_bytes, count, flops_per_token
from lmplay.model.experiment import load_experiment

L, C, V, T = 3, 64, 1000, 128
MATRICES = L * 12 * C * C + C * V
FUSED = "y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=T > 1)"
WINDOW = 9
CAUSAL_KEYS = (T + 1) / 2
WINDOW_KEYS = (WINDOW * T - WINDOW * (WINDOW - 1) / 2) / T
SCORES = """
        S = k_BHSD.shape[-2]
        places_T = torch.arange(T, device=q_BHTD.device)
        places_S = torch.arange(S, device=q_BHTD.device)
        ago_TS = places_T[:, None] - places_S
        seen_TS = (ago_TS >= 0) & (ago_TS < {width})
        scores_BHTS = q_BHTD @ k_BHSD.transpose(-2, -1) * q_BHTD.shape[-1] ** -0.5
"""
WAYS = {
    "fused": (FUSED, CAUSAL_KEYS),
    "fused, not causal": (FUSED.replace("T > 1", "False"), T),
    "a mask that only adds": (
        SCORES.format(width="T")
        + "        bias_TS = torch.zeros(T, S, device=q_BHTD.device)\n"
        + "        bias_TS.masked_fill_(~seen_TS, float('-inf'))\n"
        + "        y_BHTD = (scores_BHTS + bias_TS).softmax(-1) @ v_BHSD",
        CAUSAL_KEYS,
    ),
    "written out, not causal": (
        SCORES.format(width="T") + "        y_BHTD = scores_BHTS.softmax(-1) @ v_BHSD",
        T,
    ),
}
for width, keys in (("T", CAUSAL_KEYS), (WINDOW, WINDOW_KEYS)):
    scores = SCORES.format(width=width)
    masked = "scores_BHTS.masked_fill(~seen_TS, float('-inf'))"
    chosen = "torch.where(seen_TS, scores_BHTS, torch.finfo(scores_BHTS.dtype).min)"
    fused = FUSED.replace("is_causal=T > 1", "attn_mask={}")
    low = "torch.where(seen_TS, 0.0, float('-inf'))"
    start = scores.replace("        scores_BHTS", "        unused_BHTS = None  # ").rstrip()
    start = "\n".join(line for line in start.split("\n") if "unused" not in line) + "\n        "
    einsum = "torch.einsum('bhts,bhsd->bhtd', shares_BHTS, v_BHSD)"
    of = f"{width} wide"
    WAYS |= {
        f"masked, {of}": (f"{scores}        y_BHTD = {masked}.softmax(-1) @ v_BHSD", keys),
        f"masked in place, {of}": (
            f"{scores}        {masked.replace('fill(', 'fill_(')}\n"
            "        y_BHTD = F.softmax(scores_BHTS, dim=-1, dtype=torch.float32) @ v_BHSD",
            keys,
        ),
        f"chosen, by einsum, {of}": (
            f"{scores}        shares_BHTS = F.dropout({chosen}.softmax(-1), 0.1)\n"
            f"        y_BHTD = {einsum}",
            keys,
        ),
        f"softmax by hand, {of}": (
            f"{scores}        e_BHTS = ({masked} - scores_BHTS.amax(-1, keepdim=True)).exp()\n"
            "        y_BHTD = (e_BHTS / e_BHTS.sum(-1, keepdim=True)) @ v_BHSD",
            keys,
        ),
        f"linear, {of}": (f"{scores}        y_BHTD = (scores_BHTS * seen_TS) @ v_BHSD", keys),
        f"fused with a mask, {of}": (start + fused.format("seen_TS"), keys),
        f"fused with a bias, {of}": (start + fused.format(low), keys),
        f"flex, {of}": (
            start + "from torch.nn.attention.flex_attention import create_block_mask\n"
            "        from torch.nn.attention.flex_attention import flex_attention\n"
            f"        seen = lambda b, h, t, s: (t >= s) & (t - s < {width})\n"
            "        mask = create_block_mask(seen, None, None, T, S, device=q_BHTD.device)\n"
            "        y_BHTD = flex_attention(q_BHTD, k_BHSD, v_BHSD, block_mask=mask)",
            keys,
        ),
    }
TABLE = '''"""One line."""
from dataclasses import dataclass
from torch import nn

@dataclass(frozen=True)
class Config:
    vocab_size: int
    max_len: int = 8

class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, tokens_BT, cache=None):
        return self.table(tokens_BT) @ self.table.weight.T
'''


def edited(old, new, tmp_path, base="gpt2ish"):
    """An experiment with one edit, and its Config at L, C, V and T."""
    source = resolve(base).source
    assert old in source
    experiment = load_experiment(read_source(source.replace(old, new), tmp_path / "a.py")[0])
    sizes = {"vocab_size": V, "max_len": T, "num_blocks": L, "width": C, "num_heads": 4}
    return experiment, experiment.config(**sizes)


@pytest.mark.parametrize("way", WAYS)
def test_attention_counts_the_keys_it_attends_to_however_it_is_written(way, tmp_path):
    line, keys = WAYS[way]
    experiment, config = edited(FUSED, line, tmp_path)

    assert count(experiment, config).flops_per_token == 6 * MATRICES + 3 * L * 4 * C * keys


def test_parameters_of_the_baseline_equal_the_formula(tmp_path):
    counts = count(*edited("", "", tmp_path))

    assert counts.trained == V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C + V * C + V
    assert counts.lookup == V * C + T * C
    assert counts.matmul == MATRICES


def test_a_shorter_row_attends_to_fewer_keys(tmp_path):
    experiment, config = edited("", "", tmp_path)

    for T_now in (1, 2, 32, 128):
        keys = (T_now + 1) / 2
        assert flops_per_token(experiment, config, T_now) == 6 * MATRICES + 3 * L * 4 * C * keys


def test_attention_counts_the_same_however_its_arguments_are_given(tmp_path):
    call = "scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD"
    named = "scaled_dot_product_attention(q_BHTD, value=v_BHSD, key=k_BHSD"

    assert count(*edited(call, named, tmp_path)) == count(*edited("", "", tmp_path))


def test_a_mask_of_documents_hides_none_of_a_row_that_is_one_document(tmp_path):
    masked = """
        documents_T = (tokens_BT[0] == 7).cumsum(0)
        self.same_TT = documents_T[:, None] == documents_T"""
    experiment, config = edited("T = tokens_BT.shape[1]\n", "T = tokens_BT.shape[1]" + masked +
        "\n        for b in self.blocks: b.attention.same = self.same_TT\n", tmp_path)  # fmt: skip
    source = experiment.source.replace(
        FUSED,
        "seen_TS = self.same & torch.ones(T, T, dtype=torch.bool, device=q_BHTD.device).tril()\n"
        "        " + FUSED.replace("is_causal=T > 1", "attn_mask=seen_TS"),
    )
    source = source.replace("    max_len: int = 1024", "    end: int = 7\n    max_len: int = 1024")
    experiment = load_experiment(read_source(source, tmp_path / "a.py")[0])
    counts = count(experiment, experiment.config(**{**vars(config), "end": 7}))

    assert counts.flops_per_token == 6 * MATRICES + 3 * L * 4 * C * CAUSAL_KEYS


def test_a_window_that_grows_over_a_run_counts_as_its_mean(tmp_path):
    lines, _ = WAYS[f"masked, {WINDOW} wide"]
    lines = lines.replace(f"< {WINDOW}", "< self.window")
    experiment, config = edited(FUSED, lines, tmp_path)
    at = """    def at(self, progress: float) -> None:
        for block in self.blocks:
            block.attention.window = int(WINDOW + 8 * progress)

    def hidden(self""".replace("WINDOW", str(WINDOW))
    source = experiment.source.replace("    def hidden(self", at)
    experiment = load_experiment(read_source(source, tmp_path / "a.py")[0])
    keys = [(w * T - w * (w - 1) / 2) / T for w in (WINDOW, WINDOW + 4, WINDOW + 8)]
    mean = (keys[0] + 2 * keys[1] + keys[2]) / 4

    assert count(experiment, config).flops_per_token == 6 * MATRICES + 3 * L * 4 * C * mean


def test_heads_that_only_training_has_are_counted(tmp_path):
    terms = """    def loss_terms(self, tokens_BT, targets_BT):
        x_BTC = self.hidden(tokens_BT)
        own = {"x": x_BTC, "head": self.head, "targets": targets_BT}
        return [own, {"x": x_BTC, "head": self.second, "targets": targets_BT.roll(-1, 1)}]

    def forward(self, tokens_BT: Tensor, cache"""
    experiment, config = edited("    def forward(self, tokens_BT: Tensor, cache", terms, tmp_path)
    source = experiment.source.replace(
        "        nn.init.zeros_(self.position",
        "        self.second = nn.Linear(config.width, config.vocab_size)\n"
        "        nn.init.zeros_(self.position",
    )
    experiment = load_experiment(read_source(source, tmp_path / "a.py")[0])
    one = count(*edited("", "", tmp_path))
    both = count(experiment, config)

    assert both.flops_per_token - one.flops_per_token == 6 * C * V
    assert both.matmul - one.matmul == C * V


def test_a_tied_table_counts_as_a_matrix(tmp_path):
    experiment = load_experiment(read_source(TABLE, tmp_path / "tied.py")[0])
    counts = count(experiment, experiment.config(vocab_size=6))

    assert (counts.matmul, counts.lookup) == (36, 0)


def test_a_model_that_decides_by_its_own_numbers_is_counted_with_numbers(tmp_path):
    decides = TABLE.replace(
        "        return", "        x = self.table(tokens_BT)\n        assert x.isfinite().all()\n"
        "        return",
    )  # fmt: skip
    experiment = load_experiment(read_source(decides, tmp_path / "decides.py")[0])
    plain = load_experiment(read_source(TABLE, tmp_path / "tied.py")[0])

    assert count(experiment, experiment.config(vocab_size=6)) == count(
        plain, plain.config(vocab_size=6)
    )


def test_relative_positions_cost_their_scores_alone():
    apos, plain = load_experiment(resolve("apos")), load_experiment(resolve("gpt2ish"))
    config = apos.config(**apos.tiny)
    one, other = count(apos, config), count(plain, plain.config(**plain.tiny))
    scores = 3 * config.num_blocks * 2 * config.width * (config.max_len + 1) / 2

    assert one.flops_per_token == other.flops_per_token + scores


def test_frozen_parameters_are_counted_apart_and_their_flops_are_an_upper_bound():
    experiment = load_experiment(resolve("gpt2ish"))
    config = experiment.config(**experiment.tiny)
    whole, partly = count(experiment, config), count(experiment, config, ["blocks.0.*", "head.*"])

    assert whole.frozen == 0 < partly.frozen
    assert partly.trained + partly.frozen == whole.trained
    assert partly.matmul < whole.matmul and partly.lookup == whole.lookup
    assert partly.folded == whole.folded and partly.flops_per_token == whole.flops_per_token


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("llama", 2 * 2 * 8 * 16 * 4, 2 * 2 * 16 * 16 * 4),  # blocks, keys and values, T, C
        ("rwkv7", 2 * (16 * 8 + 2 * 16) * 4, 2 * (16 * 8 + 2 * 16) * 4),  # state, two inputs
        ("llada", None, None),
    ],
)
def test_what_generating_keeps_of_a_row_is_counted_without_a_model(name, first, second):
    experiment = load_experiment(resolve(name))
    config = experiment.config(**experiment.tiny)

    assert [cache_bytes(experiment, config, T) for T in (8, 16)] == [first, second]


def at_size(name, **values):
    experiment = load_experiment(resolve(name))
    sizes = {"vocab_size": V, "max_len": T, "num_blocks": L, "width": C, "num_heads": 4}
    return experiment, experiment.config(**sizes | values)


def test_what_only_training_predicts_is_paid_for_in_training():
    one, more = count(*at_size("llama")), count(*at_size("multi_token_4"))
    block = (one.matmul - C * V) // L

    assert more.flops_per_token - one.flops_per_token == 3 * (
        6 * (block + C * V) + 3 * 4 * C * CAUSAL_KEYS
    )


WHOLE = L * T * 2 * C * 4  # bytes: keys and values of all blocks in fp32


@pytest.mark.parametrize(
    ("name", "values", "kept"),
    [
        ("llama", {}, WHOLE),
        ("gpt2ish", {}, WHOLE),
        ("shared_layers", {"num_blocks": 4}, WHOLE // L * 4),  # a memory at each place
        ("grouped_query", {"heads_per_group": 2}, WHOLE // 2),
        ("multi_query", {}, WHOLE // 4),
        ("latent_attention", {"latent_heads": 2}, L * T * (2 * 16 + 8) * 4),
        ("window_only", {"window": 33}, WHOLE // T * 32),
        ("kv_shift", {}, WHOLE + WHOLE // T),  # and the last key and value before the shift
        ("canon", {}, WHOLE + 3 * WHOLE // T),  # and three inputs at two places
    ],
)
def test_a_cache_holds_what_later_tokens_need(name, values, kept):
    assert cache_bytes(*at_size(name, **values), T) == kept
