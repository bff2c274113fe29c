"""Avey: no attention and no recurrence; each chunk of text reads the few chunks most like it.

Idea: text is cut into chunks. A ranker picks the earlier chunks most similar to the last whole one;
    these, that chunk and the current one are a window, in which positions mix by a learned matrix
    times the cosines of what they hold, beside a gate. Every token goes through the layers once for
    each window that its chunk is in, and is scored in its own.
    As published the ranker asks with the current chunk, whose end then tells its beginning what to
    read: a leak, in the authors' code too, whose generation asks with half a chunk instead. Here
    the chunk before asks, so that all that decides a window is older than its chunk. Scores are
    divided by the largest (the authors' code takes the earliest chunk's), and what stands before a
    text's first chunk is kept out of the mixing. A layer weighs 7 / 12 of a block of llama, so
    there are more of them.
Source: Hammoud and Acharya 2025, arXiv:2506.11305, section 3; rimads/avey-dpa.
Family: mixing.
Changed from llama: Config, linear, Layer, Window, Model, rotary, rotate, Attention, MLP, Block.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, C model width, F hidden width, V vocabulary, J chunks, Q positions of a
# chunk, K chunks of a window, N windows of all rows in a line, R rows of a window, S rows seen

VARIANTS = {
    "avey_8": {"window_chunks": 8},
}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "chunk": 3,
    "window_chunks": 3,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int
    max_len: int = 1024  # tokens
    num_blocks: int = 6  # of llama, as heavy as the layers here
    width: int = 768
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the token table
    token_std: float = 1.0  # spread of the token table at the start, unless it is the head
    chunk: int = 16  # tokens
    window_chunks: int = 4  # chunks of a window: the last two, and those ranked highest

    def __post_init__(self):
        if self.chunk < 1 or self.window_chunks < 3:
            raise ValueError(
                f"chunk={self.chunk} starts at 1, window_chunks={self.window_chunks} at 3"
            )

    @property
    def num_layers(self) -> int:
        return max(1, round(12 * self.num_blocks / 7))

    @property
    def window(self) -> int:
        """Rows of a window."""
        return self.chunk * self.window_chunks

    @property
    def output_std(self) -> float:
        """Of the matrices that write into the stream, one in each layer."""
        return 0.02 * self.num_layers**-0.5


def linear(inputs: int, outputs: int, std: float = 0.02, bias: bool = False) -> nn.Linear:
    """A layer whose weights start with this spread, and its bias, if it has one, at zero."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=std * (768 / inputs) ** 0.5)
    if bias:
        nn.init.zeros_(layer.bias)
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


class Window:
    """Stands where the cache is, for layers that run on windows.

    Args:
        start: rows of each row's last window that were run in passes before.
        end: of its rows that are there after this pass.
        cache: holds what the layers make of these rows; None keeps nothing.
    """

    def __init__(self, start: int, end: int, cache=None):
        self.start, self.end, self.cache = start, end, cache

    def append(self, module: nn.Module, B: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Rows of windows behind those that were run before."""
        if self.cache is None:
            return tensors
        memory, everything = self.cache.state(module), []
        for number, new in enumerate(tensors):
            if self.start:
                new = torch.cat([memory[number], new], dim=1)
            memory[number] = new.unflatten(0, (B, -1))[:, -1, : self.end]
            everything.append(new)
        return tuple(everything)


class Layer(nn.Module):
    """Half of a hidden layer passes by; a quarter mixes over the window, and a quarter gates it."""

    def __init__(self, config: Config):
        super().__init__()
        C, R = config.width, config.window
        self.norm = RMSNorm(C, config.norm_eps)
        self.up = linear(C, 4 * C, bias=True)
        self.mixing = nn.Parameter(torch.empty(R, R))
        self.down = linear(3 * C, C, config.output_std, bias=True)
        nn.init.xavier_normal_(self.mixing)

    def forward(self, x_NRC: Tensor, is_real_NR: Tensor, window: Window, B: int) -> Tensor:
        C = x_NRC.shape[-1]
        u_NRC = self.norm(x_NRC)
        h_NRF = self.up(u_NRC)
        h_NRF = F.relu(h_NRF).square()
        aside_NRF, u_NRC, gate_NRC = h_NRF.split([2 * C, C, C], dim=-1)
        toward_NRC = F.normalize(u_NRC, dim=-1, eps=1e-8) * is_real_NR[..., None]
        toward_NSC, u_NSC = window.append(self, B, toward_NRC, u_NRC)
        S = toward_NSC.shape[1]
        mixing_RS = self.mixing[window.start : S, :S].tril(window.start)
        scores_NRS = mixing_RS * (toward_NRC @ toward_NSC.mT)
        mixed_NRC = scores_NRS @ u_NSC
        mixed_NRC = mixed_NRC * gate_NRC
        h_NRF = torch.cat([mixed_NRC, aside_NRF], dim=-1)
        y_NRC = self.down(h_NRF)
        x_NRC = x_NRC + y_NRC
        return x_NRC


class Model(nn.Module):
    """Tokens to the logits of the token after each."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.progress = 0.0
        self.token_table = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = linear(config.width, config.vocab_size)
        nn.init.normal_(self.token_table.weight, std=config.token_std)
        if config.tied:
            self.token_table.weight = self.head.weight

    def at(self, progress: float) -> None:
        """Take up what depends on the share of training that is done, 0 to 1."""
        self.progress = progress

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        (B, T), Q = tokens_BT.shape, self.config.chunk
        start = cache.length if cache is not None else 0
        x_BTC = self.token_table(tokens_BT)
        if cache is not None:
            (x_BTC,) = cache.append(self, x_BTC)  # of all tokens so far, for the ranker
        before = self.config.window - Q  # rows of a window before its own chunk
        end = before + (start + T - 1) % Q + 1
        if start % Q:  # the window is the one of the pass before
            window = Window(end - 1, end, cache)
            x_NRC = x_BTC[:, -1:]
            is_real_NR = torch.ones(B, 1, dtype=torch.bool, device=x_BTC.device)
        else:
            window = Window(0, end, cache)
            x_NRC, is_real_NR = self.windows(x_BTC, start // Q)
            x_NRC, is_real_NR = (part[:, :end] if start else part for part in (x_NRC, is_real_NR))
        for layer in self.layers:
            x_NRC = layer(x_NRC, is_real_NR, window, B)
        x_BTC = x_NRC[:, -1:] if start else x_NRC[:, before:].reshape(B, -1, x_NRC.shape[-1])[:, :T]
        x_BTC = self.final_norm(x_BTC)
        return x_BTC

    def windows(self, x_BTC: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The windows of the chunks from `first` on, and which of their rows hold a token."""
        (B, T, C), Q = x_BTC.shape, self.config.chunk
        x_BTC = F.pad(x_BTC, (0, 0, Q, -T % Q))  # the chunk at place 0 is what is not there
        x_BJQC = x_BTC.unflatten(1, (-1, Q))
        places_BJK, weights_BJK = self.ranked(x_BJQC[:, 1:], first)
        J, K = places_BJK.shape[1:]
        index_BN = (places_BJK + 1).flatten(1)
        w_BNQC = x_BJQC.gather(1, index_BN[..., None, None].expand(-1, -1, Q, C))
        w_BNQC = w_BNQC * weights_BJK.to(w_BNQC.dtype).flatten(1)[..., None, None]
        is_real_NR = (places_BJK >= 0).repeat_interleave(Q, dim=-1).flatten(0, 1)
        return w_BNQC.reshape(B * J, K * Q, C), is_real_NR

    def ranked(self, x_BJQC: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The chunks of each window from that of chunk `first` on, in time order, with weights.

        A chunk's score is the sum, over positions of the chunk before the window's own, of the
        largest cosine with one of its positions. -1 stands for a chunk that there is not.
        """
        (B, J), K = x_BJQC.shape[:2], self.config.window_chunks
        places_J = torch.arange(J, device=x_BJQC.device)
        own_J = places_J[first:]
        with torch.autocast(x_BJQC.device.type, enabled=False):
            wide = torch.promote_types(x_BJQC.dtype, torch.float32)
            toward_BJQC = F.normalize(x_BJQC.to(wide), dim=-1, eps=1e-8)
            asking_BJQC = toward_BJQC[:, (own_J - 1).clamp(min=0)]
            cosines_BJQJQ = torch.einsum("biac,bjdc->biajd", asking_BJQC, toward_BJQC)
            scores_BJJ = cosines_BJQJQ.amax(-1).sum(2)
        scores_BJJ = scores_BJJ.masked_fill(places_J >= own_J[:, None] - 1, -torch.inf)
        scores_BJJ = F.pad(scores_BJJ, (0, K), value=-torch.inf)
        best_BJK, place_BJK = scores_BJJ.sort(dim=-1, descending=True, stable=True)
        best_BJK, place_BJK = best_BJK[..., : K - 2], place_BJK[..., : K - 2]
        place_BJK = place_BJK.masked_fill(best_BJK == -torch.inf, -1)
        best_BJK = best_BJK.clamp(min=1e-6)  # so that a weight lies between 0 and 1
        weight_BJK = best_BJK / best_BJK[..., :1]
        place_BJK, order_BJK = place_BJK.sort(dim=-1, stable=True)
        weight_BJK = weight_BJK.gather(-1, order_BJK)
        last_BJK = torch.stack([own_J - 1, own_J], dim=-1).expand(B, -1, -1)
        weight_BJK = F.pad(weight_BJK, (0, 2), value=1.0)
        return torch.cat([place_BJK, last_BJK], dim=-1), weight_BJK

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
