"""Unified embeddings and unified weights: both ideas at once, in every linear layer and table.

Idea: ue keeps the rows of the table in fashion, uw1 moves many weights by few numbers; do their
    gains add up? A network makes the table, and the network's two layers, those of the blocks and
    the head have multipliers of their rows, all neutral: one seed gives ue's answers at the start.
    As in uw1, Config can add multipliers of the columns and offsets of both; the original has them
    on today, but had none of them when it was run. sac1_0_1 has wide rows twice as wide.
Source: Jeff Ward, jmward01/lmplay.
Family: weights.
Folds to: gpt2ish.
Changed from uw1: Config, UnifiedEmbedding, Model.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, I inputs and O outputs of a linear layer, N either of them or rows
# of a table, W width of a wide row, M width between the two layers of a table's network, A any
# dimensions of positions or ids

VARIANTS = {
    "sac1_0": {},
    "sac1_0_1": {"front_mul": 16},
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
    scale_columns: bool = False  # multipliers of a weight's columns too, beside those of its rows
    shift_columns: bool = False
    shift_rows: bool = False
    front_mul: int = 8  # width of a wide row, in model widths
    mid_mul: int = 1  # width between the network's two layers, in model widths

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if min(self.front_mul, self.mid_mul) < 1:
            raise ValueError(f"front_mul={self.front_mul} and mid_mul={self.mid_mul} start at 1")


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

    def __init__(self, num_inputs: int, num_outputs: int, config: Config):
        super().__init__(num_inputs, num_outputs)
        self.row_scale = Adjuster(num_outputs, 1.0)
        self.row_shift = Adjuster(num_outputs, 0.0) if config.shift_rows else None
        self.column_scale = Adjuster(num_inputs, 1.0) if config.scale_columns else None
        self.column_shift = Adjuster(num_inputs, 0.0) if config.shift_columns else None
        self.bias_shift = nn.Parameter(torch.zeros(1))

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the ordinary layer that this one is."""
        weight_OI = self.weight * self.row_scale()[:, None]
        if self.row_shift is not None:
            weight_OI = weight_OI + self.row_shift()[:, None]
        if self.column_scale is not None:
            weight_OI = weight_OI * self.column_scale()
        if self.column_shift is not None:
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

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = UnifiedLinear(config.width, config.width, config)
        self.key = UnifiedLinear(config.width, config.width, config)
        self.value = UnifiedLinear(config.width, config.width, config)
        self.output = UnifiedLinear(config.width, config.width, config)
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
        self.up = UnifiedLinear(config.width, 4 * config.width, config)
        self.down = UnifiedLinear(4 * config.width, config.width, config)
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


class UnifiedEmbedding(nn.Module):
    """A table of wide rows, each brought to width C by one network that all rows share."""

    def __init__(self, num_rows: int, config: Config):
        super().__init__()
        self.wide_table = nn.Embedding(num_rows, config.front_mul * config.width)
        self.front = UnifiedLinear(
            config.front_mul * config.width, config.mid_mul * config.width, config
        )
        self.back = UnifiedLinear(config.mid_mul * config.width, config.width, config)

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
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(config.width)
        self.head = UnifiedLinear(config.width, config.vocab_size, config)
        nn.init.zeros_(self.position_table.weight)
        self.token_table = UnifiedEmbedding(
            config.vocab_size, config
        )  # last: the rest draws as in ue

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
