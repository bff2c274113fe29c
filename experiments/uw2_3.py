"""Shared bias data: predict every bias from one vector that all layers share.

Idea: uw2 gives each layer a vector and shares the network; here it is the other way round: one wide
    vector for the whole model, and in each layer a small network of its own that makes the bias of
    it. Rows of the weights have multipliers, as in uw2_1. After training a bias is a constant. The
    original makes the multipliers and the scalar beside the bias but leaves them out of the layer;
    here they are in it.
Source: Jeff Ward, jmward01/lmplay.
Folds to: gpt2ish.
Changed from uw2: Config, BiasNet, SharedData, SharedBiasLinear, PrivateBiasLinear, Attention, MLP,
    Block, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, I inputs and O outputs of a linear layer, N either of them,
# W width of the shared vector, M hidden width of a layer's network, A any dimensions of positions

VARIANTS = {}
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
    data_mul: int = 8  # width of the shared vector, in model widths

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.data_mul < 1:
            raise ValueError(f"data_mul={self.data_mul} is below 1")


class Adjuster(nn.Module):
    """A vector and a scalar that is added to all of it."""

    def __init__(self, size: int, start: float):
        super().__init__()
        self.vector = nn.Parameter(torch.full((size,), start))
        self.scalar = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        sum_N = self.vector + self.scalar
        return sum_N


class SharedData(nn.Module):
    """The vector that the biases of all layers are made of."""

    def __init__(self, config: Config):
        super().__init__()
        self.vector = nn.Parameter(torch.empty(config.data_mul * config.width))
        nn.init.uniform_(self.vector, -(config.width**-0.5), config.width**-0.5)

    def forward(self) -> Tensor:
        return self.vector

    def fold(self) -> None:
        """Nothing: its users have become ordinary layers."""


class PrivateBiasLinear(nn.Linear):
    """A linear layer that predicts its bias from the shared vector."""

    def __init__(self, num_inputs: int, num_outputs: int, data: SharedData, config: Config):
        super().__init__(num_inputs, num_outputs, bias=False)
        width = config.data_mul * config.width
        mid_width = max(1, min(num_inputs, num_outputs) ** 2 // width)
        self.shared = (data,)  # in a tuple, so that its vector is the Model's and no one else's
        self.front = nn.Linear(width, mid_width)
        self.back = nn.Linear(mid_width, num_outputs)
        self.row_scale = Adjuster(num_outputs, 1.0)
        self.bias_shift = nn.Parameter(torch.zeros(1))

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the ordinary layer that this one is."""
        weight_OI = self.weight * self.row_scale()[:, None]
        vector_W = self.shared[0]()
        h_M = self.front(vector_W)
        h_M = F.gelu(h_M)
        bias_O = self.back(h_M)
        bias_O = bias_O + self.bias_shift
        return weight_OI, bias_O

    def forward(self, x_AI: Tensor) -> Tensor:
        weight_OI, bias_O = self.effective()
        y_AO = F.linear(x_AI, weight_OI, bias_O)
        return y_AO

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The ordinary layer."""
        weight_OI, bias_O = self.effective()
        plain = nn.Linear(self.in_features, self.out_features, device="meta")
        plain.weight = nn.Parameter(weight_OI)
        plain.bias = nn.Parameter(bias_O)
        return plain


class Attention(nn.Module):
    """Causal self-attention over H heads of width D = C / H."""

    def __init__(self, config: Config, data: SharedData):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = PrivateBiasLinear(config.width, config.width, data, config)
        self.key = PrivateBiasLinear(config.width, config.width, data, config)
        self.value = PrivateBiasLinear(config.width, config.width, data, config)
        self.output = PrivateBiasLinear(config.width, config.width, data, config)
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

    def __init__(self, config: Config, data: SharedData):
        super().__init__()
        self.up = PrivateBiasLinear(config.width, 4 * config.width, data, config)
        self.down = PrivateBiasLinear(4 * config.width, config.width, data, config)
        self.dropout = nn.Dropout(config.ff_dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTF = self.up(x_BTC)
        h_BTF = F.gelu(h_BTF)
        y_BTC = self.down(h_BTF)
        y_BTC = self.dropout(y_BTC)
        return y_BTC


class Block(nn.Module):
    """Attention, then the MLP; each reads a normed copy of the stream and adds to it."""

    def __init__(self, config: Config, index: int, data: SharedData):
        super().__init__()
        self.index = index
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config, data)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config, data)

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
        data = SharedData(config)
        self.blocks = nn.ModuleList(
            Block(config, index, data) for index in range(config.num_blocks)
        )
        self.final_norm = nn.LayerNorm(config.width)
        self.head = PrivateBiasLinear(config.width, config.vocab_size, data, config)
        self.token_table.weight.data *= config.token_std
        nn.init.zeros_(self.position_table.weight)
        self.bias_data = data

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
