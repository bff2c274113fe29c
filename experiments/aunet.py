"""AU-Net: a U-net over bytes that pools where words end, and hands on to the bytes behind.

Idea: narrow blocks in a window read all bytes. At the end of each word the vector is picked, made
    wider and goes through wide blocks; what comes out goes to that byte and those behind it, until
    the next word ends, through a matrix of its own for each of 16 offsets beside one for all. It is
    added to what the narrow blocks had, and narrow blocks finish. So the wide level predicts
    further ahead, a word at least.
    A word ends at white space behind what is none, at punctuation behind what is none, and at the
    first and every third digit of a number. That is a rule over bytes, where the authors have
    patterns of Unicode, and it looks back only. It is meant for the tokenizer `byte`; the end of a
    text counts as white space. One stage pools, as in the paper's smallest models; in aunet_pairs a
    second one does, at every other end of a word, with blocks of its own before and behind the wide
    ones; num_stages says how many. A level is half as wide as the next. As many words as a row has
    are taken, none is left out; a GPU's host waits for their number, and FLOPs are counted for four
    bytes a word. While generating, a level takes a step where any row has a place for it, and the
    others look past the place that they have there. Compiled, it is several graphs, since the
    number of words decides what is computed.
    Of two well-known copies one pools at places of other rows and one spreads a word's vector over
    the word's own bytes, and both leak.
Source: Videau et al. 2025, arXiv:2506.14761, section 2; facebookresearch/lingua, apps/aunet.
Family: patches.
Changed from llama: Config, Attention, Block, word_ends, every_other, Level, Model.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, L width of a level, J its places, K those of the next, P offsets

VARIANTS = {"aunet_pairs": {"num_stages": 2}}
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
    token_std: float = 1.0  # spread of the token table at the start
    num_local_blocks: int = 3  # of a level, before the next one and as many after it
    window: int = 256  # bytes that a byte sees, itself included
    num_offsets: int = 16  # behind the end of a word, that are told apart
    num_stages: int = 1  # of pooling: words, then every other of them, and so on; 0 for none

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if self.width % 2 ** (self.num_stages + 1):
            raise ValueError(f"width={self.width} cannot be halved {self.num_stages} times")
        if self.num_local_blocks < 1 or self.num_stages < 0:
            raise ValueError(
                f"num_local_blocks={self.num_local_blocks} starts at 1, num_stages="
                f"{self.num_stages} at 0"
            )
        if self.num_offsets < 1:
            raise ValueError(f"num_offsets={self.num_offsets} starts at 1")

    def of(self, level: int) -> "Config":
        """Of the blocks of a level, 0 for bytes: each has half the width and heads of the next."""
        times = 2 ** (self.num_stages - level)
        halved = {"width": self.width // times, "num_heads": max(1, self.num_heads // times)}
        own = {"num_blocks": 2 * self.num_local_blocks} if times > 1 else {}
        return replace(self, **halved, **own, window=0 if level else self.window, num_stages=0)

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


def every_other(places: Tensor) -> Tensor:
    """Whether each place is pooled by the next stage: the first, and of the rest every other."""
    return (places == 0) | (places % 2 == 1)


class Level(nn.Module):
    """Blocks over places, bytes or words, and between them what the next level makes of some.

    Rows have places of their own number; what is no place fills a row up, and nothing looks at it.
    """

    def __init__(self, config: Config, level: int = 0):
        super().__init__()
        self.level, self.config = level, config.of(level)
        self.is_last = level == config.num_stages
        L, half = self.config.width, config.num_local_blocks
        num_before = config.num_blocks if self.is_last else half
        self.before = nn.ModuleList(Block(self.config, index) for index in range(num_before))
        if self.is_last:
            return
        C = config.of(level + 1).width
        self.num_offsets = 2 if level else config.num_offsets  # of every other place there are two
        self.down_norm = RMSNorm(L, config.norm_eps)
        self.down = linear(L, C)
        self.inner = Level(config, level + 1)
        self.up_norm = RMSNorm(C, config.norm_eps)
        self.up = linear(C, L)
        self.up_each = linear(C, self.num_offsets * L)
        self.after = nn.ModuleList(Block(self.config, half + index) for index in range(half))

    def forward(self, x_BJL: Tensor, is_place_BJ: Tensor, ends_BJ: Tensor, cache=None) -> Tensor:
        """All places of a text; `ends_BJ` are those of the next level."""
        places_J = torch.arange(x_BJL.shape[1], device=x_BJL.device)
        turn = rotary(places_J, self.config.head_width, self.config.rope_base)
        memory = {} if cache is None else cache.state(self)
        if self.level:
            memory["is_place"] = is_place_BJ
        for block in self.before:
            x_BJL = block(x_BJL, turn, cache)
        if self.is_last:
            return x_BJL
        u_BJL = self.spread(x_BJL, is_place_BJ, ends_BJ, memory, cache)
        x_BJL = x_BJL + u_BJL
        for block in self.after:
            x_BJL = block(x_BJL, turn, cache)
        return x_BJL

    def spread(
        self, x_BJL: Tensor, is_place_BJ: Tensor, ends_BJ: Tensor, memory: dict, cache=None
    ) -> Tensor:
        """What the next level makes of the ends so far, for each place by its offset."""
        (B, J, L), P = x_BJL.shape, self.num_offsets
        K = self.num_ends(ends_BJ)
        order_BJ = (~ends_BJ).to(torch.int8).argsort(dim=1, stable=True)
        at_BK = order_BJ[:, :K]  # of the ends, and then of what nothing looks at
        y_BKL = x_BJL.gather(1, at_BK[..., None].expand(-1, -1, L))
        places_K = torch.arange(K, device=x_BJL.device)
        is_place_BK = places_K < ends_BJ.sum(1, keepdim=True)
        ends_BK = is_place_BK & every_other(places_K)
        y_BKC = self.inner(self.pooled(y_BKL), is_place_BK, ends_BK, cache)
        said_BKPL = self.said(y_BKC)
        rank_BJ = ends_BJ.cumsum(1) - 1
        places_J = torch.arange(J, device=x_BJL.device)
        offset_BJ = places_J - at_BK.gather(1, rank_BJ)
        last_B1 = is_place_BJ.sum(1, keepdim=True) - 1
        memory["rank"], memory["offset"] = rank_BJ.gather(1, last_B1), offset_BJ.gather(1, last_B1)
        rows_B1 = torch.arange(B, device=x_BJL.device)[:, None]
        memory["said"] = said_BKPL[rows_B1, memory["rank"]]
        index_BJ1 = (rank_BJ * P + offset_BJ % P)[..., None]
        return said_BKPL.flatten(1, 2).gather(1, index_BJ1.expand(-1, -1, L))

    def step(
        self, x_B1L: Tensor, place_B1: Tensor, is_place_B1: Tensor, ends_B1: Tensor, cache
    ) -> Tensor:
        """The same for one more place, or what is none of a row."""
        memory = cache.state(self)
        cos_BD, sin_BD = rotary(place_B1[:, 0], self.config.head_width, self.config.rope_base)
        turn = cos_BD[:, None, None], sin_BD[:, None, None]
        if self.level:
            memory["is_place"] = torch.cat([memory["is_place"], is_place_B1], dim=1)
        for block in self.before:
            x_B1L = block(x_B1L, turn, cache, memory.get("is_place"))
        if self.is_last:
            return x_B1L
        if ends_B1.any():
            memory["rank"] = memory["rank"] + ends_B1
            next_B1 = ends_B1 & every_other(memory["rank"])
            y_B1C = self.pooled(x_B1L)
            y_B1C = self.inner.step(y_B1C, memory["rank"], ends_B1, next_B1, cache)
            said_B1PL = self.said(y_B1C)
            memory["said"] = torch.where(ends_B1[..., None, None], said_B1PL, memory["said"])
        memory["offset"] = torch.where(ends_B1, 0, memory["offset"] + is_place_B1)
        rows_B1 = torch.arange(len(x_B1L), device=x_B1L.device)[:, None]
        u_B1L = memory["said"][rows_B1, 0, memory["offset"] % self.num_offsets]
        x_B1L = x_B1L + u_B1L
        for block in self.after:
            x_B1L = block(x_B1L, turn, cache, memory.get("is_place"))
        return x_B1L

    def pooled(self, y_BKL: Tensor) -> Tensor:
        """The vectors at the ends as wide as those of the next level."""
        y_BKL = self.down_norm(y_BKL)
        return self.down(y_BKL)

    def said(self, y_BKC: Tensor) -> Tensor:
        """What each place of the next level says to those behind it, for each offset."""
        y_BKC = self.up_norm(y_BKC)
        each_BKPL = self.up_each(y_BKC).unflatten(-1, (self.num_offsets, -1))
        return each_BKPL + self.up(y_BKC)[:, :, None]

    def num_ends(self, ends_BJ: Tensor) -> int:
        """The most in a row; without numbers, one in four bytes. A GPU is waited for."""
        J = ends_BJ.shape[1]
        if self.level:
            return J // 2 + 1  # the first, and every other
        return math.ceil(J / 4) if ends_BJ.is_meta else int(ends_BJ.sum(1).max())


class Model(nn.Module):
    """Tokens to the logits of the token after each."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.progress = 0.0
        width = config.of(0).width
        self.token_table = nn.Embedding(config.vocab_size, width)
        self.levels = Level(config)
        self.final_norm = RMSNorm(width, config.norm_eps)
        self.head = linear(width, config.vocab_size)
        nn.init.normal_(self.token_table.weight, std=config.token_std)

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        T = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        memory = {} if cache is None else cache.state(self)
        bytes_BS = torch.cat([memory["bytes"], tokens_BT], dim=1) if start else tokens_BT
        memory["bytes"] = bytes_BS
        ends_BT = word_ends(bytes_BS)[:, -T:]
        is_place_BT = torch.ones_like(ends_BT)
        x_BTL = self.token_table(tokens_BT)
        if start:
            place_B1 = torch.full_like(tokens_BT, start)
            x_BTL = self.levels.step(x_BTL, place_B1, is_place_BT, ends_BT, cache)
        else:
            x_BTL = self.levels(x_BTL, is_place_BT, ends_BT, cache)
        x_BTL = self.final_norm(x_BTL)
        return x_BTL

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
