"""Direct neural memory: after each block, attend to learned keys and values, not to tokens.

Idea: attention looks for what the text says; what the model knows has no place of its own. Here a
    memory block stands behind each block: attention to a bank of learned cells, then an MLP. The
    cells do not depend on the text, so it is a network of two layers whose bend is a softmax for
    each head. It is what nnm1 folds to, and its control: there networks make the keys and the
    values, here they are trained as they are.
Source: Jeff Ward, jmward01/lmplay.
Family: memory.
Changed from gpt2ish: Config, Memory, Recall, MemoryBlock, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, N cells, G heads of attention to them, J width of such a head,
# A any dimensions

VARIANTS = {}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "num_cells": 8,
    "memory_heads": 2,
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
    num_cells: int = 128  # of a memory
    memory_heads: int = 6  # of attention to it
    memory_blocks: int = 1  # beside each block
    memory_first: bool = False  # before the block, not behind it
    memory_residual: bool = True  # off: what was recalled reaches the stream through the MLP alone
    share: str = "all"  # by memory blocks: "all", "memory" without attention to it, "none"

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.num_cells < 1:
            raise ValueError(f"num_cells={self.num_cells} is below 1")
        if self.memory_heads < 1 or self.width % self.memory_heads:
            raise ValueError(f"memory_heads={self.memory_heads} does not divide width={self.width}")
        if self.memory_blocks < 1:
            raise ValueError(f"memory_blocks={self.memory_blocks} is below 1")
        if self.share not in ("all", "memory", "none"):
            raise ValueError(f"share={self.share!r} is not 'all', 'memory' or 'none'")


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


class Memory(nn.Module):
    """The keys and values of N cells, whatever the text."""

    def __init__(self, config: Config):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(config.num_cells, config.width))
        self.values = nn.Parameter(torch.randn(config.num_cells, config.width))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class Recall(nn.Module):
    """Attention to all cells of a memory."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.memory_heads
        self.query = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.ff_dropout)

    def split(self, x_AC: Tensor) -> Tensor:
        x_AGJ = x_AC.unflatten(-1, (self.num_heads, -1))
        return x_AGJ

    def forward(self, x_BTC: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
        k_NC, v_NC = kept
        q_BTC = self.query(x_BTC)
        q_BTGJ = self.split(q_BTC)
        k_NGJ = self.split(k_NC)
        v_NGJ = self.split(v_NC)
        scores_BTGN = torch.einsum("btgj,ngj->btgn", q_BTGJ, k_NGJ) * q_BTGJ.shape[-1] ** -0.5
        shares_BTGN = scores_BTGN.softmax(-1)
        y_BTGJ = torch.einsum("btgn,ngj->btgj", shares_BTGN, v_NGJ)
        y_BTC = y_BTGJ.flatten(2)
        y_BTC = self.output(y_BTC)
        y_BTC = self.dropout(y_BTC)
        return y_BTC


class MemoryBlock(nn.Module):
    """Attention to a memory, then an MLP; which memory, and through what, the Model says."""

    def __init__(self, config: Config):
        super().__init__()
        self.residual = config.memory_residual
        self.memory_norm = nn.LayerNorm(config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, recall: Recall, kept: tuple[Tensor, Tensor]) -> Tensor:
        u_BTC = self.memory_norm(x_BTC)
        y_BTC = recall(u_BTC, kept)
        r_BTC = y_BTC
        if self.residual:
            x_BTC = x_BTC + y_BTC
            r_BTC = x_BTC
        u_BTC = self.mlp_norm(r_BTC)
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
        places = range(config.num_blocks * config.memory_blocks)
        recalls = places[:1] if config.share == "all" else places
        memories = places if config.share == "none" else places[:1]
        self.memory_blocks = nn.ModuleList(MemoryBlock(config) for _ in places)
        self.recalls = nn.ModuleList(Recall(config) for _ in recalls)
        self.memories = nn.ModuleList(Memory(config) for _ in memories)

    def recall(self, x_BTC: Tensor, index: int, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What the memory blocks beside block `index` make of the stream."""
        num_each = self.config.memory_blocks
        for place in range(index * num_each, (index + 1) * num_each):
            recall = self.recalls[place % len(self.recalls)]
            x_BTC = self.memory_blocks[place](x_BTC, recall, kept[place % len(kept)])
        return x_BTC

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        T = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        e_BTC = self.token_table(tokens_BT)
        p_TC = self.position_table(positions_T)
        x_BTC = e_BTC + p_TC
        x_BTC = self.dropout(x_BTC)
        kept = [memory() for memory in self.memories]
        for block in self.blocks:
            if self.config.memory_first:
                x_BTC = self.recall(x_BTC, block.index, kept)
            x_BTC = block(x_BTC, cache)
            if not self.config.memory_first:
                x_BTC = self.recall(x_BTC, block.index, kept)
        x_BTC = self.final_norm(x_BTC)
        return x_BTC

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV
