"""CompleteP: multipliers that let a rate found at a small size serve at a large one.

Idea: as a model grows wider and deeper, a step at one rate changes by more what its layers give.
    So that it changes that by as much at every size, each addition to the stream is divided by the
    depth to the power of `depth_exponent`, and the head starts smaller as the model grows wider;
    rates and decay of matrices and head follow the width by the plan (`scaling.by_width=mup`),
    which --sizes goes by. At the size that rates were found at (`base_width`, `base_blocks`; None
    is this one) it is gpt2ish. `mup` has no rule for depth; `depth_mup` divides by the root of the
    depth, and lowers the rate of blocks by as much. Hidden matrices start with one over the root of
    the width, as torch has them and the rule asks. Heads are added as wide as they were, so scores
    need no rule. Implementations went wrong by multiplying the stream itself, and by decay that
    does not follow the width.
Source: Yang et al. 2022, arXiv:2203.03466, table 3 (muP, whose head is used); Dey et al. 2025,
    arXiv:2505.01618, table 1 (CompleteP divides by the depth, depth-muP by its root).
Family: weights.
Changed from gpt2ish: Config, Block, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary

VARIANTS = {
    "mup": {"depth_exponent": None},
    "depth_mup": {"depth_exponent": 0.5},
}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "base_width": 8,
    "base_blocks": 1,
}


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
    base_width: int | None = None
    base_blocks: int | None = None
    depth_exponent: float | None = 1.0

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")

    @property
    def wider(self) -> float:
        return self.width / (self.base_width or self.width)

    @property
    def deeper(self) -> float:
        return self.num_blocks / (self.base_blocks or self.num_blocks)

    @property
    def residual_scale(self) -> float:
        """Of what each part of a block adds to the stream."""
        return self.deeper ** -(self.depth_exponent or 0.0)

    @property
    def block_rate(self) -> float:
        """Of the parameters of blocks, in rates of the others."""
        return 1.0 if self.depth_exponent is None else self.deeper ** (self.depth_exponent - 1)


class Attention(nn.Module):
    """Causal self-attention over H heads of width D = C / H."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.ff_dropout)

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
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.residual_scale = config.residual_scale

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        u_BTC = self.attention_norm(x_BTC)
        y_BTC = self.attention(u_BTC, cache)
        y_BTC = y_BTC * self.residual_scale
        x_BTC = x_BTC + y_BTC
        u_BTC = self.mlp_norm(x_BTC)
        y_BTC = self.mlp(u_BTC)
        y_BTC = y_BTC * self.residual_scale
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
        self.head.weight.data *= config.wider**-0.5  # of one over the root of the width

    def parameter_groups(self) -> list[dict]:
        """Blocks have a rate of their own where depth has a rule for it."""
        return [{"params": list(self.blocks.parameters()), "lr_scale": self.config.block_rate}]

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
