"""Looks for leaks in the model that is being trained: gates open, counters count."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lmplay.data.batches import Data
from lmplay.disk import make_folder, write_json
from lmplay.errors import UserError
from lmplay.plan import Plan
from lmplay.proofs.at_size import find_leak, num_rows
from lmplay.proofs.passes import Passes
from lmplay.proofs.proof import Refuted
from lmplay.proofs.ruler import refuse_other_functions
from lmplay.roots import cache_root
from lmplay.run.rng import unchanged_rng
from lmplay.run.run import Run

# B rows, T positions

SHARE = 0.015  # of what training computes, at most


class Leaked(UserError):
    """A position saw later tokens, or a row another: what was measured is not worth comparing."""


def refuse_leak(run: Run, data: Data, is_last: bool) -> None:
    """Stop a run whose model, as it is now, answers by tokens that it must not see.

    Three forward passes over validation text in training mode and three in eval mode: each row
    with other tokens from a cut of its own on, and beside other rows. They cost at most what two
    steps on as many rows do; where validations follow one another so closely that this would be
    more than SHARE, only the first and the last one look. Torch's functions and lmplay's are what
    they were.

    Raises:
        Leaked: with the step, the position and the cut.
    """
    rows = rows_to_look_at(run, is_last)
    if not rows:
        return
    try:
        refuse_other_functions()
    except Refuted as why:
        raise Leaked(
            f"{run.experiment.name} is measured by another ruler at step {run.step}: {why}",
            hint="an experiment calls torch's functions and replaces none",
        ) from None
    model = run.whole_model()
    with unchanged_rng():
        passes = Passes(
            run.experiment,
            model,
            run.config,
            text_rows(data, rows),
            run.accelerator.autocast,
            run.accelerator.mixed_precision != "no",
            seed=run.step,
        )
        proof = find_leak(passes)
    if proof is not None:
        raise Leaked(
            f"{run.experiment.name} leaks at step {run.step}: {proof.name}: {proof.detail} "
            f"({proof.where})",
            hint="its checkpoints are kept, and no verdict takes the run",
        )


def rows_to_look_at(run: Run, is_last: bool) -> int:
    """How many rows training can afford between two validations; 0 for no look."""
    T, every = run.config.max_len, run.plan.validation.every_tokens
    affordable = min(num_rows(T), int(SHARE * every / T / 2))
    if affordable >= 2:
        return affordable
    return 2 if run.step == 0 or is_last else 0


def keep_rows(plan: Plan, tokens_BT: Tensor) -> None:
    """Remember some of a plan's text, so that a check need not prepare it."""
    path = _rows_file(plan)
    with suppress(OSError):  # then a check draws tokens
        make_folder(path.parent)
        write_json(path, tokens_BT.tolist())


def kept_rows(plan: Plan) -> Tensor | None:
    """Some of a plan's validation text, where it was prepared; else None."""
    with suppress(OSError, ValueError, TypeError):
        return torch.tensor(json.loads(_rows_file(plan).read_text(encoding="utf-8")))
    return None


def _rows_file(plan: Plan) -> Path:
    of = plan.model_dump_json(include={"tokenizer", "sequence_length", "datasets", "validation"})
    return cache_root() / "rows" / f"{hashlib.sha256(of.encode()).hexdigest()}.json"


def text_rows(data: Data, rows: int) -> Tensor:
    """Validation text with its end markers, again from its beginning where it has fewer rows."""
    tokens_BT = next(data.validation_batches(rows)).tokens_BT
    return torch.cat([tokens_BT] * -(-rows // len(tokens_BT)))[:rows]
