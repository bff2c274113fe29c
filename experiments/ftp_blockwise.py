"""FTP by blocks: an encoder reads whole blocks, and a decoder spells the next one from the last.

Idea: text is cut into blocks of K. The encoder sees all earlier blocks and the whole of its own, in
    both directions. The decoder begins anew with each block; it reads the tokens of the block so
    far and the encoder's K vectors of the block before, and nothing older. So what is far away has
    to pass through K vectors. The first block has learned ones. Positions are rotary in both, and
    the mean of the K vectors, spread over the block by a matrix for each place, tells the place
    too. Half of the blocks encode; a block less decodes, for the weight of the attention to the
    vectors. This is what a well-known copy calls FTP: there the encoder could not tell the order
    of the tokens in a block, and the first block was shown its own answers.
Source: Walker 2024, arXiv:2410.18160, after the copy in erogol/BlaGPT; `ftp` is the paper's own.
Family: patches.
Changed from llama: Config, Attention, Block, CrossAttention, DecoderBlock, PatchMemory, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, K positions of a block, J blocks, P blocks of all rows in a line

VARIANTS = {}
TINY = {"vocab_size": 61, "max_len": 16, "num_blocks": 2, "width": 16, "num_heads": 2, "patch": 3}


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
    patch: int = 8  # tokens of a block

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if self.patch < 1:
            raise ValueError(f"patch={self.patch} starts at 1")

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden_width(self) -> int:
        return -(-8 * self.width // (3 * self.mlp_multiple)) * self.mlp_multiple

    @property
    def num_encoder_blocks(self) -> int:
        return max(1, self.num_blocks // 2)

    @property
    def num_decoder_blocks(self) -> int:
        """One less than the rest: each has a second attention."""
        return max(1, self.num_blocks - self.num_encoder_blocks - 1)

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
    """Self-attention over H heads of width D = C / H, with rotary positions.

    A position sees those before it and all of its own block of `patch`, which is 1 in the decoder.
    """

    def __init__(self, config: Config, patch: int):
        super().__init__()
        self.num_heads = config.num_heads
        self.patch = patch
        self.query = linear(config.width, config.width)
        self.key = linear(config.width, config.width)
        self.value = linear(config.width, config.width)
        self.output = linear(config.width, config.width, config.output_std)

    def split(self, x_BTC: Tensor) -> Tensor:
        x_BTHD = x_BTC.unflatten(-1, (self.num_heads, -1))
        x_BHTD = x_BTHD.transpose(1, 2)
        return x_BHTD

    def mask(self, T: int, device: torch.device) -> Tensor:
        """Whether each position sees another: one of its own block, or of a block before."""
        blocks_T = torch.arange(T, device=device) // self.patch
        return blocks_T <= blocks_T[:, None]

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
        if 1 < self.patch < T:
            mask_TS = self.mask(T, x_BTC.device)
            y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask_TS)
        else:
            is_causal = 1 == self.patch < T
            y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=is_causal)
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
        self.attention = Attention(config, config.patch)
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


class CrossAttention(nn.Module):
    """Attention over H heads to all of a few other vectors, without positions."""

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

    def forward(self, x_BTC: Tensor, context_BSC: Tensor) -> Tensor:
        q_BTC = self.query(x_BTC)
        k_BSC = self.key(context_BSC)
        v_BSC = self.value(context_BSC)
        q_BHTD = self.split(q_BTC)
        k_BHSD = self.split(k_BSC)
        v_BHSD = self.split(v_BSC)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD)
        y_BTHD = y_BHTD.transpose(1, 2)
        y_BTC = y_BTHD.flatten(2)
        y_BTC = self.output(y_BTC)
        return y_BTC


class DecoderBlock(nn.Module):
    """Attention to what is decoded so far, to the vectors it is decoded from, then the MLP."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index = index
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, patch=1)
        self.cross_norm = RMSNorm(config.width, config.norm_eps)
        self.cross = CrossAttention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x_BTC: Tensor, context_BSC: Tensor, turn: tuple[Tensor, Tensor], cache=None
    ) -> Tensor:
        u_BTC = self.attention_norm(x_BTC)
        y_BTC = self.attention(u_BTC, turn, cache)
        x_BTC = x_BTC + y_BTC
        u_BTC = self.cross_norm(x_BTC)
        y_BTC = self.cross(u_BTC, context_BSC)
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
        self.token_table = nn.Embedding(config.vocab_size, config.width)
        C, encoding, decoding = config.width, config.num_encoder_blocks, config.num_decoder_blocks
        self.blocks = nn.ModuleList(Block(config, index) for index in range(encoding))
        self.encoder_norm = RMSNorm(C, config.norm_eps)
        self.front = nn.Parameter(torch.empty(config.patch, C))  # before the first block
        self.spread = linear(C, config.patch * C)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(config, i) for i in range(decoding))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = linear(config.width, config.vocab_size)
        nn.init.normal_(self.token_table.weight, std=config.token_std)
        nn.init.normal_(self.front, std=0.02)
        if config.tied:
            self.token_table.weight = self.head.weight

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        (B, T), K = tokens_BT.shape, self.config.patch
        start = cache.length if cache is not None else 0
        memory = {} if cache is None else cache.state(self)
        in_patch = start % K  # of the first position
        x_BTC = self.token_table(tokens_BT)
        context_BJKC = memory["context"] if in_patch else self.contexts(x_BTC, start, memory, cache)
        J = context_BJKC.shape[1]
        S = T if start else J * K
        u_BJC = self.spread(context_BJKC.mean(2))
        u_BSC = u_BJC.reshape(B, J * K, -1)[:, in_patch : in_patch + S]
        y_BSC = F.pad(x_BTC, (0, 0, 0, S - T)) + u_BSC
        y_PKC = y_BSC.reshape(B * J, -1, y_BSC.shape[-1])
        context_PKC = context_BJKC.flatten(0, 1)
        inside = PatchMemory(memory, in_patch, J, (T - 1) % K + 1)
        places_K = torch.arange(in_patch, in_patch + y_PKC.shape[1], device=tokens_BT.device)
        turn = rotary(places_K, self.config.head_width, self.config.rope_base)
        for block in self.decoder_blocks:
            y_PKC = block(y_PKC, context_PKC, turn, None if cache is None else inside)
        y_BTC = y_PKC.reshape(B, S, -1)[:, :T]
        y_BTC = self.final_norm(y_BTC)
        if cache is not None:
            fresh_BKC = x_BTC[:, (T - 1) // K * K :]
            memory["block"] = torch.cat([memory["block"], x_BTC], 1) if in_patch else fresh_BKC
            memory["context"] = context_BJKC[:, -1:]
        return y_BTC

    def contexts(self, x_BTC: Tensor, start: int, memory: dict, cache) -> Tensor:
        """For each block of this pass, the encoder's vectors of the block before it."""
        (B, T), K = x_BTC.shape[:2], self.config.patch
        if start:
            x_BTC = memory["block"]
            first = start // K - 1
        else:
            x_BTC = x_BTC[:, : (T - 1) // K * K]  # the last block has none behind it
            first = 0
        num_blocks = x_BTC.shape[1] // K
        positions_T = torch.arange(first * K, (first + num_blocks) * K, device=x_BTC.device)
        turn = rotary(positions_T, self.config.head_width, self.config.rope_base)
        if num_blocks:
            for block in self.blocks:
                x_BTC = block(x_BTC, turn, cache)
            x_BTC = self.encoder_norm(x_BTC)
        context_BJKC = x_BTC.unflatten(1, (num_blocks, K))
        if start == 0:
            front_BJKC = self.front.to(x_BTC.dtype).expand(B, 1, -1, -1)
            context_BJKC = torch.cat([front_BJKC, context_BJKC], dim=1)
        return context_BJKC

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
