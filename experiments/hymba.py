"""Hymba: attention and a scan side by side in every layer, behind learned tokens at the front.

Idea: heads of attention recall exactly, a scan sums up; both read the same input, are normed and
    averaged. Learned meta tokens before every text take over what attention sinks into and are the
    scan's first memory. Every third layer sees all (in the paper the first, the middle and the
    last one), the others a window and the meta tokens; pairs of these share keys and values.
    The scan is Mamba-1: each number of state fades at a rate of its own, so that no product of
    matrices does the work, only a loop over the places in a chunk and one over chunks. It is the
    slowest of the scans without a kernel; the backward pass runs it again, to spare memory. Its
    step starts small, as Mamba's does: the released code overwrites that with a long one. A window
    holds the position itself, where the released code has one more. A layer is a quarter heavier
    than a block of llama. A well-known copy shifts its targets twice.
Source: Dong et al. 2024, arXiv:2411.13676, section 2; NVlabs/hymba; Gu and Dao 2023,
    arXiv:2312.00752, section 3 (Mamba).
Family: mixing.
Changed from llama: Config, ShortConvolution, scan_step, scan_chunks, Mamba, Attention, Mixer,
    Block, Model.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, E = 2 C channels of a scan and of values, N numbers of state for
# each of them, R width of what steps are made from, M meta tokens, J chunks, Q positions in a chunk

VARIANTS = {}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "heads_per_group": 2,
    "kinds": "ws",
    "num_meta": 2,
    "window": 5,
    "state_size": 3,
    "chunk": 4,
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
    heads_per_group: int = 3  # that share keys and values
    kinds: str = "aws"  # of layers, in turn: a sees all, w a window, s with the one's before it
    num_meta: int = 16  # learned tokens before each text
    window: int = 128  # positions that most layers see, their own included
    state_size: int = 8  # numbers of state for each channel
    conv_width: int = 4  # positions that a convolution sees, its own included
    chunk: int = 16  # positions scanned at once

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if self.heads_per_group < 1 or self.num_heads % self.heads_per_group:
            raise ValueError(
                f"heads_per_group={self.heads_per_group} does not divide {self.num_heads} heads"
            )
        if not re.fullmatch("(a|ws*)+", self.kinds):
            raise ValueError(f"kinds={self.kinds!r} is made of a, w, and s behind a w")
        if min(self.window, self.state_size, self.conv_width, self.chunk) < 1:
            raise ValueError("window, state_size, conv_width and chunk start at 1")

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


class ShortConvolution(nn.Module):
    """Each channel mixed with its last positions, then SiLU."""

    def __init__(self, width: int, conv_width: int):
        super().__init__()
        self.taps = nn.Parameter(torch.empty(conv_width, width))  # newest first
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.uniform_(self.taps, -(conv_width**-0.5), conv_width**-0.5)

    def forward(self, x_BSC: Tensor, cache=None) -> Tensor:
        T = x_BSC.shape[1]
        if cache is not None:
            (x_BSC,) = cache.append(self, x_BSC, keep=len(self.taps))
        x_BSC = F.pad(x_BSC, (0, 0, len(self.taps) - 1, 0))
        end = x_BSC.shape[1]
        y_BTC = sum(tap_C * x_BSC[:, end - T - k : end - k] for k, tap_C in enumerate(self.taps))
        return F.silu(y_BTC + self.bias)


def scan_step(
    x_BE: Tensor,
    step_BE: Tensor,
    write_BN: Tensor,
    read_BN: Tensor,
    rate_EN: Tensor,
    state_BEN: Tensor,
) -> tuple[Tensor, Tensor]:
    """One position: the state fades by step times rate and takes x along `write`; what is read."""
    state_BEN = state_BEN * (-step_BE[..., None] * rate_EN).exp()
    state_BEN = state_BEN + x_BE[..., None] * write_BN[:, None]
    y_BE = (state_BEN @ read_BN[..., None])[..., 0]
    return y_BE, state_BEN


def scan_chunks(
    x_BTE: Tensor,
    step_BTE: Tensor,
    write_BTN: Tensor,
    read_BTN: Tensor,
    rate_EN: Tensor,
    state_BEN: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The same over T positions: a loop over the places in a chunk, all chunks at once, and one
    over chunks for the state that each begins with.

    No exponent is above 0, so nothing overflows.
    """
    T = x_BTE.shape[1]
    missing = -T % chunk  # padded by positions that neither fade nor write

    def in_chunks(part: Tensor) -> Tensor:
        return F.pad(part, (0, 0, 0, missing)).unflatten(1, (-1, chunk))

    x_BJQE, step_BJQE = in_chunks(x_BTE), in_chunks(step_BTE)
    write_BJQN, read_BJQN = in_chunks(write_BTN), in_chunks(read_BTN)
    J, inside, states = x_BJQE.shape[1], [], []
    kept_BJQEN = (-step_BJQE[..., None] * rate_EN).exp()
    written_BJQEN = x_BJQE[..., None] * write_BJQN[:, :, :, None]
    own_BJEN = torch.zeros_like(written_BJQEN[:, :, 0])
    for q in range(chunk):
        own_BJEN = torch.addcmul(written_BJQEN[:, :, q], kept_BJQEN[:, :, q], own_BJEN)
        inside.append((own_BJEN @ read_BJQN[:, :, q, :, None])[..., 0])
    kept_BJQEN = (-step_BJQE.cumsum(2)[..., None] * rate_EN).exp()  # from the chunk's beginning on
    for j in range(J):
        states.append(state_BEN)
        state_BEN = torch.addcmul(own_BJEN[:, j], kept_BJQEN[:, j, -1], state_BEN)
    carried_BJEN = torch.stack(states, dim=1)
    before_BJQEN = kept_BJQEN * carried_BJEN[:, :, None]
    before_BJQE = (before_BJQEN @ read_BJQN[..., None])[..., 0]
    y_BJQE = torch.stack(inside, dim=2) + before_BJQE
    return y_BJQE.flatten(1, 2)[:, :T], state_BEN


class Mamba(nn.Module):
    """Mamba-1: a state of N numbers for each of E channels, each of which fades at its own rate."""

    def __init__(self, config: Config):
        super().__init__()
        C, E, N = config.width, 2 * config.width, config.state_size
        R = -(-C // 16)
        self.chunk = config.chunk
        self.signal = linear(C, E)
        self.gate = linear(C, E)
        self.signal_conv = ShortConvolution(E, config.conv_width)
        self.step_down = linear(E, R)
        self.write = linear(E, N)
        self.read = linear(E, N)
        self.step_norm = RMSNorm(R, config.norm_eps)
        self.write_norm = RMSNorm(N, config.norm_eps)
        self.read_norm = RMSNorm(N, config.norm_eps)
        self.step_up = linear(R, E)
        self.step_bias = nn.Parameter(torch.empty(E))
        self.log_rate = nn.Parameter(torch.empty(E, N))
        self.skip = nn.Parameter(torch.ones(E))
        nn.init.uniform_(self.step_up.weight, -(R**-0.5), R**-0.5)
        start_E = 10 ** torch.empty(E).uniform_(-3, -1)  # of a step, before softplus
        self.step_bias.data.copy_(start_E + torch.log(-torch.expm1(-start_E)))
        self.log_rate.data.copy_(torch.arange(1, N + 1).log().expand(E, N))

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        wide = torch.promote_types(x_BTC.dtype, torch.float32)
        s_BTE = self.signal_conv(self.signal(x_BTC), cache)
        write_BTN = self.write_norm(self.write(s_BTE)).to(wide)
        read_BTN = self.read_norm(self.read(s_BTE)).to(wide)
        step_BTR = self.step_norm(self.step_down(s_BTE))
        step_BTE = F.softplus(self.step_up(step_BTR).to(wide) + self.step_bias)
        s_BTE = s_BTE.to(wide)
        memory = {} if cache is None else cache.state(self)
        state_BEN = memory.get("state")
        if state_BEN is None:
            state_BEN = s_BTE.new_zeros(len(x_BTC), *self.log_rate.shape)
        parts = (s_BTE * step_BTE, step_BTE, write_BTN, read_BTN)
        with torch.autocast(x_BTC.device.type, enabled=False):
            rate_EN = self.log_rate.exp()
            if x_BTC.shape[1] == 1:
                y_BE, state_BEN = scan_step(*(part[:, 0] for part in parts), rate_EN, state_BEN)
                y_BTE = y_BE[:, None]
            elif torch.is_grad_enabled():
                given = (*parts, rate_EN, state_BEN, self.chunk)
                y_BTE, state_BEN = checkpoint(scan_chunks, *given, use_reentrant=False)
            else:
                y_BTE, state_BEN = scan_chunks(*parts, rate_EN, state_BEN, self.chunk)
        memory["state"] = state_BEN
        y_BTE = y_BTE + self.skip * s_BTE
        g_BTE = F.silu(self.gate(x_BTC))
        y_BTE = y_BTE.to(g_BTE.dtype) * g_BTE
        return y_BTE


class Attention(nn.Module):
    """Causal attention of H heads, all before it or a window and the meta tokens, to width E."""

    def __init__(self, config: Config, kind: str):
        super().__init__()
        self.num_heads, self.heads_per_group = config.num_heads, config.heads_per_group
        self.num_meta = config.num_meta
        self.window = None if kind == "a" else config.window
        self.query = linear(config.width, config.width)
        if kind != "s":
            self.key = linear(config.width, config.width // config.heads_per_group)
            self.value = linear(config.width, 2 * config.width // config.heads_per_group)

    def split(self, x_BTC: Tensor, num_heads: int) -> Tensor:
        x_BTHD = x_BTC.unflatten(-1, (num_heads, -1))
        x_BHTD = x_BTHD.transpose(1, 2)
        return x_BHTD

    def mask(self, T: int, device: torch.device) -> Tensor:
        """Whether each position sees another: a meta token or one in the window, none behind it."""
        places_T = torch.arange(T, device=device)
        back_TT = places_T[:, None] - places_T
        return (back_TT >= 0) & ((back_TT < self.window) | (places_T < self.num_meta))

    def seen(self, x_BTC: Tensor, turn: tuple[Tensor, Tensor], cache=None) -> tuple:
        """Keys and values of all positions that this pass looks at."""
        num_groups = self.num_heads // self.heads_per_group
        k_BTC = self.key(x_BTC)
        v_BTE = self.value(x_BTC)
        k_BHSD = self.split(k_BTC, num_groups)
        v_BHSD = self.split(v_BTE, num_groups)
        k_BHSD = rotate(k_BHSD, turn)
        if cache is None:
            return k_BHSD, v_BHSD
        if self.window is None:
            return cache.append(self, k_BHSD, v_BHSD)
        meta, M = cache.state(self), self.num_meta
        if cache.length == 0:
            meta["key"], meta["value"] = k_BHSD[:, :, :M], v_BHSD[:, :, :M]
            k_BHSD, v_BHSD = k_BHSD[:, :, M:], v_BHSD[:, :, M:]
        k_BHSD, v_BHSD = cache.append(self, k_BHSD, v_BHSD, keep=self.window)
        k_BHSD = torch.cat([meta["key"], k_BHSD], dim=2)
        v_BHSD = torch.cat([meta["value"], v_BHSD], dim=2)
        return k_BHSD, v_BHSD

    def forward(
        self, x_BTC: Tensor, turn: tuple[Tensor, Tensor], seen: tuple | None, cache=None
    ) -> tuple[Tensor, tuple]:
        T = x_BTC.shape[1]
        q_BTC = self.query(x_BTC)
        q_BHTD = self.split(q_BTC, self.num_heads)
        q_BHTD = rotate(q_BHTD, turn)
        if seen is None:
            seen = self.seen(x_BTC, turn, cache)
        k_BHSD, v_BHSD = (part.repeat_interleave(self.heads_per_group, dim=1) for part in seen)
        if self.window is not None and 1 < T > self.window:
            mask_TS = self.mask(T, x_BTC.device)
            y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask_TS)
        else:
            y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=T > 1)
        y_BTHD = y_BHTD.transpose(1, 2)
        y_BTE = y_BTHD.flatten(2)
        return y_BTE, seen


class Mixer(nn.Module):
    """The mean of what attention and the scan find, each normed."""

    def __init__(self, config: Config, kind: str):
        super().__init__()
        self.attention = Attention(config, kind)
        self.mamba = Mamba(config)
        self.attention_norm = RMSNorm(2 * config.width, config.norm_eps)
        self.mamba_norm = RMSNorm(2 * config.width, config.norm_eps)
        self.output = linear(2 * config.width, config.width, config.output_std)

    def forward(
        self, x_BTC: Tensor, turn: tuple[Tensor, Tensor], seen: tuple | None, cache=None
    ) -> tuple[Tensor, tuple]:
        a_BTE, seen = self.attention(x_BTC, turn, seen, cache)
        s_BTE = self.mamba(x_BTC, cache)
        a_BTE = self.attention_norm(a_BTE)
        s_BTE = self.mamba_norm(s_BTE)
        y_BTE = (a_BTE + s_BTE) / 2
        y_BTC = self.output(y_BTE)
        return y_BTC, seen


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
    """Attention beside a scan, then the MLP; each reads the stream, normed, and adds to it."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index = index
        self.kind = config.kinds[index % len(config.kinds)]
        self.mixer_norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = Mixer(config, self.kind)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x_BTC: Tensor, turn: tuple[Tensor, Tensor], seen: tuple | None, cache=None
    ) -> tuple[Tensor, tuple]:
        u_BTC = self.mixer_norm(x_BTC)
        y_BTC, seen = self.mixer(u_BTC, turn, seen if self.kind == "s" else None, cache)
        x_BTC = x_BTC + y_BTC
        u_BTC = self.mlp_norm(x_BTC)
        y_BTC = self.mlp(u_BTC)
        x_BTC = x_BTC + y_BTC
        return x_BTC, seen


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
        self.meta = nn.Parameter(torch.empty(config.num_meta, config.width))
        nn.init.normal_(self.meta, std=0.02)
        if config.tied:
            self.token_table.weight = self.head.weight

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        T, M = tokens_BT.shape[1], self.config.num_meta
        start = cache.length if cache is not None else 0
        x_BTC = self.token_table(tokens_BT)
        if start == 0:
            meta_BMC = self.meta.to(x_BTC.dtype).expand(len(x_BTC), -1, -1)
            x_BTC = torch.cat([meta_BMC, x_BTC], dim=1)
        first = M + start if start else 0
        positions_T = torch.arange(first, M + start + T, device=tokens_BT.device)
        turn = rotary(positions_T, self.config.head_width, self.config.rope_base)
        seen = None
        for block in self.blocks:
            x_BTC, seen = block(x_BTC, turn, seen, cache)
        x_BTC = x_BTC[:, -T:]
        x_BTC = self.final_norm(x_BTC)
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
        groups = []
        taps = [part.taps for part in self.modules() if isinstance(part, ShortConvolution)]
        groups.append({"params": taps, "role": "conv"})
        rates = [part.log_rate for part in self.modules() if isinstance(part, Mamba)]
        groups.append({"params": rates, "weight_decay": 0.0})
        return groups

    def after_step(self) -> None:
        """What an idea does to parameters after each update: nothing here."""
