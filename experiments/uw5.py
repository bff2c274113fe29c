"""Deep predictions: one private network predicts the multipliers and the bias of a layer.

Idea: every linear layer has a wide trained vector and a trunk, one layer and GELU; what comes out
    of it is turned into the multipliers of the weight's columns and into the bias, so both move
    together. The multipliers of the rows are plain numbers. uw4_1 predicts the bias alone by a
    plain trunk, uw4_2 the multipliers of the columns alone. After training each layer is multiplied
    out. In the original the scalar that is added to predicted multipliers starts at 0, and with it
    every layer near zero; here it starts at `scale_start`, 1. uw4_1 is as intended there, where it
    cannot be built.
Source: Jeff Ward, jmward01/lmplay.
Family: weights.
Folds to: gpt2ish.
Changed from gpt2ish: Config, Adjuster, UnifiedLinear, Predicted, DeepLinear, Attention, MLP,
    Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, I inputs and O outputs of a linear layer, N either of them,
# M width of a trunk's output, A any dimensions of positions

VARIANTS = {
    "uw5_0": {},
    "uw4_1": {"predict_columns": False, "unified_trunk": False},
    "uw4_2": {"predict_bias": False},
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
    input_mul: int = 16  # width of a layer's vector, in widths of the layer's input
    mid_mul: float = 1.0  # width of its trunk's output, in the smaller width of the layer
    unified_trunk: bool = True  # with multipliers and offsets of its rows and columns
    predict_columns: bool = True  # else their multipliers are plain numbers, like those of rows
    predict_bias: bool = True
    scale_start: float = 1.0  # of the scalar added to predicted multipliers; the original's: 0

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.input_mul < 1 or self.mid_mul * self.width < 1:
            raise ValueError(f"input_mul={self.input_mul} or mid_mul={self.mid_mul} is too small")
        if not (self.predict_columns or self.predict_bias):
            raise ValueError(
                "predict_columns=False and predict_bias=False leave nothing to predict"
            )


class Adjuster(nn.Module):
    """A vector and a scalar that is added to all of it."""

    def __init__(self, size: int, start: float):
        super().__init__()
        self.vector = nn.Parameter(torch.full((size,), start))
        self.scalar = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        sum_N = self.vector + self.scalar
        return sum_N


class UnifiedLinear(nn.Linear):
    """A linear layer whose weight is adjusted along its rows and columns."""

    def __init__(self, num_inputs: int, num_outputs: int):
        super().__init__(num_inputs, num_outputs)
        self.row_scale = Adjuster(num_outputs, 1.0)
        self.row_shift = Adjuster(num_outputs, 0.0)
        self.column_scale = Adjuster(num_inputs, 1.0)
        self.column_shift = Adjuster(num_inputs, 0.0)
        self.bias_shift = nn.Parameter(torch.zeros(1))

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the ordinary layer that this one is."""
        weight_OI = self.weight * self.row_scale()[:, None]
        weight_OI = weight_OI + self.row_shift()[:, None]
        weight_OI = weight_OI * self.column_scale()
        weight_OI = weight_OI + self.column_shift()
        bias_O = self.bias + self.bias_shift
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


class Predicted(nn.Module):
    """A vector that a layer makes of the trunk's output, and a scalar added to all of it."""

    def __init__(self, num_inputs: int, size: int, start: float):
        super().__init__()
        self.to_vector = nn.Linear(num_inputs, size)
        self.scalar = nn.Parameter(torch.full((1,), start))

    def forward(self, h_M: Tensor) -> Tensor:
        vector_N = self.to_vector(h_M)
        vector_N = vector_N + self.scalar
        return vector_N


class DeepLinear(nn.Linear):
    """A linear layer with multipliers of its weight's columns and rows, and a bias.

    Each is an Adjuster, or Predicted from the layer's own trained vector by way of its trunk.
    """

    def __init__(self, num_inputs: int, num_outputs: int, config: Config):
        super().__init__(num_inputs, num_outputs, bias=False)
        width = config.input_mul * num_inputs
        mid_width = int(min(num_inputs, num_outputs) * config.mid_mul)
        trunk = UnifiedLinear if config.unified_trunk else nn.Linear
        self.vector = nn.Parameter(torch.empty(width))
        self.trunk = trunk(width, mid_width)
        if config.predict_columns:
            self.column_scale = Predicted(mid_width, num_inputs, config.scale_start)
        else:
            self.column_scale = Adjuster(num_inputs, 1.0)
        self.row_scale = Adjuster(num_outputs, 1.0)
        if config.predict_bias:
            self.shift = Predicted(mid_width, num_outputs, 0.0)
        else:
            self.shift = Adjuster(num_outputs, 0.0)
            nn.init.uniform_(self.shift.vector, -(num_inputs**-0.5), num_inputs**-0.5)
        nn.init.uniform_(self.vector, -(num_inputs**-0.5), num_inputs**-0.5)

    def of_trunk(self, part: nn.Module, h_M: Tensor) -> Tensor:
        return part(h_M) if isinstance(part, Predicted) else part()

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the ordinary layer that this one is."""
        h_M = self.trunk(self.vector)
        h_M = F.gelu(h_M)
        weight_OI = self.weight * self.of_trunk(self.column_scale, h_M)
        weight_OI = weight_OI * self.of_trunk(self.row_scale, h_M)[:, None]
        bias_O = self.of_trunk(self.shift, h_M)
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
        self.query = DeepLinear(config.width, config.width, config)
        self.key = DeepLinear(config.width, config.width, config)
        self.value = DeepLinear(config.width, config.width, config)
        self.output = DeepLinear(config.width, config.width, config)
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
        self.up = DeepLinear(config.width, 4 * config.width, config)
        self.down = DeepLinear(4 * config.width, config.width, config)
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
        self.head = DeepLinear(config.width, config.vocab_size, config)
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
