"""Techniques on llama: with the right numbers each one is llama; then what it does with others."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.catalog.entries import resolve
from lmplay.model.cache import Cache
from lmplay.model.experiment import load_experiment
from lmplay.model.objective import Objective

SIZE = {"width": 32, "num_heads": 4, "num_blocks": 3}


def model_of(name: str, **values) -> nn.Module:
    made = load_experiment(resolve(name))
    sizes = {**made.tiny, **SIZE, **values}
    return made.model(made.config(**sizes), seed=3).eval()


def random_llama(**values) -> nn.Module:
    """A llama none of whose weights is special."""
    model = model_of("llama", **values)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    return model


def with_weights_of(llama: nn.Module, name: str, **values) -> nn.Module:
    """The technique with llama's weights wherever it has such a weight."""
    model = model_of(name, **values)
    unexpected = model.load_state_dict(llama.state_dict(), strict=False).unexpected_keys
    assert not unexpected
    return model


def tokens(B: int = 2, T: int = 16) -> Tensor:
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))


def fill(model: nn.Module, pattern: str, value: float) -> None:
    """Every parameter in whose name the pattern is gets this value."""
    found = [weight for name, weight in model.named_parameters() if pattern in name]
    assert found
    for weight in found:
        weight.data.fill_(value)


def nothing(model):
    pass


def filled(*pairs):
    return lambda model: [fill(model, *pair) for pair in pairs]


IS_LLAMA = {
    "canon": ({}, filled(("taps", 0.0))),
    "grouped_query": ({"heads_per_group": 1}, nothing),
    "kv_shift": ({}, filled(("shift.here", 1.0), ("shift.before", 0.0))),
    "layer_token_embedding": ({}, filled(("layer_tables.0.table", 0.0),
        ("layer_tables.1.table", 0.0), ("layer_tables.2.output", 0.0))),
    "logit_cap": ({"cap": 1e5}, nothing),
    "multi_token_prediction": ({}, nothing),
    "output_bias": ({}, nothing),
    "qkv_bias": ({}, nothing),
    "residual_weights": ({}, nothing),
    "value_residual": ({}, lambda model: [
        block.attention.shares.data.copy_(torch.tensor([0.0, 1.0])) for block in model.blocks[1:]
    ]),
    "z_loss": ({}, nothing),
}  # fmt: skip


@pytest.mark.parametrize("name", IS_LLAMA)
def test_the_technique_turned_off_by_its_numbers_is_llama(name):
    values, turn_off = IS_LLAMA[name]
    llama = random_llama()
    model = with_weights_of(llama, name, **values)
    turn_off(model)

    torch.testing.assert_close(model(tokens()), llama(tokens()), rtol=1e-5, atol=1e-5)


def num_cached(model: nn.Module) -> int:
    """Numbers that generation keeps of each token."""
    cache = Cache()
    model(tokens(B=1, T=8), cache)
    return sum(tensor[..., 0, :].numel() for _, of in cache.opened() for tensor in of)


def head_sizes(model: nn.Module, index: int = 1) -> dict[str, Tensor]:
    """Root mean squares of each query and key of one block, as attention gets them."""
    found = {}
    real = F.scaled_dot_product_attention

    def look(q, k, *rest, **options):
        found["q"], found["k"] = (x.square().mean(-1).sqrt() for x in (q, k))
        return real(q, k, *rest, **options)

    F.scaled_dot_product_attention = look
    try:
        model(tokens())
    finally:
        F.scaled_dot_product_attention = real
    return found


def test_normed_queries_and_keys_have_one_length_whatever_makes_them():
    model = with_weights_of(random_llama(), "qk_norm")
    sizes = head_sizes(model)
    answer = model(tokens())
    model.blocks[1].attention.query.weight.data *= 10

    for size in sizes.values():
        torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(model(tokens()), answer, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("headwise", [False, True])
def test_gates_without_weights_let_half_of_attention_through(headwise):
    llama = random_llama()
    model = with_weights_of(llama, "gated_attention", headwise=headwise)
    fill(model, "attention.gate", 0.0)
    for block in llama.blocks:
        block.attention.output.weight.data /= 2

    torch.testing.assert_close(model(tokens()), llama(tokens()), rtol=1e-5, atol=1e-5)


def test_a_gate_reads_the_normed_input():
    model = with_weights_of(random_llama(), "gated_attention")
    attention = model.blocks[0].attention
    u_BTC = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    turn = tuple(torch.ones(5, 8) * x for x in (1.0, 0.0))
    seen = []
    attention.gate.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    attention(u_BTC, turn)

    assert torch.equal(seen[0], u_BTC)


@pytest.mark.parametrize("shared", [2, 4, 0])
def test_heads_that_share_keys_are_as_heads_with_copies_of_them(shared):
    llama = random_llama()
    group = shared or 4
    state = llama.state_dict()
    for name, weight in state.items():
        if name.endswith(("key.weight", "value.weight")):
            heads = weight.unflatten(0, (4, 8))
            state[name] = heads[::group].repeat_interleave(group, 0).flatten(0, 1)
    llama.load_state_dict(state)
    model = model_of("grouped_query", heads_per_group=shared)
    for name, weight in state.items():
        if name.endswith(("key.weight", "value.weight")):
            state[name] = weight.unflatten(0, (4, 8))[::group].flatten(0, 1)
    model.load_state_dict(state)

    torch.testing.assert_close(model(tokens()), llama(tokens()), rtol=1e-5, atol=1e-5)
    assert num_cached(model) * group == num_cached(llama)


def test_capped_logits_keep_their_order_within_the_cap():
    llama = random_llama()
    llama.head.weight.data *= 100
    model = with_weights_of(llama, "logit_cap")
    free, capped = llama(tokens()), model(tokens())

    assert free.abs().max() > 30 >= capped.abs().max()
    torch.testing.assert_close(capped, 30 * torch.tanh(free / 30), rtol=1e-5, atol=1e-5)


def test_z_loss_adds_the_squared_normaliser_to_what_is_minimised_only():
    llama = random_llama()
    model = with_weights_of(llama, "z_loss", z_weight=0.1)
    targets_BT = tokens().roll(-1, 1)
    sums = Objective(model).train()(tokens(), targets_BT)
    plain = Objective(llama).train()(tokens(), targets_BT)
    squared = llama(tokens()).logsumexp(-1).square().sum()

    torch.testing.assert_close(sums.loss, plain.loss)
    torch.testing.assert_close(sums.objective.detach(), plain.loss + 0.1 * squared.detach())


def test_blocks_ahead_are_scored_against_later_targets():
    model = with_weights_of(random_llama(), "multi_token_prediction", num_ahead=2, ahead_weight=0.5)
    targets_BT = tokens().roll(-1, 1)
    first, *ahead = model.loss_terms(tokens(), targets_BT)
    sums = Objective(model).train()(tokens(), targets_BT)
    total = F.cross_entropy(model(tokens()).mT, targets_BT, reduction="sum")
    for distance, term in enumerate(ahead, 1):
        logits_BTV = model.head(term["x"][:, :-distance])
        total = total + 0.5 * F.cross_entropy(
            logits_BTV.mT, targets_BT[:, distance:], reduction="sum"
        )

    assert first["targets"] is targets_BT and len(ahead) == 2
    torch.testing.assert_close(sums.objective, total)


def test_normed_additions_are_as_large_as_their_gains():
    model = with_weights_of(random_llama(), "sandwich_norm")
    answer = model(tokens())
    for block in model.blocks:
        block.attention.output.weight.data *= 10
        block.mlp.down.weight.data *= 10
    torch.testing.assert_close(model(tokens()), answer, rtol=2e-3, atol=2e-3)

    fill(model, "post_norm", 0.0)
    x_BTC = model.final_norm(model.token_table(tokens()))
    torch.testing.assert_close(model(tokens()), model.head(x_BTC))


def test_every_layer_trains_the_values_of_the_first():
    model = with_weights_of(random_llama(), "value_residual")
    for block in model.blocks[1:]:
        block.attention.shares.data.copy_(torch.tensor([1.0, 0.0]))
    model(tokens()).square().sum().backward()

    assert not hasattr(model.blocks[0].attention, "shares")
    assert model.blocks[0].attention.value.weight.grad.any()
    assert not model.blocks[2].attention.value.weight.grad.any()


@pytest.mark.parametrize("name", ["output_bias", "layer_token_embedding"])
def test_a_row_of_a_table_acts_from_where_its_token_stands(name):
    model = with_weights_of(random_llama(), name)
    table = model.output_table if name == "output_bias" else model.layer_tables[0].table
    tokens_BT = torch.arange(16)[None]
    before = model(tokens_BT)
    table.weight.data[9] += 1.0
    moved_T = (model(tokens_BT) - before).abs().amax(-1)[0] > 0

    expected = [9] if name == "output_bias" else list(range(9, 16))
    assert moved_T.nonzero().flatten().tolist() == expected


def test_a_shift_alone_makes_keys_lag_by_one():
    shift = load_experiment(resolve("kv_shift")).module.Shift(3)
    x_BHTD = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    fill(shift, "here", 0.0)
    fill(shift, "before", 1.0)

    assert torch.equal(shift(x_BHTD)[:, :, 1:], x_BHTD[:, :, :-1])
    assert not shift(x_BHTD)[:, :, 0].any()


def test_a_canon_layer_reaches_three_positions_on_and_no_further():
    canon = load_experiment(resolve("canon")).module.Canon(6, 4)
    x_BTC = torch.zeros(1, 12, 6)
    x_BTC[0, 4] = 1.0
    y_BTC = canon(x_BTC)

    assert y_BTC[0].abs().sum(-1).nonzero().flatten().tolist() == [4, 5, 6, 7]
    torch.testing.assert_close(y_BTC[0, 5], canon.taps[:, 2])


def test_a_parallel_block_without_mlp_is_a_block_without_mlp():
    llama = random_llama()
    state = {k: v for k, v in llama.state_dict().items() if "mlp_norm" not in k}
    model = model_of("parallel_block")
    model.load_state_dict(state)
    for one in (llama, model):
        fill(one, "mlp.down", 0.0)

    torch.testing.assert_close(model(tokens()), llama(tokens()))


def test_a_stream_weighed_by_zero_forgets_what_came_before():
    model = with_weights_of(random_llama(), "residual_weights")
    last = model.blocks[-1]
    fill(last, "mlp_weight", 0.0)
    fill(last, "mlp.down", 0.0)

    assert not model.hidden(tokens()).any()


def test_a_zero_start_is_the_identity():
    model = model_of("zero_init")
    x_BTC = model.final_norm(model.token_table(tokens()))

    assert torch.equal(model(tokens()), model.head(x_BTC))


def test_a_bias_of_turned_keys_acts():
    model = with_weights_of(random_llama(), "qkv_bias")
    before = model(tokens())
    model.blocks[0].attention.key.bias.data += 1.0

    assert (model(tokens()) - before).abs().max() > 1e-3


def test_doubling_what_is_squared_makes_four_times_as_much():
    mlp = model_of("squared_relu").blocks[0].mlp
    x_BTC = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    y_BTC = mlp(x_BTC)
    mlp.up.weight.data *= 2

    torch.testing.assert_close(mlp(x_BTC), 4 * y_BTC)


@pytest.mark.parametrize(
    ("name", "function"),
    [("geglu", F.gelu), ("glu", torch.sigmoid), ("reglu", F.relu), ("bilinear", lambda x: x)],
)
def test_the_gate_is_the_functions_of_its_name(name, function):
    mlp = model_of(name).blocks[0].mlp
    x_BTC = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(mlp(x_BTC), mlp.down(function(mlp.gate(x_BTC)) * mlp.up(x_BTC)))
