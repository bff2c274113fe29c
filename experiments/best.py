"""Best: the stack that a greedy search found on llama.

Idea: the best idea of the board in docs/techniques.md and three of other places, stacked in turn,
    each round on four fresh seeds, at 640,000 parameters and 150 steps on nineteen novels:
    lmp-trainer --exp llama --greedy stick_breaking,layer_token_embedding,ngram_memory,canon
    --seeds 4 --plan tiny --data novels. It took stick_breaking (0.176 nats better than llama), then
    layer_token_embedding (0.076 better than that), then ngram_memory (0.033). canon, 0.064 better
    on llama alone, was 0.022 worse on stick_breaking, and could not be told on the rest.
Source: Tan et al. 2024, arXiv:2410.17980, section 2; Gemma 3n (Google 2025, model code: per-layer
    embeddings); the form is BlaGPT's (Golge 2024, github.com/erogol/BlaGPT); DeepSeek-AI 2026,
    arXiv:2601.07372 (Engram); the form is BlaGPT's smallest (Golge, github.com/erogol/BlaGPT).
Changed from llama: Config, prime_from, break_stick, Attention, LayerTable, NgramTable, Block,
    Model, rotary, rotate.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width, F hidden
# width, V vocabulary, E width of a block's table, P tokens before

TINY = {"vocab_size": 61, "max_len": 16, "num_blocks": 2, "width": 16, "num_heads": 2}


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int
    max_len: int = 1024  # tokens
    num_blocks: int = 6
    width: int = 768
    num_heads: int = 12
    mlp_multiple: int = 64  # the hidden width is 8/3 of the width, rounded up to a multiple of this
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the token table
    token_std: float = 1.0  # spread of the token table at the start, unless it is the head
    rest: bool = True  # what is left goes to the token's own value
    table_width: int = 256  # of each block's own table
    ngram: int = 3  # tokens that look up a row together
    rows_per_token: int = 5  # of the table, for each token of the vocabulary

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if not 1 < self.ngram <= len(MULTIPLIERS):
            raise ValueError(f"ngram={self.ngram} is not 2 to {len(MULTIPLIERS)}")

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden_width(self) -> int:
        return -(-8 * self.width // (3 * self.mlp_multiple)) * self.mlp_multiple

    @property
    def output_std(self) -> float:
        """Of the matrices that write into the stream, two in each block."""
        return 0.02 * (2 * self.num_blocks) ** -0.5


MULTIPLIERS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE3D, 0x27D4EB2F)  # odd, of 32 bits


def prime_from(least: int) -> int:
    """The first prime that is at least this."""
    while any(least % factor == 0 for factor in range(2, math.isqrt(least) + 1)):
        least += 1
    return least


def linear(inputs: int, outputs: int, std: float = 0.02) -> nn.Linear:
    """A layer without bias whose weights start with this spread for 768 inputs."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=std * (768 / inputs) ** 0.5)
    return layer


class RMSNorm(nn.Module):
    """Divides each position by its root mean square, in fp32 at least, and scales each channel."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        wide_BTC = x_BTC.to(torch.promote_types(x_BTC.dtype, torch.float32))
        y_BTC = F.rms_norm(wide_BTC, self.weight.shape, self.weight, self.eps)
        return y_BTC.to(x_BTC.dtype)


def break_stick(scores_BHTS: Tensor) -> tuple[Tensor, Tensor]:
    """Each key's weight, and what is left of 1, (B, H, T, 1); the last T keys are the queries'."""
    T, S = scores_BHTS.shape[-2:]
    scores_BHTS = scores_BHTS.to(torch.promote_types(scores_BHTS.dtype, torch.float32))
    is_open = torch.ones(T, S, dtype=torch.bool, device=scores_BHTS.device).triu(S - T)
    left_BHTS = F.logsigmoid(-scores_BHTS).masked_fill(is_open, 0.0)
    from_here_BHTS = left_BHTS.flip(-1).cumsum(-1).flip(-1)
    between_BHTS = F.pad(from_here_BHTS[..., 1:], (0, 1))
    log_BHTS = F.logsigmoid(scores_BHTS) + between_BHTS
    return log_BHTS.masked_fill(is_open, -torch.inf).exp(), from_here_BHTS[..., :1].exp()


class Attention(nn.Module):
    """Self-attention to the strict past by breaking a stick, over H heads of width D = C / H."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = linear(config.width, config.width)
        self.key = linear(config.width, config.width)
        self.value = linear(config.width, config.width)
        self.output = linear(config.width, config.width, config.output_std)
        self.rest = config.rest

    def split(self, x_BTC: Tensor) -> Tensor:
        x_BTHD = x_BTC.unflatten(-1, (self.num_heads, -1))
        x_BHTD = x_BTHD.transpose(1, 2)
        return x_BHTD

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        T = x_BTC.shape[1]
        q_BTC = self.query(x_BTC)
        k_BTC = self.key(x_BTC)
        v_BTC = self.value(x_BTC)
        q_BHTD = self.split(q_BTC)
        k_BHSD = self.split(k_BTC)
        v_BHSD = self.split(v_BTC)
        if cache is not None:
            k_BHSD, v_BHSD = cache.append(self, k_BHSD, v_BHSD)
        scores_BHTS = q_BHTD @ k_BHSD.mT * q_BHTD.shape[-1] ** -0.5
        weights_BHTS, rest_BHT1 = break_stick(scores_BHTS)
        y_BHTD = weights_BHTS.to(v_BHSD.dtype) @ v_BHSD
        if self.rest:
            y_BHTD = y_BHTD + rest_BHT1.to(v_BHSD.dtype) * v_BHSD[:, :, -T:]
        y_BTHD = y_BHTD.transpose(1, 2)
        y_BTC = y_BTHD.flatten(2)
        y_BTC = self.output(y_BTC)
        return y_BTC


class MLP(nn.Module):
    """A hidden layer gated by another, then back to width C."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = linear(config.width, config.hidden_width)
        self.up = linear(config.width, config.hidden_width)
        self.down = linear(config.hidden_width, config.width, config.output_std)

    def forward(self, x_BTC: Tensor) -> Tensor:
        g_BTF = self.gate(x_BTC)
        g_BTF = F.silu(g_BTF)
        h_BTF = self.up(x_BTC)
        h_BTF = g_BTF * h_BTF
        y_BTC = self.down(h_BTF)
        return y_BTC


class LayerTable(nn.Module):
    """A row of a table for each token, gated by the stream and brought to width C."""

    def __init__(self, config: Config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.table_width)
        self.gate = linear(config.width, config.table_width)
        self.output = linear(config.table_width, config.width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, x_BTC: Tensor, tokens_BT: Tensor) -> Tensor:
        g_BTE = self.gate(x_BTC)
        g_BTE = F.gelu(g_BTE)
        e_BTE = self.table(tokens_BT)
        e_BTE = g_BTE * e_BTE
        y_BTC = self.output(e_BTE)
        return y_BTC


class NgramTable(nn.Module):
    """A row of a table for the last N tokens, and how much of it a stream takes."""

    def __init__(self, config: Config):
        super().__init__()
        self.size = config.ngram
        self.padding = config.vocab_size
        self.table = nn.Embedding(
            prime_from(config.rows_per_token * config.vocab_size), config.width
        )
        self.gate = nn.Linear(2 * config.width, 1)
        nn.init.zeros_(self.table.weight)
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)

    def rows(self, tokens_BT: Tensor, cache=None) -> Tensor:
        """The number of each position's row."""
        state = {} if cache is None else cache.state(self)
        padding_BP = tokens_BT.new_full((len(tokens_BT), self.size - 1), self.padding)
        all_BS = torch.cat([state.get("last", padding_BP), tokens_BT], dim=1)
        state["last"] = all_BS[:, all_BS.shape[1] - self.size + 1 :]
        T, hashed_BT = tokens_BT.shape[1], torch.zeros_like(tokens_BT)
        for back, factor in zip(range(self.size), MULTIPLIERS, strict=False):
            start = self.size - 1 - back
            hashed_BT = hashed_BT ^ (all_BS[:, start : start + T] * factor)
        return hashed_BT % self.table.num_embeddings

    def forward(self, x_BTC: Tensor, e_BTC: Tensor) -> Tensor:
        both_BTC = torch.cat([x_BTC, e_BTC], dim=-1)
        g_BT1 = torch.sigmoid(self.gate(both_BTC))
        return g_BT1 * e_BTC


class Block(nn.Module):
    """Attention, then the MLP; each reads a normed copy of the stream and adds to it."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index = index
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        u_BTC = self.attention_norm(x_BTC)
        y_BTC = self.attention(u_BTC, cache)
        x_BTC = x_BTC + y_BTC
        u_BTC = self.mlp_norm(x_BTC)
        y_BTC = self.mlp(u_BTC)
        x_BTC = x_BTC + y_BTC
        return x_BTC


class Model(nn.Module):
    """Tokens to the logits of the token after each."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.progress = 0.0
        self.token_table = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_blocks))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = linear(config.width, config.vocab_size)
        nn.init.normal_(self.token_table.weight, std=config.token_std)
        self.layer_tables = nn.ModuleList(LayerTable(config) for _ in range(config.num_blocks))
        self.ngrams = NgramTable(config)
        if config.tied:
            self.token_table.weight = self.head.weight

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.token_table(tokens_BT)
        rows_BT = self.ngrams.rows(tokens_BT, cache)
        e_BTC = self.ngrams.table(rows_BT)
        for block in self.blocks:
            y_BTC = self.ngrams(x_BTC, e_BTC)
            x_BTC = x_BTC + y_BTC
            x_BTC = block(x_BTC, cache)
            y_BTC = self.layer_tables[block.index](x_BTC, tokens_BT)
            x_BTC = x_BTC + y_BTC
        x_BTC = self.final_norm(x_BTC)
        return x_BTC

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV

    def loss_terms(self, tokens_BT: Tensor, targets_BT: Tensor) -> list[dict]:
        """What training minimises: the ruler's own term first, then those of ideas."""
        x_BTC = self.hidden(tokens_BT)
        terms = [{"x": x_BTC, "head": self.head, "targets": targets_BT}]
        return terms

    def parameter_groups(self) -> list[dict]:
        """Parameters that the optimizer treats apart; the rest goes by role."""
        groups = []
        return groups

    def after_step(self) -> None:
        """What an idea does to parameters after each update: nothing here."""
