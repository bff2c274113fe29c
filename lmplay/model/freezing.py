"""Parameters that a plan keeps from being trained."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lmplay.errors import UserError, nearest


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Keep the parameters of these names from being trained; a tied one is frozen by either name.

    Args:
        patterns: names in which * stands for any characters and ? for one, such as "blocks.0.*".
    Returns:
        The names of all frozen parameters, in the model's order.
    Raises:
        UserError: a pattern matches no name (with those that exist), or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = [name for name in named if fnmatchcase(name, pattern)]
        if not matched:
            hint = nearest(pattern, [*named, *_prefixes(named)]) + f"there are {_summed_up(named)}"
            raise UserError(f"freeze: no parameter is called {pattern!r}", hint=hint)
        for name in matched:
            named[name].requires_grad_(False)
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    if patterns and all(not weight.requires_grad for weight in named.values()):
        raise UserError("freeze leaves no parameter to train", hint="freeze fewer of them")
    return frozen


def _prefixes(names: Iterable[str]) -> list[str]:
    """What freezes a whole module: blocks.*, blocks.0.*, blocks.0.mlp.* and so on."""
    parts = [name.split(".") for name in names]
    found = {".".join([*some[:end], "*"]): None for some in parts for end in range(1, len(some))}
    return list(found)


def _summed_up(names: Iterable[str]) -> str:
    """Names in few words, layers that differ in a number only as one: blocks.*.norm.weight (12)."""
    alike: dict[str, list[str]] = {}
    for name in names:
        parts = ["*" if part.isdecimal() else part for part in name.split(".")]
        alike.setdefault(".".join(parts), []).append(name)
    return ", ".join(
        some[0] if len(some) == 1 else f"{form} ({len(some)})" for form, some in alike.items()
    )
