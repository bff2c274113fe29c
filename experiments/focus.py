"""Focus: learn how sharply attention picks, instead of always dividing scores by sqrt(D).

Idea: a query that knows what it looks for should see little else, one that gathers should see much.
    A linear layer predicts for each query and head a share of 2 sqrt(D), about a half at the start,
    by which the scores are divided. foc1_1 has one divisor for each layer, 1 sqrt(D) at the start;
    it is learned as its logarithm, so that it can neither reach zero nor turn negative, as it can
    in the original. Only foc1_1 folds: a constant divisor goes into the query's weights.
Source: Jeff Ward, jmward01/lmplay.
Family: attention.
Folds to: gpt2ish.
Changed from gpt2ish: Config, PredictedFocus, ConstantFocus, Attention.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary

VARIANTS = {
    "foc1_0": {},
    "foc1_1": {"focus": "constant"},
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
    focus: str = "predicted"  # for each query and head; or "constant", for each layer

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.focus not in ("predicted", "constant"):
            raise ValueError(f"focus={self.focus!r} is neither 'predicted' nor 'constant'")


class PredictedFocus(nn.Linear):
    """Queries, each divided for each head by what a layer predicts, between 0 and 2."""

    def __init__(self, config: Config):
        super().__init__(config.width, config.width)
        self.divisor = nn.Linear(config.width, config.num_heads)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q_BTC = super().forward(x_BTC)
        z_BTH = self.divisor(x_BTC)
        factor_BTH = 0.5 * (1 + torch.exp(-z_BTH))  # one over 2 sigmoid(z)
        q_BTHD = q_BTC.unflatten(-1, (z_BTH.shape[-1], -1))
        q_BTHD = q_BTHD * factor_BTH[..., None]
        q_BTC = q_BTHD.flatten(2)
        return q_BTC


class ConstantFocus(nn.Linear):
    """Queries, all divided by one number."""

    def __init__(self, config: Config):
        super().__init__(config.width, config.width)
        self.log_divisor = nn.Parameter(torch.zeros(1))

    def forward(self, x_BTC: Tensor) -> Tensor:
        q_BTC = super().forward(x_BTC)
        q_BTC = q_BTC * torch.exp(-self.log_divisor)
        return q_BTC

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The ordinary layer."""
        factor = torch.exp(-self.log_divisor)
        plain = nn.Linear(self.in_features, self.out_features, device="meta")
        plain.weight = nn.Parameter(self.weight * factor)
        plain.bias = nn.Parameter(self.bias * factor)
        return plain


class Attention(nn.Module):
    """Causal self-attention over H heads of width D = C / H."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        focus = PredictedFocus if config.focus == "predicted" else ConstantFocus
        self.query = focus(config)
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
