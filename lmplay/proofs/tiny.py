"""What can be proved of an experiment in seconds, at the size of its TINY."""

from collections.abc import Callable
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
    ruler,
    source,
    stacking,
    state,
    weights,
)
from lmplay.proofs.proof import Exempt, Proof, Refuted, prove
from lmplay.proofs.proof_cache import remembered
from lmplay.proofs.specimen import Specimen, throughout

Values = dict[str, object]
Claim = Callable[[Specimen], str]
MOST_PARAMETERS, MOST_TOKENS = 200_000, 64  # of what is proved with values that TINY hides
WITH_HIDDEN = {"any shape", "rows apart", "causal", "head", "cache"}

PROOFS = {
    "imports": source.imports_torch_only,
    "changed from": source.says_what_changed,
    "only weights": weights.holds_only_weights,
    "no float64": placement.has_no_float64,
    "placement": placement.follows_its_tokens,
    "loss at start": throughout(learning.starts_finite),
    "terms": throughout(learning.begins_with_the_ruler),
    "repeat": state.keeps_nothing,
    "seed": weights.repeats_by_seed,
    "state dict": weights.is_its_state,
    "modes": throughout(equivalences.trains_as_it_is_tested),
    "any shape": throughout(dependence.takes_any_shape),
    "rows apart": throughout(dependence.keeps_rows_apart, dependence.keeps_two_rows_apart),
    "causal": throughout(dependence.sees_no_later_token, dependence.looks_no_further),
    "head": throughout(equivalences.has_one_head),
    "cache": throughout(equivalences.generates_as_it_reads),
    "fold": throughout(equivalences.folds_without_a_trace),
    "gradients": learning.trains_every_weight,
    "learns": learning.learns_a_batch,
    "shift": learning.predicts_the_next_token,
    "optimizer": learning.can_be_optimised,
    "likelihood": ruler.sums_to_one,
    "ruler": ruler.is_the_rulers,
}


def checked(experiment: Experiment, values: Values | None = None) -> list[Proof]:
    """The proofs of `check`, from memory where this very experiment has passed them all before."""
    values = values or {}
    return remembered(depends_on(experiment, values), lambda: check(experiment, values))


def depends_on(experiment: Experiment, values: Values | None = None) -> list[object]:
    """What the proofs of an experiment depend on besides lmplay and torch."""
    values = values or {}
    config = experiment.config(**values | experiment.tiny)
    hidden = sorted(hidden_by_tiny(experiment, values).items())
    return [experiment.source, config, hidden, *_sources(experiment.entry)]


def check(experiment: Experiment, values: Values | None = None) -> list[Proof]:
    """Every proof, at tiny size on the CPU, whatever the others find.

    The Config is the file's own with the variant's values and the given ones, then TINY's over
    them, so that none can bring back a large scale; dropout is 0. What TINY hides of them is
    proved with one more specimen, as far as that stays small. Nothing outside is touched: torch's
    random state is put back.

    Args:
        values: of Config, which a run would have.
    Raises:
        UserError: the file has no TINY, or its Config refuses it.
    """
    values = values or {}
    specimen = Specimen.tiny(experiment, **values | experiment.tiny)
    claims = dict(PROOFS)
    if experiment.entry.ideas:
        claims["ideas"] = stacking.holds_every_idea
    if hidden := hidden_by_tiny(experiment, values):
        shown = _affordable(experiment, values, hidden)
        if shown:
            other = Specimen.tiny(experiment, **values | experiment.tiny | shown)
            for name in claims.keys() & WITH_HIDDEN:
                claims[name] = _also_of(claims[name], other, _said(shown))
        claims["values"] = lambda _: _says_what_is_hidden(shown, hidden)
    return prove(claims, specimen)


def hidden_by_tiny(experiment: Experiment, values: Values) -> Values:
    """Those of a variant, or asked for, instead of which a proof at tiny size uses TINY's."""
    wanted, tiny = experiment.variant | values, experiment.tiny
    return {key: v for key, v in wanted.items() if key in tiny and tiny[key] != v}


def _affordable(experiment: Experiment, values: Values, hidden: Values) -> Values:
    """Of the hidden values, those that can be proved with in about the same time."""
    shown: Values = {}
    for key, value in hidden.items():
        tried = values | experiment.tiny | shown | {key: value}
        try:
            config = experiment.config(**tried)
            model = experiment.model(config, device="meta")
        except Exception:  # which other values would be needed for
            continue
        num = sum(weight.numel() for weight in model.parameters())
        if num <= MOST_PARAMETERS and config.max_len <= MOST_TOKENS:
            shown[key] = value
    return shown


def _also_of(claim: Claim, other: Specimen, said: str) -> Claim:
    def claim_of_both(specimen: Specimen) -> str:
        found = claim(specimen)
        try:
            claim(other)
        except Refuted as why:
            raise Refuted(f"with {said}: {why}", why.unless) from None
        return found

    return claim_of_both


def _says_what_is_hidden(shown: Values, hidden: Values) -> str:
    left = {key: value for key, value in hidden.items() if key not in shown}
    if left:
        raise Exempt(f"not proved here with {_said(left)}: TINY has other values")
    return f"proved with {_said(shown)} too"


def _said(values: Values) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _sources(entry: Entry) -> list[str]:
    """The other files that its proofs look at: ideas of a stack, the parent, what it folds to."""
    others = [*entry.ideas, catalog.parent_of(entry)]
    with suppress(Refuted, UserError):  # it folds to nothing
        others.append(equivalences.folds_to(entry))
    return [f"{other.source}\0{other.variant}" for other in others if other is not None]
