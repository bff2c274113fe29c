"""H-Net: chunks of bytes that the model learns to cut.

Idea: a router begins a chunk where neighbouring bytes' vectors turn away from one another. The
    first byte of each chunk goes through the wide blocks; a running average, driven by the router's
    certainty, smooths what they find, and every byte of a chunk reads it. A term of the loss keeps
    the chunks near five bytes, or the router drifts to all or none. It is formed for each row, so
    that micro-batches do not change it (the authors form it for a batch); it trains the model and
    is never reported.
    The byte level is blocks of attention in a window here, Mamba-2 in the paper; the wide level is
    llama's. There is one stage. Chunks of different rows end at different places: while
    generating, the wide blocks take a step where any row begins one, and the others look past the
    place that they have there. How many chunks there are is known only when they are cut, which a
    GPU's host waits for, and FLOPs are counted for the length aimed at. Compiled, it is several
    graphs for the same reason.
    A well-known copy is a plain stack that throws the router's answer away.
Source: Hwang, Wang and Gu 2025, arXiv:2507.07955, sections 2 and 3; goombalab/hnet.
Family: patches.
Changed from llama: Config, Attention, Block, Router, smoothed, Model.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, L width of the byte level, J chunks

VARIANTS = {}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "num_local_blocks": 1,
    "window": 6,
    "chunk_length": 3.0,
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
    num_local_blocks: int = 2  # over bytes, before the chunks and as many after them
    window: int = 256  # bytes that a byte sees, itself included
    chunk_length: float = 5.0  # bytes of a chunk that training aims at, on average
    ratio_weight: float = 0.03  # of that aim in what training minimises

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if self.width % 4 or self.num_local_blocks < 1 or self.chunk_length <= 1:
            raise ValueError(
                f"width={self.width} is no multiple of 4, or num_local_blocks="
                f"{self.num_local_blocks} is below 1, or chunk_length={self.chunk_length} not above"
            )

    @property
    def local(self) -> "Config":
        """Of the blocks over bytes: half as wide, with half of the heads."""
        halved = {"width": self.width // 2, "num_heads": max(1, self.num_heads // 2)}
        return replace(self, **halved, num_blocks=2 * self.num_local_blocks)

    @property
    def wide(self) -> "Config":
        """Of the blocks over chunks: they see all that went before."""
        return replace(self, window=0)

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
    """Causal self-attention over H heads of width D = C / H, in a window where there is one."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.window = config.window
        self.query = linear(config.width, config.width)
        self.key = linear(config.width, config.width)
        self.value = linear(config.width, config.width)
        self.output = linear(config.width, config.width, config.output_std)

    def split(self, x_BTC: Tensor) -> Tensor:
        x_BTHD = x_BTC.unflatten(-1, (self.num_heads, -1))
        x_BHTD = x_BTHD.transpose(1, 2)
        return x_BHTD

    def mask(self, T: int, device: torch.device) -> Tensor:
        """Whether each position sees another: not behind it, and fewer than a window before."""
        places_T = torch.arange(T, device=device)
        back_TT = places_T[:, None] - places_T
        return (back_TT >= 0) & (back_TT < self.window)

    def forward(
        self, x_BTC: Tensor, turn: tuple[Tensor, Tensor], cache=None, is_seen_BS=None
    ) -> Tensor:
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
            k_BHSD, v_BHSD = cache.append(self, k_BHSD, v_BHSD, keep=self.window or None)
        if is_seen_BS is not None:
            mask_B11S = is_seen_BS[:, None, None]
            y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask_B11S)
        elif 0 < self.window < T:
            mask_TS = self.mask(T, x_BTC.device)
            y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask_TS)
        else:
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

    def forward(
        self, x_BTC: Tensor, turn: tuple[Tensor, Tensor], cache=None, is_seen_BS=None
    ) -> Tensor:
        u_BTC = self.attention_norm(x_BTC)
        y_BTC = self.attention(u_BTC, turn, cache, is_seen_BS)
        x_BTC = x_BTC + y_BTC
        u_BTC = self.mlp_norm(x_BTC)
        y_BTC = self.mlp(u_BTC)
        x_BTC = x_BTC + y_BTC
        return x_BTC


class Router(nn.Module):
    """The probability that a chunk begins at each position: how far it turned from the last one."""

    def __init__(self, width: int):
        super().__init__()
        self.query = linear(width, width)
        self.key = linear(width, width)
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)

    def forward(self, x_BTL: Tensor, before_B1L: Tensor | None = None) -> Tensor:
        if before_B1L is not None:
            x_BTL = torch.cat([before_B1L, x_BTL], dim=1)
        q_BTL = self.query(x_BTL[:, :-1])
        k_BTL = self.key(x_BTL[:, 1:])
        wide = torch.promote_types(x_BTL.dtype, torch.float32)
        p_BT = (1 - F.cosine_similarity(q_BTL.to(wide), k_BTL.to(wide), dim=-1, eps=1e-6)) / 2
        if before_B1L is None:
            p_BT = F.pad(p_BT, (1, 0), value=1.0)  # the first position begins one
        return p_BT


def smoothed(y_BJL: Tensor, p_BJ: Tensor) -> Tensor:
    """The running average that takes up the share p of each chunk; zeros before the first.

    In log2 J rounds, each of which joins stretches twice as long.
    """
    keep_BJ1 = (1 - p_BJ)[..., None]
    sum_BJL = p_BJ[..., None] * y_BJL
    distance = 1
    while distance < y_BJL.shape[1]:
        back_BJL = F.pad(sum_BJL[:, :-distance], (0, 0, distance, 0))
        back_BJ1 = F.pad(keep_BJ1[:, :-distance], (0, 0, distance, 0), value=1.0)
        sum_BJL = sum_BJL + keep_BJ1 * back_BJL
        keep_BJ1 = keep_BJ1 * back_BJ1
        distance *= 2
    return sum_BJL


class Model(nn.Module):
    """Tokens to the logits of the token after each."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.progress = 0.0
        local, wide, half = config.local, config.wide, config.num_local_blocks
        self.token_table = nn.Embedding(config.vocab_size, local.width)  # starts with a spread of 1
        self.before = nn.ModuleList(Block(local, index) for index in range(half))
        self.before_norm = RMSNorm(local.width, config.norm_eps)
        self.router = Router(local.width)
        self.widening = nn.Parameter(torch.empty(config.width - local.width))
        self.blocks = nn.ModuleList(Block(wide, index) for index in range(config.num_blocks))
        self.chunk_norm = RMSNorm(config.width, config.norm_eps)
        self.residual = linear(local.width, local.width)
        self.after = nn.ModuleList(Block(local, half + index) for index in range(half))
        self.final_norm = RMSNorm(local.width, config.norm_eps)
        self.head = linear(local.width, config.vocab_size)
        nn.init.normal_(self.widening, std=0.02)
        nn.init.zeros_(self.residual.weight)  # at first the chunks alone are heard

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTL, _ = self.routed(tokens_BT, cache)
        return x_BTL

    def routed(self, tokens_BT: Tensor, cache=None) -> tuple[Tensor, Tensor]:
        """What the head reads, and the probability that a chunk begins at each position."""
        T, local = tokens_BT.shape[1], self.config.local
        start = cache.length if cache is not None else 0
        memory = {} if cache is None else cache.state(self)
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        turn = rotary(positions_T, local.head_width, local.rope_base)
        x_BTL = self.token_table(tokens_BT)
        for block in self.before:
            x_BTL = block(x_BTL, turn, cache)
        x_BTL = self.before_norm(x_BTL)
        p_BT = self.router(x_BTL, memory.get("last"))
        memory["last"] = x_BTL[:, -1:]
        if start:
            u_BTL = self.chunk(x_BTL, p_BT, memory, cache)
        else:
            u_BTL = self.chunks(x_BTL, p_BT, memory, cache)
        r_BTL = self.residual(x_BTL)
        x_BTL = u_BTL + r_BTL
        for block in self.after:
            x_BTL = block(x_BTL, turn, cache)
        x_BTL = self.final_norm(x_BTL)
        return x_BTL, p_BT

    def chunks(self, x_BTL: Tensor, p_BT: Tensor, memory: dict, cache=None) -> Tensor:
        """What the wide blocks make of the first byte of each chunk, for all bytes of it.

        The choice itself has no gradient. A factor that is 1 hands the router one: it grows where
        what the chunk said was of use.
        """
        L = x_BTL.shape[-1]
        starts_BT = p_BT > 0.5
        J = self.num_chunks(starts_BT)
        order_BT = (~starts_BT).to(torch.int8).argsort(dim=1, stable=True)
        at_BJ = order_BT[:, :J]  # of the starts, and then of what nothing looks at
        y_BJL = x_BTL.gather(1, at_BJ[..., None].expand(-1, -1, L))
        places_J = torch.arange(J, device=x_BTL.device)
        turn = rotary(places_J, self.config.head_width, self.config.rope_base)
        y_BJC = self.widened(y_BJL)
        for block in self.blocks:
            y_BJC = block(y_BJC, turn, cache)
        y_BJC = self.chunk_norm(y_BJC)
        p_BJ = p_BT.gather(1, at_BJ).clamp(1e-4, 1 - 1e-4)
        z_BJL = smoothed(y_BJC[..., :L], p_BJ)
        rank_BT = starts_BT.cumsum(1) - 1
        z_BTL = z_BJL.gather(1, rank_BT[..., None].expand(-1, -1, L))
        memory["is_chunk"], memory["average"] = places_J <= rank_BT[:, -1:], z_BTL[:, -1:]
        sure_BT = torch.where(starts_BT, p_BT, 1 - p_BT)
        gate_BT1 = (sure_BT + (1 - sure_BT).detach())[..., None]
        return gate_BT1 * z_BTL

    def chunk(self, x_B1L: Tensor, p_B1: Tensor, memory: dict, cache) -> Tensor:
        """The same for one more byte: wide blocks run where a row begins a chunk, or nothing does.

        A row that begins none gets a place there that it will not look at.
        """
        starts_B1, z_B1L = p_B1 > 0.5, memory["average"]
        if not starts_B1.any():
            return z_B1L
        rank_B = memory["is_chunk"].sum(1)
        cos_BD, sin_BD = rotary(rank_B, self.config.head_width, self.config.rope_base)
        turn = cos_BD[:, None, None], sin_BD[:, None, None]
        memory["is_chunk"] = torch.cat([memory["is_chunk"], starts_B1], dim=1)
        y_B1C = self.widened(x_B1L)
        for block in self.blocks:
            y_B1C = block(y_B1C, turn, cache, memory["is_chunk"])
        y_B1C = self.chunk_norm(y_B1C)
        p_B11 = p_B1.clamp(1e-4, 1 - 1e-4)[..., None]
        average_B1L = p_B11 * y_B1C[..., : x_B1L.shape[-1]] + (1 - p_B11) * z_B1L
        memory["average"] = torch.where(starts_B1[..., None], average_B1L, z_B1L)
        return memory["average"]

    def widened(self, y_BJL: Tensor) -> Tensor:
        """The bytes' vectors as wide as the blocks over chunks."""
        widening_BJW = self.widening.to(y_BJL.dtype).expand(*y_BJL.shape[:2], -1)
        return torch.cat([y_BJL, widening_BJW], dim=-1)

    def num_chunks(self, starts_BT: Tensor) -> int:
        """The most in a row; without numbers, what training aims at. A GPU is waited for."""
        if starts_BT.is_meta:
            return math.ceil(starts_BT.shape[1] / self.config.chunk_length)
        return int(starts_BT.sum(1).max())

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV

    def loss_terms(self, tokens_BT: Tensor, targets_BT: Tensor) -> list[dict]:
        """What training minimises: the ruler's own term first, then those of ideas."""
        x_BTC, p_BT = self.routed(tokens_BT)
        terms = [{"x": x_BTC, "head": self.head, "targets": targets_BT}]
        ratio_B1 = self.ratio(p_BT)
        terms.append({"penalty": ratio_B1.expand_as(p_BT), "weight": self.config.ratio_weight})
        return terms

    def ratio(self, p_BT: Tensor) -> Tensor:
        """How far each row's chunks are from the length aimed at; 1 where they agree."""
        n = self.config.chunk_length
        share_B1 = (p_BT > 0.5).to(p_BT.dtype).mean(1, keepdim=True)
        mean_B1 = p_BT.mean(1, keepdim=True)
        both_B1 = (n - 1) * share_B1 * mean_B1 + (1 - share_B1) * (1 - mean_B1)
        return n / (n - 1) * both_B1

    def parameter_groups(self) -> list[dict]:
        """Parameters that the optimizer treats apart; the rest goes by role."""
        groups = []
        return groups

    def after_step(self) -> None:
        """What an idea does to parameters after each update: nothing here."""
