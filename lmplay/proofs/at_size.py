"""What is proved at a run's own size: mistakes that live at real lengths, widths and values only.

Two passes show every leak from later tokens, each row with other tokens from a cut of its own on;
one more shows every leak between rows.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lmplay.model.abilities import has_hidden, scores_itself, takes_cache
from lmplay.model.cache import Cache
from lmplay.model.experiment import Experiment
from lmplay.proofs.dependence import refuse_not_finite
from lmplay.proofs.proof import CLOSE, EXACT, Exempt, Proof, Refuted, how_far, prove
from lmplay.proofs.specimen import Specimen, randomise

# B rows, T positions, C model width

ROWS = 8
MOST_TOKENS = 8192  # in a pass, as in a micro-batch where memory cannot be probed
MOST_LOGITS = 1 << 27  # of a head that is no plain matrix, to look at what it gives
STEPS = 6  # behind a cached prompt
ROUNDING = {False: (EXACT, CLOSE), True: (0.01, 0.05)}  # in fp32, and below: of a position, a row
NOISE = 4  # times what a row moves by itself

Autocast = Callable[[], AbstractContextManager]


def num_rows(max_len: int) -> int:
    """Rows of a pass, of which there are two at least."""
    return max(2, min(ROWS, MOST_TOKENS // max_len))


def check_at_size(
    experiment: Experiment,
    config,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    tokens_BT: Tensor | None = None,
) -> list[Proof]:
    """Every proof at the size of `config`, of a model whose weights hide nothing.

    Args:
        config: what a run has.
        precision: fp32, bf16 or fp16: leaks are looked for in it and in fp32, which tells more.
        tokens_BT: text of the plan; drawn tokens, where it is not at hand.
    """
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    device = torch.device(device)

    def autocast() -> AbstractContextManager:
        return nullcontext() if low is None else torch.autocast(device.type, low)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if tokens_BT is None:
            tokens_BT = Specimen(experiment, config).tokens(B=num_rows(config.max_len))
        model = randomise(experiment.model(config, seed=0)).to(device).train()
    V, size = config.vocab_size, "{} x {} tokens in ".format(*tokens_BT.shape)
    exact = Passes(experiment, model, V, tokens_BT)
    proofs = [proof.at(f"{size}fp32") for proof in prove(LEAKS | AT_REAL_LENGTH, exact)]
    if low is not None:
        rough = Passes(experiment, model, V, tokens_BT, autocast, is_low=True)
        proofs += [proof.at(f"{size}{precision}") for proof in prove(LEAKS, rough)]
    return proofs


def find_leak(passes: "Passes") -> Proof | None:
    """The proof that fails on a model that is being trained; None where there is no leak."""
    failed = [proof for proof in prove(LEAKS, passes) if proof.passed is False]
    return failed[0] if failed else None


class Passes:
    """A model's answers to the same tokens, to others behind a cut, and beside other rows.

    The model is left as it was: its mode, its buffers. Dropout is on, with the same random numbers
    in each pass; where a pass draws others, because of its tokens, eval mode is looked at.

    Args:
        model: on its device, in training mode.
        autocast: in which it runs.
        is_low: whether that is a precision below fp32.
        seed: of cuts and other tokens.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: nn.Module,
        vocab_size: int,
        tokens_BT: Tensor,
        autocast: Autocast = nullcontext,
        is_low: bool = False,
        seed: int = 0,
    ):
        self.experiment, self.model, self.vocab_size = experiment, model, vocab_size
        self.autocast, self.seed = autocast, seed
        self.most_far, self.most_far_row = ROUNDING[is_low]
        self.device = next(model.parameters()).device
        self.tokens_BT = tokens_BT.to(self.device)
        draw = torch.Generator().manual_seed(seed)
        B, T = tokens_BT.shape
        spread_B = (torch.arange(B) + torch.rand(B, generator=draw)) / B
        self.cut_B = 1 + (spread_B * (T - 1)).long()[torch.randperm(B, generator=draw)]
        others_BT = (tokens_BT + torch.randint(1, vocab_size, (B, T), generator=draw)) % vocab_size
        later_BT = torch.arange(T) >= self.cut_B[:, None]
        self.changed_BT = torch.where(later_BT, others_BT, tokens_BT).to(self.device)
        kept_B1 = torch.arange(B)[:, None] < (B + 1) // 2
        self.mixed_BT = torch.where(kept_B1, tokens_BT, others_BT).to(self.device)
        self.later_BT = later_BT.to(self.device)

    @functools.cached_property
    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        """To the tokens, with changes behind the cuts, and beside other rows."""
        asked = (self.tokens_BT, self.changed_BT, self.mixed_BT)
        for training in (True, False):
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

    def far(self, x_BTC: Tensor) -> Tensor:
        """How far each position is from the answer, against its size, shape (B, T)."""
        answer_BTC = self.answers[0]
        size_BT = answer_BTC.norm(dim=-1)
        return (x_BTC - answer_BTC).norm(dim=-1) / size_BT.clamp_min(size_BT.mean())

    @functools.cached_property
    def row_moves(self) -> Tensor:
        """How far the rows that stay the same move when others do not, shape (T,)."""
        kept = (len(self.tokens_BT) + 1) // 2
        return self.far(self.answers[2])[:kept].amax(0)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What a pass does to the mode and the buffers of a model is undone."""
    training = model.training
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        model.train(training)
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


def is_finite(passes: Passes) -> str:
    refuse_not_finite(passes.answers[0])
    return "all positions are finite"


def keeps_rows_apart(passes: Passes) -> str:
    moved, t = passes.row_moves.max(0)
    if not moved <= passes.most_far_row:
        raise Refuted(
            f"position {int(t)} of a row moves by {moved:.1e} with other rows",
            unless=("any shape",) if moved.isnan() else (),
        )
    return f"rows move by {moved:.0e} with other rows"


def sees_no_later_token(passes: Passes) -> str:
    if scores_itself(passes.model):
        raise Exempt("its nats may depend on the whole text: likelihood")
    far_BT = passes.far(passes.answers[1]).masked_fill(passes.later_BT, 0.0)
    row, t = divmod(int(far_BT.nan_to_num(torch.inf).argmax()), far_BT.shape[1])
    moved, cut = far_BT[row, t].item(), int(passes.cut_B[row])
    if not moved <= passes.most_far + NOISE * passes.row_moves.max().item():
        raise Refuted(
            f"position {t} moves by {moved:.1e} with the tokens from {cut} on",
            unless=("any shape",) if math.isnan(moved) else ("rows apart",),
        )
    return f"{len(far_BT)} cuts: earlier positions move by {moved:.0e}"


def takes_shorter_rows(passes: Passes) -> str:
    """Some lengths up to the whole; finite in eval mode too."""
    is_finite(passes)
    tokens_BT = passes.tokens_BT[:2]
    T = tokens_BT.shape[1]
    answer = _read_plainly(passes.model, tokens_BT)
    refuse_not_finite(answer)
    if scores_itself(passes.model):
        return "all positions are finite"
    largest = 0.0
    for length in sorted({max(1, T - 1), T // 2 + 1, max(1, T // 3), min(T, 5)}):
        moved = how_far(_read_plainly(passes.model, tokens_BT[:, :length]), answer[:, :length])
        largest = max(largest, moved)
        if not moved <= CLOSE:
            raise Refuted(
                f"the first {length} of {T} tokens alone give another answer, by {moved:.1e}",
                unless=("causal", "rows apart"),
            )
    return f"some prefixes of {T} tokens agree to {largest:.0e}"


def generates_as_it_reads(passes: Passes) -> str:
    """A long prompt, then one token at a time."""
    model = passes.model
    if scores_itself(model) or not takes_cache(model):
        raise Exempt("it takes no cache, so generation reads from the start")
    tokens_BT = passes.tokens_BT[:2]
    T = tokens_BT.shape[1]
    answer = _read_plainly(model, tokens_BT)
    cache, start, largest = Cache(), 0, 0.0
    for end in range(max(1, T - STEPS), T + 1):
        x_BTC = _read_plainly(model, tokens_BT[:, start:end], cache)
        if not cache.used:
            raise Exempt("it keeps nothing in the cache: generation reads from the start")
        cache.advance(end - start)
        moved = how_far(x_BTC, answer[:, start:end])
        largest = max(largest, moved)
        if not moved <= CLOSE:
            raise Refuted(
                f"a prompt of {max(1, T - STEPS)}, then one by one: position {end - 1} differs "
                f"from the full pass by {moved:.1e}",
                unless=("causal", "rows apart", "any shape"),
            )
        start = end
    return f"a prompt of {max(1, T - STEPS)} tokens, then one by one: to {largest:.0e}"


@torch.no_grad()
def _read_plainly(model: nn.Module, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
    """As generation reads: eval mode, in fp32."""
    options = {} if cache is None else {"cache": cache}
    with unchanged(model):
        model.eval()
        if scores_itself(model):
            torch.manual_seed(0)
            return model.log_likelihood(tokens_BT, tokens_BT.roll(-1, 1))[..., None].float()
        read = model.hidden if has_hidden(model) else model
        return read(tokens_BT, **options).float()


LEAKS = {"any shape": is_finite, "rows apart": keeps_rows_apart, "causal": sees_no_later_token}
AT_REAL_LENGTH = {"any shape": takes_shorter_rows, "cache": generates_as_it_reads}
