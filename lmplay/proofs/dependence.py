"""Proofs about what a position depends on: its row's tokens so far, and nothing else."""

import math

import torch
from torch import Tensor, nn

from lmplay.proofs.double import in_double
from lmplay.proofs.proof import CLOSE, EXACT, Exempt, Refuted, how_far, nan_first
from lmplay.proofs.specimen import Specimen

# B rows, T positions

MANY = 64  # rows of a pass
CLOSE_IN_DOUBLE = 1e-8  # how far sums may differ by the order of additions, against their size
EXACT_IN_DOUBLE = 1e-11  # how far an earlier position may move in fp64, against the largest


def takes_any_shape(specimen: Specimen) -> str:
    model = specimen.randomised()
    tokens_BT = specimen.tokens(B=5)
    answer = specimen.outputs(model, tokens_BT)
    refuse_not_finite(answer)
    largest = 0.0
    for T in specimen.lengths():
        B = 1 + T % 5
        shorter = specimen.outputs(model, tokens_BT[:B, :T])
        if shorter.shape[:2] != (B, T):
            raise Refuted(f"{B} x {T} tokens give {tuple(shorter.shape)}")
        refuse_not_finite(shorter)
        if specimen.scores_itself:
            continue
        moved = how_far(shorter, answer[:B, :T])
        largest = max(largest, moved, key=nan_first)
        if not moved <= CLOSE:
            raise Refuted(
                f"the first {T} tokens alone give other logits, by {moved:.1e}",
                unless=("causal", "rows apart", "repeat", "modes"),
            )
    return f"T from 1 to {specimen.config.max_len}, B from 1 to 5; prefixes agree to {largest:.0e}"


def refuse_not_finite(x_BTC: Tensor) -> None:
    """Raise Refuted where a position is not finite, and say which is the first."""
    bad_T = (~x_BTC.isfinite()).flatten(2).any(-1).any(0)
    if bad_T.any():
        raise Refuted(f"not finite from position {int(bad_T.int().argmax())} of {x_BTC.shape[1]}")


def keeps_rows_apart(specimen: Specimen) -> str:
    tokens_BT = specimen.tokens(B=3)
    others_BT = specimen.others(tokens_BT)
    largest = 0.0
    for number, (mode, model) in enumerate(specimen.randomised_models()):
        answer = specimen.outputs(model, tokens_BT)
        draws = specimen.draws(model, tokens_BT)
        for row in range(3) if number == 0 else [1]:  # which has a row before and one behind it
            here = torch.arange(3)[:, None] == row
            mixed_BT = torch.where(here, tokens_BT, others_BT)
            mixed = specimen.outputs(model, mixed_BT)
            cases = {"with other rows": (how_far(mixed[row], answer[row]), EXACT)}
            if not draws:  # its random numbers depend on the number of rows
                alone = specimen.outputs(model, tokens_BT[row : row + 1])
                cases["alone"] = (how_far(alone[0], answer[row]), CLOSE)
            for case, (moved, allowed) in cases.items():
                largest = max(largest, moved, key=nan_first)
                if not moved <= allowed:
                    changed, before = specimen.afresh(model, mixed_BT, tokens_BT)
                    raise Refuted(
                        f"row {row} {case} moves by {moved:.1e} in {mode} mode",
                        unless=_causes(moved, how_far(changed[row], before[row])),
                    )
    _refuse_rows_of_a_large_batch(specimen)
    _refuse_rows_behind_gates(specimen, tokens_BT, others_BT)
    _refuse_objective_of_other_rows(specimen, model, tokens_BT, others_BT)
    return f"each of 3 rows with other rows and alone moves by {largest:.0e}"


def _refuse_rows_of_a_large_batch(specimen: Specimen) -> None:
    """What is done to so many rows only: groups of them, or their ranks."""
    few_BT = specimen.tokens(B=MANY, T=min(4, specimen.config.max_len))
    mixed_BT = torch.cat([few_BT[:1], specimen.others(few_BT[1:])])
    for training in (False, True):
        model = specimen.randomised().train(training)
        answer, mixed = (specimen.outputs(model, t)[0] for t in (few_BT, mixed_BT))
        if not (moved := how_far(mixed, answer)) <= EXACT:
            raise Refuted(
                f"row 0 moves by {moved:.1e} with {MANY - 1} other rows",
                unless=("any shape", "repeat"),
            )
    is_first = torch.arange(MANY)[:, None] == 0
    nats = [specimen.objective(model, t, t.roll(-1, 1), is_first) for t in (few_BT, mixed_BT)]
    if not abs(nats[1] - nats[0]) <= CLOSE * max(1.0, abs(nats[0])):
        raise Refuted(
            f"what training minimises for row 0 is {nats[1]:.4f} beside {MANY - 1} other rows, "
            f"not {nats[0]:.4f}",
            unless=("any shape", "repeat", "loss at start"),
        )


def _refuse_rows_behind_gates(specimen: Specimen, tokens_BT: Tensor, others_BT: Tensor) -> None:
    """In fp64, with every vector drawn anew."""
    if specimen.scores_itself:
        return
    mixed_BT = torch.cat([tokens_BT[:1], others_BT[1:]])
    for model in specimen.opened():
        try:
            with in_double(model) as wide:
                answer, mixed = (specimen.outputs(wide, t)[0] for t in (tokens_BT, mixed_BT))
        except Exception:  # it names a type of its own, or a counter is an index
            continue
        moved = how_far(mixed, answer)
        if answer.isfinite().all() and not moved <= EXACT_IN_DOUBLE:
            raise Refuted(
                f"row 0 moves by {moved:.1e} with other rows, in fp64, with its gates open",
                unless=("repeat", "any shape"),
            )


def keeps_two_rows_apart(specimen: Specimen) -> str:
    """As `keeps_rows_apart`, in a fiftieth of the time."""
    tokens_BT = specimen.tokens(B=3)
    mixed_BT = torch.cat([tokens_BT[:1], specimen.others(tokens_BT[1:])])
    model = specimen.randomised()
    answer, mixed = (specimen.outputs(model, t)[0] for t in (tokens_BT, mixed_BT))
    if not (moved := how_far(mixed, answer)) <= EXACT:
        raise Refuted(f"row 0 moves by {moved:.1e} with other rows", unless=("any shape", "repeat"))
    return f"a row with other rows moves by {moved:.0e}"


def _causes(moved: float, afresh: float) -> tuple[str, ...]:
    """What else may have moved it: nan, another row, or what another call left behind.

    Args:
        afresh: how far it moves alone, in two models that have not been asked anything.
    """
    if math.isnan(moved):
        return ("any shape",)
    return () if afresh > EXACT else ("repeat", "rows apart")


def _refuse_objective_of_other_rows(
    specimen: Specimen, model: nn.Module, tokens_BT: Tensor, others_BT: Tensor
) -> None:
    """What training minimises is a sum over rows, or its gradient would depend on micro-batches.

    In fp64, where a small term among large ones tells; in fp32, where that cannot be had.
    """
    try:
        with in_double(model) as wide:
            _compare_objectives(specimen, wide, tokens_BT, others_BT, CLOSE_IN_DOUBLE)
    except Refuted:
        raise
    except Exception:  # it names a type of its own
        _compare_objectives(specimen, model, tokens_BT, others_BT, CLOSE)


def _compare_objectives(
    specimen: Specimen, model: nn.Module, tokens_BT: Tensor, others_BT: Tensor, close: float
) -> None:
    targets_BT = tokens_BT.roll(-1, 1)
    suffers_from = ("repeat", "loss at start", "any shape")
    whole = specimen.objective(model, tokens_BT, targets_BT)
    is_row = torch.arange(len(tokens_BT))[:, None]
    parts = [
        specimen.objective(model, tokens_BT, targets_BT, only=is_row == row)
        for row in range(len(tokens_BT))
    ]
    mixed_BT = torch.where(is_row == 1, tokens_BT, others_BT)
    mixed = specimen.objective(model, mixed_BT, mixed_BT.roll(-1, 1), only=is_row == 1)
    if not abs(parts[1] - mixed) <= close * max(1.0, abs(mixed)):
        raise Refuted(
            f"what training minimises for a row is {mixed:.4f} beside other rows, not "
            f"{parts[1]:.4f}",
            unless=suffers_from,
        )
    if not abs(sum(parts) - whole) <= close * max(1.0, abs(whole)):
        raise Refuted(
            f"what training minimises is {whole:.4f} for 3 rows, {sum(parts):.4f} for one by one",
            unless=suffers_from,
        )
    if not specimen.draws_in_objective(model, tokens_BT):
        alone = specimen.objective(model, tokens_BT[:1], targets_BT[:1])
        if not abs(alone - parts[0]) <= close * max(1.0, abs(alone)):
            raise Refuted(
                f"what training minimises for row 0 is {alone:.4f} alone, {parts[0]:.4f} of 3",
                unless=suffers_from,
            )


def sees_no_later_token(specimen: Specimen) -> str:
    if specimen.scores_itself:
        return _likelihood_sees_no_later_token(specimen)
    cuts = specimen.lengths()[:-1]
    largest, least = 0.0, math.inf
    for mode, model in specimen.randomised_models():
        earlier, later = _moves(specimen, mode, model)
        largest, least = max(largest, earlier, key=nan_first), min(least, later)
        if not least > CLOSE:
            raise Refuted(
                "the tokens behind a cut move nothing: the proof would be empty",
                unless=("any shape",),
            )
    found = (
        f"{len(cuts)} cuts, 2 draws of weights, both modes: earlier positions move by "
        f"{largest:.0e}, later ones by {least:.0e}"
    )
    return f"{found}; {_sees_no_later_token_in_double(specimen)}"


def looks_no_further(specimen: Specimen) -> str:
    """As `sees_no_later_token`, in a fiftieth of the time."""
    if specimen.scores_itself:
        return "it has its own log_likelihood"
    earlier, _ = _moves(specimen, "eval", specimen.randomised())
    return f"earlier positions move by {earlier:.0e}"


def _moves(specimen: Specimen, mode: str, model: nn.Module) -> tuple[float, float]:
    """How far positions before a cut move, and the last ones behind it: a row for each cut.

    Raises:
        Refuted: one before a cut moves.
    """
    cuts, later_BT = _cuts(specimen)
    tokens_BT = specimen.tokens(B=len(cuts))
    changed_BT = torch.where(later_BT, specimen.others(tokens_BT), tokens_BT)
    answer, changed = (specimen.outputs(model, t) for t in (tokens_BT, changed_BT))
    far_BT = (changed - answer).abs().flatten(2).amax(-1) / max(1.0, answer.abs().max().item())
    is_leak_BT = ~(far_BT <= EXACT) & ~later_BT
    if is_leak_BT.any():
        row, t = divmod(int(is_leak_BT.int().argmax()), far_BT.shape[1])
        pair = (tokens_BT[row : row + 1], changed_BT[row : row + 1])
        alone = how_far(*specimen.afresh(model, *pair, slice(t, t + 1)))
        raise Refuted(
            f"position {t} moves by {far_BT[row, t]:.1e} with the tokens from {cuts[row]} on, "
            f"in {mode} mode",
            unless=_causes(far_BT[row, t].item(), alone),
        )
    earlier = far_BT.masked_fill(later_BT, 0.0).max().item()
    return earlier, far_BT.masked_fill(~later_BT, 0.0).amax(1).median().item()


def _cuts(specimen: Specimen) -> tuple[list[int], Tensor]:
    """Where the rows are cut, and what is behind that, shape (B, T)."""
    cuts = specimen.lengths()[:-1]
    return cuts, torch.arange(specimen.config.max_len) >= torch.tensor(cuts)[:, None]


def _sees_no_later_token_in_double(specimen: Specimen) -> str:
    """One row for each cut; also with every vector drawn anew, which opens gates that are shut."""
    cuts, later_BT = _cuts(specimen)
    rows_BT = specimen.tokens(B=1).expand(len(cuts), -1)
    changed_BT = torch.where(later_BT, specimen.others(rows_BT), rows_BT)
    models = [*specimen.randomised_models(), *(("eval", model) for model in specimen.opened())]
    largest = 0.0
    for mode, model in models:
        try:
            with in_double(model) as wide:
                answer, changed = (specimen.outputs(wide, t) for t in (rows_BT, changed_BT))
        except Exception as error:  # it names a type of its own
            return f"not proved in fp64: {type(error).__name__}"
        if not answer.isfinite().all():
            continue
        far_BT = (changed - answer).abs().flatten(2).amax(-1).masked_fill(later_BT, 0.0)
        moved = far_BT.max().item() / max(1.0, answer.abs().max().item())
        largest = max(largest, moved, key=nan_first)
        if not moved <= EXACT_IN_DOUBLE:
            row, t = divmod(int(far_BT.argmax()), far_BT.shape[1])
            raise Refuted(
                f"position {t} moves by {moved:.1e} with the tokens from {cuts[row]} on, "
                f"in fp64, in {mode} mode",
                unless=("repeat", "rows apart"),
            )
    return f"in fp64 by {largest:.0e}"


def _likelihood_sees_no_later_token(specimen: Specimen) -> str:
    """A likelihood may look at the whole text, if it is one; then Kraft's sum says that it is."""
    model = specimen.randomised()
    tokens_BT = specimen.tokens(B=3)
    if specimen.draws(model, tokens_BT):
        raise Exempt("its likelihood draws numbers, and may look at the whole text")
    answer = specimen.outputs(model, tokens_BT)
    T = tokens_BT.shape[1]
    for cut in specimen.lengths()[1:-1]:
        others_BT = torch.cat([tokens_BT[:, :cut], specimen.others(tokens_BT[:, cut:])], dim=1)
        changed = specimen.outputs(model, others_BT)
        moved = how_far(changed[:, : cut - 1], answer[:, : cut - 1])  # cut - 1 has another target
        if not moved <= EXACT:
            found = f"nats before position {cut} move by {moved:.1e} with the tokens from there on"
            if specimen.likelihood.is_one:
                raise Exempt(f"{found}, as those of a whole text may")
            raise Refuted(f"{found}, and their probabilities sum to more than 1")
    return f"no target's nats among {T} move with later tokens"
