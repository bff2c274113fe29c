"""Lookup blocks: between ordinary blocks stand some that look up learned cells, not other tokens.

Idea: attention carries what the text says; what the model knows could have a place of its own. In a
    lookup block a small network gives each of a few hundred learned cells a share, for each head,
    and the mean of the cells is added where attention would add; an MLP follows as ever. A pattern
    says which blocks stand where: "BNN" is an ordinary block and two lookup blocks, num_blocks
    times; in "BN-BNN" two groups take turns. nnm4_3 leaves the shares unbounded: then cells and
    layers are only a long way to write an MLP. In the original a group may have any number of B,
    and dropout in lookup blocks is 0.1 whatever is asked.
Source: Jeff Ward, jmward01/lmplay.
Family: memory.
Changed from gpt2ish: Config, Lookup, LookupBlock, run, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, G heads of a lookup, N cells, J width of a cell

VARIANTS = {
    "nnm4_0": {},
    "nnm4_1": {"lookup_norm": False},
    "nnm4_2": {"num_block_cells": 512},
    "nnm4_3": {"lookup_softmax": False},
    "nnm4_4": {"block_pattern": "BN-BN-BNN-BNN-BNNN-BNNN"},
    "nnm4_5": {"block_pattern": "BN-BNN-BNNN-BNNN-BNN-BN"},
}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "num_block_cells": 8,
    "block_cell_heads": 2,
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
    num_block_cells: int = 256  # of each head
    block_cell_heads: int = 6  # means that a lookup takes
    lookup_norm: bool = True  # before the lookup
    lookup_softmax: bool = True  # shares are above 0 and sum to 1
    block_pattern: str = "BNN"  # B: a block, N: a lookup block; "-": around the next block

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.num_block_cells < 1:
            raise ValueError(f"num_block_cells={self.num_block_cells} is below 1")
        if self.block_cell_heads < 1 or self.width % self.block_cell_heads:
            raise ValueError(
                f"block_cell_heads={self.block_cell_heads} does not divide width={self.width}"
            )
        groups = self.block_pattern.split("-")
        if "N" not in self.block_pattern or any(g.replace("N", "") != "B" for g in groups):
            raise ValueError(
                f"block_pattern={self.block_pattern!r} is not groups of one B and some N"
            )

    def group(self, index: int) -> str:
        """What stands around block `index`; the pattern starts again where it ends."""
        groups = self.block_pattern.split("-")
        return groups[index % len(groups)]


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

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        u_BTC = self.attention_norm(x_BTC)
        y_BTC = self.attention(u_BTC, cache)
        x_BTC = x_BTC + y_BTC
        u_BTC = self.mlp_norm(x_BTC)
        y_BTC = self.mlp(u_BTC)
        x_BTC = x_BTC + y_BTC
        return x_BTC


class Lookup(nn.Module):
    """The mean of a head's cells, for each of its heads; a small network makes the shares."""

    def __init__(self, config: Config):
        super().__init__()
        num_hidden = (config.width + config.num_block_cells) // 2
        self.num_heads = config.block_cell_heads
        self.softmax = config.lookup_softmax
        self.up = nn.Linear(config.width, num_hidden)
        self.down = nn.Linear(num_hidden, config.block_cell_heads * config.num_block_cells)
        self.cells = nn.Parameter(
            torch.randn(
                config.block_cell_heads,
                config.num_block_cells,
                config.width // config.block_cell_heads,
            )
        )
        self.output = nn.Linear(config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTF = self.up(x_BTC)
        h_BTF = F.gelu(h_BTF)
        z_BTF = self.down(h_BTF)
        z_BTGN = z_BTF.unflatten(-1, (self.num_heads, -1))
        shares_BTGN = z_BTGN.softmax(-1) if self.softmax else z_BTGN
        y_BTGJ = torch.einsum("btgn,gnj->btgj", shares_BTGN, self.cells)
        y_BTC = y_BTGJ.flatten(2)
        y_BTC = self.output(y_BTC)
        return y_BTC


class LookupBlock(nn.Module):
    """A lookup of cells, then an MLP; it sees one position alone."""

    def __init__(self, config: Config):
        super().__init__()
        self.lookup_norm = nn.LayerNorm(config.width) if config.lookup_norm else nn.Identity()
        self.lookup = Lookup(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor) -> Tensor:
        u_BTC = self.lookup_norm(x_BTC)
        y_BTC = self.lookup(u_BTC)
        x_BTC = x_BTC + y_BTC
        u_BTC = self.mlp_norm(x_BTC)
        y_BTC = self.mlp(u_BTC)
        x_BTC = x_BTC + y_BTC
        return x_BTC


def run(config: Config, letters: str) -> nn.ModuleList:
    """A lookup block for each letter."""
    return nn.ModuleList(LookupBlock(config) for _ in letters)


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
        groups = [config.group(index).split("B") for index in range(config.num_blocks)]
        self.before = nn.ModuleList(run(config, before) for before, _ in groups)
        self.behind = nn.ModuleList(run(config, behind) for _, behind in groups)

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        T = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        e_BTC = self.token_table(tokens_BT)
        p_TC = self.position_table(positions_T)
        x_BTC = e_BTC + p_TC
        x_BTC = self.dropout(x_BTC)
        for block in self.blocks:
            for lookup_block in self.before[block.index]:
                x_BTC = lookup_block(x_BTC)
            x_BTC = block(x_BTC, cache)
            for lookup_block in self.behind[block.index]:
                x_BTC = lookup_block(x_BTC)
        x_BTC = self.final_norm(x_BTC)
        return x_BTC

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV
