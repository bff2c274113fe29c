"""A device whose kernels are wrong is found out: here the CPU, with kernels made wrong."""

import pytest
import torch
import torch.nn.functional as F

from lmplay.catalog.entries import resolve
from lmplay.catalog.entry import read_file
from lmplay.errors import UserError
from lmplay.model.experiment import load_experiment
from lmplay.proofs import device as device_check
from lmplay.proofs.device import check_on, checked_on, refuse_wrong
from lmplay.proofs.proof import Proof

CPU = torch.device("cpu")
SIZE = {"vocab_size": 300, "max_len": 64, "num_blocks": 2, "width": 192, "num_heads": 3}
RIGHT, LINEAR = F.scaled_dot_product_attention, F.linear


def found(name="gpt2ish", precision="bf16"):
    experiment = load_experiment(resolve(name))
    return {p.name: p for p in check_on(CPU, precision, experiment, experiment.config(**SIZE))}


def masked(q, k, v, seen_TS):
    return RIGHT(q, k, v, attn_mask=seen_TS)


def groups_of_four(q, k, v, is_causal):
    """The mask once for four positions: pytorch/pytorch#195910."""
    at_T = torch.arange(q.shape[-2])
    return masked(q, k, v, at_T <= (at_T // 4 * 4 + 3)[:, None]) if is_causal else RIGHT(q, k, v)


def groups_without_gradients(q, k, v, is_causal):
    is_training = torch.is_grad_enabled()
    return (RIGHT if is_training else groups_of_four)(q, k, v, is_causal=is_causal)


def strides_ignored(q, k, v, is_causal):
    """q, k and v read as if each lay in one piece: pytorch/pytorch#181133."""
    q, k, v = (x.transpose(1, 2).reshape(x.shape) for x in (q, k, v))
    return RIGHT(q, k, v, is_causal=is_causal)


def whole_blocks_only(q, k, v, is_causal):
    """One position, with the keys behind the last multiple of 32 lost."""
    if q.shape[-2] == 1 and (S := k.shape[-2] // 32 * 32):
        k, v = k[..., :S, :], v[..., :S, :]
    return RIGHT(q, k, v, is_causal=is_causal)


def no_gradient_for_queries(q, k, v, is_causal):
    return RIGHT(q.detach(), k, v, is_causal=is_causal)


def nothing(q, k, v, is_causal):
    return RIGHT(q, k, v, is_causal=is_causal) * float("nan")


def tiles(q, k, v, is_causal):
    """The mask once for 32 positions, in all but the first of such tiles."""
    at_T = torch.arange(q.shape[-2])
    last_T = torch.where(at_T < 32, at_T, at_T // 32 * 32 + 31)
    return masked(q, k, v, at_T <= last_T[:, None]) if is_causal else RIGHT(q, k, v)


def late_groups(q, k, v, is_causal):
    """The mask once for four of the last positions."""
    at_T = torch.arange(q.shape[-2])
    last_T = torch.where(at_T < 48, at_T, at_T // 4 * 4 + 3)
    return masked(q, k, v, at_T <= last_T[:, None]) if is_causal else RIGHT(q, k, v)


WRONG = [
    (groups_of_four, {"causal", "gradients", "states"}),
    (groups_without_gradients, {"causal"}),
    (tiles, {"causal"}),
    (late_groups, {"causal"}),
    (strides_ignored, {"gradients", "states", "cache"}),
    (no_gradient_for_queries, {"gradients"}),
    (whole_blocks_only, {"cache"}),
    (nothing, {"causal", "gradients", "states", "cache"}),
]


@pytest.mark.parametrize(("kernel", "proofs"), WRONG)
def test_a_wrong_kernel_of_low_precision_is_found_out(monkeypatch, kernel, proofs):
    def attention(q, k, v, is_causal=False):
        is_low = q.dtype == torch.bfloat16
        return (kernel if is_low else RIGHT)(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    failed = {proof.name for proof in found().values() if proof.passed is False}

    assert proofs <= failed


def test_the_cpu_computes_the_baseline_rightly_in_fp32():
    assert all(proof.passed for proof in found(precision="fp32").values())


def test_an_attention_that_begins_at_zero_hides_no_leak(monkeypatch, tmp_path):
    entry = resolve("gpt2ish")
    old = "        self.output = nn.Linear(config.width, config.width)\n"
    new = f"{old}        nn.init.zeros_(self.output.weight)\n"
    path = tmp_path / "closed.py"
    path.write_text(entry.source.replace(old, new))
    experiment = load_experiment(read_file(path)[0])
    monkeypatch.setattr(F, "scaled_dot_product_attention", groups_of_four)
    proofs = check_on(CPU, "bf16", experiment, experiment.config(**SIZE))

    assert proofs[0].name == "causal" and proofs[0].passed is False


@pytest.mark.parametrize("name", ["gpt2ish", "gpt2", "ue", "value_norm", "nnm1", "uw6_4"])
def test_the_cpu_computes_every_family_rightly_in_bf16(name):
    assert all(proof.passed for proof in found(name).values())


def test_the_first_position_that_moves_is_named(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", groups_of_four)
    detail = found()["causal"].detail

    assert detail.startswith("position 0 moves by ")
    assert "% with the tokens from 1 on, in training mode; by itself it moves by 0.0%" in detail


def test_what_rounding_alone_moves_too_far_is_not_judged(monkeypatch):
    monkeypatch.setattr(device_check, "MOST_ROUNDING", 1e-4)

    assert [proof.passed for proof in found().values()] == [True, None, None, None]


def test_a_model_too_large_for_the_cpu_is_only_checked_for_leaks(monkeypatch):
    monkeypatch.setattr(device_check, "MOST_PARAMETERS", 1000)

    assert [proof.passed for proof in found().values()] == [True, None, None, None]


def test_what_differs_by_itself_as_much_is_no_leak(monkeypatch):
    """A device may sum each row in another order, and a model may make much of it."""

    def jitter(x, weight, bias=None):
        return LINEAR(x, weight, bias) * (1 + 0.02 * torch.randn_like(x[..., :1]))

    monkeypatch.setattr(F, "linear", jitter)
    proof = found()["causal"]

    assert proof.passed and not proof.detail.endswith("0e+00")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "mps", "host", "python"],
)
def test_too_little_memory_is_no_wrong_kernel_and_asked_again(monkeypatch, tmp_path, error):
    def full(*_, **__):
        raise error

    monkeypatch.setenv("LMP_DATASETS", str(tmp_path))
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", full)
        refuse_wrong(*asked("meta"), told.append)

    assert "not proved on meta: causal: there is not enough memory to tell" in told
    assert not list(tmp_path.rglob("*.json"))


@pytest.fixture
def remembering(monkeypatch, tmp_path):
    """How often there was something to find out, with the memory in an empty folder."""
    monkeypatch.setenv("LMP_DATASETS", str(tmp_path))
    ran = []

    def counting(device, precision, experiment, config):
        ran.append((device.type, precision))
        passed = precision == "fp32"
        return [Proof("causal", passed, "position 0 moves by 65%")]

    monkeypatch.setattr(device_check, "check_on", counting)
    return ran


def asked(device="mps", precision="fp32", **values):
    experiment = load_experiment(resolve("gpt2ish"))
    return torch.device(device), precision, experiment, experiment.config(**SIZE | values)


def test_a_pass_is_remembered_for_this_device_precision_and_config(remembering):
    for _ in range(2):
        checked_on(*asked(), print)
    checked_on(*asked(width=96), print)
    checked_on(*asked("cpu"), print)

    assert remembering == [("mps", "fp32"), ("mps", "fp32"), ("cpu", "fp32")]


def test_a_wrong_device_is_refused_each_time(remembering):
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            refuse_wrong(*asked(precision="bf16"), print)

        assert caught.value.problem == (
            "mps computes gpt2ish wrongly in bf16: causal: position 0 moves by 65%"
        )
        assert "--precision fp32" in caught.value.hint
    assert len(remembering) == 2


def test_a_right_device_and_the_cpu_are_not_refused(remembering):
    refuse_wrong(*asked(), print)
    refuse_wrong(*asked("cpu", "bf16"), print)

    assert remembering == [("mps", "fp32")]


def test_wrong_gradients_keep_nobody_from_generating(monkeypatch, tmp_path):
    monkeypatch.setenv("LMP_DATASETS", str(tmp_path))
    wrong = [Proof("gradients", False, "the whole gradient is 90% off")]
    monkeypatch.setattr(device_check, "check_on", lambda *_: wrong)
    refuse_wrong(*asked(), print, is_trained=False)

    with pytest.raises(UserError):
        refuse_wrong(*asked(), print)
