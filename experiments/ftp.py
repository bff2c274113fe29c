"""FTP: each position's vector is made to spell the next eight tokens, not only one.

Idea: a position's state is expanded to a few vectors, and a small decoder that sees those alone
    writes what follows: the next token in the model's use, eight while training, each from the true
    ones before it. So the state has to say where the text is going. A token i places ahead counts
    0.8^i. The decoder reads the last token itself first; the paper can also be read to begin with
    a start vector.
    Training decodes eight tokens at every eighth position only, from a place that is drawn anew
    each time, and counts them eight times: the mean is the same and costs an eighth. The paper
    expands to 12 vectors and decodes with three blocks, which is the variant ftp_12; the decoder
    then outweighs most of the encoder. Here one block decodes, from 4 vectors, and takes the place
    of one that encodes.
Source: Walker 2024, arXiv:2410.18160; sizes from the copy in erogol/BlaGPT, presumably the paper's.
Family: patches.
Changed from llama: Config, CrossAttention, DecoderBlock, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, K tokens that a position spells, P patches of all rows in a line,
# N vectors that a position is expanded to

VARIANTS = {
    "ftp_12": {"num_vectors": 12, "num_decoder_blocks": 3},
}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "num_vectors": 2,
    "num_ahead": 3,
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
    num_ahead: int = 8  # tokens that a position spells while training, the next one included
    decay: float = 0.8  # of a token's weight, from each to the one behind it
    num_vectors: int = 4  # that a position is expanded to
    num_decoder_blocks: int = 1  # that spell them, in the place of one that encodes

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if min(self.num_ahead, self.num_vectors, self.num_decoder_blocks) < 1 or self.decay <= 0:
            raise ValueError(
                f"num_ahead={self.num_ahead}, num_vectors={self.num_vectors} and "
                f"num_decoder_blocks={self.num_decoder_blocks} start at 1; decay={self.decay} "
                "is above 0"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden_width(self) -> int:
        return -(-8 * self.width // (3 * self.mlp_multiple)) * self.mlp_multiple

    @property
    def num_encoder_blocks(self) -> int:
        return max(1, self.num_blocks - 1)

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
        self.attention = Attention(config)
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
        self.expand = linear(C, config.num_vectors * C)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(config, i) for i in range(decoding))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = linear(config.width, config.vocab_size)
        nn.init.normal_(self.token_table.weight, std=config.token_std)
        if config.tied:
            self.token_table.weight = self.head.weight

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        e_BTC = self.token_table(tokens_BT)
        vectors_BTNC = self.vectors(e_BTC, cache)
        x_PKC = self.decoded(e_BTC.reshape(-1, 1, e_BTC.shape[-1]), vectors_BTNC.flatten(0, 1))
        return x_PKC.view_as(e_BTC)

    def vectors(self, e_BTC: Tensor, cache=None) -> Tensor:
        """What each position says of the text behind it: all that a decoder sees of it."""
        T = e_BTC.shape[1]
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=e_BTC.device)
        turn = rotary(positions_T, self.config.head_width, self.config.rope_base)
        x_BTC = e_BTC
        for block in self.blocks:
            x_BTC = block(x_BTC, turn, cache)
        x_BTC = self.encoder_norm(x_BTC)
        return self.expand(x_BTC).unflatten(-1, (self.config.num_vectors, -1))

    def decoded(self, e_PKC: Tensor, vectors_PNC: Tensor) -> Tensor:
        """For each patch of K tokens, what the head reads at each; it sees those before it."""
        places_K = torch.arange(e_PKC.shape[1], device=e_PKC.device)
        turn = rotary(places_K, self.config.head_width, self.config.rope_base)
        x_PKC = e_PKC
        for block in self.decoder_blocks:
            x_PKC = block(x_PKC, vectors_PNC, turn)
        return self.final_norm(x_PKC)

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV

    def loss_terms(self, tokens_BT: Tensor, targets_BT: Tensor) -> list[dict]:
        """What training minimises: the ruler's own term first, then those of ideas.

        Patches of K tokens tile each row, from a place that is drawn; each is spelt from the
        vectors of its first position, and its place in the patch says how much a target counts.
        """
        (B, T), K = tokens_BT.shape, self.config.num_ahead
        e_BTC = self.token_table(tokens_BT)
        vectors_BTNC = self.vectors(e_BTC)
        x_PKC = self.decoded(e_BTC.reshape(B * T, 1, -1), vectors_BTNC.flatten(0, 1))
        x_BTC = x_PKC.view_as(e_BTC)
        weight = 1 / sum(self.config.decay**i for i in range(K))
        terms = [{"x": x_BTC, "head": self.head, "targets": targets_BT, "weight": weight}]
        missing_B1 = torch.randint(K, (B, 1), device=tokens_BT.device)  # of the first patch
        places_BT = torch.arange(T, device=tokens_BT.device) + missing_B1
        num_patches = (T + K - 2) // K + 1
        from_BS = torch.arange(num_patches * K, device=tokens_BT.device) - missing_B1
        from_BS1 = from_BS.clamp(0, T - 1)[..., None]
        e_BSC = e_BTC.gather(1, from_BS1.expand(-1, -1, e_BTC.shape[-1]))
        e_PKC = e_BSC.reshape(B * num_patches, K, -1)
        first_BJ = from_BS1[:, ::K, 0]
        rows_B1 = torch.arange(B, device=tokens_BT.device)[:, None]
        a_PKC = self.decoded(e_PKC, vectors_BTNC[rows_B1, first_BJ].flatten(0, 1))
        a_BSC = a_PKC.reshape(B, num_patches * K, -1)
        a_BTC = a_BSC.gather(1, places_BT[..., None].expand_as(e_BTC))
        share_BT = weight * K * self.config.decay ** (places_BT % K)
        is_first_BT = (places_BT % K == 0) | (places_BT < K) & (missing_B1 > 0)
        share_BT = share_BT.masked_fill(is_first_BT, 0.0)
        ahead = {"targets": targets_BT[..., None], "shares": share_BT[..., None]}
        terms.append({"x": a_BTC, "head": self.head, **ahead})
        return terms

    def parameter_groups(self) -> list[dict]:
        """Parameters that the optimizer treats apart; the rest goes by role."""
        groups = []
        return groups

    def after_step(self) -> None:
        """What an idea does to parameters after each update: nothing here."""
