"""Proofs about what a position depends on: its row's tokens so far, and nothing else."""

import math

import torch

from lmplay.proofs.proof import CLOSE, EXACT, Exempt, Refuted, how_far, nan_first
from lmplay.proofs.specimen import Specimen

# B rows, T positions


def takes_any_shape(specimen: Specimen) -> str:
    model = specimen.randomised()
    tokens_BT = specimen.tokens(B=5)
    answer = specimen.outputs(model, tokens_BT)
    largest = 0.0
    for T in specimen.lengths():
        B = 1 + T % 5
        shorter = specimen.outputs(model, tokens_BT[:B, :T])
        if shorter.shape[:2] != (B, T):
            raise Refuted(f"{B} x {T} tokens give {tuple(shorter.shape)}")
        if specimen.scores_itself:
            if not shorter.isfinite().all():
                raise Refuted(f"not finite for {B} x {T} tokens")
            continue
        moved = how_far(shorter, answer[:B, :T])
        largest = max(largest, moved, key=nan_first)
        if not moved <= CLOSE:
            raise Refuted(f"the first {T} tokens alone give other logits, by {moved:.1e}")
    return f"T from 1 to {specimen.config.max_len}, B from 1 to 5; prefixes agree to {largest:.0e}"


def keeps_rows_apart(specimen: Specimen) -> str:
    tokens_BT = specimen.tokens(B=3)
    others_BT = specimen.others(tokens_BT)
    largest = 0.0
    for mode, model in specimen.randomised_models():
        answer = specimen.outputs(model, tokens_BT)
        for row in range(3):
            here = torch.arange(3)[:, None] == row
            mixed = specimen.outputs(model, torch.where(here, tokens_BT, others_BT))
            cases = {"with other rows": (how_far(mixed[row], answer[row]), EXACT)}
            if not specimen.scores_itself:  # its random numbers depend on the number of rows
                alone = specimen.outputs(model, tokens_BT[row : row + 1])
                cases["alone"] = (how_far(alone[0], answer[row]), CLOSE)
            for case, (moved, allowed) in cases.items():
                largest = max(largest, moved, key=nan_first)
                if not moved <= allowed:
                    raise Refuted(f"row {row} {case} moves by {moved:.1e} in {mode} mode")
    return f"each of 3 rows with other rows and alone moves by {largest:.0e}"


def sees_no_later_token(specimen: Specimen) -> str:
    if specimen.scores_itself:
        raise Exempt("it has its own log_likelihood")
    tokens_BT = specimen.tokens(B=3)
    cuts = specimen.lengths()[:-1]
    largest, least = 0.0, math.inf
    for mode, model in specimen.randomised_models():
        answer = specimen.outputs(model, tokens_BT)
        for cut in cuts:
            others_BT = torch.cat([tokens_BT[:, :cut], specimen.others(tokens_BT[:, cut:])], dim=1)
            changed = specimen.outputs(model, others_BT)
            for t in range(cut):
                moved = how_far(changed[:, t], answer[:, t])
                largest = max(largest, moved, key=nan_first)
                if not moved <= EXACT:
                    raise Refuted(
                        f"position {t} moves by {moved:.1e} with the tokens from {cut} on, "
                        f"in {mode} mode"
                    )
            moved = how_far(changed[:, cut:], answer[:, cut:])
            least = min(least, moved)
            if not moved > CLOSE:
                raise Refuted(f"the tokens from {cut} on move nothing: the proof would be empty")
    return (
        f"{len(cuts)} cuts, 2 draws of weights, both modes: earlier positions move by "
        f"{largest:.0e}, later ones by {least:.0e} or more"
    )
