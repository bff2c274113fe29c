"""What a model can do beyond tokens to logits: the one place that asks for the optional names.

The names are those of design section 3. Each question takes a Model or its class.
"""

import inspect
from collections.abc import Callable

from torch import nn

Of = nn.Module | type[nn.Module]


def has_hidden(model: Of) -> bool:
    """Whether it gives what its head reads, so that a loss need not hold all logits."""
    return hasattr(model, "hidden")


def reader(model: nn.Module) -> Callable:
    """What reads tokens for its head, or else gives logits: what training and generation run."""
    return model.hidden if has_hidden(model) else model.forward


def head_of(model: nn.Module) -> nn.Linear | None:
    """What makes logits of what `hidden` gives, where that is no more than a matrix."""
    head = getattr(model, "head", None)
    return head if isinstance(head, nn.Linear) else None


def takes_cache(model: Of) -> bool:
    """Whether it can go on from what earlier positions left behind."""
    return "cache" in inspect.signature(reader(model)).parameters


def scores_itself(model: Of) -> bool:
    """Whether its reported loss is its own likelihood, since it has no left-to-right logits."""
    return hasattr(model, "log_likelihood")


def draws_likelihood(model: Of) -> bool:
    """Whether its likelihood is a mean over draws, each of which it gives: so it has an error."""
    return hasattr(model, "likelihood_draws")


def writes_itself(model: Of) -> bool:
    """Whether it generates by its own method."""
    return hasattr(model, "generate")


def has_terms(model: Of) -> bool:
    """Whether it minimises a weighted sum of terms, the ruler's first."""
    return hasattr(model, "loss_terms")


def trains_by_itself(model: Of) -> bool:
    """Whether it minimises a loss of its own, of which the ruler's is no part."""
    return hasattr(model, "training_loss")


def has_own_objective(model: Of) -> bool:
    """Whether what it minimises is, or may be, another number than its reported loss."""
    return has_terms(model) or trains_by_itself(model)


def follows_progress(model: Of) -> bool:
    """Whether it changes over a run, and is told by `at` how far that is."""
    return hasattr(model, "at")


def set_progress(model: nn.Module, progress: float) -> None:
    """Tell a model, if it follows that, the share of its run's tokens that it was trained on."""
    if follows_progress(model):
        model.at(progress)


def has_after_step(model: Of) -> bool:
    """Whether it does something after each step of the optimizer, which a GPU's host waits for.

    A body that is only a docstring, where ideas insert their lines, does nothing.
    """
    method = getattr(model, "after_step", None)
    return method is not None and not _is_empty(method)


def has_groups(model: Of) -> bool:
    """Whether it claims parameters for groups of its own."""
    return hasattr(model, "parameter_groups")


def folds(module: nn.Module) -> bool:
    """Whether what only training needs can be taken out of it."""
    return hasattr(module, "fold")


def unfolds(module: nn.Module) -> bool:
    """Whether it can reproduce a trained ordinary module."""
    return hasattr(module, "unfold")


def any_folds(model: nn.Module) -> bool:
    """Whether there is anything to take out."""
    return any(folds(module) for module in model.modules())


def _is_empty(method: Callable) -> bool:
    code, empty = method.__code__, _empty.__code__
    return (code.co_code, code.co_consts[1:]) == (empty.co_code, empty.co_consts[1:])


def _empty(self) -> None:
    """Nothing."""
