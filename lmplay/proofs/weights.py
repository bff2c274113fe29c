"""Proofs about weights: nothing else is kept, and a seed or a state dict gives all of them."""

import copy

import torch
from torch import Tensor

from lmplay.model.objective import Objective
from lmplay.proofs.proof import EXACT, Refuted, how_far
from lmplay.proofs.specimen import Specimen

# B rows, T positions


def holds_only_weights(specimen: Specimen) -> str:
    model, shapes = specimen.model(), specimen.experiment.model(specimen.config, device="meta")
    for name, module in model.named_modules():
        where = name or "Model"
        for key in module._non_persistent_buffers_set:
            raise Refuted(f"{where}.{key} is a buffer that no checkpoint keeps")
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules") and _holds_tensor(value):
                raise Refuted(f"{where}.{key} is a tensor but neither parameter nor buffer")
    for name, tensor in shapes.state_dict().items():
        if tensor.device.type != "meta":
            raise Refuted(f"{name} is made on {tensor.device} when it is asked for on another")
        if tensor.shape != model.state_dict()[name].shape:
            raise Refuted(f"{name} has another shape on the meta device")
    return f"{sum(p.numel() for p in model.parameters()):,} parameters here"


def repeats_by_seed(specimen: Specimen) -> str:
    tokens_BT = specimen.tokens(B=2)
    losses, states = [], []
    for _ in range(2):
        model = specimen.model(seed=5, dropout=0.3).train()
        states.append(copy.deepcopy(model.state_dict()))
        torch.manual_seed(6)
        losses.append(Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.item())
    for name, tensor in states[0].items():
        if not torch.equal(tensor, states[1][name]):
            raise Refuted(f"{name} starts with other numbers for the same seed")
    if losses[0] != losses[1]:
        raise Refuted(f"the training loss is {losses[0]}, then {losses[1]} for the same seed")
    return f"{len(states[0])} tensors and the training loss"


def is_its_state(specimen: Specimen) -> str:
    model = specimen.randomised()
    other = specimen.model(seed=7).eval()
    other.load_state_dict(model.state_dict())
    tokens_BT = specimen.tokens(B=2)
    moved = how_far(specimen.outputs(other, tokens_BT), specimen.outputs(model, tokens_BT))
    if not moved <= EXACT:
        raise Refuted(f"a model with the same state dict answers otherwise, by {moved:.1e}")
    return f"another model with it answers the same ({moved:.0e})"


def _holds_tensor(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds_tensor(part) for part in value)
    return isinstance(value, Tensor)
