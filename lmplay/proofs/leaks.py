"""Proofs that no position depends on later tokens or another row, of a model of any size.

Two passes show every leak from later tokens, each row with other tokens from a cut of its own on;
one more shows every leak between rows. They are made before training, and of a live model too.
"""

import math

import torch

from lmplay.model.abilities import scores_itself
from lmplay.model.experiment import Experiment
from lmplay.proofs.dependence import refuse_not_finite
from lmplay.proofs.passes import Passes
from lmplay.proofs.proof import EXACT, Exempt, Refuted, how_far
from lmplay.proofs.specimen import Specimen

# B rows, T positions, V vocabulary

LEAST = 0.01  # nats, or of a sum, that are no mistake ...
SIGMAS = 5  # ... nor is so many times the standard error
NOISE = 4  # times what a row moves by itself


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


LEAKS = {
    "any shape": is_finite,
    "rows apart": keeps_rows_apart,
    "causal": sees_no_later_token,
    "likelihood": codes_no_noise,
}
