"""Rene: scans in most layers, windows of attention and MLPs in between, no positions.

Idea: a stack of single layers, each a Mamba-2 scan, attention in a window, or an MLP. Scans carry
    most of the depth with a state that does not grow; one layer in twelve attends for exact recall
    of what is near; a third are MLPs. Convolutions and scans feel the order of tokens, so nothing
    else tells it. A block of llama counts as two layers.
    A scan divides into chunks: products of matrices inside, a loop over them outside, and one step
    a token while generating. Its norm comes before its gate. A window of 256 matters at any length
    above it; the release has 2,048.
Source: Cartesia 2024, Rene-v0.1 (a release without a paper); Dao and Gu 2024, arXiv:2405.21060,
    section 6 (Mamba-2). Proportions are those of a public copy; the release's list was not read.
Family: mixing.
Changed from llama: Config, rotary, rotate, ShortConvolution, scan_step, scan_chunks, Mamba,
    Attention, MLP, Block, Layer, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, E = 2 C channels of a scan, N numbers of state for each of them,
# J chunks, Q positions in a chunk

VARIANTS = {
    "rene_mamba": {"kinds": "m"},
}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "kinds": "mFa",
    "window": 5,
    "state_size": 4,
    "scan_head_width": 8,
    "chunk": 4,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int
    max_len: int = 1024  # tokens
    num_blocks: int = 6
    width: int = 768
    num_heads: int = 12
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the token table
    token_std: float = 1.0  # spread of the token table at the start, unless it is the head
    kinds: str = "mmFmmFamFmmF"  # of layers, in turn: m scan, a attention in a window, F MLP
    window: int = 256  # positions that attention sees, its own included
    state_size: int = 64  # numbers of state for each channel
    scan_head_width: int = 64  # channels that fade alike
    conv_width: int = 4  # positions that a convolution sees, its own included
    chunk: int = 64  # positions scanned at once

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if 2 * self.width % self.scan_head_width:
            raise ValueError(
                f"scan_head_width={self.scan_head_width} does not divide {2 * self.width} channels"
            )
        if not self.kinds or set(self.kinds) - set("maF"):
            raise ValueError(f"kinds={self.kinds!r} is made of m, a and F")
        if min(self.window, self.state_size, self.conv_width, self.chunk) < 1:
            raise ValueError("window, state_size, conv_width and chunk start at 1")

    @property
    def num_layers(self) -> int:
        """Two for each block of llama, which has two parts."""
        return 2 * self.num_blocks

    @property
    def output_std(self) -> float:
        """Of the matrices that write into the stream, one in each layer."""
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
    x_BHD: Tensor, decay_BH: Tensor, write_BN: Tensor, read_BN: Tensor, state_BHDN: Tensor
) -> tuple[Tensor, Tensor]:
    """One position: the state fades by exp(decay) and takes x along `write`; what `read` sees."""
    state_BHDN = state_BHDN * decay_BH[..., None, None].exp()
    state_BHDN = state_BHDN + x_BHD[..., None] * write_BN[:, None, None]
    y_BHD = (state_BHDN @ read_BN[:, None, :, None])[..., 0]
    return y_BHD, state_BHDN


def scan_chunks(
    x_BTHD: Tensor,
    decay_BTH: Tensor,
    write_BTN: Tensor,
    read_BTN: Tensor,
    state_BHDN: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The same over T positions: products within each chunk, a loop over chunks.

    No exponent is above 0, so nothing overflows.
    """
    T = x_BTHD.shape[1]
    missing = -T % chunk  # padded by positions that neither fade nor write

    def in_chunks(part: Tensor) -> Tensor:
        padded = torch.cat([part, part.new_zeros(part.shape[0], missing, *part.shape[2:])], dim=1)
        return padded.unflatten(1, (-1, chunk))

    x_BJHQD = in_chunks(x_BTHD).transpose(2, 3)
    write_BJQN, read_BJQN = in_chunks(write_BTN), in_chunks(read_BTN)
    sums_BJHQ = in_chunks(decay_BTH).cumsum(2).transpose(2, 3)
    between = sums_BJHQ[..., :, None] - sums_BJHQ[..., None, :]
    is_later = torch.ones(chunk, chunk, dtype=torch.bool, device=x_BTHD.device).triu(1)
    between = between.masked_fill(is_later, -torch.inf)  # before exp: there it may be huge
    scores_BJQQ = read_BJQN @ write_BJQN.mT
    inside_BJHQD = (scores_BJQQ[:, :, None] * between.exp()) @ x_BJHQD
    last_BJH1 = sums_BJHQ[..., -1:]
    kept_BJHQD = x_BJHQD * (last_BJH1 - sums_BJHQ).exp()[..., None]
    written_BJHDN = kept_BJHQD.mT @ write_BJQN[:, :, None]
    states = []
    for j in range(x_BJHQD.shape[1]):
        states.append(state_BHDN)
        state_BHDN = last_BJH1[:, j, :, :, None].exp() * state_BHDN + written_BJHDN[:, j]
    carried_BJHDN = torch.stack(states, dim=1)
    before_BJHQD = sums_BJHQ.exp()[..., None] * (read_BJQN[:, :, None] @ carried_BJHDN.mT)
    y_BJHQD = inside_BJHQD + before_BJHQD
    y_BTHD = y_BJHQD.transpose(2, 3).flatten(1, 2)[:, :T]
    return y_BTHD, state_BHDN


class Mamba(nn.Module):
    """Mamba-2: a state of N numbers for each of E = 2 C channels, which fades head by head."""

    def __init__(self, config: Config):
        super().__init__()
        C, E, N = config.width, 2 * config.width, config.state_size
        self.num_heads, self.chunk = E // config.scan_head_width, config.chunk
        self.gate = linear(C, E)
        self.signal = linear(C, E)
        self.write = linear(C, N)
        self.read = linear(C, N)
        self.step = linear(C, self.num_heads)
        self.signal_conv = ShortConvolution(E, config.conv_width)
        self.write_conv = ShortConvolution(N, config.conv_width)
        self.read_conv = ShortConvolution(N, config.conv_width)
        self.step_bias = nn.Parameter(torch.empty(self.num_heads))
        self.log_rate = nn.Parameter(torch.empty(self.num_heads))
        self.skip = nn.Parameter(torch.ones(self.num_heads))
        self.norm = RMSNorm(E, config.norm_eps)
        self.output = linear(E, C, config.output_std)
        start_H = 10 ** torch.empty(self.num_heads).uniform_(-3, -1)  # of a step, before softplus
        self.step_bias.data.copy_(start_H + torch.log(-torch.expm1(-start_H)))
        self.log_rate.data.copy_(torch.empty(self.num_heads).uniform_(1, 16).log())

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        wide = torch.promote_types(x_BTC.dtype, torch.float32)
        s_BTE = self.signal_conv(self.signal(x_BTC), cache)
        write_BTN = self.write_conv(self.write(x_BTC), cache).to(wide)
        read_BTN = self.read_conv(self.read(x_BTC), cache).to(wide)
        step_BTH = F.softplus(self.step(x_BTC).to(wide) + self.step_bias)
        decay_BTH = -step_BTH * self.log_rate.exp()
        s_BTHD = s_BTE.to(wide).unflatten(-1, (self.num_heads, -1))
        stepped_BTHD = s_BTHD * step_BTH[..., None]
        memory = {} if cache is None else cache.state(self)
        state_BHDN = memory.get("state")
        if state_BHDN is None:
            H, D = s_BTHD.shape[2:]
            state_BHDN = s_BTHD.new_zeros(len(x_BTC), H, D, write_BTN.shape[-1])
        parts = (stepped_BTHD, decay_BTH, write_BTN, read_BTN)
        with torch.autocast(x_BTC.device.type, enabled=False):
            if x_BTC.shape[1] == 1:
                y_BHD, state_BHDN = scan_step(*(part[:, 0] for part in parts), state_BHDN)
                y_BTHD = y_BHD[:, None]
            else:
                y_BTHD, state_BHDN = scan_chunks(*parts, state_BHDN, self.chunk)
        memory["state"] = state_BHDN
        y_BTHD = y_BTHD + self.skip[:, None] * s_BTHD
        y_BTE = y_BTHD.flatten(2)
        y_BTE = self.norm(y_BTE)
        g_BTE = F.silu(self.gate(x_BTC))
        y_BTE = y_BTE * g_BTE
        y_BTC = self.output(y_BTE)
        return y_BTC


class Attention(nn.Module):
    """Causal self-attention in a window, over H heads of width D = C / H, without positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.window = config.window
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight, std=0.02 * (768 / config.width) ** 0.5)
        self.output.weight.data *= config.output_std / 0.02

    def mask(self, T: int, device: torch.device) -> Tensor:
        """Whether each position sees another: not behind it, and fewer than a window before."""
        places_T = torch.arange(T, device=device)
        back_TT = places_T[:, None] - places_T
        return (back_TT >= 0) & (back_TT < self.window)

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
            k_BHSD, v_BHSD = cache.append(self, k_BHSD, v_BHSD, keep=self.window)
        mask_TS = self.mask(T, x_BTC.device) if T > 1 else None
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask_TS)
        y_BTHD = y_BHTD.transpose(1, 2)
        y_BTC = y_BTHD.flatten(2)
        y_BTC = self.output(y_BTC)
        return y_BTC


class MLP(nn.Module):
    """Two linear layers, 3 C wide between them, with GELU and biases."""

    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.width, 3 * config.width)
        self.down = nn.Linear(3 * config.width, config.width)
        for layer, std in ((self.up, 0.02), (self.down, config.output_std)):
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight, std=std * (768 / layer.in_features) ** 0.5)

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        h_BTF = self.up(x_BTC)
        h_BTF = F.gelu(h_BTF)
        y_BTC = self.down(h_BTF)
        return y_BTC


class Layer(nn.Module):
    """One way of mixing: it reads a normed copy of the stream and adds to it."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        kind = config.kinds[index % len(config.kinds)]
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = {"m": Mamba, "a": Attention, "F": MLP}[kind](config)

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        u_BTC = self.norm(x_BTC)
        y_BTC = self.mixer(u_BTC, cache)
        x_BTC = x_BTC + y_BTC
        return x_BTC


class Model(nn.Module):
    """Tokens to the logits of the token after each."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.progress = 0.0
        self.token_table = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = linear(config.width, config.vocab_size)
        nn.init.normal_(self.token_table.weight, std=config.token_std)
        if config.tied:
            self.token_table.weight = self.head.weight

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.token_table(tokens_BT)
        for layer in self.layers:
            x_BTC = layer(x_BTC, cache)
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
        return groups

    def after_step(self) -> None:
        """What an idea does to parameters after each update: nothing here."""
