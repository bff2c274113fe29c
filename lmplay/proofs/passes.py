"""What a model of a run's own size answers to tokens that differ in what it must not see."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor, nn

from lmplay.model.abilities import (
    draws_likelihood,
    has_hidden,
    has_terms,
    reader,
    scores_itself,
    trains_by_itself,
)
from lmplay.model.cache import Cache
from lmplay.model.experiment import Experiment
from lmplay.model.objective import Objective
from lmplay.proofs.double import rounding_of
from lmplay.proofs.placement import Doubles, Makers
from lmplay.proofs.proof import CLOSE, EXACT, Refuted
from lmplay.proofs.source import watching, what_was_opened
from lmplay.proofs.specimen import unchanged, without_dropout

# B rows, T positions, C model width

MOST_LOGITS = 1 << 27  # of a head that is no plain matrix, to look at what it gives
ROUNDING = {False: (EXACT, CLOSE), True: (0.01, 0.05)}  # in fp32, and below: of a position, a row
SOME_ROWS = 4  # of a pass in low precision, and of one with a loss
ROUNDINGS = 10  # times what it moves by rounding in one pass, an answer may move
SHARE_OF_ENDS = 1 / 64  # of tokens, where a model knows the end marker

Autocast = Callable[[], AbstractContextManager]


class Passes:
    """A model's answers to the same tokens, to others behind a cut, and beside other rows.

    The model is left as it was: its mode, its buffers. Dropout is on, with the same random numbers
    in each pass; where a pass draws others, because of its tokens, eval mode is looked at.

    Args:
        model: on its device, in training mode.
        config: what it was made of.
        autocast: in which it runs.
        is_low: whether that is a precision below fp32.
        is_still: whether in fp32 not one number moves, so that below it only a leak moves any.
        seed: of cuts and other tokens.
        training: in which mode it is asked.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: nn.Module,
        config,
        tokens_BT: Tensor,
        autocast: Autocast = nullcontext,
        is_low: bool = False,
        is_still: bool = False,
        seed: int = 0,
        training: bool = True,
    ):
        self.given = {key: value for key, value in locals().items() if key != "self"}
        self.experiment, self.model, self.config = experiment, model, config
        self.vocab_size = config.vocab_size
        self.autocast, self.seed = autocast, seed
        self.training = training and not scores_itself(model)  # which reports in eval mode only
        self.most_far, self.most_far_row = ROUNDING[is_low and not is_still]
        self.device = next(model.parameters()).device
        self.tokens_BT = tokens_BT.to(self.device)
        draw = torch.Generator().manual_seed(seed)
        B, T = tokens_BT.shape
        spread_B = (torch.arange(B) + torch.rand(B, generator=draw)) / B
        self.cut_B = 1 + (spread_B * (T - 1)).long()[torch.randperm(B, generator=draw)]
        # where chunks of any power of two begin, one behind it, and before the last token
        borders = torch.tensor([T // 2, T - 1, T // 2 + 1, T // 4][: B // 2])
        self.cut_B[: len(borders)] = borders.clamp(1, max(1, T - 1))
        by_BT = torch.randint(1, self.vocab_size, (B, T), generator=draw)
        others_BT = (tokens_BT + by_BT) % self.vocab_size
        if (end := getattr(config, "end", None)) is not None:  # of a document
            ends_BT = torch.rand((B, T), generator=draw) < SHARE_OF_ENDS
            others_BT = torch.where(ends_BT & (tokens_BT != end), end, others_BT)
        later_BT = torch.arange(T) >= self.cut_B[:, None]
        self.changed_BT = torch.where(later_BT, others_BT, tokens_BT).to(self.device)
        kept_B1 = torch.arange(B)[:, None] < (B + 1) // 2
        self.mixed_BT = torch.where(kept_B1, tokens_BT, others_BT).to(self.device)
        self.later_BT = later_BT.to(self.device)

    def again(self, **changed: object) -> "Passes":
        """Others of the same model, with some arguments changed."""
        return Passes(**self.given | changed)

    @functools.cached_property
    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        """To the tokens, with changes behind the cuts, and beside other rows."""
        asked = (self.tokens_BT, self.changed_BT, self.mixed_BT)
        for training in (True, False) if self.training else (False,):
            found = [self.read(tokens_BT, training) for tokens_BT in asked]
            if all(torch.equal(found[0][1], state) for _, state in found):
                break
        return tuple(x_BTC for x_BTC, _ in found)

    def read(self, tokens_BT: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """What its head reads, or gives where that is no matrix; and the generator's state."""
        with unchanged(self.model), self.autocast(), torch.set_grad_enabled(training):
            self.model.train(training)
            torch.manual_seed(self.seed)
            if scores_itself(self.model):
                x_BTC = self.model.log_likelihood(tokens_BT, tokens_BT.roll(-1, 1))[..., None]
            elif has_hidden(self.model):
                x_BTC = self.model.hidden(tokens_BT)
                is_plain = type(self.model.head) is nn.Linear
                if not is_plain and tokens_BT.numel() * self.vocab_size <= MOST_LOGITS:
                    x_BTC = self.model.head(x_BTC)
            else:
                x_BTC = self.model(tokens_BT)
            return x_BTC.detach().float(), torch.get_rng_state()

    def nats(self, tokens_BT: Tensor) -> tuple[Tensor, bool]:
        """What a model with its own likelihood reports of each target, and whether it drew."""
        with unchanged(self.model), self.autocast(), torch.no_grad():
            self.model.eval()
            torch.manual_seed(self.seed)
            before = torch.get_rng_state()
            inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
            if draws_likelihood(self.model):
                nats_BT = self.model.likelihood_draws(inputs_BT, targets_BT).float().mean(0)
            else:
                nats_BT = self.model.log_likelihood(inputs_BT, targets_BT).float()
            return nats_BT, not torch.equal(before, torch.get_rng_state())

    @functools.cached_property
    def draws(self) -> bool:
        """Whether its own likelihood draws numbers."""
        return draws_likelihood(self.model) or self.nats(self.tokens_BT[:2])[1]

    def is_close(self, moved: float) -> bool:
        """Whether additions in another order may move an answer so far."""
        return moved <= CLOSE or moved <= ROUNDINGS * self.rounding

    @functools.cached_property
    def rounding(self) -> float:
        """How far fp32 is from fp64, as generation reads: a thousandth of it all in some models."""
        return rounding_of(self.model, self.tokens_BT[:2])

    @functools.cached_property
    def plain(self) -> Tensor:
        """To two rows, as generation reads them: in eval mode, in fp32."""
        return self.read_plainly(self.tokens_BT[:2])

    @torch.no_grad()
    def read_plainly(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """In eval mode, in fp32, what a head reads."""
        options = {} if cache is None else {"cache": cache}
        with unchanged(self.model):
            self.model.eval()
            if scores_itself(self.model):
                torch.manual_seed(0)
                nats_BT = self.model.log_likelihood(tokens_BT, tokens_BT.roll(-1, 1))
                return nats_BT[..., None].float()
            return reader(self.model)(tokens_BT, **options).float()

    def gradients(self, rows: int, length: int) -> dict[str, float | None]:
        """The largest number in the gradient of each weight; None where it has none."""
        tokens_BT = self.tokens_BT[:rows, :length]
        with unchanged(self.model), self.autocast():
            torch.manual_seed(self.seed)
            sums = Objective(self.model).train()(tokens_BT, tokens_BT.roll(-1, 1))
            sums.objective.backward()
        sizes = {}
        for name, weight in self.model.named_parameters():
            sizes[name] = None if weight.grad is None else weight.grad.abs().max().item()
            weight.grad = None
        return sizes

    def minimised(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[float, float]:
        """What training minimises without dropout, summed over the targets; what of it is the
        ruler's."""
        with unchanged(self.model), without_dropout(self.model), self.autocast():
            torch.manual_seed(self.seed)
            sums = Objective(self.model).train()(tokens_BT, targets_BT)
            return sums.objective.item(), 0.0 if sums.loss is None else sums.loss.item()

    @functools.cached_property
    def minimises_what_is_reported(self) -> bool:
        """Whether the only term of its loss is the ruler's."""
        if not has_terms(self.model):
            return not trains_by_itself(self.model)
        tokens_BT = self.tokens_BT[:SOME_ROWS]
        with unchanged(self.model), torch.no_grad():
            return len(self.model.train().loss_terms(tokens_BT, tokens_BT.roll(-1, 1))) == 1

    @functools.cached_property
    def watched(self) -> dict[str, str]:
        """What a pass of training is caught at, by the proof that it fails."""
        file = self.experiment.module.__file__
        doubles, made = Doubles(), ""
        tokens_BT = self.tokens_BT[:1]
        with unchanged(self.model), watching(file), suppress(Exception):  # for other proofs
            try:
                with torch.device("meta"), doubles, Makers(file):
                    Objective(self.model).train()(tokens_BT, tokens_BT.roll(-1, 1))
            except Refuted as why:
                made = str(why)
        wide = f"{doubles.found} gives double precision" if doubles.found else ""
        return {"placement": made, "no float64": wide, "imports": what_was_opened()}

    def far(self, x_BTC: Tensor) -> Tensor:
        """How far each position is from the answer, against its size, shape (B, T)."""
        answer_BTC = self.answers[0]
        size_BT = answer_BTC.norm(dim=-1)
        return (x_BTC - answer_BTC).norm(dim=-1) / size_BT.clamp_min(size_BT.mean())

    @property
    def nothing_moves(self) -> bool:
        """Whether not one number moves that must not, however little."""
        earlier_BT = self.far(self.answers[1]).masked_fill(self.later_BT, 0.0)
        return not (earlier_BT.any() or self.row_moves.any())

    @functools.cached_property
    def row_moves(self) -> Tensor:
        """How far the rows that stay the same move when others do not, shape (T,)."""
        kept = (len(self.tokens_BT) + 1) // 2
        return self.far(self.answers[2])[:kept].amax(0)
