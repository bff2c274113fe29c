"""Proofs at a run's own size: some mistakes live at real lengths, widths and values only."""

import math
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from lmplay.model.abilities import draws_likelihood, follows_progress, scores_itself, set_progress
from lmplay.model.experiment import Experiment
from lmplay.proofs.double import rounding_of
from lmplay.proofs.leaks import LEAKS
from lmplay.proofs.passes import SHARE_OF_ENDS, SOME_ROWS, Passes
from lmplay.proofs.proof import EXACT, NO_MEMORY, Proof, how_far, most_telling, prove
from lmplay.proofs.real_size import REAL_SIZE, SHORT, STEPS
from lmplay.proofs.specimen import OPENINGS, Specimen, open_gates, randomise

# B rows, T positions

ROWS = 8
MOST_TOKENS = 8192  # in a pass, as in a micro-batch where memory cannot be probed
FEW_ROWS = 2  # of passes that are made for many states of a model
CALM = 3e-6  # of an answer to SHORT tokens, which is no more than usual of rounding
STRENGTHS = (1.0, 0.5, 0.25, 0.1, 0.0)  # to randomise with
PROGRESS = (0.0, 0.5, 0.8, 1.0)  # of a run, at which a model is looked at


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
        model = _randomised(experiment, config).to(device).train()
        if draws_likelihood(model):  # each row of which it reads several times
            tokens_BT = tokens_BT[:2]
    set_progress(model, 0.0)
    passes = Passes(experiment, model, config, tokens_BT)
    proofs, passes = prove_what_fits(LEAKS | REAL_SIZE, passes, "fp32")
    few = passes.again(tokens_BT=passes.tokens_BT[:FEW_ROWS])
    if low is not None:
        is_still = most_telling(proofs) is None and passes.nothing_moves
        some_BT = passes.tokens_BT[:SOME_ROWS]
        rough = passes.again(tokens_BT=some_BT, autocast=autocast, is_low=True, is_still=is_still)
        proofs += prove_what_fits(LEAKS, rough, precision)[0]
    proofs = _throughout_a_run(proofs, few)
    return _with_gates_open(proofs, few)


def _randomised(experiment: Experiment, config) -> nn.Module:
    """A model whose weights hide nothing, as far from its start as fp32 can still follow.

    Where multipliers multiply multipliers, numbers overflow, or rounding alone moves an answer.
    """
    tokens_BT = Specimen(experiment, config).tokens(B=1, T=min(SHORT, config.max_len))
    kept = None
    for strength in STRENGTHS:
        torch.manual_seed(0)
        model = randomise(experiment.model(config, seed=0), strength=strength)
        far = rounding_of(model, tokens_BT)
        if far <= CALM:
            return model
        if kept is None or not math.isfinite(kept[0]):
            kept = far, model
    return kept[1]


def prove_what_fits(claims: dict, passes: Passes, precision: str) -> tuple[list[Proof], Passes]:
    """Every claim, where memory does not suffice of half as many rows, then of shorter ones.

    Returns:
        What was found, and of which passes.
    """
    while True:
        size = "{} x {} tokens".format(*passes.tokens_BT.shape)
        proofs = [proof.at(f"{size} in {precision}") for proof in prove(claims, passes)]
        smaller_BT = _half(passes.tokens_BT)
        if all(proof.detail != NO_MEMORY for proof in proofs) or smaller_BT is None:
            return proofs, passes
        passes = passes.again(tokens_BT=smaller_BT)


def _half(tokens_BT: Tensor) -> Tensor | None:
    """Half of the rows, of which two are left; then half of each; None where nothing is left."""
    B, T = tokens_BT.shape
    if B > 2:
        return tokens_BT[: max(2, B // 2)]
    return tokens_BT[:, : T // 2] if T >= 2 * STEPS else None


def _throughout_a_run(proofs: list[Proof], passes: Passes) -> list[Proof]:
    """The same, but those fail that do so later in a run, where a model changes."""
    if not follows_progress(passes.model):
        return proofs
    before = None
    for progress in PROGRESS:
        set_progress(passes.model, progress)
        answer, _ = passes.read(passes.changed_BT, passes.training)
        if before is not None and not torch.equal(answer, before):
            proofs = _replaced(proofs, passes.again(), f"at progress {progress:g}", *LEAKS)
        before = answer
    return proofs


def _with_gates_open(proofs: list[Proof], passes: Passes) -> list[Proof]:
    """The same, but those fail that do so with every vector drawn anew and all counters on."""
    if scores_itself(passes.model):
        return proofs
    for opening in OPENINGS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            open_gates(passes.model, opening)
        opened = passes.again()
        with suppress(Exception):  # such as a counter that is an index
            asked = (opened.tokens_BT, opened.changed_BT)
            answer, changed = (opened.read(tokens_BT, opened.training)[0] for tokens_BT in asked)
            is_finite = answer.isfinite().all() and changed.isfinite().all()
            earlier_BT = ~opened.later_BT
            if is_finite and how_far(changed[earlier_BT], answer[earlier_BT]) > EXACT:
                proofs = _replaced(proofs, opened, "with its gates open", "rows apart", "causal")
    return proofs


def _replaced(proofs: list[Proof], passes: Passes, when: str, *names: str) -> list[Proof]:
    """The same, with those of these proofs that fail there instead of those that passed."""
    failed = [p for p in prove(LEAKS, passes) if p.passed is False]
    found = {p.name: p for p in failed if p.name in names}
    made = []
    for proof in proofs:
        if proof.passed and (now := found.pop(proof.name, None)):
            proof = replace(now, detail=f"{now.detail}, {when}").at(proof.where)
        made.append(proof)
    return made


def find_leak(passes: Passes) -> Proof | None:
    """The proof that fails on a model that is being trained; None where there is no leak."""
    looks = [passes, passes.again(training=False)]
    for looked in looks if passes.training else looks[1:]:
        mode = "training" if looked.training else "eval mode"
        for proof in prove_what_fits(LEAKS, looked, mode)[0]:
            if proof.passed is False:
                return proof
    return None
