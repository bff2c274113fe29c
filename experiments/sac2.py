"""Unified embeddings and shared predictors: both ideas at once, in blocks without norms.

Idea: ue keeps the rows of the table in fashion; uw6 lets networks, shared by layers, predict
    multipliers and biases. `sac2` is both at their own sizes; the original's names have wider rows
    and inputs. The table's two layers and the head have multipliers and offsets as in uw1_2. In
    sac2_1, sac2_3 and sac2_4 the table's layers are predicted too. In sac2_3 and sac2_4 only layers
    of one role share a net and vectors above 4 C are plain; in sac2_3 the multipliers of the head's
    columns are predicted. The blocks have no norms: `no_block_norms` is the control. After training
    each layer is multiplied out.
Source: Jeff Ward, jmward01/lmplay.
Family: weights.
Folds to: no_block_norms.
Changed from uw6: Config, SharedNets, PredictedLinear, layer_of, Attention, MLP, UnifiedEmbedding,
    Model.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, I inputs and O outputs of a linear layer, N either of them or rows
# of a table, W width of a vector's input or of a wide row, M width between the two layers of a
# table's network, K vectors from one net, A any dimensions of positions or ids

VARIANTS = {
    "sac2_0": {"front_mul": 16, "input_mul": 64},
    "sac2_0_med": {"front_mul": 16, "input_mul": 64, "width": 1280, "num_heads": 20},
    "sac2_1": {"front_mul": 16, "input_mul": 64, "table_kind": "predicted"},
    "sac2_2": {"front_mul": 16, "block_kind": "unified"},
    "sac2_3": {
        "front_mul": 16,
        "input_mul": 64,
        "table_kind": "predicted",
        "by_role": True,
        "max_predicted": 4,
        "head_kind": "predicted",
    },
    "sac2_4": {
        "front_mul": 16,
        "input_mul": 64,
        "table_kind": "predicted",
        "by_role": True,
        "max_predicted": 4,
    },
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
    final_norm: bool = True  # before the head
    input_mul: int = 32  # width of the input of a predicted vector, in model widths
    by_role: bool = False  # queries share nets with queries alone, keys with keys, and so on
    head_kind: str = "unified"  # "unified", "plain" or "predicted"
    block_kind: str = "predicted"  # of the layers in the blocks: "predicted" or "unified"
    table_kind: str = "unified"  # of the layers of the table's network: the same two
    max_predicted: int | None = None  # model widths; a longer vector is plain, None is no limit
    front_mul: int = 8  # width of a wide row, in model widths
    mid_mul: int = 1  # width between the network's two layers, in model widths

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.input_mul < 1:
            raise ValueError(f"input_mul={self.input_mul} is below 1")
        if self.head_kind not in ("unified", "plain", "predicted"):
            raise ValueError(f"head_kind={self.head_kind!r} is not unified, plain or predicted")
        for key in ("block_kind", "table_kind"):
            if getattr(self, key) not in ("predicted", "unified"):
                raise ValueError(f"{key}={getattr(self, key)!r} is not predicted or unified")
        if self.max_predicted is not None and self.max_predicted < 1:
            raise ValueError(f"max_predicted={self.max_predicted} is below 1")
        if min(self.front_mul, self.mid_mul) < 1:
            raise ValueError(f"front_mul={self.front_mul} and mid_mul={self.mid_mul} start at 1")


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

    def net(self, role: str, size: int, config: Config) -> SharedNet | None:
        if config.max_predicted is not None and size > config.max_predicted * config.width:
            return None
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
        self.shift = Vector(bias_O, row_net)

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the ordinary layer that this one is."""
        weight_OI = self.weight * self.column_scale()
        weight_OI = weight_OI * self.row_scale()[:, None]
        bias_O = self.shift()
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


def layer_of(
    num_inputs: int, num_outputs: int, nets: SharedNets, role: str, config: Config
) -> nn.Module:
    """A linear layer of the kind that its role has."""
    kinds = {"front": config.table_kind, "back": config.table_kind}
    if kinds.get(role, config.block_kind) == "unified":
        return UnifiedLinear(num_inputs, num_outputs)
    return PredictedLinear(num_inputs, num_outputs, nets, role, config)


class Attention(nn.Module):
    """Causal self-attention over H heads of width D = C / H."""

    def __init__(self, config: Config, nets: SharedNets):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = layer_of(config.width, config.width, nets, "query", config)
        self.key = layer_of(config.width, config.width, nets, "key", config)
        self.value = layer_of(config.width, config.width, nets, "value", config)
        self.output = layer_of(config.width, config.width, nets, "output", config)
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
        self.up = layer_of(config.width, 4 * config.width, nets, "up", config)
        self.down = layer_of(4 * config.width, config.width, nets, "down", config)
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


class UnifiedEmbedding(nn.Module):
    """A table of wide rows, each brought to width C by one network that all rows share."""

    def __init__(self, num_rows: int, nets: SharedNets, config: Config):
        super().__init__()
        self.wide_table = nn.Embedding(num_rows, config.front_mul * config.width)
        self.front = layer_of(
            config.front_mul * config.width, config.mid_mul * config.width, nets, "front", config
        )
        self.back = layer_of(config.mid_mul * config.width, config.width, nets, "back", config)

    def network(self, wide_NW: Tensor) -> Tensor:
        h_NM = self.front(wide_NW)
        h_NM = F.gelu(h_NM)
        e_NC = self.back(h_NM)
        return e_NC

    def forward(self, ids_A: Tensor) -> Tensor:
        distinct_N, index_A = torch.unique(ids_A, return_inverse=True)
        wide_NW = self.wide_table(distinct_N)
        e_NC = self.network(wide_NW)
        e_NC = e_NC.to(wide_NW.dtype)  # where a token recurs, its gradients add up unrounded
        e_AC = F.embedding(index_A, e_NC)
        return e_AC

    @torch.no_grad()
    def fold(self) -> nn.Embedding:
        """The plain table of what every row becomes."""
        parts = [self.network(wide_NW) for wide_NW in self.wide_table.weight.split(1024)]
        return nn.Embedding.from_pretrained(torch.cat(parts), freeze=False)

    def unfold(self, plain: nn.Embedding) -> None:
        """Start from a trained table and learn to give its rows, more or less."""
        wanted_NC = plain.weight.detach()
        weights = list(self.parameters())
        are_trained = [weight.requires_grad for weight in weights]
        self.requires_grad_(True)
        self.wide_table.weight.data[:, : wanted_NC.shape[1]] = wanted_NC
        optimizer = torch.optim.Adam(weights, lr=1e-3)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.9)
        for _ in range(50):
            order_N = torch.randperm(len(wanted_NC)).to(wanted_NC.device)
            for ids_N in order_N.split(math.ceil(len(order_N) / 7)):
                e_NC = self.network(self.wide_table(ids_N))
                loss = F.mse_loss(e_NC, wanted_NC[ids_N])
                loss.backward(inputs=weights)  # not of a network that other layers share
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()
        for weight, is_trained in zip(weights, are_trained, strict=True):
            weight.requires_grad_(is_trained)


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
        nn.init.zeros_(self.position_table.weight)
        self.nets = nets
        self.token_table = UnifiedEmbedding(config.vocab_size, nets, config)

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        T = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        for net in self.nets.values():
            net.open()
        e_BTC = self.token_table(tokens_BT)
        p_TC = self.position_table(positions_T)
        x_BTC = e_BTC + p_TC
        x_BTC = self.dropout(x_BTC)
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
