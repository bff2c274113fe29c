"""Proofs about weights: nothing else is kept, and a seed or a state dict gives all of them."""

import copy

import torch
from torch import Tensor

from lmplay.model.abilities import has_after_step
from lmplay.model.objective import Objective
from lmplay.proofs.proof import EXACT, Refuted, how_far
from lmplay.proofs.specimen import Specimen

# B rows, T positions


def holds_only_weights(specimen: Specimen) -> str:
    model, shapes = specimen.model(), specimen.experiment.model(specimen.config, device="meta")
    own = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for name, module in model.named_modules():
        where = name or "Model"
        for key in module._non_persistent_buffers_set:
            raise Refuted(f"{where}.{key} is a buffer that no checkpoint keeps")
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules") and _holds_tensor(value, own):
                raise Refuted(f"{where}.{key} is a tensor but neither parameter nor buffer")
    storages: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (other := storages.setdefault(tensor.untyped_storage().data_ptr(), name)) != name:
            raise Refuted(f"{name} and {other} share their numbers: make them one Parameter")
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
    _refuse_alike(states[0], specimen.model(seed=6).state_dict())
    _refuse_a_seed_of_its_own(specimen, tokens_BT)
    return f"{len(states[0])} tensors and the training loss; another seed gives others"


def _refuse_alike(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Most of what is drawn differs; constants, and tables that are computed, need not."""
    drawn = {k: t for k, t in first.items() if t.is_floating_point() and t.unique().numel() > 1}
    alike = [name for name, tensor in drawn.items() if torch.equal(tensor, second[name])]
    if 2 * sum(drawn[name].numel() for name in alike) > sum(t.numel() for t in drawn.values()):
        raise Refuted(f"{alike[0]} starts with the same numbers for another seed")


def _refuse_a_seed_of_its_own(specimen: Specimen, tokens_BT: Tensor) -> None:
    """Building and running leave torch's generator where drawing leads it."""
    config = specimen.config_with_dropout(0.3)
    model = specimen.model(dropout=0.3)
    objective = Objective(model)

    def run(training: bool) -> None:
        objective.train(training)
        sums = objective(tokens_BT, tokens_BT.roll(-1, 1))
        if training and has_after_step(model):
            sums.objective.backward()
            model.after_step()

    passes = {
        "building the model": lambda: specimen.experiment.module.Model(config),
        "a pass in training mode": lambda: run(True),
        "a pass in eval mode": lambda: run(False),
    }
    for name, do in passes.items():
        ends = []
        for num_drawn in (0, 1):
            torch.manual_seed(5)
            torch.rand(num_drawn)
            do()
            ends.append(torch.get_rng_state())
            if torch.initial_seed() != 5:
                raise Refuted(f"{name} sets torch's seed, to {torch.initial_seed()}")
        if torch.equal(*ends):
            raise Refuted(f"{name} sets the state of torch's generator")


def is_its_state(specimen: Specimen) -> str:
    model = specimen.randomised()
    other = specimen.model(seed=7).eval()
    other.load_state_dict(model.state_dict())
    tokens_BT = specimen.tokens(B=2)
    moved = how_far(specimen.outputs(other, tokens_BT), specimen.outputs(model, tokens_BT))
    if not moved <= EXACT:
        raise Refuted(
            f"a model with the same state dict answers otherwise, by {moved:.1e}",
            unless=("repeat", "any shape"),
        )
    return f"another model with it answers the same ({moved:.0e})"


def _holds_tensor(value: object, own: set[int]) -> bool:
    """Whether there is one besides the parameters and buffers, which a module may list again."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds_tensor(part, own) for part in value)
    return isinstance(value, Tensor) and id(value) not in own
