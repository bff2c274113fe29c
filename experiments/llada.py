"""LLaDA: text by diffusion; tokens are masked at random, and the model restores them all.

Idea: the baseline without its causal mask reads a row in which a share of the tokens, from none to
    all, is masked, and says what stood there. Weighted by one over that share, its loss bounds the
    row's likelihood from above: it is what writing the row in a random order would cost. Text is
    written from masks alone, the surest tokens first.
    The number that is reported is a bound, "at most so many nats", so a lower one than a causal
    model's proves something and a higher one nothing. Each row is scored under eight draws of masks
    of fixed sizes, which vary less than masks at a rate; they are made from the row's own tokens,
    so neither its neighbours nor the micro-batch change them. validation.csv has the standard error
    that these draws leave. The first token is seen and not
    scored, as everywhere. The authors' rows of random length, one in a hundred, are left out.
    A well-known copy divides by the number of masked tokens, which doubles the bound.
Source: Nie et al. 2025, arXiv:2502.09992, section 2 and appendix; ML-GSAI/LLaDA.
Family: diffusion.
Changed from llama: Config, Attention, Block, noise_of, stirred, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, N = B draws, rows of a batch each drawn several times

VARIANTS = {
    "llada_fast": {"tokens_per_step": 4},
}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "num_draws": 4,
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
    least_rate: float = 1e-3  # of masking
    num_draws: int = 8  # of masks for each row, when it is scored
    tokens_per_step: int = 1  # fixed at each step of generation, the surest first

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width}: {self.num_heads} heads need pairs of channels")
        if min(self.num_draws, self.tokens_per_step) < 1 or not 0 < self.least_rate < 1:
            raise ValueError(
                f"num_draws={self.num_draws} and tokens_per_step={self.tokens_per_step} start at "
                f"1, least_rate={self.least_rate} lies between 0 and 1"
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
    """Self-attention in both directions over H heads of width D = C / H, with rotary positions."""

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

    def forward(self, x_BTC: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        q_BTC = self.query(x_BTC)
        k_BTC = self.key(x_BTC)
        v_BTC = self.value(x_BTC)
        q_BHTD = self.split(q_BTC)
        k_BHSD = self.split(k_BTC)
        v_BHSD = self.split(v_BTC)
        q_BHTD = rotate(q_BHTD, turn)
        k_BHSD = rotate(k_BHSD, turn)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD)
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

    def forward(self, x_BTC: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        u_BTC = self.attention_norm(x_BTC)
        y_BTC = self.attention(u_BTC, turn)
        x_BTC = x_BTC + y_BTC
        u_BTC = self.mlp_norm(x_BTC)
        y_BTC = self.mlp(u_BTC)
        x_BTC = x_BTC + y_BTC
        return x_BTC


def noise_of(tokens_BT: Tensor, num_draws: int) -> Tensor:
    """Numbers in [0, 1) for each draw and position, (draws, B, T + 1), made from a row's tokens.

    So a row is masked alike whatever rows stand beside it. Three rounds of shifts and products
    modulo 2^31, which int64 holds; the last column is a number for the whole row.
    """
    T = tokens_BT.shape[1]
    places_T = torch.arange(1, T + 1, device=tokens_BT.device)
    x_BT = stirred((tokens_BT + 1) * 1_000_003 + places_T * 7_919)
    row_B1 = x_BT.sum(1, keepdim=True)
    draws_S11 = torch.arange(num_draws, device=tokens_BT.device)[:, None, None]
    places_T = torch.arange(T + 1, device=tokens_BT.device)
    x_SBT = stirred(row_B1 + stirred(draws_S11 * 104_729 + places_T * 15_485_863))
    return x_SBT.float() / 2**31


def stirred(x: Tensor) -> Tensor:
    """Whole numbers to others below 2^31 that look like noise."""
    x = x % 2**31
    for factor in (739_982_445, 695_872_825, 1_103_515_245):
        x = (x ^ (x >> 15)) * factor % 2**31
    return x ^ (x >> 16)


class Model(nn.Module):
    """A row in which some tokens are masked to the logits of the token at each position itself."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.progress = 0.0
        self.mask = config.vocab_size  # the id of what is masked, which no text has
        self.token_table = nn.Embedding(config.vocab_size + 1, config.width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_blocks))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = linear(config.width, config.vocab_size)
        nn.init.normal_(self.token_table.weight, std=config.token_std)

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        T = tokens_BT.shape[1]
        positions_T = torch.arange(T, device=tokens_BT.device)
        turn = rotary(positions_T, self.config.head_width, self.config.rope_base)
        x_BTC = self.token_table(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, turn)
        x_BTC = self.final_norm(x_BTC)
        return x_BTC

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.hidden(tokens_BT)
        logits_BTV = self.head(x_BTC)
        return logits_BTV

    def whole(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The row with its last target, (B, T + 1), and which of its targets are scored, (B, T).

        What follows the last scored target is always masked: that a text ends there would be told.
        """
        scored_BT = targets_BT >= 0
        last_B1 = torch.where(scored_BT[:, -1:], targets_BT[:, -1:], self.mask)
        row_BS = torch.cat([tokens_BT, last_B1], dim=1)
        has_more_BT = scored_BT.flip(1).cummax(1).values.flip(1)
        behind_BS = F.pad(~has_more_BT, (1, 0), value=False)
        return torch.where(behind_BS, self.mask, row_BS), scored_BT

    def nats(self, row_BS: Tensor, is_masked_BT: Tensor) -> Tensor:
        """Of each masked token behind the first, given those that are not; 0 for these."""
        asked_BS = torch.where(F.pad(is_masked_BT, (1, 0), value=False), self.mask, row_BS)
        logits_BTV = self.forward(asked_BS)[:, 1:]
        answers_BT = torch.where(is_masked_BT, row_BS[:, 1:], -100)
        wide = torch.promote_types(logits_BTV.dtype, torch.float32)
        return F.cross_entropy(logits_BTV.to(wide).mT, answers_BT, reduction="none")

    def training_loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Nats of masked tokens over the rate of masking, which is spread evenly over the rows."""
        row_BS, scored_BT = self.whole(tokens_BT, targets_BT)
        B = len(row_BS)
        ranks_B1 = torch.arange(B, device=row_BS.device)[:, None]
        rate_B1 = (ranks_B1 + torch.rand(1, 1, device=row_BS.device)) / B
        rate_B1 = rate_B1.clamp(min=self.config.least_rate)
        is_masked_BT = scored_BT & (torch.rand(scored_BT.shape, device=row_BS.device) < rate_B1)
        return self.nats(row_BS, is_masked_BT) / rate_B1

    def log_likelihood(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """A bound on each row's nats, spread over its targets: on average at most this many."""
        return self.likelihood_draws(tokens_BT, targets_BT).mean(0)

    def likelihood_draws(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The draws, (draws, B, T), of which that bound is the mean.

        n targets are scored; a draw masks l of them, l spread evenly over 1 to n, and counts the
        nats of each n / l times.
        """
        row_BS, scored_BT = self.whole(tokens_BT, targets_BT)
        num_draws = self.config.num_draws
        noise_SBT = noise_of(row_BS, num_draws)
        n_B1 = scored_BT.sum(1, keepdim=True).clamp(min=1)
        order_BT = noise_SBT[..., 1:-1].masked_fill(~scored_BT, 2.0).argsort(-1)
        rank_BT = order_BT.argsort(-1)
        drawn = []
        for draw in range(num_draws):
            share_B1 = (draw + noise_SBT[draw, :, -1:]) / num_draws
            num_masked_B1 = 1 + (n_B1 * share_B1).long().clamp(max=n_B1 - 1)
            is_masked_BT = scored_BT & (rank_BT[draw] < num_masked_B1)
            nats_BT = self.nats(row_BS, is_masked_BT)
            drawn.append(nats_BT * (n_B1 / num_masked_B1))
        return torch.stack(drawn)

    def generate(self, tokens_BT: Tensor, num_tokens: int, choose) -> Tensor:
        """New tokens behind each row: all masked at first, then the surest are fixed step by step.

        Args:
            choose: logits, (B, positions, V), to a token each.
        """
        T = tokens_BT.shape[1]
        row_BS = F.pad(tokens_BT, (0, num_tokens), value=self.mask)
        for fixed in range(0, num_tokens, self.config.tokens_per_step):
            logits_BNV = self.forward(row_BS)[:, T:]
            chosen_BN = choose(logits_BNV)
            sure_BN = logits_BNV.log_softmax(-1).gather(-1, chosen_BN[..., None])[..., 0]
            sure_BN = sure_BN.masked_fill(row_BS[:, T:] != self.mask, -torch.inf)
            num_new = min(self.config.tokens_per_step, num_tokens - fixed)
            at_BK = sure_BN.topk(num_new, dim=1).indices
            row_BS[:, T:].scatter_(1, at_BK, chosen_BN.gather(1, at_BK))
        return row_BS[:, T:]

    def parameter_groups(self) -> list[dict]:
        """Parameters that the optimizer treats apart; the rest goes by role."""
        groups = []
        return groups

    def after_step(self) -> None:
        """What an idea does to parameters after each update: nothing here."""
