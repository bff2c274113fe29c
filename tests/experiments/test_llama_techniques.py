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
    own = model.state_dict()
    fitting = {k: w for k, w in llama.state_dict().items() if k in own and own[k].shape == w.shape}
    model.load_state_dict(fitting, strict=False)
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
    "canon_full": ({}, filled(("taps", 0.0))),
    "attention_sinks": ({}, filled(("sink", -1e4))),
    "forgetting": ({"forget_bias": 30.0}, filled(("forget.weight", 0.0))),
    "grouped_query": ({"heads_per_group": 1}, nothing),
    "kv_shift": ({}, filled(("shift.here", 1.0), ("shift.before", 0.0))),
    "layer_token_embedding": ({}, filled(("layer_tables.0.table", 0.0),
        ("layer_tables.1.table", 0.0), ("layer_tables.2.output", 0.0))),
    "logit_cap": ({"cap": 1e5}, nothing),
    "multi_token_prediction": ({}, nothing),
    "ngram_lambdas": ({}, nothing),
    "ngram_memory": ({}, nothing),
    "output_bias": ({}, nothing),
    "qkv_bias": ({}, nothing),
    "residual_weights": ({}, nothing),
    "score_cap": ({"score_cap": 1e5}, nothing),
    "shared_layers": ({"uses": 1}, nothing),
    "sliding_window": ({"window": 16}, nothing),
    "sparse_indexer": ({"top_keys": 16}, nothing),
    "token_order_loss": ({}, nothing),
    "value_residual": ({}, lambda model: [
        block.attention.shares.data.copy_(torch.tensor([0.0, 1.0])) for block in model.blocks[1:]
    ]),
    "value_residual_plus": ({}, filled(("total", 0.0), ("own_share", 1.0))),
    "x0_lambdas": ({}, nothing),
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


def test_a_difference_of_equal_attentions_is_what_is_left_of_one():
    """Version 2, where a share without weights is one half."""
    llama = random_llama()
    model = with_weights_of(llama, "differential_v2")
    fill(model, "share", 0.0)
    for own, one in zip(llama.blocks, model.blocks, strict=True):
        one.attention.query.weight.data.copy_(own.attention.query.weight.data.repeat(2, 1))
        own.attention.output.weight.data /= 2

    torch.testing.assert_close(model(tokens()), llama(tokens()), rtol=1e-5, atol=1e-5)


def test_lambda_starts_as_the_paper_says():
    model = model_of("differential", num_blocks=3)
    starts = [block.attention.start for block in model.blocks]
    fill(model, "vectors", 0.0)

    assert starts == pytest.approx([0.2, 0.3555, 0.4707], abs=1e-4)
    assert [block.attention.share().item() for block in model.blocks] == pytest.approx(starts)


def test_the_first_softmax_alone_is_normed_attention():
    attention = model_of("differential").blocks[0].attention
    attention.share = lambda: 0.0
    attention.start = 0.0
    u_BTC = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    turn = (torch.ones(6, 4), torch.zeros(6, 4))
    q, k, v = (
        part.unflatten(-1, (4, 8)).transpose(1, 2)
        for part in (attention.query(u_BTC), attention.key(u_BTC), attention.value(u_BTC))
    )
    y_BHTD = F.scaled_dot_product_attention(q[..., :4], k[..., :4], v, is_causal=True)
    expected = attention.output(attention.head_norm(y_BHTD).transpose(1, 2).flatten(2))

    torch.testing.assert_close(attention(u_BTC, turn), expected, rtol=1e-5, atol=1e-5)


def test_latents_are_all_that_is_kept_and_a_step_makes_the_same_of_them():
    model = random_like(model_of("latent_attention", latent_heads=2))
    assert num_cached(model) == 3 * (2 * 8 + 4)

    cache, steps = Cache(), []
    for t in range(8):
        steps.append(model(tokens()[:, t : t + 1], cache))
        cache.advance(1)
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens()[:, :8]), rtol=1e-4, atol=1e-4)


def random_like(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    return model


def test_a_window_of_one_block_hides_what_is_older():
    model = random_like(model_of("sliding_window", window=4, full_every=0, num_blocks=1))
    before = model(tokens())
    changed = tokens().clone()
    changed[:, 3] = (changed[:, 3] + 1) % 61
    moved_T = (model(changed) - before).abs().amax((0, 2)) > 0

    assert moved_T.nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_windows_keep_no_more_than_they_see():
    model = model_of("sliding_window", window=4, full_every=0)
    cache = Cache()
    model(tokens(), cache)
    cache.advance(16)
    kept = [b.end for buffers in cache._buffers.values() for b in buffers]

    assert kept == [4] * 6


def test_a_sink_takes_its_share_of_the_weight():
    model = random_like(model_of("attention_sinks"))
    found = []
    real = F.scaled_dot_product_attention

    def look(q, k, v, attn_mask):
        sink = F.pad(torch.zeros_like(v[:, :, 1:, :1]), (0, 0, 1, 0), value=1.0)
        found.append(real(q, k, sink, attn_mask=attn_mask))
        return real(q, k, v, attn_mask=attn_mask)

    F.scaled_dot_product_attention = look
    try:
        for score in (0.0, 3.0):
            fill(model, "sink", score)
            model(tokens())
    finally:
        F.scaled_dot_product_attention = real
    even, high = torch.stack(found).chunk(2)

    assert (even > 0).all() and (high[0] > even[0]).all()


def test_softpick_gives_nothing_for_negative_scores_and_no_more_than_all():
    softpick = load_experiment(resolve("softpick")).module.softpick
    scores = 3 * torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    weights = softpick(scores, seen)
    naive = torch.relu(scores.exp() - 1) * seen
    naive = naive / (((scores.exp() - 1) * seen).abs().sum(-1, keepdim=True) + 1e-8)

    torch.testing.assert_close(weights, naive)
    assert (weights.sum(-1) <= 1 + 1e-6).all() and not weights[(scores <= 0) | ~seen].any()
    assert not softpick(torch.full((1, 1, 4, 4), -200.0), seen[:4, :4]).any()
    torch.testing.assert_close(softpick(scores.abs(), seen).sum(-1), torch.ones(2, 3, 6))


def test_one_gate_for_all_is_a_slope_of_distances():
    model = random_like(model_of("forgetting", forget_bias=-1.0))
    fill(model, "forget.weight", 0.0)
    fill(model, "forget.bias", -1.0)
    found = []
    real = F.scaled_dot_product_attention

    def look(q, k, v, attn_mask):
        found.append(attn_mask)
        return real(q, k, v, attn_mask=attn_mask)

    F.scaled_dot_product_attention = look
    try:
        model(tokens())
    finally:
        F.scaled_dot_product_attention = real
    at = torch.arange(16)
    slope = F.logsigmoid(torch.tensor(-1.0)) * (at[:, None] - at)
    expected = slope.masked_fill(at[:, None] < at, -torch.inf).expand(2, 4, 16, 16)

    torch.testing.assert_close(found[0], expected)


def test_without_positions_the_order_of_what_came_before_is_the_same_to_one_layer():
    model = random_like(model_of("no_positions", num_blocks=1))
    mixed = tokens()[:, [3, 1, 0, 2, *range(4, 16)]]

    torch.testing.assert_close(model(mixed)[:, 4:], model(tokens())[:, 4:], rtol=1e-4, atol=1e-4)


def test_a_tanh_looks_at_one_channel_and_never_exceeds_its_gain():
    norm = load_experiment(resolve("dynamic_tanh")).module.DynamicTanh(6, 0.5)
    x_TC = 10 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    changed_TC = x_TC.clone()
    changed_TC[:, 2] += 1

    assert (norm(x_TC).abs() <= 1).all()
    torch.testing.assert_close(norm(-x_TC), -norm(x_TC))
    assert ((norm(changed_TC) != norm(x_TC)).any(0)).tolist() == [c == 2 for c in range(6)]


def test_nearness_is_that_of_a_brute_force_ranking():
    soonest = load_experiment(resolve("token_order_loss")).module.soonest
    row = [5, 7, 5, 2, 2, 9, 5, 1]
    later_BTK, shares_BTK = soonest(torch.tensor([row]), 4)
    for t in range(8):
        ahead = row[t : t + 4]
        weights = {token: 2.718281828 ** -ahead.index(token) for token in ahead}
        found = {}
        for token, share in zip(later_BTK[0, t].tolist(), shares_BTK[0, t].tolist(), strict=True):
            if share:
                found[token] = found.get(token, 0) + share
        expected = {token: w / sum(weights.values()) for token, w in weights.items()}
        assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(shares_BTK.sum(-1), torch.ones(1, 8))


def test_scores_of_simple_rope_depend_on_the_distance_whatever_its_sign():
    module = load_experiment(resolve("simple_rope")).module
    q_E, k_E = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    turn = module.rotary(torch.arange(20), 8, 100.0)
    q, k = (module.rotate(x_E.expand(20, 4), turn) for x_E in (q_E, k_E))
    scores = q @ k.T

    torch.testing.assert_close(scores, scores.T)
    torch.testing.assert_close(scores[3:, 3:], scores[:-3, :-3])
    torch.testing.assert_close(scores.diagonal(), (q_E * k_E).sum().expand(20))


def test_powers_are_normed_each_by_itself():
    norm = load_experiment(resolve("poly_norm")).module.PolyNorm()
    h_TF = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(norm(3 * h_TF), norm(h_TF), rtol=1e-4, atol=1e-5)
    norm.weight.data.copy_(torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(norm(h_TF), h_TF / h_TF.square().mean(-1, keepdim=True).sqrt())


def test_poly_relu_has_relu_and_its_square_among_its_settings():
    function = load_experiment(resolve("poly_relu")).module.PolyReLU()
    h_TF = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for index, expected in enumerate([F.relu(h_TF), F.relu(h_TF) ** 2, F.relu(h_TF) ** 3]):
        function.weight.data.zero_()
        function.weight.data[index] = 1.0

        torch.testing.assert_close(function(h_TF), expected)


def test_the_larger_of_a_map_and_nothing_is_relu():
    for name in ("maxout", "negout"):
        mlp = model_of(name).blocks[0].mlp
        fill(mlp, "up.weight", 0.0)
        x_BTC = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))

        torch.testing.assert_close(mlp(x_BTC), mlp.down(F.relu(mlp.gate(x_BTC))))


def test_shared_blocks_are_copies_of_one_another():
    llama = random_llama(num_blocks=4)
    for to, of in ((1, 0), (3, 2)):
        llama.blocks[to].load_state_dict(llama.blocks[of].state_dict())
    model = model_of("shared_layers", num_blocks=4)
    state = llama.state_dict()
    model.load_state_dict(
        {k.replace("blocks.2.", "blocks.1."): w for k, w in state.items()
         if not k.startswith(("blocks.1.", "blocks.3."))}
    )  # fmt: skip

    torch.testing.assert_close(model(tokens()), llama(tokens()))


def test_the_embedding_alone_goes_to_a_block_that_drops_the_stream():
    model = random_like(model_of("x0_lambdas"))
    model.blocks[2].shares.data.copy_(torch.tensor([0.0, 1.0]))
    x_BTC = model.hidden(tokens())
    fill(model.blocks[0], "down", 0.0)

    torch.testing.assert_close(model.hidden(tokens()), x_BTC)


def test_dilated_branches_merge_by_their_masses():
    module = load_experiment(resolve("dilated_attention")).module
    H, T, D, shortest = 3, 12, 4, 3
    q, k, v = torch.randn(3, 1, H, T, D, generator=torch.Generator().manual_seed(0))
    bias = module.dilated(T, T, H, shortest, q.device)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = q @ k.mT / D**0.5
    for h in range(H):
        for t in range(T):
            total, mass = torch.zeros(D), 0.0
            for step, stride in enumerate(module.STRIDES):
                segment = shortest * 2**step
                offset = h % stride
                keys = [
                    s for s in range(t + 1)
                    if s // segment == t // segment and s % stride == offset == t % stride
                ]  # fmt: skip
                weights = scores[0, h, t, keys].exp()
                total = total + weights @ v[0, h, keys]
                mass = mass + weights.sum()
            torch.testing.assert_close(found[0, h, t], total / mass)


def test_a_row_is_that_of_the_last_three_tokens_and_of_no_other():
    table = model_of("ngram_memory").ngrams
    rows_BT = table.rows(torch.tensor([[1, 2, 3, 4, 9, 2, 3, 4], [7, 2, 3, 4, 5, 6, 7, 8]]))

    assert rows_BT[0, 3] == rows_BT[0, 7] == rows_BT[1, 3]
    assert rows_BT[0, 2] != rows_BT[1, 2] and rows_BT[0, 0] != rows_BT[1, 0]
    assert table.table.num_embeddings == 307  # the first prime from 5 x 61
    assert ((rows_BT >= 0) & (rows_BT < 307)).all()


def test_a_table_of_equal_rows_is_a_constant_second_layer():
    model = random_like(model_of("token_up_projection"))
    assert [block.mlp.has_table for block in model.blocks] == [False, True, False]

    mlp = model.blocks[1].mlp
    mlp.up.weight.data[:] = mlp.up.weight.data[0]
    x_BTC = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    expected = mlp.down(F.silu(mlp.gate(x_BTC)) * mlp.up.weight[0])

    torch.testing.assert_close(mlp(x_BTC, tokens()), expected)


class Always(nn.Module):
    """A layer that says one number, whatever it reads."""

    def __init__(self, outputs: int, value: float):
        super().__init__()
        self.outputs, self.value = outputs, value

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.new_full((*x_BTC.shape[:-1], self.outputs), self.value)


def test_pro_without_shift_norms_and_gate_is_plain_forgetting():
    plain = random_like(model_of("forgetting"))
    model = with_weights_of(plain, "forgetting_pro")
    for block in model.blocks:
        attention = block.attention
        attention.key_shift.share = attention.value_shift.share = Always(4, -1e4)
        attention.query_norm = attention.key_norm = attention.head_norm = nn.Identity()
        attention.output_gate = Always(32, 1e4)

    torch.testing.assert_close(model(tokens()), plain(tokens()), rtol=1e-5, atol=1e-5)


def test_a_token_that_asks_for_it_gets_what_stands_before_and_gains_are_each_heads_own():
    attention = model_of("forgetting_pro").blocks[0].attention
    x_BTC = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    y_BHTD = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(1))
    attention.key_shift.share = Always(4, 1e4)
    shifted = attention.key_shift(x_BTC, y_BHTD)
    attention.key_norm.weight.data[2] = 3.0
    sizes = attention.key_norm(y_BHTD).square().mean(-1).sqrt()

    torch.testing.assert_close(shifted[:, :, 1:], y_BHTD[:, :, :-1])
    assert not shifted[:, :, 0].any()
    expected = torch.tensor([1.0, 1.0, 3.0, 1.0])[:, None].expand(2, 4, 5)
    torch.testing.assert_close(sizes, expected, rtol=1e-3, atol=1e-3)


def test_kernels_of_one_place_and_unmixed_heads_are_plain_attention():
    llama = random_llama()
    model = with_weights_of(llama, "multi_token_attention")
    for block in model.blocks:
        block.attention.head_norm = nn.Identity()

    torch.testing.assert_close(model(tokens()), llama(tokens()), rtol=1e-5, atol=1e-5)


def test_scores_are_blended_with_those_of_the_past_only():
    attention = random_like(model_of("multi_token_attention")).blocks[0].attention
    attention.mixtures.data.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))  # pairs change places
    T = 9
    q, k = torch.randn(2, 1, 4, T, 8, generator=torch.Generator().manual_seed(0))
    scores_HTS = (q @ k.mT / 8**0.5)[0]
    expected = torch.full((4, T, T), -torch.inf)
    for h in range(4):
        for t in range(T):
            for s in range(t + 1):
                blended = 0.0
                for up in range(6):
                    for side in range(-5, 6):
                        row, column = t - up, s + side
                        if 0 <= column <= row:
                            weight = attention.kernels[h, 0, 5 - up, 5 + side]
                            blended = blended + weight * scores_HTS[h, row, column]
                expected[h, t, s] = blended
    expected = expected.softmax(-1)[[1, 0, 3, 2]]

    torch.testing.assert_close(
        attention.weights(q, k, q.shape[2])[0], expected, rtol=1e-4, atol=1e-5
    )


def test_shares_of_the_first_values_sum_to_the_number_of_layers_and_rise_with_depth():
    model = model_of("value_residual_plus", num_blocks=5)
    found = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, given: found.append(given[3]))
    model(tokens())
    shares = torch.stack(found)

    assert shares.sum().item() == pytest.approx(5.0)
    assert (shares[1:] > shares[:-1]).all()
    assert not hasattr(model.blocks[0].attention, "own_share")


def test_the_stream_stays_on_the_sphere_and_no_step_leaves_it_where_it_is():
    model = random_like(model_of("unit_sphere"))
    found = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, made: found.append((given[0], made)))
    model(tokens())
    for _, made in found:
        torch.testing.assert_close(made.norm(dim=-1), torch.ones(2, 16))

    model.after_step()
    fill(model, "_step", 0.0)
    found.clear()
    model(tokens())
    for given, made in found:
        torch.testing.assert_close(made, given)


def test_every_matrix_is_made_unit_vectors_along_the_axis_of_the_stream():
    model = random_like(model_of("unit_sphere"))
    model.after_step()
    rows = [model.token_table, model.head]
    columns = []
    for block in model.blocks:
        rows += [block.attention.query, block.attention.key, block.attention.value]
        rows += [block.mlp.gate, block.mlp.up]
        columns += [block.attention.output, block.mlp.down]

    for dim, layers in ((1, rows), (0, columns)):
        for layer in layers:
            size = layer.weight.norm(dim=dim)
            torch.testing.assert_close(size, torch.ones_like(size))


def test_on_the_sphere_a_query_or_key_has_the_length_of_its_gains():
    model = model_of("unit_sphere")
    sizes = head_sizes(model)
    fill(model, "attention.gain", 32**-0.5 * 3)

    for size in sizes.values():
        torch.testing.assert_close(size * 8**0.5, torch.ones_like(size))
    for size in head_sizes(model).values():
        torch.testing.assert_close(size * 8**0.5, torch.full_like(size, 3.0))


def test_as_many_keys_are_chosen_as_may_be_and_the_nearest_of_equal_ones():
    best = load_experiment(resolve("sparse_indexer")).module.best
    scores = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0))
    scores[1] = 0.0
    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    chosen = best(scores, 3)

    assert chosen.sum(-1).tolist() == [[1, 2, 3, 3, 3, 3, 3, 3, 3]] * 2
    for t in range(9):
        wanted = scores[0, t].topk(3).indices.sort().values[: t + 1]
        assert chosen[1, t].nonzero().flatten().tolist() == list(range(max(0, t - 2), t + 1))
        assert t < 2 or torch.equal(chosen[0, t].nonzero().flatten(), wanted)


def test_a_scorer_learns_from_its_own_term_and_nothing_else_does():
    model = random_like(model_of("sparse_indexer")).train()
    first, own = model.loss_terms(tokens(), tokens().roll(-1, 1))
    own["penalty"].sum().backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    first["x"].square().sum().backward()
    by_the_model = {name for name, weight in model.named_parameters() if weight.grad is not None}

    assert (own["penalty"] >= 0).all()
    assert reached and all(".indexer." in name for name in reached)
    assert not reached & by_the_model


def test_a_scorer_that_says_what_the_heads_do_loses_nothing():
    module = load_experiment(resolve("sparse_indexer")).module
    q, k = torch.randn(2, 1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    scores_BTS = (q @ k.mT / 8**0.5)[:, 0].masked_fill(later, -torch.inf)
    chosen = module.best(scores_BTS, 4)[:, None]

    lost = module.divergence(scores_BTS + 2.0, q, k, chosen)
    torch.testing.assert_close(lost, torch.zeros(1, 6), rtol=0, atol=1e-6)
    assert (module.divergence(-scores_BTS, q, k, chosen)[:, 3:] > 0.01).all()


@pytest.mark.parametrize(
    ("name", "part"),
    [("learned_positions", "position_table"), ("relative_positions", "distances")],
)
def test_positions_without_numbers_are_no_positions(name, part):
    plain = random_like(model_of("no_positions"))
    model = with_weights_of(plain, name)
    assert (model(tokens()) - plain(tokens())).abs().max() > 1e-4
    fill(model, part, 0.0)

    torch.testing.assert_close(model(tokens()), plain(tokens()), rtol=1e-5, atol=1e-5)


def test_a_distance_is_heard_by_the_query_and_beyond_the_farthest_all_are_alike():
    model = random_like(model_of("relative_positions", num_blocks=1))
    found = []
    real = F.scaled_dot_product_attention

    def look(q, k, v, attn_mask):
        found.append((q, attn_mask))
        return real(q, k, v, attn_mask=attn_mask)

    F.scaled_dot_product_attention = look
    try:
        model(tokens())
    finally:
        F.scaled_dot_product_attention = real
    (q, bias), distances = found[0], model.blocks[0].attention.distances
    for t, s in ((0, 0), (7, 6), (9, 5), (15, 10), (15, 0)):
        expected = (q[:, :, t] * distances[min(t - s, 5)]).sum(-1) / 8**0.5
        torch.testing.assert_close(bias[:, :, t, s], expected)
    assert (bias[:, :, 3, 4:] == -torch.inf).all()


def test_adding_one_number_to_all_channels_is_nothing_to_layer_norms():
    moved = {}
    for name in ("llama", "layer_norm"):
        model = random_like(model_of(name))
        before = model(tokens())
        model.token_table.weight.data += 3.0
        moved[name] = (model(tokens()) - before).abs().max().item()

    assert moved["layer_norm"] < 1e-4 < 1e-2 < moved["llama"]


def test_ngrams_have_the_rows_that_they_have_in_the_gated_memory():
    model = random_like(model_of("ngram_lambdas"))
    rows = model.ngrams.rows(tokens())
    assert torch.equal(rows, model_of("ngram_memory").ngrams.rows(tokens()))

    before = model(tokens())
    model.ngrams.table.weight.data[rows[0, 7]] += 1.0
    moved_T = (model(tokens()) - before).abs().amax(-1)[0] > 0
    assert moved_T.nonzero().flatten().tolist() == list(range(7, 16))
