"""What can be proved of an experiment in seconds, at the size of its TINY."""

from contextlib import suppress

from lmplay.catalog import entries as catalog
from lmplay.catalog.entry import Entry
from lmplay.errors import UserError
from lmplay.model.experiment import Experiment
from lmplay.proofs import (
    dependence,
    equivalences,
    learning,
    placement,
    source,
    stacking,
    weights,
)
from lmplay.proofs.proof import Proof, Refuted, prove
from lmplay.proofs.proof_cache import remembered
from lmplay.proofs.specimen import Specimen, throughout

PROOFS = {
    "imports": source.imports_torch_only,
    "changed from": source.says_what_changed,
    "only weights": weights.holds_only_weights,
    "no float64": placement.has_no_float64,
    "placement": placement.follows_its_tokens,
    "loss at start": throughout(learning.starts_finite),
    "terms": throughout(learning.begins_with_the_ruler),
    "seed": weights.repeats_by_seed,
    "state dict": weights.is_its_state,
    "modes": throughout(equivalences.trains_as_it_is_tested),
    "any shape": throughout(dependence.takes_any_shape),
    "rows apart": throughout(dependence.keeps_rows_apart),
    "causal": throughout(dependence.sees_no_later_token),
    "head": throughout(equivalences.has_one_head),
    "cache": throughout(equivalences.generates_as_it_reads),
    "fold": throughout(equivalences.folds_without_a_trace),
    "gradients": learning.trains_every_weight,
    "learns": learning.learns_a_batch,
    "shift": learning.predicts_the_next_token,
}


def checked(experiment: Experiment) -> list[Proof]:
    """The proofs of `check`, from memory where this very experiment has passed them all before."""
    return remembered(depends_on(experiment), lambda: check(experiment))


def depends_on(experiment: Experiment) -> list[object]:
    """What the proofs of an experiment depend on besides lmplay and torch."""
    return [experiment.source, experiment.config(**experiment.tiny), *_sources(experiment.entry)]


def check(experiment: Experiment) -> list[Proof]:
    """Every proof, at tiny size on the CPU, whatever the others find.

    The Config is the file's own with the variant's values, then TINY's over them, so that a
    variant cannot bring back a large scale; every value with "dropout" in its name is 0. Nothing
    outside is touched: torch's random state is put back.

    Raises:
        UserError: the file has no TINY, or its Config refuses it.
    """
    of_stack = {"ideas": stacking.holds_every_idea} if experiment.entry.ideas else {}
    return prove(PROOFS | of_stack, Specimen(experiment))


def _sources(entry: Entry) -> list[str]:
    """The other files that its proofs look at: ideas of a stack, the parent, what it folds to."""
    others = [*entry.ideas, catalog.parent_of(entry)]
    with suppress(Refuted, UserError):  # it folds to nothing
        others.append(equivalences.folds_to(entry))
    return [f"{other.source}\0{other.variant}" for other in others if other is not None]
