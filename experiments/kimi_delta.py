"""Kimi Delta Attention: a linear attention that corrects itself, three blocks in four.

Idea: a state of D x D numbers a head maps keys to values. Each position first lets it fade, channel
    by channel, then moves what it says to the new key towards the new value (the delta rule), so
    that writing a key twice keeps the second value only. It costs the same at any length and keeps
    no keys. Every fourth block attends in full, without positions: order is felt by the others.
    Training solves a triangular system in each chunk of positions, generating takes one step a
    token; both are the same recurrence. The decay has the bounded form of the authors' library (its
    logarithm lies in -5 to 0), which fp32 can factor within a chunk; its start is the paper's. Full
    layers are ordinary attention here, latent attention in the paper.
    A well-known copy has neither the norm nor the gate behind the state, and starts every channel
    by halving its memory at each step.
Source: Kimi Team 2025, arXiv:2510.26692, sections 3 and 4; Yang et al. 2024, arXiv:2412.06464.
Family: mixing.
Changed from llama: Config, Attention, ShortConvolution, delta_step, delta_chunks, DeltaAttention,
    Block, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, J chunks, Q positions in a chunk

VARIANTS = {
    "kimi_delta_rotary": {"rotary_attention": True},
    "kimi_delta_only": {"attention_every": 0},
}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "attention_every": 2,
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
    attention_every: int = 4  # of so many blocks the last attends in full; 0 for none
    rotary_attention: bool = False  # whether those blocks know positions
    conv_width: int = 4  # positions that a convolution sees, its own included
    chunk: int = 16  # positions solved for at once

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if not 1 <= self.chunk <= 16 or self.conv_width < 1 or self.attention_every < 0:
            raise ValueError(
                f"chunk={self.chunk} lies in 1 to 16, past which fp32 overflows; conv_width="
                f"{self.conv_width} starts at 1, attention_every={self.attention_every} at 0"
            )

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
    """Causal self-attention over H heads of width D = C / H, with rotary positions or without."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.rotary = config.rotary_attention
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
        if self.rotary:
            q_BHTD = rotate(q_BHTD, turn)
            k_BHSD = rotate(k_BHSD, turn)
        if cache is not None:
            k_BHSD, v_BHSD = cache.append(self, k_BHSD, v_BHSD)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=T > 1)
        y_BTHD = y_BHTD.transpose(1, 2)
        y_BTC = y_BTHD.flatten(2)
        y_BTC = self.output(y_BTC)
        return y_BTC


class ShortConvolution(nn.Module):
    """Each channel mixed with its last positions, then SiLU."""

    def __init__(self, config: Config):
        super().__init__()
        self.taps = nn.Parameter(torch.empty(config.conv_width, config.width))  # newest first
        nn.init.uniform_(self.taps, -(config.conv_width**-0.5), config.conv_width**-0.5)

    def forward(self, x_BSC: Tensor, cache=None) -> Tensor:
        T = x_BSC.shape[1]
        if cache is not None:
            (x_BSC,) = cache.append(self, x_BSC, keep=len(self.taps))
        x_BSC = F.pad(x_BSC, (0, 0, len(self.taps) - 1, 0))
        end = x_BSC.shape[1]
        y_BTC = sum(tap_C * x_BSC[:, end - T - k : end - k] for k, tap_C in enumerate(self.taps))
        return F.silu(y_BTC)


def delta_step(
    q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor, g_BHD: Tensor, beta_BH: Tensor, state_BHDD: Tensor
) -> tuple[Tensor, Tensor]:
    """One position of the gated delta rule: what the state says to q, and the state after it.

    The state maps keys (rows) to values. Each row fades by exp(g), then the state is corrected by
    the share beta of its error: what it says to k is moved towards v.
    """
    state_BHDD = state_BHDD * g_BHD.exp()[..., None]
    error_BHD = v_BHD - (k_BHD[..., None, :] @ state_BHDD)[..., 0, :]
    write_BHD = beta_BH[..., None] * error_BHD
    state_BHDD = state_BHDD + k_BHD[..., None] * write_BHD[..., None, :]
    o_BHD = (q_BHD[..., None, :] @ state_BHDD)[..., 0, :]
    return o_BHD, state_BHDD


def delta_chunks(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    g_BHTD: Tensor,
    beta_BHT: Tensor,
    state_BHDD: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The same over T positions: a triangular system in each chunk, a loop over chunks.

    With g from -5 to 0 and 16 positions a chunk, exp stays below 1e35: fp32 holds it.
    """
    T = q_BHTD.shape[2]
    missing = -T % chunk  # padded by positions that neither fade nor write

    def in_chunks(x_BHTD: Tensor) -> Tensor:
        x_BHTD = F.pad(x_BHTD, (0, 0, 0, missing))
        return x_BHTD.unflatten(2, (-1, chunk))

    q, k, v, g = (in_chunks(x_BHTD) for x_BHTD in (q_BHTD, k_BHTD, v_BHTD, g_BHTD))
    beta_BHJQ1 = in_chunks(beta_BHT[..., None])
    sum_BHJQD = g.cumsum(-2)
    faded_k, faded_q, grown_k = k * sum_BHJQD.exp(), q * sum_BHJQD.exp(), k * (-sum_BHJQD).exp()
    among_BHJQQ = (faded_k @ grown_k.mT).tril(-1)
    asked_BHJQQ = (faded_q @ grown_k.mT).tril()
    right = torch.cat([beta_BHJQ1 * v, beta_BHJQ1 * faded_k], dim=-1)
    solved = torch.linalg.solve_triangular(
        beta_BHJQ1 * among_BHJQQ, right, upper=False, unitriangular=True
    )
    values, corrections = solved.chunk(2, dim=-1)
    last_BHJ1D = sum_BHJQD[..., -1:, :]
    kept_k = k * (last_BHJ1D - sum_BHJQD).exp()
    outputs = []
    for j in range(q.shape[2]):
        write_BHQD = values[:, :, j] - corrections[:, :, j] @ state_BHDD
        outputs.append(faded_q[:, :, j] @ state_BHDD + asked_BHJQQ[:, :, j] @ write_BHQD)
        state_BHDD = last_BHJ1D[:, :, j].mT.exp() * state_BHDD + kept_k[:, :, j].mT @ write_BHQD
    o_BHTD = torch.cat(outputs, dim=2)[:, :, :T]
    return o_BHTD, state_BHDD


class DeltaAttention(nn.Module):
    """Linear attention that corrects its state by its own error and forgets channel by channel."""

    def __init__(self, config: Config):
        super().__init__()
        H, D = config.num_heads, config.head_width
        self.num_heads, self.chunk = H, config.chunk
        self.query = linear(config.width, config.width)
        self.key = linear(config.width, config.width)
        self.value = linear(config.width, config.width)
        self.query_conv = ShortConvolution(config)
        self.key_conv = ShortConvolution(config)
        self.value_conv = ShortConvolution(config)
        self.beta = linear(config.width, H)
        self.decay_down = linear(config.width, D)
        self.decay_up = linear(D, config.width)
        self.decay_log_scale = nn.Parameter(torch.zeros(H, 1))
        self.decay_bias = nn.Parameter(torch.empty(H, D))
        self.gate_down = linear(config.width, D)
        self.gate_up = linear(D, config.width)
        self.gate_bias = nn.Parameter(torch.zeros(config.width))
        self.norm = RMSNorm(D, config.norm_eps)
        self.output = linear(config.width, config.width, config.output_std)
        # decays start as in the paper: a rate of 1 to 16 for each head, times steps of 0.001 to 0.1
        start_HD = torch.empty(H, 1).uniform_(1, 16) * 10 ** torch.empty(H, D).uniform_(-3, -1)
        self.decay_bias.data.copy_(torch.logit(start_HD / 5))

    def split(self, x_BTC: Tensor) -> Tensor:
        x_BTHD = x_BTC.unflatten(-1, (self.num_heads, -1))
        x_BHTD = x_BTHD.transpose(1, 2)
        return x_BHTD.to(torch.promote_types(x_BHTD.dtype, torch.float32))

    def decay(self, x_BTC: Tensor) -> Tensor:
        """The logarithm of what each channel of a key keeps of its state, -5 to 0."""
        r_BTD = self.decay_down(x_BTC)
        z_BHTD = self.split(self.decay_up(r_BTD))
        z_BHTD = self.decay_log_scale[:, None].exp() * (z_BHTD + self.decay_bias[:, None])
        return -5 * torch.sigmoid(z_BHTD)

    def forward(self, x_BTC: Tensor, turn: tuple[Tensor, Tensor], cache=None) -> Tensor:
        q_BTC = self.query_conv(self.query(x_BTC), cache)
        k_BTC = self.key_conv(self.key(x_BTC), cache)
        v_BTC = self.value_conv(self.value(x_BTC), cache)
        q_BHTD = F.normalize(self.split(q_BTC), dim=-1, eps=1e-6)
        k_BHTD = F.normalize(self.split(k_BTC), dim=-1, eps=1e-6)
        v_BHTD = self.split(v_BTC)
        q_BHTD = q_BHTD * q_BHTD.shape[-1] ** -0.5
        g_BHTD = self.decay(x_BTC)
        beta_BTH = torch.sigmoid(self.beta(x_BTC).to(g_BHTD.dtype))
        beta_BHT = beta_BTH.transpose(1, 2)
        memory = {} if cache is None else cache.state(self)
        state_BHDD = memory.get("state")
        if state_BHDD is None:
            state_BHDD = k_BHTD.new_zeros(*k_BHTD.shape[:2], k_BHTD.shape[-1], k_BHTD.shape[-1])
        parts = (q_BHTD, k_BHTD, v_BHTD, g_BHTD, beta_BHT)
        with torch.autocast(x_BTC.device.type, enabled=False):  # the solver has no bf16
            if x_BTC.shape[1] == 1:
                o_BHD, state_BHDD = delta_step(*(part[:, :, 0] for part in parts), state_BHDD)
                o_BHTD = o_BHD[:, :, None]
            else:
                o_BHTD, state_BHDD = delta_chunks(*parts, state_BHDD, self.chunk)
        memory["state"] = state_BHDD
        o_BHTD = self.norm(o_BHTD)
        o_BTHD = o_BHTD.transpose(1, 2)
        o_BTC = o_BTHD.flatten(2)
        r_BTD = self.gate_down(x_BTC)
        gate_BTC = torch.sigmoid(self.gate_up(r_BTD) + self.gate_bias)
        y_BTC = self.output(o_BTC * gate_BTC)
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
    """Delta or full attention, then the MLP; each reads a normed copy and adds to the stream."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index = index
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        is_full = config.attention_every and (index + 1) % config.attention_every == 0
        self.attention = Attention(config) if is_full else DeltaAttention(config)
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

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        T = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        turn = rotary(positions_T, self.config.head_width, self.config.rope_base)
        x_BTC = self.token_table(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, turn, cache)
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
        deltas = [part for part in self.modules() if isinstance(part, DeltaAttention)]
        decays = [w for part in deltas for w in (part.decay_log_scale, part.decay_bias)]
        groups.append({"params": decays, "weight_decay": 0.0})
        return groups

    def after_step(self) -> None:
        """What an idea does to parameters after each update: nothing here."""
