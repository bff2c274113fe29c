"""What a change to the step of any optimizer does, and where it does nothing."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.errors import UserError
from lmplay.optim.joint import make_optimizer
from lmplay.plan import Optimizer

ROLES = {"0.weight": "matrix", "0.bias": "vector", "1.weight": "table"}
F64 = torch.float64


def made(name="AdamW", lr=0.1, weight_decay=0.3, num_steps=8, constant=False, **options):
    """A model after some steps at a falling rate; the second element has its every weight before.

    Args:
        constant: every step has the same gradient.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Embedding(5, 3)).double()
    wanted = Optimizer(name=name, lr=lr, weight_decay=weight_decay, options=options)
    optimizer = make_optimizer(wanted, model, ROLES)
    draw = torch.Generator().manual_seed(1)
    grads = {p: torch.randn(p.shape, generator=draw, dtype=F64) for p in model.parameters()}
    before = None
    for step in range(num_steps):
        before = copy.deepcopy(model.state_dict())
        for p in model.parameters():
            fresh = torch.randn(p.shape, generator=draw, dtype=F64)
            p.grad = grads[p].clone() if constant else fresh
        optimizer.set_factor(1 - step / num_steps)
        optimizer.step_if(torch.tensor(True))
    return model.state_dict(), before


def test_decoupled_decay_is_adamw_s():
    changed, _ = made("Adam", decay="decoupled")

    assert_close(changed, made("AdamW")[0], rtol=1e-12, atol=1e-12)


def test_cautious_steps_are_the_masked_ones_scaled_up():
    state, _ = made(weight_decay=0.0, cautious=True, num_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Embedding(5, 3)).double()
    draw = torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.randn(p.shape, generator=draw, dtype=F64)
    grads = [[torch.randn(p.shape, generator=draw, dtype=F64) for p in model.parameters()]
             for _ in range(2)]  # fmt: skip
    for index, (name, p) in enumerate(model.named_parameters()):
        m = v = 0.0
        w = p.detach().clone()
        for t in (1, 2):
            g = grads[t - 1][index]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            u = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            mask = (u * g > 0).double()
            w = w - 0.1 * (1 - (t - 1) / 2) * u * mask / mask.mean().clamp(min=1e-3)

        assert_close(state[name], w)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion"])
def test_caution_changes_nothing_where_the_gradient_stays(name):
    assert_close(made(name, constant=True, cautious=True)[0], made(name, constant=True)[0])


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "Muon"])
def test_cautious_decay_decays_the_same_or_not_at_all_and_never_away_from_zero(name):
    bare, before = made(name, weight_decay=0.0, num_steps=1)
    whole, _ = made(name, num_steps=1, decay="decoupled")
    cautious, _ = made(name, num_steps=1, decay="cautious")
    falls = (before["0.weight"] - bare["0.weight"]) * before["0.weight"] >= 0

    assert 0 < falls.sum() < falls.numel()
    expected = torch.where(falls, whole["0.weight"], bare["0.weight"])
    assert_close(cautious["0.weight"], expected)


def test_independent_decay_does_not_know_the_rate():
    sizes = {}
    for lr in (0.1, 0.4):
        bare, _ = made("SGD", lr=lr, weight_decay=0.0, num_steps=1)
        decayed, before = made("SGD", lr=lr, num_steps=1, decay="independent")
        sizes[lr] = (bare["0.weight"] - decayed["0.weight"]) / before["0.weight"]

    assert_close(sizes[0.1], sizes[0.4])
    assert_close(sizes[0.1], torch.full_like(sizes[0.1], 0.3))


def test_independent_and_corrected_decay_are_the_usual_one_at_a_constant_rate():
    usual = made("Adam", num_steps=1, decay="decoupled")[0]

    assert_close(made("Adam", num_steps=1, weight_decay=0.03, decay="independent")[0], usual)
    assert_close(made("Adam", num_steps=1, decay="corrected")[0], usual)


@pytest.mark.parametrize("name", ["AdamW", "Muon", "SGD"])
def test_on_a_ball_matrices_keep_their_length_and_turn_by_the_rate(name):
    state, before = made(name, weight_decay=0.0, hyperball=True, lr=0.01, num_steps=1)
    w, old = state["0.weight"], before["0.weight"]
    bare, _ = made(name, weight_decay=0.0, lr=0.01, num_steps=1)

    assert w.norm() == pytest.approx(old.norm().item(), rel=1e-12)
    move = old - bare["0.weight"]
    turned = old - 0.01 * old.norm() * move / move.norm()
    assert_close(w, turned * old.norm() / turned.norm())
    assert_close(state["0.bias"], bare["0.bias"])


def on_ball(start_OI, *moves, role="matrix", lr=0.1, **options):
    """A weight after steps of SGD on a ball, which are `moves` times the rate."""
    layer = nn.Module()
    layer.weight = nn.Parameter(start_OI.clone())
    wanted = Optimizer(name="SGD", lr=lr, options={"hyperball": True, **options})
    optimizer = make_optimizer(wanted, layer, {"weight": role})
    for move in moves:
        layer.weight.grad = move.clone()
        optimizer.set_factor(1.0)
        optimizer.step()
    return layer.weight.detach()


def test_the_published_example_of_a_ball():
    made = on_ball(torch.tensor([[3.0, 4.0]], dtype=F64), torch.tensor([[0.0, 2.0]], dtype=F64))

    assert_close(made, torch.tensor([[3.2540, 3.7963]], dtype=F64), atol=5e-5, rtol=0)


def test_on_a_ball_only_directions_count():
    draw = torch.Generator().manual_seed(2)
    start, *moves = torch.randn(101, 4, 6, generator=draw, dtype=F64)
    path = on_ball(start, *moves)

    assert path.norm().item() == pytest.approx(start.norm().item(), rel=1e-10)
    assert_close(on_ball(start, *(1000 * move for move in moves)), path)
    assert_close(on_ball(5 * start, *moves), 5 * path)
    assert_close(on_ball(start, moves[0], lr=1e-30), start)
    assert_close(on_ball(start, start), start)  # a step along the weight moves nothing
    sideways = moves[0] - (moves[0] * start).sum() / start.square().sum() * start
    turned = on_ball(start, sideways)
    cosine = (turned * start).sum() / start.square().sum()
    assert torch.acos(cosine).item() == pytest.approx(math.atan(0.1), rel=1e-6)


def test_the_matrices_of_a_stack_keep_their_own_lengths():
    draw = torch.Generator().manual_seed(3)
    start_EOI = torch.randn(2, 4, 6, generator=draw, dtype=F64)
    move_EOI = (
        torch.randn(2, 4, 6, generator=draw, dtype=F64) * torch.tensor([1, 0.01])[:, None, None]
    )
    made_EOI = on_ball(start_EOI, move_EOI)

    for made, start, move in zip(made_EOI, start_EOI, move_EOI, strict=True):
        assert_close(made, on_ball(start, move))


def test_tables_and_heads_are_on_no_ball():
    start, move = torch.ones(3, 3, dtype=F64), torch.eye(3, dtype=F64)
    for role in ("table", "head"):
        assert_close(on_ball(start, move, role=role), start - 0.1 * move)


def test_decay_does_nothing_on_a_ball():
    bare, _ = made(weight_decay=0.0, hyperball=True)
    decayed, _ = made(weight_decay=0.5, hyperball=True)

    assert_close(decayed["0.weight"], bare["0.weight"])
    assert not torch.equal(decayed["1.weight"], bare["1.weight"])  # a table


def test_a_matrix_of_zeros_would_keep_its_length_and_is_refused():
    with pytest.raises(UserError, match="all zero"):
        on_ball(torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW", {"decay": "none"}), ("AdamW", {"cautious": "yes"}), ("Scion", {"cautious": True})],
)
def test_what_cannot_be_changed_is_refused(name, options):
    with pytest.raises(UserError):
        made(name, weight_decay=0.0, **options)


def test_a_changed_step_keeps_no_state_and_is_left_out_whole():
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    wanted = Optimizer(name="AdamW", lr=0.1, weight_decay=0.1, options={"cautious": True})
    roles = {"weight": "matrix", "bias": "vector"}
    optimizer, other = (make_optimizer(wanted, model, roles) for _ in range(2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    optimizer.step_if(torch.tensor(False))
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())

    assert [group["weight_decay"] for group in other.param_groups] == [0.1, 0.0]
    assert set(other.state[model.weight]) == {"step", "exp_avg", "exp_avg_sq"}
