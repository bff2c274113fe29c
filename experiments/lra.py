"""Learned residual add: weigh the stream and what a layer adds to it by learned, bounded gates.

Idea: where x + y keeps all that was ever written, alpha x + beta y lets the model fade old
    information and turn new information down. Both weights stay between `floor` and `ceil`. They
    are predicted from x and y at each position, by one linear layer or by an MLP, or learned as
    constants; one for each channel, or one for all. All kinds start at or near 0.95, the middle, so
    that over 12 adds the first vectors shrink to about half of what they add up to in gpt2ish.
    Only lra1_3 folds: every reader of the stream is a LayerNorm, to which a constant in front of
    the whole stream is nothing but for eps. That moves what a norm gives by a share of at most
    |1 - s^2| eps / (2 v), v the variance that it meets and s the product of the alphas so far.
Source: Jeff Ward, jmward01/lmplay.
Family: residual.
Folds to: gpt2ish.
Changed from gpt2ish: Config, LearnedAdd, Add, FoldableBlocks, Block, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, E = 2 C, G = C weights or one for all channels

VARIANTS = {
    "lra1_0": {},
    "lra1_1": {"gate": "constant"},
    "lra1_2": {"per_channel": False},
    "lra1_3": {"gate": "constant", "per_channel": False},
    "lra1_4": {"gate": "mlp"},
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
    gate: str = "linear"  # made by: "linear", "mlp" (both from x and y) or "constant"
    per_channel: bool = True
    floor: float = 0.4  # below every alpha and beta
    ceil: float = 1.5  # above them

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.gate not in ("linear", "mlp", "constant"):
            raise ValueError(f"gate={self.gate!r} is none of 'linear', 'mlp' and 'constant'")
        if not 0 < self.floor < self.ceil:
            raise ValueError(f"floor={self.floor} and ceil={self.ceil} are not 0 < floor < ceil")


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


class LearnedAdd(nn.Module):
    """alpha x + beta y, with alpha and beta between floor and ceil."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = config.gate
        self.floor = config.floor
        self.ceil = config.ceil
        num_raw = 2 * (config.width if config.per_channel else 1)
        if config.gate == "constant":
            self.raw = nn.Parameter(torch.zeros(num_raw))
        elif config.gate == "linear":
            self.predictor = nn.Linear(2 * config.width, num_raw)
        else:
            self.predictor = nn.Sequential(
                nn.Linear(2 * config.width, config.width),
                nn.ReLU(),
                nn.Linear(config.width, num_raw),
            )

    def bounded(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.sigmoid(raw)
        weights = self.floor + (self.ceil - self.floor) * share
        alpha, beta = weights.chunk(2, dim=-1)
        return alpha, beta

    def forward(self, x_BTC: Tensor, y_BTC: Tensor) -> Tensor:
        if self.gate == "constant":
            alpha_G, beta_G = self.bounded(self.raw)
            x_BTC = alpha_G * x_BTC + beta_G * y_BTC
            return x_BTC
        xy_BTE = torch.cat([x_BTC, y_BTC], dim=-1)
        raw_BTG = self.predictor(xy_BTE)
        alpha_BTG, beta_BTG = self.bounded(raw_BTG)
        x_BTC = alpha_BTG * x_BTC + beta_BTG * y_BTC
        return x_BTC


class Add(nn.Module):
    """x + y: what is left of a learned add after folding."""

    def forward(self, x_BTC: Tensor, y_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + y_BTC
        return x_BTC


class FoldableBlocks(nn.ModuleList):
    """Blocks whose adds have one constant alpha and one constant beta each."""

    @torch.no_grad()
    def fold(self) -> nn.ModuleList:
        """Plain blocks, for the stream divided by the product of the alphas so far."""
        scale_G = 1.0
        for block in self:
            parts = (block.attention_add, block.attention.output), (block.mlp_add, block.mlp.down)
            for add, layer in parts:
                alpha_G, beta_G = add.bounded(add.raw)
                scale_G = scale_G * alpha_G
                layer.weight *= beta_G / scale_G
                layer.bias *= beta_G / scale_G
            block.attention_add = Add()
            block.mlp_add = Add()
        return nn.ModuleList(self)


class Block(nn.Module):
    """Attention, then the MLP; each reads a normed copy of the stream and adds to it."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index = index
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.attention_add = LearnedAdd(config)
        self.mlp_add = LearnedAdd(config)

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        u_BTC = self.attention_norm(x_BTC)
        y_BTC = self.attention(u_BTC, cache)
        x_BTC = self.attention_add(x_BTC, y_BTC)
        u_BTC = self.mlp_norm(x_BTC)
        y_BTC = self.mlp(u_BTC)
        x_BTC = self.mlp_add(x_BTC, y_BTC)
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
        if config.gate == "constant" and not config.per_channel:
            self.blocks = FoldableBlocks(self.blocks)

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
