"""SpaceByte: a narrow model over bytes, with wide blocks where a word begins.

Idea: the byte that begins a word is the hardest to predict, so the wide blocks run only at bytes
    behind which a word may begin: no letter, no digit, no continuation of UTF-8, behind one that
    is. Narrow blocks in a window run before and after over all bytes; what the wide ones find is
    added at those bytes alone, and the window carries it through the word. Half of the bytes at
    most are such bytes, so there is room for all and none is left out of the score, as the authors
    do beyond their capacity. It is meant for the tokenizer `byte`. The end of a text is read as
    such a byte. Positions are rotary; widths and depths have llama's blocks. Words of different
    rows end at different places: while generating, the wide blocks take a step where any row begins
    one, and the others look past the place that they have there.
    A well-known copy shifts its targets twice and keeps a learning rate that belongs to another
    start.
Source: Slagle 2024, arXiv:2404.14408, sections 3 and 4.
Family: patches.
Changed from llama: Config, Attention, Block, word_starts, Model.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, L width of the byte level, J words

VARIANTS = {}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "num_local_blocks": 1,
    "window": 6,
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
    token_std: float = 1.0  # spread of the token table at the start
    num_local_blocks: int = 3  # over bytes, before the words and as many after them
    window: int = 256  # bytes that a byte sees, itself included

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if self.width % 4 or self.num_local_blocks < 1:
            raise ValueError(
                f"width={self.width} is no multiple of 4, or num_local_blocks="
                f"{self.num_local_blocks} is below 1"
            )

    @property
    def local(self) -> "Config":
        """Of the blocks over bytes: half as wide, with half of the heads."""
        halved = {"width": self.width // 2, "num_heads": max(1, self.num_heads // 2)}
        return replace(self, **halved, num_blocks=2 * self.num_local_blocks)

    @property
    def wide(self) -> "Config":
        """Of the blocks over words: they see all that went before."""
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


def word_starts(bytes_BT: Tensor) -> Tensor:
    """Whether each byte ends what went before, so that a word follows: bool, the first one always.

    That is a byte that is no letter, no digit and no continuation of UTF-8, behind one that is.
    What is no byte, such as an end marker, counts as no letter.
    """
    is_digit = (bytes_BT >= 48) & (bytes_BT <= 57)
    is_letter = ((bytes_BT >= 65) & (bytes_BT <= 90)) | ((bytes_BT >= 97) & (bytes_BT <= 122))
    is_continuation = (bytes_BT >= 128) & (bytes_BT <= 191)
    is_apart = ~(is_digit | is_letter | is_continuation)
    before = F.pad(is_apart[:, :-1], (1, 0), value=False)
    starts_BT = is_apart & ~before
    first_T = torch.arange(bytes_BT.shape[1], device=bytes_BT.device) == 0
    return starts_BT | first_T


class Model(nn.Module):
    """Tokens to the logits of the token after each."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.progress = 0.0
        local, wide, half = config.local, config.wide, config.num_local_blocks
        self.token_table = nn.Embedding(config.vocab_size, local.width)
        self.before = nn.ModuleList(Block(local, index) for index in range(half))
        self.blocks = nn.ModuleList(Block(wide, index) for index in range(config.num_blocks))
        self.after = nn.ModuleList(Block(local, half + index) for index in range(half))
        self.final_norm = RMSNorm(local.width, config.norm_eps)
        self.head = linear(local.width, config.vocab_size)
        nn.init.normal_(self.token_table.weight, std=config.token_std)

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        T, local = tokens_BT.shape[1], self.config.local
        start = cache.length if cache is not None else 0
        memory = {} if cache is None else cache.state(self)
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        turn = rotary(positions_T, local.head_width, local.rope_base)
        x_BTL = self.token_table(tokens_BT)
        for block in self.before:
            x_BTL = block(x_BTL, turn, cache)
        if start:
            both_BT = torch.cat([memory["last"], tokens_BT], dim=1)
            starts_BT = word_starts(both_BT)[:, 1:]
            u_BTL = self.word(x_BTL, starts_BT, memory, cache)
        else:
            starts_BT = word_starts(tokens_BT)
            u_BTL = self.words(x_BTL, starts_BT, memory, cache)
        memory["last"] = tokens_BT[:, -1:]
        x_BTL = x_BTL + u_BTL * starts_BT[..., None]
        for block in self.after:
            x_BTL = block(x_BTL, turn, cache)
        x_BTL = self.final_norm(x_BTL)
        return x_BTL

    def words(self, x_BTL: Tensor, starts_BT: Tensor, memory: dict, cache=None) -> Tensor:
        """What the wide blocks make of the bytes at the starts, for each byte that of its word.

        A byte behind a start is none, so half of the bytes and one are room enough for all.
        """
        T, L = x_BTL.shape[1:]
        J = T // 2 + 1
        order_BT = (~starts_BT).to(torch.int8).argsort(dim=1, stable=True)
        at_BJ = order_BT[:, : min(J, T)]  # of the starts, and then of what nothing looks at
        y_BJL = x_BTL.gather(1, at_BJ[..., None].expand(-1, -1, L))
        y_BJC = F.pad(y_BJL, (self.config.width - L, 0))
        places_J = torch.arange(y_BJC.shape[1], device=x_BTL.device)
        turn = rotary(places_J, self.config.head_width, self.config.rope_base)
        for block in self.blocks:
            y_BJC = block(y_BJC, turn, cache)
        rank_BT = starts_BT.cumsum(1) - 1
        memory["is_word"] = places_J <= rank_BT[:, -1:]
        return y_BJC[..., -L:].gather(1, rank_BT[..., None].expand(-1, -1, L))

    def word(self, x_B1L: Tensor, starts_B1: Tensor, memory: dict, cache) -> Tensor:
        """The same for one more byte: wide blocks run where a row begins a word, or nothing does.

        A row that begins none gets a place there that it will not look at.
        """
        if not starts_B1.any():
            return torch.zeros_like(x_B1L)
        rank_B = memory["is_word"].sum(1)
        cos_BD, sin_BD = rotary(rank_B, self.config.head_width, self.config.rope_base)
        turn = cos_BD[:, None, None], sin_BD[:, None, None]
        memory["is_word"] = torch.cat([memory["is_word"], starts_B1], dim=1)
        y_B1C = F.pad(x_B1L, (self.config.width - x_B1L.shape[-1], 0))
        for block in self.blocks:
            y_B1C = block(y_B1C, turn, cache, memory["is_word"])
        return y_B1C[..., -x_B1L.shape[-1] :]

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
        groups = []
        return groups

    def after_step(self) -> None:
        """What an idea does to parameters after each update: nothing here."""
