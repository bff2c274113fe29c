"""The size of one run's model: what its plan, its variant and the command line ask of Config."""

import dataclasses
from dataclasses import dataclass

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError, nearest
from lmplay.model.experiment import Experiment
from lmplay.plan import Plan


@dataclass(frozen=True)
class Scale:
    """A Config for one run, and how it stands to its plan."""

    config: object
    differs: dict[str, list]  # key: [the plan's value, this run's]; None where Config lacks the key


def scale(
    experiment: Experiment, plan: Plan, vocab_size: int, end: int, changes: dict[str, object]
) -> Scale:
    """The Config of a run: the file's values, then the plan's, the variant's, those of `--set`.

    Args:
        vocab_size, end: of the tokenizer: its size, and the token that ends a document.
    Raises:
        UserError: the plan scales what the baseline does not have, Config refuses a value, or no
            model can be made with it.
    """
    known = resolve("gpt2ish").fields
    for key in plan.model:
        if key not in known:
            hint = nearest(key, known) + "a plan scales every experiment alike"
            raise UserError(f"plan {plan.name}: gpt2ish has no Config value {key!r}", hint=hint)
    shared = {key: value for key, value in plan.model.items() if key in experiment.fields}
    given = {"vocab_size": vocab_size, "max_len": plan.max_len}
    given |= {"end": end} if "end" in experiment.fields else {}
    config = experiment.config(**shared | experiment.variant | given | changes)
    _refuse_unmakeable(experiment, config, shared | changes)
    made = dataclasses.asdict(config)
    differs = {  # what an experiment does not have, such as dropout, is 0 there
        key: [value, made.get(key)]
        for key, value in plan.model.items()
        if made.get(key, 0) != value
    }
    return Scale(config, differs)


def _refuse_unmakeable(experiment: Experiment, config: object, values: dict[str, object]) -> None:
    """Raise a UserError where making the model fails; `values` are those that were asked for."""
    try:
        experiment.model(config, device="meta")
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in values.items())
        problem = f"{experiment.name} cannot be made with {given}: {type(error).__name__}: {error}"
        raise UserError(problem, hint="--describe shows the fields") from error
