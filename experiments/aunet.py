"""AU-Net: a U-net over bytes that pools where words end, and hands on to the bytes behind.

Idea: narrow blocks in a window read all bytes. At the end of each word the vector is picked, made
    wider and goes through wide blocks; what comes out goes to that byte and those behind it, until
    the next word ends, through a matrix of its own for each of 16 offsets beside one for all. It is
    added to what the narrow blocks had, and narrow blocks finish. So the wide level predicts
    further ahead, a word at least.
    A word ends at white space behind what is none, at punctuation behind what is none, and at the
    first and every third digit of a number. That is a rule over bytes, where the authors have
    patterns of Unicode, and it looks back only. One stage pools here; the paper's larger models
    have a second one over every other word, and more. It is meant for the tokenizer `byte`; the end
    of a text counts as white space. As many words as a row has are taken, none is left out; a GPU's
    host waits for their number, and FLOPs are counted for four bytes a word. While generating, the
    wide blocks take a step where any row ends a word, and the others look past the place that they
    have there.
    Of two well-known copies one pools at places of other rows and one spreads a word's vector over
    the word's own bytes, and both leak.
Source: Videau et al. 2025, arXiv:2506.14761, section 2; facebookresearch/lingua, apps/aunet.
Family: patches.
Changed from llama: Config, Attention, Block, word_ends, Model.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, L width of the byte level, J words, P offsets

VARIANTS = {}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "num_local_blocks": 1,
    "window": 6,
    "num_offsets": 3,
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
    num_local_blocks: int = 3  # over bytes, before the words and as many after them
    window: int = 256  # bytes that a byte sees, itself included
    num_offsets: int = 16  # behind the end of a word, that are told apart

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if self.width % 4 or self.num_local_blocks < 1:
            raise ValueError(
                f"width={self.width} is no multiple of 4, or num_local_blocks="
                f"{self.num_local_blocks} is below 1"
            )
        if self.num_offsets < 1:
            raise ValueError(f"num_offsets={self.num_offsets} starts at 1")

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
    """A layer without bias whose weights start with this spread."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=std)
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


def word_ends(bytes_BT: Tensor) -> Tensor:
    """Whether each byte is where the text so far is pooled: bool, the first one always.

    That is white space behind what is none, the first of several signs of punctuation, and of a
    number the first and every third digit. Whatever is above 127 is a letter, but for what is no
    byte, such as an end marker, which is white space.
    """
    places_T = torch.arange(bytes_BT.shape[1], device=bytes_BT.device)
    is_digit = (bytes_BT >= 48) & (bytes_BT <= 57)
    is_space = (bytes_BT == 32) | (bytes_BT == 9) | (bytes_BT == 10) | (bytes_BT == 13)
    is_space = is_space | (bytes_BT > 255)
    is_sign = ((bytes_BT >= 33) & (bytes_BT <= 47)) | ((bytes_BT >= 58) & (bytes_BT <= 64))
    is_sign = is_sign | ((bytes_BT >= 91) & (bytes_BT <= 96))
    is_sign = is_sign | ((bytes_BT >= 123) & (bytes_BT <= 126))
    last_other_BT = torch.where(is_digit, -1, places_T).cummax(1).values
    is_third = is_digit & ((places_T - last_other_BT - 1) % 3 == 0)
    ends_BT = is_third | (places_T == 0)
    for is_kind in (is_space, is_sign):
        ends_BT = ends_BT | (is_kind & ~F.pad(is_kind[:, :-1], (1, 0), value=False))
    return ends_BT


class Model(nn.Module):
    """Tokens to the logits of the token after each."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.progress = 0.0
        local, wide, half = config.local, config.wide, config.num_local_blocks
        self.token_table = nn.Embedding(config.vocab_size, local.width)
        self.before = nn.ModuleList(Block(local, index) for index in range(half))
        self.down_norm = RMSNorm(local.width, config.norm_eps)
        self.down = linear(local.width, config.width)
        self.blocks = nn.ModuleList(Block(wide, index) for index in range(config.num_blocks))
        self.up_norm = RMSNorm(config.width, config.norm_eps)
        self.up = linear(config.width, local.width)
        self.up_each = linear(config.width, config.num_offsets * local.width)
        self.after = nn.ModuleList(Block(local, half + index) for index in range(half))
        self.final_norm = RMSNorm(local.width, config.norm_eps)
        self.head = linear(local.width, config.vocab_size)
        nn.init.normal_(self.token_table.weight, std=0.02)

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
        bytes_BS = torch.cat([memory["bytes"], tokens_BT], dim=1) if start else tokens_BT
        memory["bytes"] = bytes_BS
        ends_BT = word_ends(bytes_BS)[:, -T:]
        words = self.word if start else self.words
        u_BTL = words(x_BTL, ends_BT, memory, cache)
        x_BTL = x_BTL + u_BTL
        for block in self.after:
            x_BTL = block(x_BTL, turn, cache)
        x_BTL = self.final_norm(x_BTL)
        return x_BTL

    def words(self, x_BTL: Tensor, ends_BT: Tensor, memory: dict, cache=None) -> Tensor:
        """What the wide blocks make of the words so far, for each byte by its offset."""
        (B, T, L), P = x_BTL.shape, self.config.num_offsets
        J = self.num_words(ends_BT)
        order_BT = (~ends_BT).to(torch.int8).argsort(dim=1, stable=True)
        at_BJ = order_BT[:, :J]  # of the ends, and then of what nothing looks at
        y_BJL = x_BTL.gather(1, at_BJ[..., None].expand(-1, -1, L))
        places_J = torch.arange(J, device=x_BTL.device)
        turn = rotary(places_J, self.config.head_width, self.config.rope_base)
        y_BJC = self.pooled(y_BJL)
        for block in self.blocks:
            y_BJC = block(y_BJC, turn, cache)
        said_BJPL = self.said(y_BJC)
        rank_BT = ends_BT.cumsum(1) - 1
        places_T = torch.arange(T, device=x_BTL.device)
        offset_BT = places_T - at_BJ.gather(1, rank_BT)
        memory["is_word"], memory["offset"] = places_J <= rank_BT[:, -1:], offset_BT[:, -1:]
        rows_B1 = torch.arange(B, device=x_BTL.device)[:, None]
        memory["said"] = said_BJPL[rows_B1, rank_BT[:, -1:]]
        index_BT1 = (rank_BT * P + offset_BT % P)[..., None]
        return said_BJPL.flatten(1, 2).gather(1, index_BT1.expand(-1, -1, L))

    def word(self, x_B1L: Tensor, ends_B1: Tensor, memory: dict, cache) -> Tensor:
        """The same for one more byte: wide blocks run where a row ends a word, or nothing does.

        A row that ends none gets a place there that it will not look at.
        """
        if ends_B1.any():
            rank_B = memory["is_word"].sum(1)
            cos_BD, sin_BD = rotary(rank_B, self.config.head_width, self.config.rope_base)
            turn = cos_BD[:, None, None], sin_BD[:, None, None]
            memory["is_word"] = torch.cat([memory["is_word"], ends_B1], dim=1)
            y_B1C = self.pooled(x_B1L)
            for block in self.blocks:
                y_B1C = block(y_B1C, turn, cache, memory["is_word"])
            said_B1PL = self.said(y_B1C)
            memory["said"] = torch.where(ends_B1[..., None, None], said_B1PL, memory["said"])
        memory["offset"] = torch.where(ends_B1, 0, memory["offset"] + 1)
        rows_B1 = torch.arange(len(ends_B1), device=x_B1L.device)[:, None]
        return memory["said"][rows_B1, 0, memory["offset"] % self.config.num_offsets]

    def pooled(self, y_BJL: Tensor) -> Tensor:
        """The vectors at the ends of words as wide as the blocks over words."""
        y_BJL = self.down_norm(y_BJL)
        return self.down(y_BJL)

    def said(self, y_BJC: Tensor) -> Tensor:
        """What each word says to the bytes behind it, for each offset."""
        y_BJC = self.up_norm(y_BJC)
        each_BJPL = self.up_each(y_BJC).unflatten(-1, (self.config.num_offsets, -1))
        return each_BJPL + self.up(y_BJC)[:, :, None]

    def num_words(self, ends_BT: Tensor) -> int:
        """The most in a row; without numbers, one in four bytes. A GPU is waited for."""
        if ends_BT.is_meta:
            return math.ceil(ends_BT.shape[1] / 4)
        return int(ends_BT.sum(1).max())

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
