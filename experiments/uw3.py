"""Private bias network: predict the bias of every linear layer with a deep network of its own.

Idea: uw2 lets all layers share a network that predicts their biases; here each has a network of
    two layers for itself, which reads a wide trained vector. Is it the sharing that helps, or the
    depth on the way to a bias? Rows of the weights have multipliers and the bias a scalar, as in
    uw2_1. After training a bias is a constant.
Source: Jeff Ward, jmward01/lmplay.
Family: weights.
Folds to: gpt2ish.
Changed from gpt2ish: Config, Adjuster, Predictor, DeepBiasLinear, Attention, MLP, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, I inputs and O outputs of a linear layer, N either of them,
# W width of a layer's vector, M hidden width of its network, A any dimensions of positions

VARIANTS = {
    "uw3_0": {},
    "uw3_1": {"mid_mul": 0.25},
    "uw3_2": {"mid_mul": 2.0},
    "uw3_3": {"input_mul": 16},
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
    input_mul: int = 8  # width of a layer's vector, in widths of the layer's input
    mid_mul: float = 1.0  # hidden width of its network, in the smaller width of the layer

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.input_mul < 1 or self.mid_mul * self.width < 1:
            raise ValueError(f"input_mul={self.input_mul} or mid_mul={self.mid_mul} is too small")


class Adjuster(nn.Module):
    """A vector and a scalar that is added to all of it."""

    def __init__(self, size: int, start: float):
        super().__init__()
        self.vector = nn.Parameter(torch.full((size,), start))
        self.scalar = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        sum_N = self.vector + self.scalar
        return sum_N


class Predictor(nn.Module):
    """A trained vector and the network of two layers that makes another vector of it."""

    def __init__(self, num_inputs: int, num_outputs: int, size: int, config: Config):
        super().__init__()
        width = config.input_mul * num_inputs
        mid_width = int(min(num_inputs, num_outputs) * config.mid_mul)
        self.input = nn.Parameter(torch.empty(width))
        self.front = nn.Linear(width, mid_width)
        self.back = nn.Linear(mid_width, size)
        nn.init.uniform_(self.input, -(num_inputs**-0.5), num_inputs**-0.5)

    def forward(self) -> Tensor:
        h_M = self.front(self.input)
        h_M = F.gelu(h_M)
        vector_N = self.back(h_M)
        return vector_N


class DeepBiasLinear(nn.Linear):
    """A linear layer whose bias is predicted, and whose weight's rows have multipliers."""

    def __init__(self, num_inputs: int, num_outputs: int, config: Config):
        super().__init__(num_inputs, num_outputs, bias=False)
        self.predictor = Predictor(num_inputs, num_outputs, num_outputs, config)
        self.row_scale = Adjuster(num_outputs, 1.0)
        self.bias_shift = nn.Parameter(torch.zeros(1))

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the ordinary layer that this one is."""
        weight_OI = self.weight * self.row_scale()[:, None]
        bias_O = self.predictor() + self.bias_shift
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

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = DeepBiasLinear(config.width, config.width, config)
        self.key = DeepBiasLinear(config.width, config.width, config)
        self.value = DeepBiasLinear(config.width, config.width, config)
        self.output = DeepBiasLinear(config.width, config.width, config)
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
        self.up = DeepBiasLinear(config.width, 4 * config.width, config)
        self.down = DeepBiasLinear(4 * config.width, config.width, config)
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
        self.head = DeepBiasLinear(config.width, config.vocab_size, config)
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
