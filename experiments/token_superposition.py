"""Token superposition: at first the model reads bags of four tokens and predicts the next bag.

Idea: early training learns mostly which words go together; a position that holds the mean of s
    embeddings reads s times as much text for the same arithmetic. The state of a bag predicts each
    token of the next one, by one softmax. Behind superposed_share of the run it is trained as
    llama, and it is llama's forward that every validation and all generation run.
    The loss jumps there by a nat or two. Tokens read are what a plan counts, and by that count it
    is expected to lose: compare by seconds or FLOPs, with a plan whose batch is larger at first.
    The target is the next bag, not the bag one token later, of which it would have read all but
    one token. Nothing is scored for the first bag's own tokens; the rest counts for them. Bags
    never straddle rows.
Source: Peng, Gigant and Quesnelle 2026, arXiv:2605.06546.
Family: outputs.
Changed from llama: Config, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, J bags, Q tokens in a bag, N = B J

VARIANTS = {
    "tst_2": {"bag": 2},
    "tst_8": {"bag": 8},
}
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
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the token table
    token_std: float = 1.0  # spread of the token table at the start, unless it is the head
    bag: int = 4  # tokens that a position holds at first
    superposed_share: float = 0.3  # of the run

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if self.bag < 1:
            raise ValueError(f"bag={self.bag} starts at 1")

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


class Attention(nn.Module):
    """Causal self-attention over H heads of width D = C / H, with rotary positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = linear(config.width, config.width)
        self.key = linear(config.width, config.width)
        self.value = linear(config.width, config.width)
        self.output = linear(config.width, config.width, config.output_std)

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
        if cache is not None:
            k_BHSD, v_BHSD = cache.append(self, k_BHSD, v_BHSD)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=T > 1)
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

    def forward(self, x_BTC: Tensor, turn: tuple[Tensor, Tensor], cache=None) -> Tensor:
        u_BTC = self.attention_norm(x_BTC)
        y_BTC = self.attention(u_BTC, turn, cache)
        x_BTC = x_BTC + y_BTC
        u_BTC = self.mlp_norm(x_BTC)
        y_BTC = self.mlp(u_BTC)
        x_BTC = x_BTC + y_BTC
        return x_BTC


CHUNK = 2048  # positions whose logits are alive at a time


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

    def embedded(self, tokens_BT: Tensor, bag: int) -> Tensor:
        """The mean of each bag's rows of the table."""
        e_BTC = self.token_table(tokens_BT)
        return e_BTC if bag == 1 else e_BTC.unflatten(1, (-1, bag)).mean(2)

    def hidden(self, tokens_BT: Tensor, cache=None, bag: int = 1) -> Tensor:
        """What the head reads, for each bag of so many tokens; a single one is a token."""
        T = tokens_BT.shape[1] // bag
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        turn = rotary(positions_T, self.config.head_width, self.config.rope_base)
        x_BTC = self.embedded(tokens_BT, bag)
        for block in self.blocks:
            x_BTC = block(x_BTC, turn, cache)
        x_BTC = self.final_norm(x_BTC)
        return x_BTC

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV

    def nats(self, x_NC: Tensor, asked_NQ: Tensor) -> Tensor:
        """Of each of the Q tokens that a position is asked for, by one softmax in fp32 at least."""
        logits_NV = self.head(x_NC)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        return logits_NV.logsumexp(-1, keepdim=True) - logits_NV.gather(-1, asked_NQ)

    def training_loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Nats of each target; at first given the bag before the target's own."""
        is_superposed = self.progress < self.config.superposed_share
        size = self.config.bag if is_superposed and tokens_BT.shape[1] >= self.config.bag else 1
        num_bags = tokens_BT.shape[1] // size
        x_BJC = self.hidden(tokens_BT[:, : num_bags * size], bag=size)
        x_NC = x_BJC.flatten(0, 1)
        first, scored_BT = size - 1, targets_BT >= 0  # target t is token t + 1
        missing = num_bags * size - (targets_BT.shape[1] - first)
        asked_BT = F.pad(targets_BT.clamp(min=0)[:, first:], (0, missing))
        asked_NQ = asked_BT.unflatten(1, (num_bags, size)).flatten(0, 1)
        parts = [
            checkpoint(self.nats, x, asked, use_reentrant=False, preserve_rng_state=False)
            for x, asked in zip(x_NC.split(CHUNK), asked_NQ.split(CHUNK), strict=True)
        ]
        nats_BT = torch.cat(parts).view(len(tokens_BT), -1)
        nats_BT = F.pad(nats_BT, (first, -missing))
        num_B1 = scored_BT.sum(1, keepdim=True)
        return nats_BT * num_B1 / scored_BT[:, first:].sum(1, keepdim=True).clamp(min=1)

    def parameter_groups(self) -> list[dict]:
        """Parameters that the optimizer treats apart; the rest goes by role."""
        groups = []
        return groups

    def after_step(self) -> None:
        """What an idea does to parameters after each update: nothing here."""
