import os

import torch

from lmplay.run.accelerator import make_accelerator

CPU, SECOND_GPU = torch.device("cpu"), torch.device("cuda", 1)


def test_a_second_run_of_a_process_gets_its_own_device_and_precision(monkeypatch):
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    made = [
        (accelerator.device, accelerator.mixed_precision)
        for accelerator in (
            make_accelerator(device, precision)
            for device, precision in ((CPU, "fp32"), (SECOND_GPU, "bf16"), (CPU, "fp32"))
        )
    ]

    assert made == [(CPU, "no"), (SECOND_GPU, "bf16"), (CPU, "no")]
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ
