"""Attention position: score each key by how far back it stands, as the query sees it.

Idea: beside what a key says, where it stands may matter, and to some queries more than to others.
    Each head has a learned vector for each distance; its product with the query joins the key's, as
    a sum or, in apos1_1, as a product. The table of positions at the entrance stays. The vectors
    start with a spread of 1, so that distance has more to say than content at the start. apos1_2
    has them in the last two blocks only. Scores are made in plain sight, not by a fused kernel, so
    memory grows with T^2. In generation a query keeps its distances; the original drops them there.
Source: Jeff Ward, jmward01/lmplay.
Family: positions.
Changed from gpt2ish: Config, Attention, Block.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary

VARIANTS = {
    "apos1_0": {},
    "apos1_1": {"combine": "multiply"},
    "apos1_2": {"num_distance_blocks": 2},
}
TINY = {"vocab_size": 61, "max_len": 16, "num_blocks": 2, "width": 16, "num_heads": 2}


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int
    max_len: int = 1024  # tokens
    num_blocks: int = 6
    width: int = 768
    num_heads: int = 12
    embed_dropout: float = 0.1  # after token + position
    ff_dropout: float = 0.1  # after attention's output projection and after the MLP
    token_std: float = 1.0  # spread of the token table at the start; `ue` starts at 0.2
    combine: str = "add"  # the distance's score is what to the key's: "add" or "multiply"
    num_distance_blocks: int | None = None  # the last ones of the model; None is num_blocks

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.combine not in ("add", "multiply"):
            raise ValueError(f"combine={self.combine!r} is neither 'add' nor 'multiply'")
        if self.num_distance_blocks is not None and self.num_distance_blocks < 1:
            raise ValueError(f"num_distance_blocks={self.num_distance_blocks} starts at 1")

    @property
    def first_distance_block(self) -> int:
        return 0 if self.num_distance_blocks is None else self.num_blocks - self.num_distance_blocks


class Attention(nn.Module):
    """Causal self-attention over H heads of width D = C / H."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.ff_dropout)
        self.combine = config.combine
        self.distance_table = None
        if index >= config.first_distance_block:
            self.distance_table = nn.Embedding(config.max_len, config.width)

    def split(self, x_BTC: Tensor) -> Tensor:
        x_BTHD = x_BTC.unflatten(-1, (self.num_heads, -1))
        x_BHTD = x_BTHD.transpose(1, 2)
        return x_BHTD

    def distance_scores(self, q_BHTD: Tensor, S: int) -> Tensor:
        """Of each query with the vector of its distance to each key; rubbish for later keys."""
        B, H, T, _ = q_BHTD.shape
        distances_S = torch.arange(S - 1, -1, -1, device=q_BHTD.device)
        r_SC = self.distance_table(distances_S)
        r_SHD = r_SC.unflatten(-1, (self.num_heads, -1))
        r_HDS = r_SHD.permute(1, 2, 0)
        scores_BHTS = q_BHTD @ r_HDS  # column S - 1 - n has distance n, in every row
        padded = F.pad(scores_BHTS, (1, 0))
        shifted = padded.view(B, H, S + 1, T)[:, :, 1:]  # row t goes T - 1 - t places to the left
        scores_BHTS = shifted.reshape(B, H, T, S)
        return scores_BHTS

    def attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
        T, S = q_BHTD.shape[-2], k_BHSD.shape[-2]
        scores_BHTS = q_BHTD @ k_BHSD.transpose(-2, -1)
        distance_BHTS = self.distance_scores(q_BHTD, S)
        if self.combine == "add":
            scores_BHTS = scores_BHTS + distance_BHTS
        else:
            scores_BHTS = scores_BHTS * distance_BHTS
        scores_BHTS = scores_BHTS * q_BHTD.shape[-1] ** -0.5
        later_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTD.device).triu(S - T + 1)
        scores_BHTS = scores_BHTS.masked_fill(later_TS, float("-inf"))
        shares_BHTS = scores_BHTS.softmax(-1)
        y_BHTD = shares_BHTS @ v_BHSD
        return y_BHTD

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
        if self.distance_table is not None:
            y_BHTD = self.attend(q_BHTD, k_BHSD, v_BHSD)
        else:
            y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=T > 1)
        y_BTHD = y_BHTD.transpose(1, 2)
        y_BTC = y_BTHD.flatten(2)
        y_BTC = self.output(y_BTC)
        y_BTC = self.dropout(y_BTC)
        return y_BTC


class MLP(nn.Module):
    """Two linear layers, 4 C wide between them."""

    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.ff_dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTF = self.up(x_BTC)
        h_BTF = F.gelu(h_BTF)
        y_BTC = self.down(h_BTF)
        y_BTC = self.dropout(y_BTC)
        return y_BTC


class Block(nn.Module):
    """Attention, then the MLP; each reads a normed copy of the stream and adds to it."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index = index
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config, index)
        self.mlp_norm = nn.LayerNorm(config.width)
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
        self.token_table = nn.Embedding(config.vocab_size, config.width)
        self.position_table = nn.Embedding(config.max_len, config.width)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size)
        self.token_table.weight.data *= config.token_std
        nn.init.zeros_(self.position_table.weight)

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        T = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        e_BTC = self.token_table(tokens_BT)
        p_TC = self.position_table(positions_T)
        x_BTC = e_BTC + p_TC
        x_BTC = self.dropout(x_BTC)
        for block in self.blocks:
            x_BTC = block(x_BTC, cache)
        x_BTC = self.final_norm(x_BTC)
        return x_BTC

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV
