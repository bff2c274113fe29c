"""What is proved at a run's own size: mistakes that live at real lengths, widths and values only.

Two passes show every leak from later tokens, each row with other tokens from a cut of its own on;
one more shows every leak between rows.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from lmplay.model.abilities import (
    any_folds,
    draws_likelihood,
    has_hidden,
    scores_itself,
    takes_cache,
)
from lmplay.model.cache import Cache
from lmplay.model.experiment import Experiment
from lmplay.model.folding import folded
from lmplay.proofs.dependence import refuse_not_finite
from lmplay.proofs.passes import SHARE_OF_ENDS, Passes
from lmplay.proofs.proof import CLOSE, EXACT, NO_MEMORY, Exempt, Proof, Refuted, how_far, prove
from lmplay.proofs.specimen import OPENINGS, Specimen, open_gates, randomise, unchanged

# B rows, T positions, C model width

ROWS = 8
MOST_TOKENS = 8192  # in a pass, as in a micro-batch where memory cannot be probed
STEPS = 6  # behind a cached prompt
OPENED_ROWS = 3
SHORT = 32  # tokens of a row whose gradients are compared
ROUNDING = 1e-5  # of the largest gradient: less may be of a weight that norms take back
LEAST = 0.01  # nats, or of a sum, that are no mistake ...
SIGMAS = 5  # ... nor is so many times the standard error
NOISE = 4  # times what a row moves by itself


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

    end = getattr(config, "end", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if tokens_BT is None:
            tokens_BT = Specimen(experiment, config).tokens(B=num_rows(config.max_len))
        elif end is not None:  # which a few rows of text need not have
            tokens_BT = tokens_BT.masked_fill(torch.rand(tokens_BT.shape) < SHARE_OF_ENDS, end)
        model = randomise(experiment.model(config, seed=0)).to(device).train()
        if draws_likelihood(model):  # each row of which it reads several times
            tokens_BT = tokens_BT[:2]
    exact = Passes(experiment, model, config.vocab_size, tokens_BT, end=end)
    proofs = prove_what_fits(LEAKS | AT_REAL_LENGTH, exact, "fp32")
    if low is not None:
        rough = exact.again(autocast=autocast, is_low=True)
        proofs += prove_what_fits(LEAKS, rough, precision)
    return _with_gates_open(proofs, exact.again(tokens_BT=tokens_BT[:OPENED_ROWS]))


def prove_what_fits(claims: dict, passes: Passes, precision: str) -> list[Proof]:
    """Every claim, where memory does not suffice of half as many rows, then of shorter ones."""
    while True:
        size = "{} x {} tokens".format(*passes.tokens_BT.shape)
        proofs = [proof.at(f"{size} in {precision}") for proof in prove(claims, passes)]
        smaller_BT = _half(passes.tokens_BT)
        if all(proof.detail != NO_MEMORY for proof in proofs) or smaller_BT is None:
            return proofs
        passes = passes.again(tokens_BT=smaller_BT)


def _half(tokens_BT: Tensor) -> Tensor | None:
    """Half of the rows, of which two are left; then half of each; None where nothing is left."""
    B, T = tokens_BT.shape
    if B > 2:
        return tokens_BT[: max(2, B // 2)]
    return tokens_BT[:, : T // 2] if T >= 2 * STEPS else None


def _with_gates_open(proofs: list[Proof], passes: Passes) -> list[Proof]:
    """The same, but the causal proof fails where it does so with every vector drawn anew."""
    if scores_itself(passes.model) or _first_causal(proofs) is None:
        return proofs
    for ends in OPENINGS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            open_gates(passes.model, ends)
        opened = passes.again()
        (found,) = prove({"causal": _sees_nothing_or_no_later_token}, opened)
        if found.passed is False and all(x_BTC.isfinite().all() for x_BTC in opened.answers):
            told = replace(found, detail=f"{found.detail}, with its gates open")
            return [told.at(p.where) if p == _first_causal(proofs) else p for p in proofs]
    return proofs


def _sees_nothing_or_no_later_token(passes: Passes) -> str:
    """In two passes where nothing moves, as nearly always."""
    asked = (passes.tokens_BT, passes.changed_BT)
    answer, changed = (passes.read(tokens_BT, passes.training)[0] for tokens_BT in asked)
    if how_far(changed[~passes.later_BT], answer[~passes.later_BT]) <= EXACT:
        return "nothing moves"
    return sees_no_later_token(passes)


def _first_causal(proofs: list[Proof]) -> Proof | None:
    return next((p for p in proofs if p.name == "causal" and p.passed), None)


def find_leak(passes: Passes) -> Proof | None:
    """The proof that fails on a model that is being trained; None where there is no leak."""
    looks = [passes, passes.again(training=False)]
    for looked in looks if passes.training else looks[1:]:
        for proof in prove_what_fits(LEAKS, looked, "training" if looked.training else "eval mode"):
            if proof.passed is False:
                return proof
    return None


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
    later_BT = passes.later_BT
    if scores_itself(passes.model):
        if passes.draws or _looks_at_the_whole_text(passes.experiment):
            raise Exempt("its nats may depend on the whole text: likelihood")
        later_BT = later_BT | later_BT.roll(-1, 1)  # the last before a cut has another target
    far_BT = passes.far(passes.answers[1]).masked_fill(later_BT, 0.0)
    row, t = divmod(int(far_BT.nan_to_num(torch.inf).argmax()), far_BT.shape[1])
    moved, cut = far_BT[row, t].item(), int(passes.cut_B[row])
    if not moved <= passes.most_far + NOISE * passes.row_moves.max().item():
        raise Refuted(
            f"position {t} moves by {moved:.1e} with the tokens from {cut} on",
            unless=("any shape",) if math.isnan(moved) else ("rows apart",),
        )
    return f"{len(far_BT)} cuts: earlier positions move by {moved:.0e}"


def _looks_at_the_whole_text(experiment: Experiment) -> bool:
    """Whether nats at tiny size move with later tokens, which a likelihood's may."""
    specimen = Specimen.tiny(experiment)
    model, tokens_BT = specimen.randomised(), specimen.tokens(B=3)
    changed_BT = torch.cat([tokens_BT[:, :-1], specimen.others(tokens_BT[:, -1:])], dim=1)
    answer, changed = (specimen.outputs(model, t)[:, :-2] for t in (tokens_BT, changed_BT))
    return not how_far(changed, answer) <= EXACT


def codes_no_noise(passes: Passes) -> str:
    """A likelihood of its own needs as many nats as there are, where tokens are drawn by chance.

    They are drawn as often as each is in the text, so that a model which sees its targets says so
    once it has learned to look. Source: Gibbs' inequality.
    """
    if not scores_itself(passes.model):
        raise Exempt("it has no log_likelihood")
    B, T = passes.tokens_BT.shape
    counts_V = passes.tokens_BT.flatten().bincount(minlength=passes.vocab_size).float()
    counts_V = counts_V.cpu() + 1e-3
    draw = torch.Generator().manual_seed(passes.seed)
    drawn_BT = counts_V.multinomial(B * (T + 1), True, generator=draw).view(B, T + 1)
    nats_BT, _ = passes.nats(drawn_BT.to(passes.device))
    more_BT = nats_BT.double().cpu() + (counts_V / counts_V.sum()).log()[drawn_BT[:, 1:]]
    more_B = more_BT.mean(1)  # of a row, whose nats may lean on one another
    error = max(more_B.std().item() / B**0.5, more_BT.std().item() / (B * T) ** 0.5)
    found = f"{more_B.mean():+.3f} nats beyond the entropy of drawn tokens"
    if not more_B.mean().item() >= -LEAST - SIGMAS * error:
        raise Refuted(f"{found}: it sees what it is asked", unless=("rows apart", "any shape"))
    return f"{found}; {_sums_to_one(passes)}"


def _sums_to_one(passes: Passes) -> str:
    """Of each token by itself, where later ones move no nats: as Kraft's sum, at a real V."""
    if passes.draws or _looks_at_the_whole_text(passes.experiment):
        return "those of a whole text"
    B, T = passes.tokens_BT.shape
    draw = torch.Generator().manual_seed(passes.seed)
    drawn_BT = torch.randint(passes.vocab_size, (B, T + 1), generator=draw)
    nats_BT, _ = passes.nats(drawn_BT.to(passes.device))
    sums_BT = passes.vocab_size * (-nats_BT.double()).exp()
    total, error = sums_BT.mean().item(), sums_BT.std().item() / (B * T) ** 0.5
    if not total <= 1 + LEAST + SIGMAS * error:
        raise Refuted(f"the probabilities of a next token sum to {total:.2f}")
    return f"those of a next token sum to {total:.2f}"


def trains_at_its_length(passes: Passes) -> str:
    """All gradients are finite, and what short rows give more than rounding, long ones move too."""
    T = passes.tokens_BT.shape[1]
    long, short = (passes.gradients(length) for length in (T, min(T, SHORT)))
    for name, size in long.items():
        if not math.isfinite(size):
            raise Refuted(f"the gradient of {name} is not finite", unless=("any shape",))
        if size == 0 and short[name] > ROUNDING * max(short.values()):
            raise Refuted(f"{name} gets a gradient from {SHORT} tokens in a row, but not from {T}")
    return f"{len(long)} gradients of rows of {T} tokens are finite"


def folds_without_a_trace(passes: Passes) -> str:
    if not any_folds(passes.model):
        raise Exempt("nothing folds")
    tokens_BT = passes.tokens_BT[:1]
    answer = _read_plainly(passes.model, tokens_BT, whole=True)
    plain = folded(passes.model).eval()
    moved = how_far(_read_plainly(plain, tokens_BT, whole=True), answer)
    if not moved <= CLOSE:
        raise Refuted(f"folding moves the logits by {moved:.1e}", unless=("any shape", "repeat"))
    return f"folding moves the logits by {moved:.0e}"


def takes_shorter_rows(passes: Passes) -> str:
    """Some lengths up to the whole; finite in eval mode too."""
    is_finite(passes)
    tokens_BT = passes.tokens_BT[:2]
    T = tokens_BT.shape[1]
    if scores_itself(passes.model):
        return "all positions are finite"
    answer = _read_plainly(passes.model, tokens_BT)
    refuse_not_finite(answer)
    largest = 0.0
    lengths = {T - 1, T // 2, T // 2 + 1, T // 3, 5}
    for length in sorted(length for length in lengths if 0 < length <= T):
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
    largest = 0.0
    prompts = sorted({max(1, T // 2 - STEPS // 2), max(1, T - STEPS)})
    for prompt in prompts:
        cache, start = Cache(), 0
        for end in range(prompt, min(T, prompt + STEPS) + 1):
            x_BTC = _read_plainly(model, tokens_BT[:, start:end], cache)
            if not cache.used:
                raise Exempt("it keeps nothing in the cache: generation reads from the start")
            cache.advance(end - start)
            moved = how_far(x_BTC, answer[:, start:end])
            largest = max(largest, moved)
            if not moved <= CLOSE:
                raise Refuted(
                    f"a prompt of {prompt}, then one by one: position {end - 1} differs from the "
                    f"full pass by {moved:.1e}",
                    unless=("causal", "rows apart", "any shape"),
                )
            start = end
    said = " and ".join(map(str, prompts))
    return f"a prompt of {said} tokens, then one by one: to {largest:.0e}"


@torch.no_grad()
def _read_plainly(
    model: nn.Module, tokens_BT: Tensor, cache: Cache | None = None, whole: bool = False
) -> Tensor:
    """As generation reads: eval mode, in fp32; the whole way to logits, or to what a head reads."""
    options = {} if cache is None else {"cache": cache}
    with unchanged(model):
        model.eval()
        if scores_itself(model):
            torch.manual_seed(0)
            return model.log_likelihood(tokens_BT, tokens_BT.roll(-1, 1))[..., None].float()
        read = model.hidden if has_hidden(model) and not whole else model
        return read(tokens_BT, **options).float()


LEAKS = {
    "any shape": is_finite,
    "rows apart": keeps_rows_apart,
    "causal": sees_no_later_token,
    "likelihood": codes_no_noise,
}
AT_REAL_LENGTH = {
    "any shape": takes_shorter_rows,
    "cache": generates_as_it_reads,
    "gradients": trains_at_its_length,
    "fold": folds_without_a_trace,
}
