"""RWKV-7: a recurrent model whose state erases along one direction and writes along another.

Idea: a state of D x D numbers a head, for any length of text. At each position every channel of a
    key fades by its own share, what the state holds along a learned direction is taken out, as much
    as each channel says, and a new value is written along the key. Every projection reads the
    position mixed with the one before it; layers after the first draw their values towards those of
    the first; the MLP is a squared ReLU that sees one position back as well. There are no positions
    and no attention.
    Training solves a triangular system in each chunk of positions, generating takes one step a
    token. The starting values are the authors', on which much depends, but for the head: normal
    numbers of the spread of their orthogonal matrix. Their pull on the largest logit is left out.
    A well-known copy is of a draft of October 2024, with other mixes, no residual of values and no
    shift in the MLP.
Source: Peng et al. 2025, arXiv:2503.14456, sections 3 and 4 and appendix; BlinkDL/RWKV-LM, x070.
Family: mixing.
Changed from llama: Config, orthogonal, Shift, state_step, state_chunks, LowRank, TimeMix, MLP,
    Block, Model, linear, RMSNorm, rotary, rotate, Attention.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions with the one before them, C model width, H heads, D head width,
# F hidden width, V vocabulary, R rank, J chunks, Q positions in a chunk

VARIANTS = {}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "min_rank": 4,
    "chunk": 4,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int
    max_len: int = 1024  # tokens
    num_blocks: int = 6
    width: int = 768
    num_heads: int = 12
    min_rank: int = 32  # of the pairs of matrices that make decays and gates
    chunk: int = 32  # positions solved for at once

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if not 1 <= self.chunk <= 128:
            raise ValueError(f"chunk={self.chunk} lies in 1 to 128, past which fp32 overflows")

    def rank(self, factor: float, power: float = 0.5) -> int:
        """The authors' rule: a multiple of 32 near factor C^power."""
        return max(self.min_rank, round(factor * self.width**power / 32) * 32)


def orthogonal(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A layer without bias that starts as a turn of its inputs times `gain`; 0 is zeros."""
    layer = nn.Linear(inputs, outputs, bias=False)
    if gain:
        nn.init.orthogonal_(layer.weight, gain)
    else:
        nn.init.zeros_(layer.weight)
    return layer


class Shift(nn.Module):
    """What the position before has more than this one; zeros before the first."""

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        T, x_BSC = x_BTC.shape[1], x_BTC
        if cache is not None:
            (x_BSC,) = cache.append(self, x_BTC, keep=2)
        x_BSC = F.pad(x_BSC, (0, 0, 1, 0))
        end = x_BSC.shape[1]
        return x_BSC[:, end - T - 1 : end - 1] - x_BTC


def state_step(
    r_BHD: Tensor,
    decay_BHD: Tensor,
    k_BHD: Tensor,
    v_BHD: Tensor,
    read_BHD: Tensor,
    erase_BHD: Tensor,
    state_BHDD: Tensor,
) -> tuple[Tensor, Tensor]:
    """One position: what the state, keys by values, says to r, and the state after it.

    Each row of a key fades by exp(decay); along `erase` the state gets what it said to `read`, a
    negative direction, before it faded; along k it gets v.
    """
    said_BHD = (read_BHD[..., None, :] @ state_BHDD)[..., 0, :]
    state_BHDD = state_BHDD * decay_BHD.exp()[..., None]
    state_BHDD = state_BHDD + erase_BHD[..., None] * said_BHD[..., None, :]
    state_BHDD = state_BHDD + k_BHD[..., None] * v_BHD[..., None, :]
    y_BHD = (r_BHD[..., None, :] @ state_BHDD)[..., 0, :]
    return y_BHD, state_BHDD


def state_chunks(
    r_BHTD: Tensor,
    decay_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    read_BHTD: Tensor,
    erase_BHTD: Tensor,
    state_BHDD: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The same over T positions: a triangular system in each chunk, a loop over chunks."""
    T = r_BHTD.shape[2]
    missing = -T % chunk  # padded by positions that neither fade, nor erase, nor write

    def in_chunks(x_BHTD: Tensor) -> Tensor:
        return F.pad(x_BHTD, (0, 0, 0, missing)).unflatten(2, (-1, chunk))

    sums = in_chunks(decay_BHTD).cumsum(-2)
    before = sums - in_chunks(decay_BHTD)
    r, read = in_chunks(r_BHTD) * sums.exp(), in_chunks(read_BHTD) * before.exp()
    k, erase = in_chunks(k_BHTD) * (-sums).exp(), in_chunks(erase_BHTD) * (-sums).exp()
    v = in_chunks(v_BHTD)
    heard_of_v = (read @ k.mT).tril(-1) @ v
    solved = torch.linalg.solve_triangular(
        -(read @ erase.mT).tril(-1),
        torch.cat([read, heard_of_v], dim=-1),
        upper=False,
        unitriangular=True,
    )
    of_state, of_values = solved.chunk(2, dim=-1)
    asked_of_erase, asked_of_k = (r @ erase.mT).tril(), (r @ k.mT).tril()
    kept_BHJD1 = sums[..., -1:, :].mT.exp()
    outputs = []
    for j in range(r.shape[2]):
        said = of_state[:, :, j] @ state_BHDD + of_values[:, :, j]
        y = r[:, :, j] @ state_BHDD + asked_of_erase[:, :, j] @ said
        outputs.append(y + asked_of_k[:, :, j] @ v[:, :, j])
        written = erase[:, :, j].mT @ said + k[:, :, j].mT @ v[:, :, j]
        state_BHDD = kept_BHJD1[:, :, j] * (state_BHDD + written)
    y_BHTD = torch.cat(outputs, dim=2)[:, :, :T]
    return y_BHTD, state_BHDD


class LowRank(nn.Module):
    """A map through R channels, with an activation between; it starts at what its bias says."""

    def __init__(self, width: int, rank: int, activation=None):
        super().__init__()
        self.down = orthogonal(width, rank, 0)
        self.up = orthogonal(rank, width, 0.1)
        self.activation = activation

    def forward(self, x_BTC: Tensor) -> Tensor:
        r_BTR = self.down(x_BTC)
        if self.activation is not None:
            r_BTR = self.activation(r_BTR)
        y_BTC = self.up(r_BTR)
        return y_BTC


class TimeMix(nn.Module):
    """The state: what each position erases, writes and reads."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        C, H = config.width, config.num_heads
        self.num_heads, self.chunk, self.is_first = H, config.chunk, index == 0
        early = 1 - index / config.num_blocks
        late = index / max(config.num_blocks - 1, 1)
        place_C = torch.arange(C) / C
        line_C = torch.arange(C) / max(C - 1, 1)
        in_head_C = torch.arange(C) % (C // H) / max(C // H - 1, 1) * 2 - 1
        zigzag_C = in_head_C * in_head_C.abs()
        self.shift = Shift()
        self.mix_r = nn.Parameter(1 - place_C ** (0.2 * early))
        self.mix_w = nn.Parameter(1 - place_C ** (0.9 * early))
        self.mix_k = nn.Parameter(1 - place_C ** (0.7 * early))
        self.mix_v = nn.Parameter(1 - place_C ** (0.7 * early))
        self.mix_a = nn.Parameter(1 - place_C ** (0.9 * early))
        self.mix_g = nn.Parameter(1 - place_C ** (0.2 * early))
        self.receptance = orthogonal(C, C, 1)
        self.key = orthogonal(C, C, 0.1)
        self.value = orthogonal(C, C, 1)
        self.output = orthogonal(C, C, 0)
        self.decay = LowRank(C, config.rank(1.8), torch.tanh)
        self.decay_bias = nn.Parameter(-5.5 + 6 * line_C ** (1 + late**0.3) + 2.5 * zigzag_C)
        self.erase = LowRank(C, config.rank(1.8))
        self.erase_bias = nn.Parameter(-0.19 + 0.3 * zigzag_C + 0.4 * (line_C - 0.5))
        self.gate = LowRank(C, config.rank(0.6, 0.8), torch.sigmoid)
        if not self.is_first:
            self.first_value = LowRank(C, config.rank(1.3))
            self.first_value_bias = nn.Parameter(0.73 - 0.4 * (line_C - 0.5))
        self.key_direction = nn.Parameter(0.71 - 0.1 * (line_C - 0.5))
        self.key_erase = nn.Parameter(torch.full((C,), 1.02))
        self.bonus = nn.Parameter(torch.full((H, C // H), -0.04))
        self.norm = nn.GroupNorm(H, C, eps=64e-5)
        nn.init.constant_(self.norm.weight, ((1 + index) / config.num_blocks) ** 0.7)

    def split(self, x_BTC: Tensor) -> Tensor:
        x_BTHD = x_BTC.unflatten(-1, (self.num_heads, -1))
        x_BHTD = x_BTHD.transpose(1, 2)
        return x_BHTD.to(torch.promote_types(x_BHTD.dtype, torch.float32))

    def forward(
        self, x_BTC: Tensor, first_BTC: Tensor | None, cache=None
    ) -> tuple[Tensor, Tensor | None]:
        B, T, C = x_BTC.shape
        shift_BTC = self.shift(x_BTC, cache)
        r_BTC = self.receptance(x_BTC + shift_BTC * self.mix_r)
        k_BTC = self.key(x_BTC + shift_BTC * self.mix_k)
        v_BTC = self.value(x_BTC + shift_BTC * self.mix_v)
        w_BTC = self.decay(x_BTC + shift_BTC * self.mix_w) + self.decay_bias
        w_BTC = -math.exp(-0.5) * torch.sigmoid(w_BTC)  # keeps 0.545 to 1 of each channel
        if self.is_first:
            first_BTC = v_BTC
        else:
            share_BTC = self.first_value(x_BTC + shift_BTC * self.mix_v) + self.first_value_bias
            v_BTC = v_BTC + (first_BTC - v_BTC) * torch.sigmoid(share_BTC)
        a_BTC = self.erase(x_BTC + shift_BTC * self.mix_a) + self.erase_bias
        a_BTC = torch.sigmoid(a_BTC)
        g_BTC = self.gate(x_BTC + shift_BTC * self.mix_g)
        along_BHTD = F.normalize(self.split(k_BTC * self.key_direction), dim=-1, eps=1e-6)
        k_BTC = k_BTC * (1 + (a_BTC - 1) * self.key_erase)
        r_BHTD, k_BHTD, v_BHTD = self.split(r_BTC), self.split(k_BTC), self.split(v_BTC)
        parts = (r_BHTD, self.split(w_BTC), k_BHTD, v_BHTD)
        parts = (*parts, -along_BHTD, self.split(a_BTC) * along_BHTD)
        memory = {} if cache is None else cache.state(self)
        state_BHDD = memory.get("state")
        if state_BHDD is None:
            state_BHDD = k_BHTD.new_zeros(B, self.num_heads, C // self.num_heads, k_BHTD.shape[-1])
        with torch.autocast(x_BTC.device.type, enabled=False):  # the solver has no bf16
            if T == 1:
                y_BHD, state_BHDD = state_step(*(part[:, :, 0] for part in parts), state_BHDD)
                y_BHTD = y_BHD[:, :, None]
            else:
                y_BHTD, state_BHDD = state_chunks(*parts, state_BHDD, self.chunk)
        memory["state"] = state_BHDD
        y_BTC = y_BHTD.transpose(1, 2).flatten(2)
        y_BTC = self.norm(y_BTC.flatten(0, 1)).view(B, T, C)
        own_BHT1 = (r_BHTD * k_BHTD * self.bonus[:, None]).sum(-1, keepdim=True)
        y_BTC = y_BTC + (own_BHT1 * v_BHTD).transpose(1, 2).flatten(2)
        y_BTC = self.output(y_BTC * g_BTC)
        return y_BTC, first_BTC


class MLP(nn.Module):
    """A squared ReLU, 4 C wide, of the position mixed with the one before."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        place_C = torch.arange(config.width) / config.width
        self.shift = Shift()
        self.mix = nn.Parameter(1 - place_C ** ((1 - index / config.num_blocks) ** 4))
        self.up = orthogonal(config.width, 4 * config.width, 1)
        self.down = orthogonal(4 * config.width, config.width, 0)

    def forward(self, x_BTC: Tensor, cache=None) -> Tensor:
        shift_BTC = self.shift(x_BTC, cache)
        h_BTF = self.up(x_BTC + shift_BTC * self.mix)
        h_BTF = F.relu(h_BTF).square()
        y_BTC = self.down(h_BTF)
        return y_BTC


class Block(nn.Module):
    """The state, then the MLP; each reads a normed copy of the stream and adds to it."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index = index
        self.time_norm = nn.LayerNorm(config.width)
        self.time = TimeMix(config, index)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config, index)

    def forward(
        self, x_BTC: Tensor, first_BTC: Tensor | None, cache=None
    ) -> tuple[Tensor, Tensor | None]:
        u_BTC = self.time_norm(x_BTC)
        y_BTC, first_BTC = self.time(u_BTC, first_BTC, cache)
        x_BTC = x_BTC + y_BTC
        u_BTC = self.mlp_norm(x_BTC)
        y_BTC = self.mlp(u_BTC, cache)
        x_BTC = x_BTC + y_BTC
        return x_BTC, first_BTC


class Model(nn.Module):
    """Tokens to the logits of the token after each."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.progress = 0.0
        self.token_table = nn.Embedding(config.vocab_size, config.width)
        self.token_norm = nn.LayerNorm(
            config.width
        )  # makes the tiny table's rows as long as others
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.uniform_(self.token_table.weight, -1e-4, 1e-4)
        nn.init.normal_(self.head.weight, std=0.5 * config.width**-0.5)

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.token_table(tokens_BT)
        x_BTC = self.token_norm(x_BTC)
        first_BTC = None
        for block in self.blocks:
            x_BTC, first_BTC = block(x_BTC, first_BTC, cache)
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
        mixes = [block.time for block in self.blocks]
        groups.append({"params": [mix.bonus for mix in mixes], "weight_decay": 0.0})
        groups.append({"params": [mix.decay_bias for mix in mixes], "lr_scale": 2.0})
        pairs = [part for part in self.modules() if isinstance(part, LowRank)]
        low = [w for part in pairs for w in part.parameters()]
        groups.append({"params": low, "weight_decay": 0.0})  # of matrices, the large ones alone
        return groups

    def after_step(self) -> None:
        """What an idea does to parameters after each update: nothing here."""
