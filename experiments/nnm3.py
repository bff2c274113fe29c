"""Cell lookup: each linear layer also looks up a mean of a few learned cells.

Idea: a linear layer is one map for every input; a token that needs something particular must share
    it with all others. Beside the layer a small network gives each of a few cells a share, for each
    head, and the mean of the cells, through one more linear layer, is added to what the layer says.
    It is a cheap form of attention to a learned memory (nnm1), with shares that depend on the input
    alone. nnm3_1 has 64 cells, not 20 as the original's description says; nnm3_3 has them at query,
    key and value, as its values say. All of it is kept after training.
Source: Jeff Ward, jmward01/lmplay.
Family: memory.
Changed from gpt2ish: Config, CellLookup, CellLinear, linear, Attention, MLP.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, I inputs and O outputs of a linear layer, G heads of a lookup,
# N cells, J width of a cell

VARIANTS = {
    "nnm3_0": {},
    "nnm3_1": {"num_layer_cells": 64},
    "nnm3_2": {"cell_layers": "up down"},
    "nnm3_3": {"cell_layers": "query key value"},
}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "layer_cell_heads": 2,
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
    num_layer_cells: int = 10  # of each head
    layer_cell_heads: int = 3  # means that a lookup takes
    cell_layers: str = "query key value output up down"  # of each block, that have cells

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.num_layer_cells < 1:
            raise ValueError(f"num_layer_cells={self.num_layer_cells} is below 1")
        if self.layer_cell_heads < 1 or self.width % self.layer_cell_heads:
            raise ValueError(
                f"layer_cell_heads={self.layer_cell_heads} does not divide width={self.width}"
            )
        if not self.layers or self.layers - {"query", "key", "value", "output", "up", "down"}:
            raise ValueError(
                f"cell_layers={self.cell_layers!r} names none, or other layers than query, key, "
                f"value, output, up, down"
            )

    @property
    def layers(self) -> set[str]:
        return set(self.cell_layers.split())


class CellLookup(nn.Module):
    """The mean of a head's cells, for each of its heads; a small network makes the shares."""

    def __init__(self, num_inputs: int, num_outputs: int, config: Config):
        super().__init__()
        num_hidden = (num_inputs + config.num_layer_cells) // 2
        self.num_heads = config.layer_cell_heads
        self.up = nn.Linear(num_inputs, num_hidden)
        self.down = nn.Linear(num_hidden, config.layer_cell_heads * config.num_layer_cells)
        self.cells = nn.Parameter(
            torch.randn(
                config.layer_cell_heads,
                config.num_layer_cells,
                num_outputs // config.layer_cell_heads,
            )
        )
        self.output = nn.Linear(num_outputs, num_outputs)

    def forward(self, x_BTI: Tensor) -> Tensor:
        h_BTF = self.up(x_BTI)
        h_BTF = F.gelu(h_BTF)
        z_BTF = self.down(h_BTF)
        z_BTGN = z_BTF.unflatten(-1, (self.num_heads, -1))
        shares_BTGN = z_BTGN.softmax(-1)
        y_BTGJ = torch.einsum("btgn,gnj->btgj", shares_BTGN, self.cells)
        y_BTO = y_BTGJ.flatten(2)
        y_BTO = self.output(y_BTO)
        return y_BTO


class CellLinear(nn.Linear):
    """A linear layer with a lookup beside it, the two added."""

    def __init__(self, num_inputs: int, num_outputs: int, config: Config):
        super().__init__(num_inputs, num_outputs)
        self.lookup = CellLookup(num_inputs, num_outputs, config)

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_BTO = super().forward(x_BTI)
        y_BTO = y_BTO + self.lookup(x_BTI)
        return y_BTO


def linear(name: str, num_inputs: int, num_outputs: int, config: Config) -> nn.Linear:
    """A linear layer of a block, with cells where Config says so."""
    if name in config.layers:
        return CellLinear(num_inputs, num_outputs, config)
    return nn.Linear(num_inputs, num_outputs)


class Attention(nn.Module):
    """Causal self-attention over H heads of width D = C / H."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = linear("query", config.width, config.width, config)
        self.key = linear("key", config.width, config.width, config)
        self.value = linear("value", config.width, config.width, config)
        self.output = linear("output", config.width, config.width, config)
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
        self.up = linear("up", config.width, 4 * config.width, config)
        self.down = linear("down", 4 * config.width, config.width, config)
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
