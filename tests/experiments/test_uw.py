"""Unified weights: sizes, exact folding after training, and what each file says of itself."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lmplay.catalog import read_file
from lmplay.experiment import Experiment, folded, load_experiment
from lmplay.objective import Objective

FOLDER = Path(__file__).parent.parent.parent / "experiments"

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "uw1": 120_652_012,
    "uw1_0": 120_652_012,
    "uw1_1": 120_694_289,
    "uw1_2": 120_828_332,
}
TARGETS = {"uw1": "gpt2ish"}  # what a file folds to
DEPLOYED = {"gpt2ish": 120_560_209}

every_name = pytest.mark.parametrize("name", COUNTS)


def experiment(name: str) -> Experiment:
    files = ["gpt2ish", "ue", "value_norm", *TARGETS, *TARGETS.values()]
    entries = [e for file in files for e in read_file(FOLDER / f"{file}.py")]
    return load_experiment(next(entry for entry in entries if entry.name == name))


def target_of(name: str) -> str:
    return TARGETS[experiment(name).entry.file]


def tiny(name: str, seed: int = 0, **values) -> nn.Module:
    """The model at the size of TINY, without dropout."""
    made = experiment(name)
    config = made.config(**{**made.tiny, "embed_dropout": 0.0, "ff_dropout": 0.0, **values})
    return made.model(config, seed=seed)


def on_meta(name: str, **values) -> nn.Module:
    """The model at full size, without numbers."""
    made = experiment(name)
    return made.model(made.config(vocab_size=50257, **values), device="meta")


def num_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def random_tokens(B: int, T: int, V: int = 61) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, num_steps: int = 5) -> nn.Module:
    tokens_BT = random_tokens(B=4, T=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(num_steps):
        optimizer.zero_grad()
        Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).objective.backward()
        optimizer.step()
    return model.eval()


def moved(changed: Tensor, answer: Tensor) -> float:
    """The largest difference, against the largest answer."""
    return ((changed - answer).abs().max() / answer.abs().max()).item()


@every_name
def test_the_parameter_count_is_the_catalogues(name):
    assert num_parameters(on_meta(name)) == COUNTS[name]


@every_name
def test_folding_gives_the_size_and_the_shapes_of_what_it_folds_to(name):
    target = target_of(name)
    plain = folded(on_meta(name))

    assert num_parameters(plain) == DEPLOYED[target]
    assert shapes(plain) == shapes(on_meta(target))


@every_name
def test_a_trained_model_answers_as_the_one_that_it_folds_to(name):
    model = trained(tiny(name))
    plain = tiny(target_of(name), seed=9).eval()
    plain.load_state_dict(folded(model).state_dict())
    tokens_BT = random_tokens(B=3, T=16)

    assert moved(plain(tokens_BT), model(tokens_BT)) < 1e-5


@pytest.mark.parametrize("name", ["uw1_0", "uw1_1", "uw1_2"])
def test_with_one_seed_the_start_is_exactly_the_baselines(name):
    tokens_BT = random_tokens(B=3, T=16)

    assert torch.equal(tiny(name, seed=3)(tokens_BT), tiny("gpt2ish", seed=3)(tokens_BT))


def test_uw1_adjusts_rows_first_then_columns():
    torch.manual_seed(0)
    layer = tiny("uw1_2").blocks[0].mlp.up
    for weight in layer.parameters():
        nn.init.normal_(weight)
    weight_OI, bias_O = layer.effective()
    m_O, a_O, n_I, c_I = (
        adjuster.vector + adjuster.scalar
        for adjuster in (layer.row_scale, layer.row_shift, layer.column_scale, layer.column_shift)
    )

    for i, j in ((0, 0), (63, 15), (7, 2)):
        expected = (layer.weight[i, j] * m_O[i] + a_O[i]) * n_I[j] + c_I[j]
        torch.testing.assert_close(weight_OI[i, j], expected)
    assert torch.equal(bias_O, layer.bias + layer.bias_shift)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("uw1_0", {"row_scale"}),
        ("uw1_1", {"row_scale", "column_scale"}),
        ("uw1_2", {"row_scale", "column_scale", "row_shift", "column_shift"}),
    ],
)
def test_each_layer_of_uw1_has_its_variants_adjusters(name, parts):
    model = tiny(name)
    layers = [module for module in model.modules() if hasattr(module, "effective")]

    assert len(layers) == 6 * len(model.blocks) + 1
    for layer in layers:
        assert {part for part, _ in layer.named_children()} == parts


def test_what_moves_all_logits_of_a_position_alike_changes_no_loss():
    model, tokens_BT = tiny("uw1_2").eval(), random_tokens(B=3, T=16)
    before = Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).loss
    with torch.no_grad():
        model.head.bias_shift += 1.0
        model.head.column_shift.vector += torch.randn(16)
        model.head.column_shift.scalar += 1.0

    torch.testing.assert_close(Objective(model)(tokens_BT, tokens_BT.roll(-1, 1)).loss, before)
