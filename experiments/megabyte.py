"""MegaByte: a wide model over patches, and a narrow one that spells each patch.

Idea: most of the compute is spent once for every K positions. The global model reads one vector a
    patch, the tokens' narrow vectors side by side; the local one begins anew with each patch, reads
    its tokens so far and what the global model says of the patches before. Attention costs
    (T / K)^2 + T K. A patch is shifted by K - 1 positions, so that it ends with the first token of
    those it speaks to, and no target is lost. Positions are rotary at both levels, where the paper
    adds tables. The head is as wide as the local model: with a large vocabulary it outweighs it,
    so the design suits bytes.
    A well-known copy predicts a first token from nothing, drops one of each row, and has no
    positions at all.
Source: Yu et al. 2023, arXiv:2305.07185, section 2.
Family: patches.
Changed from llama: Config, PatchMemory, Model.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, K positions of a patch, J patches, P patches of all rows in a line,
# G = C / K channels of a position in a patch, L width inside a patch

VARIANTS = {
    "megabyte_8": {"patch": 8},
}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "num_local_blocks": 1,
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
    patch: int = 4  # positions
    num_local_blocks: int = 3  # that spell a patch, at half the width

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if self.patch < 1 or self.width % self.patch or self.width % 4 or self.num_local_blocks < 1:
            raise ValueError(
                f"width={self.width} is divided by patch={self.patch} and by 4; "
                f"num_local_blocks={self.num_local_blocks} starts at 1"
            )

    @property
    def local(self) -> "Config":
        """Of the blocks inside a patch: half as wide, with half of the heads."""
        halved = {"width": self.width // 2, "num_heads": max(1, self.num_heads // 2)}
        return replace(self, **halved, num_blocks=self.num_local_blocks, patch=1)

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


class PatchMemory:
    """Stands where the cache is, for blocks that begin anew with each patch.

    Args:
        state: keys and values of the patch so far, (B, H, positions, D); empty at first.
        filled: positions of the patch that were there before.
        num_patches: of each row in this pass; the last one is kept.
        end: positions of the last patch that are real.
    """

    def __init__(self, state: dict, filled: int, num_patches: int, end: int):
        self.state, self.filled, self.num_patches, self.end = state, filled, num_patches, end
        self.num_appends = 0

    def append(self, module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        everything = []
        for number, new in enumerate(tensors):
            name = f"{self.num_appends} {number}"
            if self.filled:
                new = torch.cat([self.state[name], new], dim=-2)
            last = new.unflatten(0, (-1, self.num_patches))[:, -1]
            self.state[name] = last[..., : self.filled + self.end, :]
            everything.append(new)
        self.num_appends += 1
        return tuple(everything)


class Model(nn.Module):
    """Tokens to the logits of the token after each."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.progress = 0.0
        local, G = config.local, config.width // config.patch
        self.token_table = nn.Embedding(config.vocab_size, G)
        self.front = nn.Parameter(torch.empty(config.patch - 1, G))  # before the first patch
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_blocks))
        self.patch_norm = RMSNorm(config.width, config.norm_eps)
        self.to_local = linear(G, local.width)
        self.local_table = nn.Embedding(config.vocab_size, local.width)
        self.local_blocks = nn.ModuleList(Block(local, index) for index in range(local.num_blocks))
        self.final_norm = RMSNorm(local.width, config.norm_eps)
        self.head = linear(local.width, config.vocab_size)
        nn.init.normal_(self.token_table.weight, std=config.token_std)
        nn.init.normal_(self.local_table.weight, std=config.token_std)
        nn.init.normal_(self.front, std=0.02)

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        (B, T), K = tokens_BT.shape, self.config.patch
        start = cache.length if cache is not None else 0
        memory = {} if cache is None else cache.state(self)
        u_BSL = self.patches(tokens_BT, start, memory, cache)
        in_patch = start % K  # of the first position
        S = T if T == 1 else -(-T // K) * K
        x_BSL = self.local_table(F.pad(tokens_BT, (0, S - T)))
        x_BSL = x_BSL + u_BSL[:, in_patch : in_patch + S]
        x_PKL = x_BSL.reshape(-1, min(S, K), x_BSL.shape[-1])
        num_patches = len(x_PKL) // B
        inside = PatchMemory(memory, in_patch, num_patches, (T - 1) % K + 1)
        places_K = torch.arange(in_patch, in_patch + min(S, K), device=tokens_BT.device)
        turn = rotary(places_K, self.config.local.head_width, self.config.rope_base)
        for block in self.local_blocks:
            x_PKL = block(x_PKL, turn, None if cache is None else inside)
        x_BTL = x_PKL.reshape(B, S, -1)[:, :T]
        x_BTL = self.final_norm(x_BTL)
        return x_BTL

    def patches(self, tokens_BT: Tensor, start: int, memory: dict, cache) -> Tensor:
        """What the patches so far say to each position of those that this pass is in.

        Patch j is read up to position j K, so that its positions see nothing later than themselves.
        """
        K = self.config.patch
        e_BTG = self.token_table(tokens_BT)
        front_BKG = memory.get("tail")
        if front_BKG is None:
            front_BKG = self.front.to(e_BTG.dtype).expand(len(e_BTG), -1, -1)
        e_BSG = torch.cat([front_BKG, e_BTG], dim=1)
        memory["tail"] = e_BSG[:, e_BSG.shape[1] - (K - 1) :]
        if start % K:  # the patch is the one of the pass before
            return memory["slices"]
        J = -(-tokens_BT.shape[1] // K)
        x_BJC = e_BSG[:, : J * K].reshape(len(e_BTG), J, -1)
        places_J = torch.arange(start // K, start // K + J, device=tokens_BT.device)
        turn = rotary(places_J, self.config.head_width, self.config.rope_base)
        for block in self.blocks:
            x_BJC = block(x_BJC, turn, cache)
        x_BJC = self.patch_norm(x_BJC)
        x_BSG = x_BJC.reshape(len(e_BTG), J * K, -1)
        u_BSL = self.to_local(x_BSG)
        memory["slices"] = u_BSL[:, -K:]
        return u_BSL

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
