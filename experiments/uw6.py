"""Shared predictors: networks that layers share predict multipliers and biases of the layers.

Idea: every linear layer in the blocks has a multiplier for each column and each row of its weight,
    and a bias. Each is a vector that a linear map, shared by all vectors of that size, makes of an
    input of the vector's own, plus a plain vector and a scalar; the plain vector starts such that
    all is neutral (multipliers are 1, biases lie within 0.01). In uw6_4 to uw6_6 only layers of
    one role share a map. The head is an ordinary one with multipliers and offsets, in uw6_2
    without, in uw6_5 and uw6_6 its columns' multipliers are predicted. uw6_3 has no biases in the
    blocks, as in the original; uw6_6 no norm before the head. The blocks have no norms, so
    `no_block_norms` is the control. After training each layer is multiplied out.
Source: Jeff Ward, jmward01/lmplay.
Family: weights.
Folds to: no_block_norms.
Changed from no_block_norms: Config, SharedNet, SharedNets, Vector, PredictedLinear, Adjuster,
    UnifiedLinear, Attention, MLP, Block, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, I inputs and O outputs of a linear layer, N either of them,
# W width of a vector's input, K vectors from one net, A any dimensions of positions

VARIANTS = {
    "uw6_0": {},
    "uw6_1": {"input_mul": 16},
    "uw6_2": {"input_mul": 16, "head_kind": "plain"},
    "uw6_3": {"block_bias": False},
    "uw6_4": {"by_role": True},
    "uw6_5": {"by_role": True, "head_kind": "predicted"},
    "uw6_6": {"by_role": True, "head_kind": "predicted", "final_norm": False},
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
    input_mul: int = 32  # width of the input of a predicted vector, in model widths
    by_role: bool = False  # queries share nets with queries alone, keys with keys, and so on
    head_kind: str = "unified"  # "unified", "plain" or "predicted"

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.input_mul < 1:
            raise ValueError(f"input_mul={self.input_mul} is below 1")
        if self.head_kind not in ("unified", "plain", "predicted"):
            raise ValueError(f"head_kind={self.head_kind!r} is not unified, plain or predicted")


class SharedNet(nn.Linear):
    """Predicts vectors of one size, each from an input of its own."""

    def __init__(self, num_outputs: int, config: Config):
        super().__init__(config.input_mul * config.width, num_outputs, bias=False)
        self.inputs = nn.ParameterList()
        self.rows = None

    def add(self) -> int:
        """The place of a new vector."""
        self.inputs.append(torch.empty(self.in_features).uniform_(-0.01, 0.01))
        return len(self.inputs) - 1

    def open(self) -> None:
        """Predict all vectors in one product, until `close`."""
        inputs_KW = torch.stack(list(self.inputs))
        rows_KN = self(inputs_KW)
        self.rows = rows_KN.unbind()

    def close(self) -> None:
        self.rows = None

    def row(self, place: int) -> Tensor:
        """The vector at that place, shape (N,)."""
        if self.rows is not None:
            return self.rows[place]
        return self(self.inputs[place])

    def fold(self) -> None:
        """Nothing: its users have become ordinary layers."""


class SharedNets(nn.ModuleDict):
    """A net for each size of vector, or for each role and size; made when first asked for."""

    def net(self, role: str, size: int, config: Config) -> SharedNet:
        name = f"{role}_{size}" if config.by_role else f"size_{size}"
        if name not in self:
            self[name] = SharedNet(size, config)
        return self[name]


class Vector(nn.Module):
    """A trained vector, predicted by a net or plain, that starts at a given value."""

    def __init__(self, start_N: Tensor, net: SharedNet | None):
        super().__init__()
        self.nets = ()
        self.offset = nn.Parameter(start_N)
        self.scalar = nn.Parameter(torch.zeros(1))
        if net is not None:
            self.nets = (net,)  # in a tuple, so that its parameters are the Model's
            self.place = net.add()
            self.offset.data -= net.row(self.place).detach()

    def forward(self) -> Tensor:
        vector_N = self.offset + self.scalar
        for net in self.nets:
            vector_N = vector_N + net.row(self.place)
        return vector_N


class PredictedLinear(nn.Linear):
    """A linear layer with multipliers of its weight's columns and rows, and a bias, as Vectors."""

    def __init__(
        self, num_inputs: int, num_outputs: int, nets: SharedNets, role: str, config: Config
    ):
        super().__init__(num_inputs, num_outputs, bias=False)
        is_head = role == "head"  # of whose vectors only the one of the model's width is predicted
        bias_O = torch.empty(num_outputs).uniform_(-0.01, 0.01)
        column_net = nets.net(role, num_inputs, config)
        row_net = None if is_head else nets.net(role, num_outputs, config)
        self.column_scale = Vector(torch.ones(num_inputs), column_net)
        self.row_scale = Vector(torch.ones(num_outputs), row_net)
        self.shift = Vector(bias_O, row_net) if is_head or config.block_bias else None

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the ordinary layer that this one is."""
        weight_OI = self.weight * self.column_scale()
        weight_OI = weight_OI * self.row_scale()[:, None]
        bias_O = None if self.shift is None else self.shift()
        return weight_OI, bias_O

    def forward(self, x_AI: Tensor) -> Tensor:
        weight_OI, bias_O = self.effective()
        y_AO = F.linear(x_AI, weight_OI, bias_O)
        return y_AO

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The ordinary layer."""
        weight_OI, bias_O = self.effective()
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight_OI)
        plain.bias = None if bias_O is None else nn.Parameter(bias_O)
        return plain


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


class Attention(nn.Module):
    """Causal self-attention over H heads of width D = C / H."""

    def __init__(self, config: Config, nets: SharedNets):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = PredictedLinear(config.width, config.width, nets, "query", config)
        self.key = PredictedLinear(config.width, config.width, nets, "key", config)
        self.value = PredictedLinear(config.width, config.width, nets, "value", config)
        self.output = PredictedLinear(config.width, config.width, nets, "output", config)
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

    def __init__(self, config: Config, nets: SharedNets):
        super().__init__()
        self.up = PredictedLinear(config.width, 4 * config.width, nets, "up", config)
        self.down = PredictedLinear(4 * config.width, config.width, nets, "down", config)
        self.dropout = nn.Dropout(config.ff_dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTF = self.up(x_BTC)
        h_BTF = F.gelu(h_BTF)
        y_BTC = self.down(h_BTF)
        y_BTC = self.dropout(y_BTC)
        return y_BTC


class Block(nn.Module):
    """Attention, then the MLP; each reads the stream and adds to it."""

    def __init__(self, config: Config, index: int, nets: SharedNets):
        super().__init__()
        self.index = index
        self.attention = Attention(config, nets)
        self.mlp = MLP(config, nets)

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
        nets = SharedNets()
        self.blocks = nn.ModuleList(
            Block(config, index, nets) for index in range(config.num_blocks)
        )
        self.final_norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()
        if config.head_kind == "plain":
            self.head = nn.Linear(config.width, config.vocab_size)
        elif config.head_kind == "unified":
            self.head = UnifiedLinear(config.width, config.vocab_size)
        else:
            self.head = PredictedLinear(config.width, config.vocab_size, nets, "head", config)
        self.token_table.weight.data *= config.token_std
        nn.init.zeros_(self.position_table.weight)
        self.nets = nets

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        T = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        e_BTC = self.token_table(tokens_BT)
        p_TC = self.position_table(positions_T)
        x_BTC = e_BTC + p_TC
        x_BTC = self.dropout(x_BTC)
        for net in self.nets.values():
            net.open()
        for block in self.blocks:
            x_BTC = block(x_BTC, cache)
        for net in self.nets.values():
            net.close()
        x_BTC = self.final_norm(x_BTC)
        return x_BTC

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV
