"""What a step is measured against."""

import torch

from lmplay.train.curves import matmul_rate


def test_the_speed_of_a_matrix_product_is_measured_without_touching_the_random_numbers():
    before = torch.get_rng_state()
    rate = matmul_rate(torch.device("cpu"), "bf16")

    assert rate > 1e8
    assert torch.equal(torch.get_rng_state(), before)
