"""Proofs about where tensors are made, and how wide."""

import traceback

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmplay.model.abilities import has_after_step, takes_cache
from lmplay.model.cache import Cache
from lmplay.model.objective import Objective
from lmplay.proofs.proof import Refuted
from lmplay.proofs.specimen import Specimen

# B rows, T positions


def has_no_float64(specimen: Specimen) -> str:
    model = specimen.model().train()
    for name, tensor in model.state_dict().items():
        if tensor.dtype in _DOUBLES:
            raise Refuted(f"{name} is {tensor.dtype}")
    tokens_BT = specimen.tokens(B=2)
    doubles = Doubles()
    with doubles:
        Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
    if doubles.found:
        raise Refuted(f"{doubles.found} gives double precision, which MPS has not")
    return f"none among {doubles.num_ops} operations of a step"


def follows_its_tokens(specimen: Specimen) -> str:
    """Runs on the CPU while meta is the default device: a tensor made without a device is there."""
    model = specimen.model().train()
    tokens_BT, cache = specimen.tokens(B=2), Cache()
    makers = Makers(specimen.experiment.module.__file__)
    with torch.device("meta"), makers:
        Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
        if has_after_step(model):
            model.after_step()
        specimen.outputs(model.eval(), tokens_BT)
        if not specimen.scores_itself and takes_cache(model):
            for t in range(2):
                model(tokens_BT[:, t : t + 1], cache=cache)
                cache.advance(1)
    waits = ", ".join(sorted(makers.waits)) or "nothing"
    return f"{makers.num_ops} operations; the host has to wait for {waits}"


_DOUBLES = (torch.float64, torch.complex128)


_SAID = {"_local_scalar_dense": "item", "_unique2": "unique"}


class Doubles(TorchDispatchMode):
    """Names the first operation that gives double precision."""

    def __init__(self):
        super().__init__()
        self.found = ""
        self.num_ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        self.num_ops += 1
        outputs = given if isinstance(given, tuple | list) else (given,)
        if any(isinstance(out, Tensor) and out.dtype in _DOUBLES for out in outputs):
            self.found = self.found or str(func)
        return given


class Makers(TorchDispatchMode):
    """Refutes the first operation that makes a tensor on meta; notes what a GPU's host waits for.

    Args:
        file: the experiment's, whose line is named.
    """

    def __init__(self, file: str):
        super().__init__()
        self.file = file
        self.num_ops = 0
        self.waits: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.num_ops += 1
        name = func.overloadpacket.__name__
        name = _SAID.get(name, name)
        if any(isinstance(out, Tensor) and out.is_meta for out in tree_leaves(made)):
            lines = [f.lineno for f in traceback.extract_stack() if f.filename == self.file]
            where = f"line {lines[-1]}: " if lines else ""
            raise Refuted(f"{where}{name} makes a tensor on the CPU; give it device=x.device")
        has_mask = any(isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(args))
        is_read = torch.Tag.data_dependent_output in func.tags
        is_sized = torch.Tag.dynamic_output_shape in func.tags
        if is_read or (is_sized and (has_mask or name != "index")):
            self.waits.add(name)
        return made
