"""Rank promotion attention: attend to a handful of elements on levels of growing reach.

Idea: a token need not look at all others. On level 0 it sees the last few tokens; an element from
    which a small network expects much is promoted to the next level, as a summary of the elements
    around it, and stays in sight there until as many newer ones have come. So reach grows with each
    level, while the number of keys never does. An element is promoted when it is among the first
    that its level has, or when its expected use is above the mean of those before it, times
    `utility_cut`. No gradient passes the choice: training adds, for each row once, the squared
    error between the expected use and the attention that was paid, and that trains the network.
    Summaries are means of the window whose shares a network picks (`num_distil_heads`), or come
    straight from an MLP. Places before the start are held by learned pads.
    The series was deleted from the original's tree, unfinished; details are our reading of it. All
    levels are computed at every position here, so it is slow, and steps of generation read again
    all that came before. Each position reads dozens of elements, each row of a batch costs that
    much memory. rpa_ue has the names with unified embeddings.
Source: Jeff Ward, jmward01/lmplay (its history, March to November 2025).
Family: attention.
Changed from gpt2ish: Config, Utility, Ranking, Direct, Level, Attention, Block, Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B rows, T positions, S positions attended to, C model width, H heads, D head width,
# F hidden width, V vocabulary, K width of all keys, E = K + C of an element, R window of a level,
# P elements in sight, U pads and elements, I = R E of a window, G groups of channels, Q heads of a
# group, J width of a group or of a head's value

VARIANTS = {
    "rpa1_0": {},
    "rpa1_1": {"key_width": 240},
    "rpa1_2": {
        "key_width": 240,
        "num_distil_heads": 12,
        "num_groups": 3,
    },
    "rpa1_3": {
        "key_width": 384,
        "num_distil_heads": 12,
        "num_groups": 3,
    },
    "rpa1_4": {
        "key_width": 36,
        "num_distil_heads": 4,
        "num_groups": 2,
    },
    "rpa1_5": {
        "key_width": 36,
        "num_distil_heads": 4,
        "num_groups": 2,
        "absolute_positions": False,
    },
    "rpa1_6": {
        "key_width": 36,
        "num_distil_heads": 4,
        "num_groups": 2,
        "absolute_positions": False,
        "windows": "3 3 / 3 3 3 / 3 3 3 / 3 3 3 3 3 / 5 3 3 / 5 3",
    },
    "rpa1_7": {
        "key_width": 36,
        "num_distil_heads": 4,
        "num_groups": 2,
        "absolute_positions": False,
        "windows": "5 5 3 / 5 3",
    },
    "rpa1_10": {
        "key_width": 36,
        "num_distil_heads": None,
        "utility_mul": 50,
        "absolute_positions": False,
        "windows": "3 3 / 3 5 5",
    },
    "rpa1_12": {
        "key_width": 36,
        "num_distil_heads": None,
        "utility_mul": 50,
        "absolute_positions": False,
        "windows": "3 5 / 7 11 / 3 5 / 7 11 / 3 5 / 7 11",
    },
}
TINY = {
    "vocab_size": 61,
    "max_len": 16,
    "num_blocks": 2,
    "width": 16,
    "num_heads": 2,
    "key_width": 8,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int
    max_len: int = 1024  # tokens
    num_blocks: int = 6
    width: int = 768
    num_heads: int = 12
    embed_dropout: float = 0.1  # after token + position
    ff_dropout: float = 0.1  # after attention's output projection and after the MLP
    token_std: float = 1.0  # spread of the token table at the start; `ue` starts at 0.2
    key_width: int | None = None  # of all heads together; None is width
    windows: str = "3 3 3 3 3 3 3 3 3 3"  # of each level; "/": the next block; the last one stays
    num_distil_heads: int | None = 1  # that share out a window; None: an MLP makes the summary
    num_groups: int = 1  # of channels, each summed up by num_distil_heads / num_groups heads
    promoted_mlp: bool = False  # an MLP behind each summary
    utility_mul: int = 10  # hidden width of the network that expects, in windows
    utility_cut: float = 1.0  # promoted above this share of the mean
    absolute_positions: bool = True  # the table at the entrance

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.keys_width % self.num_heads:
            raise ValueError(
                f"key_width={self.key_width} is not a multiple of num_heads={self.num_heads}"
            )
        heads = self.num_groups if self.num_distil_heads is None else self.num_distil_heads
        if min(heads, self.num_groups) < 1 or heads % self.num_groups:
            raise ValueError(
                f"num_distil_heads={self.num_distil_heads} is not a multiple of "
                f"num_groups={self.num_groups}"
            )
        if self.element_width % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} does not divide {self.element_width}, key and value"
            )
        for index in range(self.num_blocks):
            windows = self.windows_of(index)
            if len(windows) < 2 or min(windows) < 2:
                raise ValueError(f"windows={self.windows!r}: a block has 2 levels of 2 or more")
        if self.utility_mul < 1 or self.utility_cut < 0:
            raise ValueError(
                f"utility_mul={self.utility_mul} is below 1 or utility_cut={self.utility_cut} "
                f"below 0"
            )

    @property
    def keys_width(self) -> int:
        return self.width if self.key_width is None else self.key_width

    @property
    def element_width(self) -> int:
        return self.keys_width + self.width

    def windows_of(self, index: int) -> list[int]:
        blocks = self.windows.split("/")
        return [int(window) for window in blocks[min(index, len(blocks) - 1)].split()]


class Utility(nn.Module):
    """How much use is expected of the newest element of a window, 0 or more."""

    def __init__(self, config: Config, window: int):
        super().__init__()
        self.up = nn.Linear(window * config.element_width, config.utility_mul * window)
        self.down = nn.Linear(config.utility_mul * window, 1)

    def forward(self, tile_BSRE: Tensor) -> Tensor:
        tile_BSI = tile_BSRE.flatten(2)
        h_BSF = self.up(tile_BSI)
        h_BSF = F.gelu(h_BSF)
        z_BS1 = self.down(h_BSF)
        utility_BS = 1 + F.elu(z_BS1.squeeze(-1).float())
        return utility_BS


class Ranking(nn.Module):
    """A window's summary: a mean for each group of channels, with shares made from the window."""

    def __init__(self, config: Config, window: int):
        super().__init__()
        self.num_groups = config.num_groups
        self.up = nn.Linear(window * config.element_width, 10 * window)
        self.down = nn.Linear(10 * window, config.num_distil_heads * window)

    def forward(self, tile_BSRE: Tensor) -> Tensor:
        R = tile_BSRE.shape[2]
        tile_BSI = tile_BSRE.flatten(2)
        h_BSF = self.up(tile_BSI)
        h_BSF = F.gelu(h_BSF)
        z_BSF = self.down(h_BSF)
        z_BSGQR = z_BSF.unflatten(-1, (self.num_groups, -1, R))
        shares_BSGQR = z_BSGQR.softmax(-1)
        shares_BSGR = shares_BSGQR.mean(-2)
        tile_BSRGJ = tile_BSRE.unflatten(-1, (self.num_groups, -1))
        summary_BSGJ = torch.einsum("bsgr,bsrgj->bsgj", shares_BSGR, tile_BSRGJ)
        summary_BSE = summary_BSGJ.flatten(2)
        return summary_BSE


class Direct(nn.Module):
    """A window's summary, straight from two linear layers."""

    def __init__(self, config: Config, window: int):
        super().__init__()
        self.up = nn.Linear(window * config.element_width, 3 * config.width)
        self.down = nn.Linear(3 * config.width, config.element_width)

    def forward(self, tile_BSRE: Tensor) -> Tensor:
        tile_BSI = tile_BSRE.flatten(2)
        h_BSF = self.up(tile_BSI)
        h_BSF = F.gelu(h_BSF)
        summary_BSE = self.down(h_BSF)
        return summary_BSE


class Level(nn.Module):
    """Elements at some of the positions: what is in sight of each position, and what goes on."""

    def __init__(self, config: Config, window: int, is_last: bool):
        super().__init__()
        self.window = window
        self.utility_cut = config.utility_cut
        self.pads = nn.Parameter(torch.rand(window - 1, config.element_width))
        if is_last:
            return
        distil = Direct if config.num_distil_heads is None else Ranking
        self.utility = Utility(config, window)
        self.distil = distil(config, window)
        self.refine = Direct(config, 1) if config.promoted_mlp else None

    def places(self, member_BS: Tensor) -> Tensor:
        """Of the `window` latest members at each position, newest first; -1 - n for pad n."""
        B, S = member_BS.shape
        order_BS = member_BS.cumsum(1) - 1  # of the latest member
        places_BS = torch.arange(S, device=member_BS.device).expand(B, S)
        spare_BS = torch.where(member_BS, order_BS, S)
        by_order = places_BS.new_zeros(B, S + 1).scatter(1, spare_BS, places_BS)
        steps_R = torch.arange(self.window, device=member_BS.device)
        order_BSR = order_BS[..., None] - steps_R
        known_BSR = order_BSR.clamp(min=0)
        places_BSR = by_order.gather(1, known_BSR.flatten(1)).view_as(known_BSR)
        places_BSR = torch.where(order_BSR < 0, order_BSR, places_BSR)
        return places_BSR

    def tile(self, elements_BSE: Tensor, places_BSR: Tensor) -> Tensor:
        """The elements and pads at these places."""
        B = len(elements_BSE)
        pads_BRE = self.pads.flip(0).to(elements_BSE.dtype).expand(B, -1, -1)
        rows_BUE = torch.cat([pads_BRE, elements_BSE], dim=1)
        rows_B11 = torch.arange(B, device=places_BSR.device)[:, None, None]
        tile_BSRE = rows_BUE[rows_B11, places_BSR + self.window - 1]
        return tile_BSRE

    @torch.no_grad()
    def promoted(self, utility_BS: Tensor, member_BS: Tensor) -> Tensor:
        """Which members go on to the next level."""
        order_BS = member_BS.cumsum(1) - 1
        members_BS = torch.where(member_BS, utility_BS, 0.0)
        before_BS = members_BS.cumsum(1) - members_BS
        useful_BS = utility_BS * order_BS > self.utility_cut * before_BS
        promoted_BS = member_BS & (useful_BS | (order_BS < self.window))
        return promoted_BS

    def summary(self, tile_BSRE: Tensor) -> Tensor:
        summary_BSE = self.distil(tile_BSRE)
        if self.refine is not None:
            summary_BSE = self.refine(summary_BSE[:, :, None])
        return summary_BSE


class Attention(nn.Module):
    """Self-attention over the few elements that each position has in sight."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.width, config.keys_width)
        self.key = nn.Linear(config.width, config.keys_width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.ff_dropout)
        windows = config.windows_of(index)
        last = len(windows) - 1
        self.levels = nn.ModuleList(
            Level(config, window, level == last) for level, window in enumerate(windows)
        )
        self.sight_table = nn.Parameter(torch.zeros(sum(windows), config.element_width))

    def sight(self, elements_BSE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Elements of all levels; of those above level 0 the expected use, and if there is one."""
        member_BS = torch.ones_like(elements_BSE[..., 0], dtype=torch.bool)
        utility_BS = None
        tiles, utilities, known = [], [], []
        for level in self.levels:
            places_BSR = level.places(member_BS)
            tile_BSRE = level.tile(elements_BSE, places_BSR)
            tiles.append(tile_BSRE)
            if utility_BS is not None:
                found_BSR = places_BSR.clamp(min=0)
                found = utility_BS.gather(1, found_BSR.flatten(1)).view(found_BSR.shape)
                utilities.append(found)
                known.append(places_BSR >= 0)
            if level is not self.levels[-1]:
                utility_BS = level.utility(tile_BSRE)
                member_BS = level.promoted(utility_BS, member_BS)
                elements_BSE = level.summary(tile_BSRE)
        return torch.cat(tiles, dim=2), torch.cat(utilities, dim=2), torch.cat(known, dim=2)

    def forward(self, x_BTC: Tensor, cache=None) -> tuple[Tensor, Tensor]:
        T = x_BTC.shape[1]
        q_BTK = self.query(x_BTC)
        k_BTK = self.key(x_BTC)
        v_BTC = self.value(x_BTC)
        elements_BSE = torch.cat([k_BTK, v_BTC], dim=-1)
        if cache is not None:
            (elements_BSE,) = cache.append(self, elements_BSE)
        seen_BSPE, utility_BSP, known_BSP = self.sight(elements_BSE)
        seen_BTPE = seen_BSPE[:, -T:] + self.sight_table
        k_BTPK, v_BTPC = seen_BTPE.split([q_BTK.shape[-1], x_BTC.shape[-1]], dim=-1)
        q_BTHD = q_BTK.unflatten(-1, (self.num_heads, -1))
        k_BTPHD = k_BTPK.unflatten(-1, (self.num_heads, -1))
        v_BTPHJ = v_BTPC.unflatten(-1, (self.num_heads, -1))
        scores_BTHP = torch.einsum("bthd,btphd->bthp", q_BTHD, k_BTPHD) * q_BTHD.shape[-1] ** -0.5
        shares_BTHP = scores_BTHP.softmax(-1)
        y_BTHJ = torch.einsum("bthp,btphj->bthj", shares_BTHP, v_BTPHJ)
        y_BTC = y_BTHJ.flatten(2)
        y_BTC = self.output(y_BTC)
        y_BTC = self.dropout(y_BTC)
        paid_BTP = shares_BTHP.detach().mean(2)[..., -utility_BSP.shape[-1] :]
        error_BTP = (utility_BSP[:, -T:] - paid_BTP).square() * known_BSP[:, -T:]
        error_B = error_BTP.sum((1, 2)) / known_BSP[:, -T:].sum((1, 2))
        return y_BTC, error_B


class MLP(nn.Module):
    """Two linear layers, 4 C wide between them."""

    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.ff_dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTF = self.up(x_BTC)
        h_BTF = F.gelu(h_BTF)
        y_BTC = self.down(h_BTF)
        y_BTC = self.dropout(y_BTC)
        return y_BTC


class Block(nn.Module):
    """Attention, then the MLP; each reads a normed copy of the stream and adds to it."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.index = index
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config, index)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, cache=None) -> tuple[Tensor, Tensor]:
        u_BTC = self.attention_norm(x_BTC)
        y_BTC, error_B = self.attention(u_BTC, cache)
        x_BTC = x_BTC + y_BTC
        u_BTC = self.mlp_norm(x_BTC)
        y_BTC = self.mlp(u_BTC)
        x_BTC = x_BTC + y_BTC
        return x_BTC, error_B


class Model(nn.Module):
    """Tokens to the logits of the token after each."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_table = nn.Embedding(config.vocab_size, config.width)
        self.position_table = nn.Embedding(config.max_len, config.width)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size)
        self.token_table.weight.data *= config.token_std
        nn.init.zeros_(self.position_table.weight)
        if not config.absolute_positions:
            self.position_table = None

    def run(self, tokens_BT: Tensor, cache=None) -> tuple[Tensor, Tensor]:
        """What the head reads, and the mean error of the expected use of each row."""
        T = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        e_BTC = self.token_table(tokens_BT)
        p_TC = 0.0 if self.position_table is None else self.position_table(positions_T)
        x_BTC = e_BTC + p_TC
        x_BTC = self.dropout(x_BTC)
        errors = []
        for block in self.blocks:
            x_BTC, error_B = block(x_BTC, cache)
            errors.append(error_B)
        x_BTC = self.final_norm(x_BTC)
        error_B = torch.stack(errors).mean(0)
        return x_BTC, error_B

    def hidden(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC, _ = self.run(tokens_BT, cache)
        return x_BTC

    def training_loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTC, error_B = self.run(tokens_BT)
        logits_BTV = self.head(x_BTC)
        nats_BT = F.cross_entropy(logits_BTV.mT.float(), targets_BT, reduction="none")
        num_targets_B = (targets_BT >= 0).sum(1).clamp(min=1)
        shared_B = error_B / num_targets_B
        nats_BT = nats_BT + shared_B[:, None]
        return nats_BT

    def forward(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x_BTC = self.hidden(tokens_BT, cache)
        logits_BTV = self.head(x_BTC)
        return logits_BTV
