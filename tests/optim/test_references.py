"""Optimizers of other packages, with our arguments, against their papers' formulas in fp64."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lmplay.optim.known import find
from lmplay.optim.registry import build

LR, DECAY, STEPS = 0.05, 0.2, 7
F64 = torch.float64


def gradients(shape, scale=1.0):
    draw = torch.Generator().manual_seed(1)
    return [scale * torch.randn(shape, generator=draw, dtype=F64) for _ in range(STEPS)]


def start(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)


def trained(name, shape=(5, 4), role="matrix", weight_decay=DECAY, scale=1.0, **options):
    """The weight after every step of the optimizer as we make it."""
    weight = nn.Parameter(start(shape))
    known = find(name, "optimizer")
    group = {"params": [weight], "lr": LR, "weight_decay": weight_decay, "role": role}
    optimizer = build(known, {**known.options, **options}, [group], "optimizer")
    path = []
    for gradient in gradients(shape, scale):
        weight.grad = gradient.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return path, optimizer


def lion(w, g, state, t, b1=0.9, b2=0.99):
    m = state.get("m", torch.zeros_like(w))
    state["m"] = b2 * m + (1 - b2) * g
    return w - LR * ((b1 * m + (1 - b1) * g).sign() + DECAY * w)


def signum(w, g, state, t, mu=0.9):
    state["m"] = mu * state.get("m", torch.zeros_like(w)) + (1 - mu) * g
    return w - LR * (state["m"].sign() + DECAY * w)


def ademamix(w, g, state, t, b1=0.9, b2=0.999, b3=0.999, alpha=5.0, T=5):
    done = min(t / T, 1.0)
    half = 1 / ((1 - done) / math.log(b1) + done / math.log(b3))  # even in half-lives
    now = min(math.exp(half), b3)
    m, slow, v = (state.get(key, torch.zeros_like(w)) for key in ("m", "slow", "v"))
    m, slow, v = b1 * m + (1 - b1) * g, now * slow + (1 - now) * g, b2 * v + (1 - b2) * g * g
    state.update(m=m, slow=slow, v=v)
    u = (m / (1 - b1**t) + alpha * done * slow) / ((v / (1 - b2**t)).sqrt() + 1e-8)
    return w - LR * (u + DECAY * w)


def adopt(w, g, state, t, b1=0.9, b2=0.999):
    if t == 1:  # the library decays in this step too, which the paper's only begins with
        state.update(v=g * g, m=torch.zeros_like(w))
        return w - LR * DECAY * w
    clip = (t - 1) ** 0.25
    n = (g / state["v"].sqrt().clamp(min=1e-6)).clamp(-clip, clip)
    state["m"] = b1 * state["m"] + (1 - b1) * n
    state["v"] = b2 * state["v"] + (1 - b2) * g * g
    return w - LR * (state["m"] + DECAY * w)


def mars(w, g, state, t, b1=0.95, b2=0.99, gamma=0.025):
    c = g + gamma * b1 / (1 - b1) * (g - state.get("last", torch.zeros_like(g)))
    c = c / max(1.0, c.norm().item())
    m, v = (state.get(key, torch.zeros_like(w)) for key in ("m", "v"))
    m, v = b1 * m + (1 - b1) * c, b2 * v + (1 - b2) * c * c
    state.update(m=m, v=v, last=g)
    return w - LR * (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-8) + DECAY * w)


def lamb(w, g, state, t, b1=0.9, b2=0.999):
    m, v = (state.get(key, torch.zeros_like(w)) for key in ("m", "v"))
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    state.update(m=m, v=v)
    r = m / (v.sqrt() + 1e-6) + DECAY * w
    return w - LR * min(w.norm().item(), 10.0) / r.norm() * r


def schedule_free(w, g, state, t, b=0.9, b2=0.99):
    """`w` is what the gradient is taken at; `state` has the average too."""
    z, x = state.get("z", w), state.get("x", w)
    v = b2 * state.get("v", 0.0) + (1 - b2) * g * g
    z = z - LR * (g / ((v / (1 - b2**t)).sqrt() + 1e-8) + DECAY * w)
    x = (1 - 1 / t) * x + z / t
    state.update(z=z, x=x, v=v)
    return (1 - b) * z + b * x


def scion(lmo, radius):
    def step(w, g, state, t, alpha=0.1):
        state["d"] = (1 - alpha) * state.get("d", torch.zeros_like(w)) + alpha * g
        return (1 - LR) * w - LR * radius * lmo(state["d"])

    return step


def adafactor(w, g, state, t):
    b2 = 1 - t**-0.8
    square = g * g
    R = b2 * state.get("R", 0.0) + (1 - b2) * square.mean(1, keepdim=True)
    C = b2 * state.get("C", 0.0) + (1 - b2) * square.mean(0, keepdim=True)
    state.update(R=R, C=C)
    u = g / (R @ C / R.mean()).sqrt()
    u = u / max(1.0, u.square().mean().sqrt().item())
    size = max(1e-3, w.square().mean().sqrt().item()) * min(LR, t**-0.5)
    return w * (1 - LR * DECAY) - size * u


FORMULAS = {
    "Lion": (lion, {}),
    "Signum": (signum, {}),
    "AdEMAMix": (ademamix, {"t_alpha_beta3": 5}),
    "ADOPT": (adopt, {}),
    "MARS": (mars, {}),
    "LAMB": (lamb, {}),
    "ScheduleFreeAdamW": (schedule_free, {}),
    "Adafactor": (adafactor, {}),
}


def assert_follows(path, formula, shape=(5, 4), rtol=1e-5, scale=1.0):
    w, state = start(shape), {}
    for t, (found, g) in enumerate(zip(path, gradients(shape, scale), strict=True), 1):
        w = formula(w, g, state, t)
        assert_close(found, w, rtol=rtol, atol=rtol, msg=lambda text, t=t: f"step {t}: {text}")


@pytest.mark.parametrize("name", FORMULAS)
def test_it_does_what_its_paper_says(name):
    formula, options = FORMULAS[name]

    assert_follows(trained(name, **options)[0], formula)


@pytest.mark.parametrize(
    ("role", "shape", "lmo", "radius"),
    [
        ("head", (5, 4), lambda d: d.sign() / 4, 3000.0),
        ("table", (5, 4), lambda d: d / d.square().mean(1, keepdim=True).sqrt(), 50.0),
        ("vector", (6,), lambda d: d / d.square().mean().sqrt(), 50.0),
    ],
)
def test_scion_has_a_norm_for_each_role(role, shape, lmo, radius):
    path, _ = trained("Scion", shape, role, weight_decay=0.0)

    assert_follows(path, scion(lmo, radius), shape, rtol=1e-4)


def test_scion_never_leaves_its_ball():
    weight = nn.Parameter(torch.zeros(6, 9))
    group = {"params": [weight], "lr": 0.3, "weight_decay": 0.0, "role": "matrix"}
    optimizer = build(find("Scion", "optimizer"), {}, [group], "optimizer")
    for _ in range(60):
        weight.grad = torch.ones(6, 9)
        optimizer.step()

    radius = 50 * (6 / 9) ** 0.5
    assert 0.6 * radius < torch.linalg.matrix_norm(weight.detach(), 2) < 1.2 * radius


def test_soap_without_a_rotation_is_adam_that_skips_a_step():
    path, _ = trained("SOAP", weight_decay=0.0, max_precondition_dim=1)
    w, m, v = start((5, 4)), 0.0, 0.0
    for t, g in enumerate(gradients((5, 4)), 1):
        if t > 1:
            m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * g * g
            w = w - LR * (m / (1 - 0.95 ** (t - 1))) / ((v / (1 - 0.95 ** (t - 1))).sqrt() + 1e-8)
        assert_close(path[t - 1], w, rtol=0.02, atol=0.02)


def test_palm_soap_without_a_rotation_has_palm_s_average_and_no_correction():
    path, _ = trained("PaLMSOAP", max_precondition_dim=1)
    w, m, v = start((5, 4)), 0.0, 0.0
    for t, g in enumerate(gradients((5, 4))):
        if t:  # the first step only looks
            beta2 = 1 - t**-0.8
            m, v = 0.95 * m + 0.05 * g, beta2 * v + (1 - beta2) * g * g
            w = (w - LR * m / (v.sqrt() + 1e-8)) * (1 - LR * DECAY)
        assert_close(path[t], w, rtol=1e-9, atol=1e-9)


def test_kron_does_what_its_paper_says():
    from pytorch_optimizer.optimizer.utils.psgd import norm_lower_bound

    path, _ = trained("Kron")
    w, m = start((5, 4)), 0.0
    left, right = (torch.eye(size, dtype=F64) for size in (5, 4))
    for t, g in enumerate(gradients((5, 4)), 1):
        m = 0.9 * m + 0.1 * g
        with torch.random.fork_rng():
            torch.manual_seed(t - 1)
            probe = torch.randn(5, 4, dtype=F64)
        ahead = m / (1 - 0.9**t)
        a = left @ ahead @ right.T
        b = torch.linalg.inv(left).T @ probe @ torch.linalg.inv(right)
        for Q, one, two in ((left, a @ a.T, b @ b.T), (right, a.T @ a, b.T @ b)):
            size = norm_lower_bound(one + two)
            Q -= 0.1 * torch.triu(one - two) / size @ Q
        u = left.T @ left @ ahead @ right.T @ right
        u = u * (1.1 / (u.square().mean().sqrt() + 1e-6)).clamp(max=1)
        w = w - LR * (u + DECAY * w)
        assert_close(path[t - 1], w, rtol=1e-4, atol=1e-4)


def test_kron_draws_by_its_step_alone_and_nobody_notices():
    import numpy as np

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        path, _ = trained("Kron")
        found.append(path)
        drawn = torch.rand(1).item(), np.random.random()
        torch.manual_seed(seed)
        np.random.seed(seed)
        assert drawn == (torch.rand(1).item(), np.random.random())

    assert_close(found[0], found[1], rtol=0, atol=0)


def test_kron_makes_nothing_that_is_larger_than_its_factors():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.numel = max(self.numel, made.numel())
            return made

    with Largest() as largest:
        trained("Kron", shape=(24, 60))

    assert largest.numel == 60 * 60


def test_soap_learns_a_turned_problem_as_it_learns_a_straight_one_and_adam_does_not():
    draw = torch.Generator().manual_seed(3)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=F64))
    begin = torch.randn(6, 6, generator=draw, dtype=F64)
    sizes = torch.logspace(-3, 0, 6, dtype=F64)[:, None]
    left = {}
    for name, more in (("SOAP", {"precondition_frequency": 1}), ("Adam", {})):
        for frame in (torch.eye(6, dtype=F64), turn):
            weight = nn.Parameter(frame @ begin)
            group = {"params": [weight], "lr": 0.03, "weight_decay": 0.0, "role": "matrix"}
            known = find(name, "optimizer")
            optimizer = build(known, {**known.options, **more}, [group], "optimizer")
            for _ in range(100):
                weight.grad = frame @ (sizes * (frame.T @ weight.detach()))
                optimizer.step()
            found = (sizes * (frame.T @ weight.detach()).square()).sum().item()
            left.setdefault(name, []).append(found)

    straight, turned = left["SOAP"]
    assert turned == pytest.approx(straight, rel=0.01) and straight < 0.05
    assert left["Adam"][1] != pytest.approx(left["Adam"][0], rel=0.1)


def test_prodigy_s_rate_only_grows_and_does_not_know_the_size_of_the_loss():
    found = {}
    for scale in (1.0, 100.0):
        weight = nn.Parameter(torch.zeros(20, dtype=F64))
        target = torch.linspace(-1, 1, 20, dtype=F64)
        known = find("Prodigy", "optimizer")
        group = {"params": [weight], "lr": 1.0, "weight_decay": 0.0}
        optimizer = build(known, {**known.options, "eps": 0.0}, [group], "optimizer")
        rates = []
        for _ in range(200):
            weight.grad = scale * (weight.detach() - target).sign()
            optimizer.step()
            rates.append(float(optimizer.param_groups[0]["d"]))
        assert rates == sorted(rates) and 0.05 < rates[-1] < 2
        found[scale] = weight.detach().clone()

    assert_close(found[100.0], found[1.0], rtol=1e-6, atol=1e-6)


def test_prodigy_s_groups_step_at_shares_of_one_rate():
    moves = []
    for shares in ((1.0, 1.0), (1.0, 0.5)):
        weights = [nn.Parameter(torch.zeros(size, dtype=F64)) for size in (20, 6)]
        groups = [{"params": [w], "lr": lr, "weight_decay": 0.0} for w, lr in
                  zip(weights, shares, strict=True)]  # fmt: skip
        optimizer = build(find("Prodigy", "optimizer"), {}, groups, "optimizer")
        for w in weights:
            w.grad = torch.ones_like(w)
        optimizer.step()
        moves.append([w.detach() for w in weights])

    assert_close(moves[1][0], moves[0][0], rtol=0, atol=0)
    assert_close(moves[1][1], 0.5 * moves[0][1])


@pytest.mark.parametrize("scale", [1e-4, 1e-6])
@pytest.mark.parametrize("name", ["Adafactor", "Lion", "Signum"])
def test_the_size_of_the_loss_does_not_matter(name, scale):
    assert_close(trained(name, scale=scale)[0], trained(name)[0], rtol=1e-4, atol=1e-4)


def test_adopt_survives_a_row_whose_first_gradient_is_zero():
    weight = nn.Parameter(torch.zeros(2, 3))
    known = find("ADOPT", "optimizer")
    group = {"params": [weight], "lr": 1e-3, "weight_decay": 0.0}
    optimizer = build(known, dict(known.options), [group], "optimizer")
    for g in (0.0, 1e-3, 1e-3):
        weight.grad = torch.full((2, 3), g)
        optimizer.step()

    assert weight.abs().max() < 1e-2
