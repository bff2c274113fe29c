"""Sparse indexer: a small scorer picks the keys that attention looks at, a fixed number of them.

Idea: most keys get next to no weight, so attention over all of them is wasted if something cheap
    can tell which. A few narrow heads, with one key for all of them, score every earlier position;
    the best `top_keys` go to attention, ties to the nearest. No gradient passes the choice: the
    scorer learns from a term of its own, the divergence of its softmax over the chosen keys from
    what the heads gave them on average, and learns nothing else; its input is detached. A dense
    warm-up, of which the authors tell, is left out, as is their 8-bit scorer: this shows what the
    choice costs in loss, not what it saves; FLOPs are counted as if all were attended to.
    Generation also keeps the scorer's keys. BlaGPT's module has no objective and is never used.
Source: DeepSeek-AI 2025, DeepSeek-V3.2-Exp report, section 1 (lightning indexer).
Family: attention.
Changed from llama: Config, Indexer, best, divergence, Attention, Block, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary

TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "top_keys": 4,
    "index_heads": 2,
    "index_width": 4,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int
    max_len: int = 1024  # tokens
    num_blocks: int = 6
    width: int = 768
    num_heads: int = 12
    mlp_multiple: int = 64  # the hidden width is 8/3 of the width, rounded up to a multiple of this
    rope_base: float = 10000.0  # the slowest pair turns once in 2 pi times nearly this many tokens
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the token table
    token_std: float = 1.0  # spread of the token table at the start, unless it is the head
    top_keys: int = 128  # that attention looks at
    index_heads: int = 4  # of the scorer
    index_width: int = 32  # of each
    index_weight: float = 1.0  # of the scorer's term

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if self.index_width % 2:
            raise ValueError(f"index_width={self.index_width}: rotary positions need pairs")

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden_width(self) -> int:
        return -(-8 * self.width // (3 * self.mlp_multiple)) * self.mlp_multiple

    @property
    def output_std(self) -> float:
        """Of the matrices that write into the stream, two in each block."""
        return 0.02 * (2 * self.num_blocks) ** -0.5


def linear(inputs: int, outputs: int, std: float = 0.02) -> nn.Linear:
    """A layer without bias whose weights start with this spread for 768 inputs."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=std * (768 / inputs) ** 0.5)
    return layer


class RMSNorm(nn.Module):
    """Divides each position by its root mean square, in fp32 at least, and scales each channel."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        wide_BTC = x_BTC.to(torch.promote_types(x_BTC.dtype, torch.float32))
        y_BTC = F.rms_norm(wide_BTC, self.weight.shape, self.weight, self.eps)
        return y_BTC.to(x_BTC.dtype)


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


class Indexer(nn.Module):
    """How well each earlier position fits each position: a score, very low for later ones."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.index_heads
        self.base = config.rope_base
        self.query = linear(config.width, config.index_heads * config.index_width)
        self.key = linear(config.width, config.index_width)
        self.weight = linear(config.width, config.index_heads)
        self.key_norm = nn.LayerNorm(config.index_width)

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        T = x_BTC.shape[1]
        x_BTC = x_BTC.detach()
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=x_BTC.device)
        q_BHTD = self.query(x_BTC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_B1SD = self.key_norm(self.key(x_BTC))[:, None]
        turn = rotary(positions_T, q_BHTD.shape[-1], self.base)
        q_BHTD = rotate(q_BHTD, turn)
        k_B1SD = rotate(k_B1SD, turn)
        if cache is not None:
            (k_B1SD,) = cache.append(self, k_B1SD)
        fits_BHTS = torch.relu(q_BHTD @ k_B1SD.mT * q_BHTD.shape[-1] ** -0.5)
        weight_BHT1 = self.weight(x_BTC).mT[..., None]
        scores_BTS = (weight_BHT1 * fits_BHTS).sum(dim=1)
        scores_BTS = scores_BTS.to(torch.promote_types(scores_BTS.dtype, torch.float32))
        at_S = torch.arange(scores_BTS.shape[-1], device=x_BTC.device)
        return scores_BTS.masked_fill(at_S[-T:, None] < at_S, -torch.inf)


def best(scores_BTS: Tensor, num_keys: int) -> Tensor:
    """True at the keys of the highest scores, the nearest of equal ones, where they are seen."""
    order_BTS = scores_BTS.flip(-1).argsort(dim=-1, descending=True, stable=True)
    chosen_BTS = torch.zeros_like(scores_BTS, dtype=torch.bool)
    chosen_BTS = chosen_BTS.scatter(-1, order_BTS[..., :num_keys], True).flip(-1)
    return chosen_BTS & scores_BTS.isfinite()


def divergence(scores_BTS: Tensor, q_BHTD: Tensor, k_BHSD: Tensor, chosen_B1TS: Tensor) -> Tensor:
    """Nats from what the heads give to the chosen keys, on average, to the scores' softmax."""
    with torch.no_grad():
        given_BHTS = q_BHTD @ k_BHSD.mT * q_BHTD.shape[-1] ** -0.5
        given_BHTS = given_BHTS.to(scores_BTS.dtype).masked_fill(~chosen_B1TS, -torch.inf)
        given_BTS = given_BHTS.softmax(dim=-1).mean(dim=1)
    chosen_BTS = chosen_B1TS[:, 0]
    logs_BTS = scores_BTS.masked_fill(~chosen_BTS, -torch.inf).log_softmax(dim=-1)
    logs_BTS = logs_BTS.masked_fill(~chosen_BTS, 0.0)
    return (torch.xlogy(given_BTS, given_BTS) - given_BTS * logs_BTS).sum(dim=-1)


class Attention(nn.Module):
    """Causal self-attention over H heads of width D = C / H, with rotary positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = linear(config.width, config.width)
        self.key = linear(config.width, config.width)
        self.value = linear(config.width, config.width)
        self.output = linear(config.width, config.width, config.output_std)
        self.indexer = Indexer(config)
        self.top_keys = config.top_keys

    def split(self, x_BTC: Tensor) -> Tensor:
        x_BTHD = x_BTC.unflatten(-1, (self.num_heads, -1))
        x_BHTD = x_BTHD.transpose(1, 2)
        return x_BHTD

    def forward(
        self,
        x_BTC: Tensor,
        turn: tuple[Tensor, Tensor],
        cache=None,
        found: list[Tensor] | None = None,
    ) -> Tensor:
        q_BTC = self.query(x_BTC)
        k_BTC = self.key(x_BTC)
        v_BTC = self.value(x_BTC)
        q_BHTD = self.split(q_BTC)
        k_BHSD = self.split(k_BTC)
        v_BHSD = self.split(v_BTC)
        q_BHTD = rotate(q_BHTD, turn)
        k_BHSD = rotate(k_BHSD, turn)
        if cache is not None:
            k_BHSD, v_BHSD = cache.append(self, k_BHSD, v_BHSD)
        scores_BTS = self.indexer(x_BTC, cache)
        chosen_B1TS = best(scores_BTS, self.top_keys)[:, None]
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=chosen_B1TS)
        if found is not None:
            found.append(divergence(scores_BTS, q_BHTD, k_BHSD, chosen_B1TS))
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
        self.down = linear(config.hidden_width, config.width, config.output_std)

    def forward(self, x_BTC: Tensor) -> Tensor:
        g_BTF = self.gate(x_BTC)
        g_BTF = F.silu(g_BTF)
        h_BTF = self.up(x_BTC)
        h_BTF = g_BTF * h_BTF
        y_BTC = self.down(h_BTF)
        return y_BTC


class Block(nn.Module):
    """Attention, then the MLP; each reads a normed copy of the stream and adds to it."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index = index
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTC: Tensor,
        turn: tuple[Tensor, Tensor],
        cache=None,
        found: list[Tensor] | None = None,
    ) -> Tensor:
        u_BTC = self.attention_norm(x_BTC)
        y_BTC = self.attention(u_BTC, turn, cache, found)
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
        self.progress = 0.0
        self.token_table = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_blocks))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = linear(config.width, config.vocab_size)
        nn.init.normal_(self.token_table.weight, std=config.token_std)
        if config.tied:
            self.token_table.weight = self.head.weight

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None, found: list[Tensor] | None = None) -> Tensor:
        """What the head reads; `found` gets how far each block's scorer is from its heads."""
        T = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        turn = rotary(positions_T, self.config.head_width, self.config.rope_base)
        x_BTC = self.token_table(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, turn, cache, found)
        x_BTC = self.final_norm(x_BTC)
        return x_BTC

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV

    def loss_terms(self, tokens_BT: Tensor, targets_BT: Tensor) -> list[dict]:
        """What training minimises: the ruler's own term first, then those of ideas."""
        found: list[Tensor] = []
        x_BTC = self.hidden(tokens_BT, found=found)
        terms = [{"x": x_BTC, "head": self.head, "targets": targets_BT}]
        terms.append({"penalty": sum(found), "weight": self.config.index_weight})
        return terms

    def parameter_groups(self) -> list[dict]:
        """Parameters that the optimizer treats apart; the rest goes by role."""
        groups = []
        return groups

    def after_step(self) -> None:
        """What an idea does to parameters after each update: nothing here."""
