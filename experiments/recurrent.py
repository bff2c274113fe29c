"""Recurrent: run the baseline one token at a time, on a state that it carries along.

Idea: none but the way of running, a place to start from with models that do have a state. One token
    goes through all blocks before the next begins, in training too, and all that it finds is what
    the tokens before it left in the state: here the keys and values of each block, with gradients
    flowing through them. So it learns what gpt2ish learns, only far slower, in T small steps and
    with memory that grows with T^2. A model of your own changes State, or what `step` does with it.
Source: Jeff Ward, jmward01/lmplay.
Family: mixing.
Changed from gpt2ish: State, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary

VARIANTS = {
    "rgpt2ish": {},
    "rtest_runner": {"width": 64, "num_heads": 2},
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

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")


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


class State:
    """What the tokens so far left behind: to attention, it looks like the cache of generation."""

    def __init__(self):
        self.length = 0  # tokens
        self.kept: dict[nn.Module, list[Tensor]] = {}

    def append(self, module: nn.Module, *new: Tensor) -> list[Tensor]:
        old = self.kept.get(module)
        if old is not None:
            new = [torch.cat(pair, dim=-2) for pair in zip(old, new, strict=True)]
        self.kept[module] = list(new)
        return self.kept[module]


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

    def step(self, tokens_BT: Tensor, state: State) -> Tensor:
        """The next token of each row (T is 1), which the state is left with."""
        positions_T = torch.full((1,), state.length, device=tokens_BT.device)
        e_BTC = self.token_table(tokens_BT)
        p_TC = self.position_table(positions_T)
        x_BTC = e_BTC + p_TC
        x_BTC = self.dropout(x_BTC)
        for block in self.blocks:
            x_BTC = block(x_BTC, state)
        x_BTC = self.final_norm(x_BTC)
        state.length += 1
        return x_BTC

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        slot = cache.state(self) if cache is not None else {}
        state = slot.setdefault("state", State())
        steps = [self.step(token_BT, state) for token_BT in tokens_BT.split(1, dim=1)]
        x_BTC = torch.cat(steps, dim=1)
        return x_BTC

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV
