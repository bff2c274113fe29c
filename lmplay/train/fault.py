"""Where numbers that are not finite come from."""

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lmplay.data.batches import Batch
from lmplay.model.objective import Objective
from lmplay.run.run import Run


def first_bad_place(run: Run, batch: Batch) -> str | None:
    """Where a step that failed, run again without an update, first gives what is not finite.

    A module, else the last parameter whose gradient it is; None if this process sees none, as where
    dropout had to do with it.
    """
    bad: list[str] = []

    def look(name: str):
        return lambda module, given, made: bad.extend([name] * _is_bad(made))

    model = run.whole_model()
    modules = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(look(name)) for name, module in modules]
    objective = Objective(model)  # neither compiled, which drops hooks, nor averaging gradients
    try:
        for part in batch.of_rank(run.accelerator.process_index, run.world_size, 1):
            with run.accelerator.autocast():
                scored = objective(part.tokens_BT.to(run.device), part.targets_BT.to(run.device))
            if not bad:
                scored.objective.backward()
        gradients = [(name, p.grad) for name, p in model.named_parameters()]
        bad += [f"the gradient of {name}" for name, grad in reversed(gradients) if _is_bad(grad)]
    except RuntimeError:  # a model that cannot stand its own numbers has been seen by then
        pass
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return bad[0] if bad else None


def _is_bad(made: object) -> bool:
    tensors = [t for t in tree_leaves(made) if isinstance(t, Tensor) and t.is_floating_point()]
    return not all(t.isfinite().all() for t in tensors)
