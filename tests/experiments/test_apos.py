"""Attention position: sizes, the scores themselves, and what they do not depend on."""

import re

import pytest
import torch
from models import experiment, moved, random_tokens, tiny, trained
from torch import Tensor, nn

# trained parameters with the GPT-2 vocabulary, from jmward01/lmplay
COUNTS = {
    "apos": 125_278_801,
    "apos1_0": 125_278_801,
    "apos1_1": 125_278_801,
    "apos1_2": 122_133_073,
}


def query(T: int) -> Tensor:
    return torch.randn(2, 2, T, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 7), (7, 7), (16, 16)])
def test_each_query_meets_the_vector_of_its_distance_to_each_key(T, S):
    attention = tiny("apos1_0").blocks[0].attention
    q_BHTD = query(T)
    scores_BHTS = attention.distance_scores(q_BHTD, S)
    r_CHD = attention.distance_table.weight.view(16, 2, 8)

    for t in range(T):
        for s in range(S - T + t + 1):
            distance = S - T + t - s
            expected_BH = (q_BHTD[:, :, t] * r_CHD[distance]).sum(-1)
            torch.testing.assert_close(scores_BHTS[:, :, t, s], expected_BH)


@pytest.mark.parametrize("combine", ["add", "multiply"])
def test_the_shares_are_the_formulas(combine):
    attention = tiny("apos", combine=combine).blocks[0].attention
    q_BHTD, k_BHSD, v_BHSD = query(9), query(9).flip(2), query(9).flip(1)
    content = q_BHTD @ k_BHSD.mT
    distance = attention.distance_scores(q_BHTD, 9)
    raw = (content + distance if combine == "add" else content * distance) / 8**0.5
    shares = torch.stack(
        [
            torch.cat([raw[:, :, t, : t + 1].softmax(-1), raw.new_zeros(2, 2, 8 - t)], -1)
            for t in range(9)
        ],
        2,
    )

    torch.testing.assert_close(attention.attend(q_BHTD, k_BHSD, v_BHSD), shares @ v_BHSD)


def test_moving_a_sequence_to_the_right_leaves_its_distance_scores():
    attention = tiny("apos1_0").blocks[0].attention
    q_BHTD = query(12)
    whole = attention.distance_scores(q_BHTD, 12)[:, :, 4:, 4:]
    moved_back = attention.distance_scores(q_BHTD[:, :, 4:], 8)

    torch.testing.assert_close(whole.tril(), moved_back.tril())


def test_without_its_vectors_the_sum_is_the_baseline():
    ours, baseline = tiny("apos1_0").eval(), tiny("gpt2ish", seed=9).eval()
    for block in ours.blocks:
        nn.init.zeros_(block.attention.distance_table.weight)
    same = {k: v for k, v in ours.state_dict().items() if "distance" not in k}
    baseline.load_state_dict(same)
    tokens_BT = random_tokens(B=3, T=16)

    assert moved(ours(tokens_BT), baseline(tokens_BT)) < 1e-5


def test_apos1_2_knows_distances_in_the_last_two_blocks_only():
    model = tiny("apos1_2", num_blocks=5)

    assert [block.attention.distance_table is not None for block in model.blocks] == [
        *[False] * 3,
        *[True] * 2,
    ]


@pytest.mark.parametrize("name", COUNTS)
def test_training_moves_every_distance_that_was_met(name):
    model = trained(tiny(name), num_steps=1)
    start = tiny(name)
    change = (
        model.blocks[-1].attention.distance_table.weight
        - start.blocks[-1].attention.distance_table.weight
    )

    assert (change.abs().amax(-1) > 0).all()


@pytest.mark.parametrize(
    ("values", "told"),
    [({"combine": "max"}, "combine='max'"), ({"num_distance_blocks": 0}, "num_distance_blocks=0")],
)
def test_config_refuses_nonsense_and_says_the_value(values, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        experiment("apos").module.Config(vocab_size=61, **values)
