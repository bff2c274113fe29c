"""Shared bias network: predict the bias of every linear layer with one network.

Idea: biases are many small numbers that are trained each for itself. Here every linear layer has a
    vector of its own, which one network, shared by the whole model, and then a linear map of the
    layer turn into its bias: what all biases have in common gathers in the network. uw2_1 also
    multiplies the rows of the weights; uw2_4 has vectors 8 times as wide, uw2_5 an ordinary head,
    uw2_6 a second network for the head alone. After training a bias is a constant.
    In the original uw2_6 hands the first network to the head and leaves the second untrained.
Source: Jeff Ward, jmward01/lmplay.
Family: weights.
Folds to: gpt2ish.
Changed from gpt2ish: Config, Adjuster, BiasNet, SharedBiasLinear, Attention, MLP, Block, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, I inputs and O outputs of a linear layer, N either of them,
# W width of a layer's vector, A any dimensions of positions

VARIANTS = {
    "uw2_0": {},
    "uw2_1": {"scale_rows": True},
    "uw2_4": {"scale_rows": True, "input_mul": 8},
    "uw2_5": {"scale_rows": True, "input_mul": 8, "head_net": "none"},
    "uw2_6": {"scale_rows": True, "input_mul": 8, "head_net": "own"},
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
    scale_rows: bool = False  # multipliers of a weight's rows, and a scalar beside the bias
    input_mul: int = 1  # width of a layer's vector, in model widths
    head_net: str = "shared"  # predicts the head's bias: "shared" or "own"; "none": it is ordinary

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.input_mul < 1:
            raise ValueError(f"input_mul={self.input_mul} is below 1")
        if self.head_net not in ("shared", "own", "none"):
            raise ValueError(f"head_net={self.head_net!r} is not 'shared', 'own' or 'none'")


class Adjuster(nn.Module):
    """A vector and a scalar that is added to all of it."""

    def __init__(self, size: int, start: float):
        super().__init__()
        self.vector = nn.Parameter(torch.full((size,), start))
        self.scalar = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        sum_N = self.vector + self.scalar
        return sum_N


class BiasNet(nn.Module):
    """The first layer on the way from a layer's vector to its bias; its users share it."""

    def __init__(self, config: Config):
        super().__init__()
        self.layer = nn.Linear(config.input_mul * config.width, config.width)

    def forward(self, vector_W: Tensor) -> Tensor:
        h_C = self.layer(vector_W)
        h_C = F.gelu(h_C)
        return h_C

    def fold(self) -> None:
        """Nothing: its users have become ordinary layers."""


class SharedBiasLinear(nn.Linear):
    """A linear layer whose bias is predicted from a vector of its own."""

    def __init__(self, num_inputs: int, num_outputs: int, net: BiasNet, config: Config):
        super().__init__(num_inputs, num_outputs, bias=False)
        self.nets = (net,)  # in a tuple, so that its parameters are the Model's and no one else's
        self.vector = nn.Parameter(torch.empty(config.input_mul * config.width))
        self.to_bias = nn.Linear(config.width, num_outputs)
        self.row_scale = Adjuster(num_outputs, 1.0) if config.scale_rows else None
        self.bias_shift = nn.Parameter(torch.zeros(1)) if config.scale_rows else None
        nn.init.uniform_(self.vector, -(num_inputs**-0.5), num_inputs**-0.5)

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the ordinary layer that this one is."""
        weight_OI = self.weight
        h_C = self.nets[0](self.vector)
        bias_O = self.to_bias(h_C)
        if self.row_scale is not None:
            weight_OI = weight_OI * self.row_scale()[:, None]
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

    def __init__(self, config: Config, net: BiasNet):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = SharedBiasLinear(config.width, config.width, net, config)
        self.key = SharedBiasLinear(config.width, config.width, net, config)
        self.value = SharedBiasLinear(config.width, config.width, net, config)
        self.output = SharedBiasLinear(config.width, config.width, net, config)
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

    def __init__(self, config: Config, net: BiasNet):
        super().__init__()
        self.up = SharedBiasLinear(config.width, 4 * config.width, net, config)
        self.down = SharedBiasLinear(4 * config.width, config.width, net, config)
        self.dropout = nn.Dropout(config.ff_dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTF = self.up(x_BTC)
        h_BTF = F.gelu(h_BTF)
        y_BTC = self.down(h_BTF)
        y_BTC = self.dropout(y_BTC)
        return y_BTC


class Block(nn.Module):
    """Attention, then the MLP; each reads a normed copy of the stream and adds to it."""

    def __init__(self, config: Config, index: int, net: BiasNet):
        super().__init__()
        self.index = index
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config, net)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config, net)

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
        net = BiasNet(config)
        self.blocks = nn.ModuleList(Block(config, index, net) for index in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(config.width)
        head_net = BiasNet(config) if config.head_net == "own" else net
        if config.head_net == "none":
            self.head = nn.Linear(config.width, config.vocab_size)
        else:
            self.head = SharedBiasLinear(config.width, config.vocab_size, head_net, config)
        self.token_table.weight.data *= config.token_std
        nn.init.zeros_(self.position_table.weight)
        self.bias_net = net
        if config.head_net == "own":
            self.head_bias_net = head_net

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
