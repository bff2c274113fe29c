import os
import subprocess
import sys

import pytest
import torch

from lmplay import machine
from lmplay.errors import UserError
from lmplay.machine import (
    _products,
    bf16_gain,
    matmul_rate,
    num_cores,
    resolve_device,
    resolve_precision,
    slowness,
)

CPU, SECOND_GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process")
def test_a_core_that_was_taken_away_does_not_count():
    core = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{core}}})\n"
        "from lmplay.machine import num_cores; print(num_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)

    assert int(done.stdout) == 1


def test_without_such_a_setting_every_core_counts(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)

    assert num_cores() == 7


@pytest.mark.parametrize("name", ["gpu", "cuda:97", "meta", "CPU"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match="--device"):
        resolve_device(name)


def test_automatic_precision_is_bf16_on_a_gpu_that_has_it_else_fp16(monkeypatch):
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, has=has_bf16, **__: has)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_, has=has_bf16: has)

        assert resolve_precision("amp", SECOND_GPU) == expected
        assert resolve_precision("amp", torch.device("mps")) == expected


@pytest.mark.parametrize(
    ("bf16", "gain", "expected", "said"),
    [
        ([0.5, 1.0, 1.5], 2.0, "bf16", ""),
        ([0.9, 1.9, 2.9], 6 / 5.7, "fp32", ""),
        (
            [1.0, 80.0, 3.0],
            6 / 84,
            "fp32",
            "a matrix product in bf16 takes 14.0 times as long",
        ),
    ],
    ids=["faster", "hardly faster", "one product slow"],
)
def test_a_cpu_takes_bf16_where_its_own_products_are_faster(
    place, monkeypatch, bf16, gain, expected, said
):
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(machine, "_best_seconds", lambda *_: [1.0, 2.0, 3.0, *bf16])

    assert resolve_precision("amp", CPU) == expected
    assert slowness("bf16", CPU).startswith(said) and bool(slowness("bf16", CPU)) == bool(said)
    assert not slowness("fp32", CPU) and not slowness("bf16", SECOND_GPU)
    assert resolve_precision("bf16", CPU) == "bf16"  # as asked for
    assert bf16_gain() == pytest.approx(gain)
    assert threads == [1, 7]  # on one thread, and once


def test_what_was_measured_holds_for_one_setting_of_instructions(place, monkeypatch):
    measured = iter([2.0, 0.1])
    monkeypatch.setattr(machine, "_measured_gain", lambda: next(measured))
    gains = []
    for setting in ("AVX2", "AVX2", "SSE41", "SSE41", "AVX2"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", setting)
        gains.append(bf16_gain())

    assert gains == [2.0, 2.0, 0.1, 0.1, 2.0]


@pytest.mark.parametrize("damage", ["", "[]", "{}"])
def test_a_damaged_measurement_is_made_again(place, monkeypatch, damage):
    monkeypatch.setattr(machine, "_measured_gain", lambda: 2.0)
    bf16_gain()
    (kept,) = (place / "cache" / "machine").iterdir()
    kept.write_text(damage)
    monkeypatch.setattr(machine, "_measured_gain", lambda: 3.0)

    assert (bf16_gain(), kept.read_text()) == (3.0, "3.0\n")


def test_a_cache_that_cannot_be_written_keeps_nothing(place, monkeypatch):
    (place / "file").touch()
    monkeypatch.setenv("LMP_DATASETS", str(place / "file"))
    measured = iter([2.0, 1.9])
    monkeypatch.setattr(machine, "_measured_gain", lambda: next(measured))

    assert [bf16_gain(), bf16_gain()] == [2.0, 1.9]


def test_precision_is_a_known_word_and_fp16_needs_a_gpu():
    for name in ("fp8", "fp16"):
        with pytest.raises(UserError, match=name):
            resolve_precision(name, CPU)


def test_the_peak_is_the_fastest_product_that_was_ever_measured(place, monkeypatch):
    small, large = 2 * 256**3, 2 * 1024**3
    measured = iter(
        [
            *([1.0, 1.0, 1.0], [0.5, 0.25, 0.4]),
            *([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
            *([1.0, 0.001, 1.0], [1.0, 1.0, 1.0]),
        ]
    )
    monkeypatch.setattr(machine, "_best_seconds", lambda *_: next(measured))

    peaks = [matmul_rate(CPU, "fp32") for _ in range(3)]
    assert peaks == pytest.approx([large * 4, large * 4, small * 1000])


def test_the_peak_of_slow_bf16_is_that_of_fp32_in_which_some_products_are_made(place, monkeypatch):
    dtypes = []

    def products(device, dtype, size):
        dtypes.append(dtype)
        return [lambda: None]

    monkeypatch.setattr(machine, "_products", products)
    for gain in (0.1, 2.0):
        monkeypatch.setattr(machine, "_measured_gain", lambda gain=gain: gain)
        monkeypatch.setenv("LMP_DATASETS", str(place / str(gain)))
        matmul_rate(CPU, "bf16")

    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


def test_products_are_those_of_a_linear_layer_and_its_gradients():
    forward, of_input, of_weight = (make() for make in _products(CPU, torch.float64, 8))
    draw = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.rand(8, 8, generator=draw).double() for _ in range(3))
    for leaf in (x, weight):
        leaf.requires_grad_()
    y = torch.nn.functional.linear(x, weight, weight[0].detach())
    y.backward(dy)

    for made, expected in ((forward, y), (of_input, x.grad), (of_weight, weight.grad)):
        torch.testing.assert_close(made, expected.detach())


def test_measuring_leaves_the_random_numbers_alone(place):
    before = torch.get_rng_state()

    assert matmul_rate(CPU, "bf16") > 1e6 and bf16_gain() > 0
    assert torch.equal(torch.get_rng_state(), before)
