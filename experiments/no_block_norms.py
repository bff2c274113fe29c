"""No block norms: no LayerNorm before attention and before the MLP.

Idea: the control for uw6 and its relatives, whose blocks have no norms, and what they fold to:
    their gain or loss against gpt2ish is part of the missing norms, part of their layers. The norm
    before the head stays. The variants are the controls for uw6_3, whose blocks have no biases
    either, and for uw6_6, which has no norm at all.
Source: Jeff Ward, jmward01/lmplay.
Family: norms.
Changed from gpt2ish: Config, Attention, MLP, Block, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary

VARIANTS = {
    "no_block_norms_unbiased": {"block_bias": False},
    "no_norms": {"final_norm": False},
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
    block_bias: bool = True  # of the linear layers in the blocks
    final_norm: bool = True  # before the head

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")


class Attention(nn.Module):
    """Causal self-attention over H heads of width D = C / H."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.width, config.width, bias=config.block_bias)
        self.key = nn.Linear(config.width, config.width, bias=config.block_bias)
        self.value = nn.Linear(config.width, config.width, bias=config.block_bias)
        self.output = nn.Linear(config.width, config.width, bias=config.block_bias)
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
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.block_bias)
        self.down = nn.Linear(4 * config.width, config.width, bias=config.block_bias)
        self.dropout = nn.Dropout(config.ff_dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTF = self.up(x_BTC)
        h_BTF = F.gelu(h_BTF)
        y_BTC = self.down(h_BTF)
        y_BTC = self.dropout(y_BTC)
        return y_BTC


class Block(nn.Module):
    """Attention, then the MLP; each reads the stream and adds to it."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index = index
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        y_BTC = self.attention(x_BTC, cache)
        x_BTC = x_BTC + y_BTC
        y_BTC = self.mlp(x_BTC)
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
        self.final_norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()
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
