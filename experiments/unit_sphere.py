"""Unit sphere: nGPT, a transformer all of whose vectors have length one.

Idea: the stream is a point on a sphere, and each layer moves it a learned step towards the point
    that it found: no norms, no decay, no scale that drifts. Every matrix is a list of unit vectors
    along the stream's axis, made so again after each step of the optimizer; without that it is not
    nGPT, and BlaGPT's has none. Scores of unit queries and keys are multiplied by sqrt(D) and
    learned gains, the MLP's hidden layers and the logits by learned gains too. A gain is stored
    small where it should learn slowly: `stored` is what stands for its start. Steps start at 0.05
    of the way and count by their size. The head is a table of its own. Warm-up is not needed.
Source: Loshchilov et al. 2024, arXiv:2410.01131, sections 2.1 to 2.6.
Family: norms.
Changed from llama: Config, linear, unit, Gain, Attention, MLP, Block, Head, Model, RMSNorm.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary

TINY = {"vocab_size": 61, "max_len": 16, "num_blocks": 2, "width": 16, "num_heads": 2}


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int
    max_len: int = 1024  # tokens
    num_blocks: int = 6
    width: int = 768
    num_heads: int = 12
    mlp_multiple: int = 64  # the hidden width is 8/3 of the width, rounded up to a multiple of this
    rope_base: float = 10000.0  # the slowest pair turns once in 2 pi times nearly this many tokens
    tied: bool = False  # the head is the token table

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden_width(self) -> int:
        return -(-8 * self.width // (3 * self.mlp_multiple)) * self.mlp_multiple

    @property
    def stored(self) -> float:
        """What a gain that learns slowly is stored as while it is one."""
        return self.width**-0.5


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer without bias; the model makes its weights unit vectors."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight)
    return layer


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """Vectors of length one, in fp32 at least; a zero stays one."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=dim).to(x.dtype)


class Gain(nn.Module):
    """A learned gain for each channel, `start` while its number is `stored`."""

    def __init__(self, width: int, start: float, stored: float):
        super().__init__()
        self.ratio = start / stored
        self.weight = nn.Parameter(torch.full((width,), stored))

    def forward(self) -> Tensor:
        return self.ratio * self.weight


def rotary(positions_T: Tensor, D: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles by which each position turns the D / 2 pairs of a head."""
    pairs_D = torch.arange(0, D, 2, device=positions_T.device, dtype=torch.float32)
    rates_D = base ** (-pairs_D / D)
    angles_TD = positions_T[:, None] * rates_D
    angles_TD = torch.cat([angles_TD, angles_TD], dim=-1)
    return angles_TD.cos(), angles_TD.sin()


def rotate(x_BHTD: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Each position turned by its own angles; channel i is paired with channel i + D / 2."""
    cos_TD, sin_TD = turn
    first, second = x_BHTD.chunk(2, dim=-1)
    crossed_BHTD = torch.cat([-second, first], dim=-1)
    turned_BHTD = x_BHTD * cos_TD + crossed_BHTD * sin_TD
    return turned_BHTD.to(x_BHTD.dtype)


class Attention(nn.Module):
    """Causal self-attention over H heads of width D = C / H, with rotary positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = linear(config.width, config.width)
        self.key = linear(config.width, config.width)
        self.value = linear(config.width, config.width)
        self.output = linear(config.width, config.width)
        self.gain = Gain(config.width, 1.0, config.stored)

    def split(self, x_BTC: Tensor) -> Tensor:
        x_BTHD = x_BTC.unflatten(-1, (self.num_heads, -1))
        x_BHTD = x_BTHD.transpose(1, 2)
        return x_BHTD

    def forward(self, x_BTC: Tensor, turn: tuple[Tensor, Tensor], cache=None) -> Tensor:
        T = x_BTC.shape[1]
        q_BTC = self.query(x_BTC)
        k_BTC = self.key(x_BTC)
        v_BTC = self.value(x_BTC)
        q_BHTD = self.split(q_BTC)
        k_BHSD = self.split(k_BTC)
        v_BHSD = self.split(v_BTC)
        q_BHTD = rotate(q_BHTD, turn)
        k_BHSD = rotate(k_BHSD, turn)
        gain_H1D = self.gain().unflatten(0, (self.num_heads, 1, -1)).to(q_BHTD.dtype)
        q_BHTD = gain_H1D * unit(q_BHTD)
        k_BHSD = gain_H1D * unit(k_BHSD)
        if cache is not None:
            k_BHSD, v_BHSD = cache.append(self, k_BHSD, v_BHSD)
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BHSD, v_BHSD, is_causal=T > 1, scale=q_BHTD.shape[-1] ** 0.5
        )
        y_BTHD = y_BHTD.transpose(1, 2)
        y_BTC = y_BTHD.flatten(2)
        y_BTC = self.output(y_BTC)
        return y_BTC


class MLP(nn.Module):
    """A hidden layer gated by another, then back to width C."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = linear(config.width, config.hidden_width)
        self.up = linear(config.width, config.hidden_width)
        self.down = linear(config.hidden_width, config.width)
        self.gate_gain = Gain(config.hidden_width, config.width**0.5, 1.0)
        self.up_gain = Gain(config.hidden_width, 1.0, 1.0)

    def forward(self, x_BTC: Tensor) -> Tensor:
        g_BTF = self.gate(x_BTC)
        g_BTF = g_BTF * self.gate_gain()
        g_BTF = F.silu(g_BTF)
        h_BTF = self.up(x_BTC)
        h_BTF = h_BTF * self.up_gain()
        h_BTF = g_BTF * h_BTF
        y_BTC = self.down(h_BTF)
        return y_BTC


class Block(nn.Module):
    """Attention, then the MLP; each moves the stream over the sphere to what it found."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index = index
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.attention_step = Gain(config.width, 0.05, config.stored)
        self.mlp_step = Gain(config.width, 0.05, config.stored)

    def forward(self, x_BTC: Tensor, turn: tuple[Tensor, Tensor], cache=None) -> Tensor:
        y_BTC = self.attention(x_BTC, turn, cache)
        y_BTC = self.attention_step().abs() * (unit(y_BTC) - x_BTC)
        x_BTC = unit(x_BTC + y_BTC)
        y_BTC = self.mlp(x_BTC)
        y_BTC = self.mlp_step().abs() * (unit(y_BTC) - x_BTC)
        x_BTC = unit(x_BTC + y_BTC)
        return x_BTC


class Head(nn.Linear):
    """A layer without bias, each of whose outputs has a learned gain."""

    def __init__(self, config: Config):
        super().__init__(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.weight)
        self.gain = Gain(config.vocab_size, 1.0, config.stored)

    def forward(self, x_BTC: Tensor) -> Tensor:
        logits_BTV = super().forward(x_BTC)
        return logits_BTV * self.gain()


class Model(nn.Module):
    """Tokens to the logits of the token after each."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.progress = 0.0
        self.token_table = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_blocks))
        self.head = Head(config)
        if config.tied:
            self.head.weight = self.token_table.weight
        self.after_step()

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        T = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        turn = rotary(positions_T, self.config.head_width, self.config.rope_base)
        x_BTC = self.token_table(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, turn, cache)
        return x_BTC

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV

    def loss_terms(self, tokens_BT: Tensor, targets_BT: Tensor) -> list[dict]:
        """What training minimises: the ruler's own term first, then those of ideas."""
        x_BTC = self.hidden(tokens_BT)
        terms = [{"x": x_BTC, "head": self.head, "targets": targets_BT}]
        return terms

    def parameter_groups(self) -> list[dict]:
        """Parameters that the optimizer treats apart; the rest goes by role."""
        groups = [{"params": list(self.parameters()), "weight_decay": 0.0}]
        return groups

    @torch.no_grad()
    def after_step(self) -> None:
        """Make every matrix a list of unit vectors along the axis of the stream again."""
        readers, writers = [self.token_table, self.head], []
        for block in self.blocks:
            readers += [block.attention.query, block.attention.key, block.attention.value]
            readers += [block.mlp.gate, block.mlp.up]
            writers += [block.attention.output, block.mlp.down]
        for layers, dim in ((readers, 1), (writers, 0)):
            for layer in layers:
                layer.weight.copy_(unit(layer.weight, dim))
