"""Rank promotion attention: held against one token at a time; sizes; its second loss."""

import re

import pytest
import torch
from models import experiment, num_parameters, on_meta, random_tokens, tiny
from torch import Tensor, nn

# trained parameters with the GPT-2 vocabulary; the original's are not known
COUNTS = {
    "rpa": 135_960_865,
    "rpa1_0": 135_960_865,
    "rpa1_1": 125_797_921,
    "rpa1_2": 125_853_163,
    "rpa1_3": 128_624_875,
    "rpa1_4": 121_886_395,
    "rpa1_5": 121_099_963,
    "rpa1_6": 115_355_845,
    "rpa1_7": 115_915_850,
    "rpa1_10": 220_384_144,
    "rpa1_12": 186_838_087,
    "rpa_ue": 411_452_449,
    "rpa1_8": 199_631_557,
    "rpa1_9": 244_126_837,
    "rpa1_11": 349_829_191,
    "rpa1_13": 422_620_885,
}


def size_of_attention(config, windows: list[int]) -> int:
    """Of one block, from its description."""
    d, k, E = config.width, config.keys_width, config.element_width

    def linear(num_inputs: int, num_outputs: int) -> int:
        return num_inputs * num_outputs + num_outputs

    size = 2 * linear(d, k) + 2 * linear(d, d) + sum(windows) * E
    size += sum((w - 1) * E for w in windows)
    for w in windows[:-1]:
        size += linear(w * E, config.utility_mul * w) + linear(config.utility_mul * w, 1)
        if config.num_distil_heads is None:
            size += linear(w * E, 3 * d) + linear(3 * d, E)
        else:
            size += linear(w * E, 10 * w) + linear(10 * w, config.num_distil_heads * w)
        if config.promoted_mlp:
            size += linear(E, 3 * d) + linear(3 * d, E)
    return size


@pytest.mark.parametrize("name", COUNTS)
def test_the_parameter_count_follows_from_the_description(name):
    made = experiment(name)
    config = made.config(vocab_size=50257)
    blocks = range(config.num_blocks)
    size = num_parameters(on_meta("gpt2ish"))
    size -= config.num_blocks * 4 * (768 * 768 + 768)
    size += sum(size_of_attention(config, config.windows_of(index)) for index in blocks)
    size -= 0 if config.absolute_positions else 1024 * 768
    if made.entry.file == "rpa_ue":
        size -= 50257 * 768
        size += num_parameters(on_meta(name).token_table)

    assert num_parameters(on_meta(name)) == COUNTS[name] == size


def one_by_one(attention: nn.Module, x_TC: Tensor) -> tuple[Tensor, Tensor]:
    """What attention gives for one row, and its error: lists that grow with each token."""
    H = attention.num_heads
    levels = list(attention.levels)
    elements: list[list[Tensor]] = [[] for _ in levels]  # newest last
    uses: list[list[Tensor]] = [[] for _ in levels]  # what was expected of each, when promoted
    expected: list[list[Tensor]] = [[] for _ in levels]  # of each member, by its own level

    def window(number: int) -> list[Tensor]:
        level = levels[number]
        newest = elements[number][::-1][: level.window]
        return newest + list(level.pads[: level.window - len(newest)])

    outputs, errors = [], []
    for x_C in x_TC:
        arriving, use = torch.cat([attention.key(x_C), attention.value(x_C)]), None
        for number, level in enumerate(levels):
            elements[number].append(arriving)
            uses[number].append(use)
            if level is levels[-1]:
                break
            tile_11RE = torch.stack(window(number))[None, None]
            use = level.utility(tile_11RE)[0, 0]
            earlier = expected[number]
            promoted = len(earlier) < level.window
            promoted = promoted or use > level.utility_cut * sum(earlier) / len(earlier)
            expected[number] = [*earlier, use]
            if not promoted:
                break
            arriving = level.summary(tile_11RE)[0, 0]
        seen_PE = torch.stack([row for number in range(len(levels)) for row in window(number)])
        seen_PE = seen_PE + attention.sight_table
        q_HD = attention.query(x_C).view(H, -1)
        k_PHD = seen_PE[:, : q_HD.numel()].unflatten(1, (H, -1))
        v_PHJ = seen_PE[:, q_HD.numel() :].unflatten(1, (H, -1))
        scores_HP = (q_HD * k_PHD).sum(-1).T / q_HD.shape[1] ** 0.5
        shares_HP = scores_HP.softmax(-1)
        y_HJ = (shares_HP.T[..., None] * v_PHJ).sum(0)
        outputs.append(attention.output(y_HJ.flatten()))
        paid_P = shares_HP.mean(0)
        start = levels[0].window
        for number, level in enumerate(levels[1:], 1):
            for place, use_then in enumerate(uses[number][::-1][: level.window]):
                errors.append((use_then - paid_P[start + place]) ** 2)
            start += level.window
    return torch.stack(outputs), torch.stack(errors).mean()


@pytest.mark.parametrize(
    "values",
    [
        {"windows": "3 3 3"},
        {"windows": "2 4", "utility_cut": 1.05},
        {"windows": "3 2 4 2", "utility_cut": 0.5, "num_distil_heads": 4, "num_groups": 2},
        {"windows": "5 3 3", "num_distil_heads": None, "promoted_mlp": True},
    ],
)
def test_all_positions_at_once_are_one_token_at_a_time(values):
    attention = tiny("rpa", max_len=40, **values).blocks[0].attention
    nn.init.normal_(attention.sight_table)
    x_BTC = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        y_BTC, error_B = attention(x_BTC)
        rows = [one_by_one(attention, x_TC) for x_TC in x_BTC]

    torch.testing.assert_close(y_BTC, torch.stack([y_TC for y_TC, _ in rows]))
    torch.testing.assert_close(error_B, torch.stack([error for _, error in rows]))


def test_the_promoted_are_the_first_and_those_above_the_mean():
    level = tiny("rpa", windows="2 2").blocks[0].attention.levels[0]
    utility_BS = torch.tensor([[5.0, 1.0, 2.0, 4.0, 9.0, 3.5, 3.5]])
    member_BS = torch.tensor([[True, True, True, True, False, True, True]])

    assert level.promoted(utility_BS, member_BS).tolist() == [
        [True, True, False, True, False, True, True]  # above 3, 2.67, (not a member), 3, 3.1
    ]


def test_an_element_stays_in_sight_until_as_many_newer_ones_were_promoted():
    level = tiny("rpa", windows="3 3").blocks[0].attention.levels[1]
    member_BS = torch.tensor([[True, False, True, True, False, True]])

    assert level.places(member_BS).tolist() == [
        [[0, -1, -2], [0, -1, -2], [2, 0, -1], [3, 2, 0], [3, 2, 0], [5, 3, 2]]
    ]


def test_only_the_second_loss_trains_the_network_that_chooses():
    def trained_by(loss) -> set[str]:
        model, tokens_BT = tiny("rpa1_6"), random_tokens(B=2, T=16)
        loss(model, tokens_BT, tokens_BT.roll(-1, 1)).sum().backward()
        return {key for key, weight in model.named_parameters() if weight.grad is not None}

    def nats(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(tokens_BT).mT, targets_BT)

    def both(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return model.training_loss(tokens_BT, targets_BT)

    left_out = trained_by(both) - trained_by(nats)

    assert left_out
    assert left_out == {key for key in trained_by(both) if ".utility." in key}


def test_the_second_loss_joins_each_row_once_however_many_targets_it_has():
    model, tokens_BT = tiny("rpa1_6"), random_tokens(B=3, T=16)
    targets_BT = tokens_BT.roll(-1, 1)
    targets_BT[1, 4:] = -100
    logits_BTV = model(tokens_BT)
    nats_BT = nn.functional.cross_entropy(logits_BTV.mT, targets_BT, reduction="none")
    _, error_B = model.run(tokens_BT)
    loss_BT = torch.where(targets_BT == -100, 0.0, model.training_loss(tokens_BT, targets_BT))

    assert (error_B > 0).all()
    torch.testing.assert_close(loss_BT.sum(1), nats_BT.sum(1) + error_B)


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("rpa", {"key_width": 40}, "key_width=40"),
        ("rpa", {"num_distil_heads": 4, "num_groups": 3}, "num_distil_heads=4"),
        ("rpa", {"num_distil_heads": 0}, "num_distil_heads=0"),
        ("rpa", {"num_distil_heads": 5, "num_groups": 5}, "num_groups=5"),
        ("rpa", {"windows": "3"}, "windows='3'"),
        ("rpa", {"windows": "3 3 / 3 1"}, "windows='3 3 / 3 1'"),
        ("rpa", {"utility_mul": 0}, "utility_mul=0"),
        ("rpa", {"utility_cut": -1.0}, "utility_cut=-1.0"),
        ("rpa_ue", {"front_mul": 0}, "front_mul=0"),
    ],
)
def test_config_refuses_nonsense_and_says_the_value(name, values, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        experiment(name).module.Config(vocab_size=61, **values)
