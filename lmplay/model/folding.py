"""Takes the parameters that only training needs out of a model."""

import copy

from torch import nn

from .abilities import folds  # relative: an export ships both


def folded(model: nn.Module) -> nn.Module:
    """A copy without the parameters that only training needs.

    Each module with a `fold` makes room for the module that `fold` gives, the inner ones first;
    those that give None are removed at the end, when nothing folds with their help any more.
    """
    model = copy.deepcopy(model).eval()
    plain: dict[nn.Module, nn.Module | None] = {}
    for name, module in reversed(list(model.named_modules(remove_duplicate=False))):
        if not folds(module):
            continue
        if module not in plain:
            plain[module] = module.fold()
        if plain[module] is not None and name:
            model.set_submodule(name, plain[module])
        elif plain[module] is not None:
            model = plain[module]
    gone = {module for module, replacement in plain.items() if replacement is None}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child in gone:
                delattr(module, name)
    return model
