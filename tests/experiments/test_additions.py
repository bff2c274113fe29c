"""Newer techniques on llama: what turns each off, then what it promises and how it goes wrong."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.catalog.entries import resolve
from lmplay.model.cache import Cache
from lmplay.model.experiment import load_experiment
from lmplay.model.objective import Objective

SIZE = {"width": 32, "num_heads": 4, "num_blocks": 3, "norm_eps": 1e-12}


def made(name: str, **values) -> nn.Module:
    """The technique as it starts. Its norms see no scale: eps is far below any stream."""
    experiment = load_experiment(resolve(name))
    model = experiment.model(experiment.config(**{**experiment.tiny, **SIZE, **values}), seed=3)
    return model.eval()


def shaken(model: nn.Module, strength: float = 0.1) -> nn.Module:
    """No weight is special any more."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += strength * torch.randn(weight.shape, generator=draw)
    return model


def with_weights_of(model: nn.Module, name: str, **values) -> nn.Module:
    """The technique with these weights wherever it has such a weight, else as it starts."""
    other = made(name, **values)
    own = other.state_dict()
    fitting = {k: w for k, w in model.state_dict().items() if k in own and own[k].shape == w.shape}
    other.load_state_dict(fitting, strict=False)
    return other


def tokens(B: int = 2, T: int = 16) -> Tensor:
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module_of(name: str):
    return load_experiment(resolve(name)).module


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


IS_LLAMA = [
    *(("block_attn_residuals", {"block_size": size}) for size in (1, 2, 4, 6)),
    ("context_ladder", {"first_window": 16}),
    *(("depth_scaled_norm", {"num_blocks": 1, "learned": learned}) for learned in (False, True)),
    ("gated_norm", {}),
    *(("hyper_connections", {"dynamic": dynamic}) for dynamic in (False, True)),
    ("hyper_connections", {"num_streams": 1}),
    *(("identity_hc", {"dynamic": dynamic}) for dynamic in (False, True)),
    ("kv_midpoint", {"num_blocks": 2}),
    ("kv_reuse", {"kv_group": 1}),
    *(("mhc", {"lite": lite, "num_streams": n}) for lite in (False, True) for n in (1, 2, 4)),
    ("nope_layers", {"nope_every": 9}),
    ("over_encoding", {}),
    ("shared_value", {"num_blocks": 1}),
    ("ssmax_centred", {}),
    ("token_superposition", {}),
    ("value_residual_own", {}),
    ("wide_residual", {"direct": True, "stream_multiple": 1}),
]


@pytest.mark.parametrize(("name", "values"), IS_LLAMA)
def test_the_technique_is_llama_where_its_numbers_say_so(name, values):
    llama = shaken(made("llama", num_blocks=values.get("num_blocks", 3)))
    model = with_weights_of(llama, name, **values)

    assert_same(model(tokens()), llama(tokens()))


def num_cached(model: nn.Module, T: int = 8) -> int:
    """Numbers that generation keeps of one more token."""
    kept = []
    for length in (T, T + 1):
        cache = Cache()
        model(tokens(B=1, T=length), cache)
        cache.advance(length)
        kept.append(
            sum(b.end * b.data[..., 0, :].numel() for of in cache._buffers.values() for b in of)
        )
    return kept[1] - kept[0]


# ---- residual topology


def test_a_query_weighs_the_directions_of_its_sources():
    """The numbers are those of two sources worked out by hand."""
    module = module_of("block_attn_residuals")
    mix = module.DepthMix(module.Config(vocab_size=2, width=2, num_heads=1))
    mix.query.data.copy_(torch.tensor([2**0.5, 0.0]))  # the score is divided by it
    sources = [torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 2.0]]])]

    torch.testing.assert_close(
        mix(sources), 2 * torch.tensor([[[2.1008, 3.4005]]]), rtol=1e-4, atol=1e-4
    )
    mix.query.data.copy_(torch.tensor([1e3, 0.0]))
    torch.testing.assert_close(mix(sources), 2 * sources[0])


def test_a_block_is_the_sum_of_its_own_outputs():
    model = shaken(made("block_attn_residuals", block_size=2))
    seen = []
    model.final_mix.register_forward_hook(lambda module, given, made: seen.extend(given[0]))
    wrote = []
    for block in model.blocks:
        for part in (block.attention, block.mlp):
            part.register_forward_hook(lambda module, given, made: wrote.append(made))
    model(tokens())

    assert len(seen) == 4
    for number, source in enumerate(seen[1:]):
        assert_same(source, wrote[2 * number] + wrote[2 * number + 1])


@pytest.mark.parametrize("name", ["hyper_connections", "static_hc", "mhc", "mhc_lite"])
def test_streams_are_mixed_by_their_matrix(name):
    """A much copied implementation went on with the streams as they were."""
    model = shaken(made(name))
    before = model(tokens())
    connection = model.blocks[0].mlp_connection
    mix = connection.mix if name in ("hyper_connections", "static_hc") else connection.mix_bias
    mix.data += normal(*mix.shape)

    assert (model(tokens()) - before).abs().max() > 1e-4


def test_no_decay_pulls_a_mix_from_the_identity():
    (group,) = made("static_hc").parameter_groups()

    assert group["weight_decay"] == 0 and len(group["params"]) == 6
    torch.testing.assert_close(group["params"][0].detach(), torch.eye(4))


def test_streams_have_no_order():
    model = shaken(made("hyper_connections"))
    before = model(tokens())
    order = [2, 0, 3, 1]
    for block in model.blocks:
        for one in (block.attention_connection, block.mlp_connection):
            one.read.data = one.read.data[order]
            one.write.data = one.write.data[order]
            one.mix.data = one.mix.data[order][:, order]
            rows = [0, 1, *(2 + i for i in order)]
            one.change.weight.data = one.change.weight.data[rows]

    assert_same(model(tokens()), before)


def test_equal_streams_stay_equal_under_any_matrix_that_keeps_their_mean():
    llama = shaken(made("llama"))
    model = with_weights_of(llama, "static_hc")
    for seed, block in enumerate(model.blocks):
        for one in (block.attention_connection, block.mlp_connection):
            one.mix.data.copy_(normal(4, 4, seed=seed))
            one.mix.data += (1 - one.mix.data.sum(0)) / 4
            one.read.data.copy_(normal(4, seed=seed).abs())

    assert_same(model(tokens()), llama(tokens()))


@pytest.mark.parametrize("name", ["hyper_connections", "mhc", "mhc_lite"])
def test_matrices_are_trained_from_the_third_step_on(name):
    model = made(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        Objective(model).train()(tokens(), tokens().roll(-1, 1)).objective.backward()
        optimizer.step()
    connection = model.blocks[1].attention_connection
    mix = connection.mix if name == "hyper_connections" else connection.mix_bias

    assert mix.grad.abs().max() > 1e-9


@pytest.mark.parametrize(("spread", "far"), [(1.0, 1e-3), (2.0, 0.05)])
def test_alternating_over_rows_and_columns_ends_near_a_doubly_stochastic_matrix(spread, far):
    mixed = module_of("mhc").sinkhorn(spread * normal(200, 4, 4), 20)

    assert_same(mixed.sum(-1), torch.ones(200, 4))
    assert (mixed.sum(-2) - 1).abs().max() < far
    assert (module_of("mhc").sinkhorn(300 * normal(200, 4, 4), 20)).isfinite().all()


def test_two_streams_have_the_matrix_of_the_closed_form():
    mixed = module_of("mhc").sinkhorn(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), 20)

    assert mixed[0, 0].item() == pytest.approx(0.8176, abs=1e-4)  # sigmoid(1.5)


@pytest.mark.parametrize("lite", [False, True])
def test_streams_hardly_mix_at_the_start(lite):
    connection = made("mhc", lite=lite, num_rounds=20).blocks[0].attention_connection
    mixes = connection.mixes(connection.mix_bias)

    assert mixes.diagonal().min() > 0.98
    torch.testing.assert_close(mixes.sum(0), torch.ones(4), rtol=1e-4, atol=1e-4)
    s_BTNC = normal(1, 2, 4, 32)
    _, mixed, writes = connection(s_BTNC)
    torch.testing.assert_close(mixed, s_BTNC, rtol=0, atol=0.1)
    torch.testing.assert_close(writes, torch.ones(1, 2, 4, 1))


def test_permutations_keep_the_mean_of_the_streams():
    connection = shaken(made("mhc_lite"), 1.0).blocks[1].mlp_connection
    s_BTNC = normal(2, 5, 4, 32)
    _, mixed, _ = connection(s_BTNC)

    torch.testing.assert_close(mixed.mean(-2), s_BTNC.mean(-2), rtol=1e-5, atol=1e-5)


def test_static_streams_are_a_table_of_how_much_one_layer_listens_to_another():
    model = shaken(made("static_identity_hc"), 0.5)
    wrote, read, table = [], [], []
    for block in model.blocks:
        for one, part in (
            (block.attention_connection, block.attention),
            (block.mlp_connection, block.mlp),
        ):
            one.register_forward_hook(lambda module, given, made: read.append(made[0]))
            part.register_forward_hook(lambda module, given, made: wrote.append(made))
            table.append((torch.sigmoid(one.read_bias), 2 * torch.sigmoid(one.write_bias)))
    model(tokens())
    e_BTC = model.token_table(tokens())

    for layer, (reads, _) in enumerate(table):
        expected = reads.sum() * e_BTC
        for below in range(layer):
            expected = expected + (reads @ table[below][1]) * wrote[below]
        assert_same(read[layer], expected)


@pytest.mark.parametrize(("direct", "ratio", "cost"), [(True, 2, 2.0), (False, 2, 1.64)])
def test_a_wide_stream_costs_what_the_formula_says(direct, ratio, cost):
    """Of the matrices of the blocks, which are what every position is multiplied with."""

    def num_in_blocks(model):
        return sum(w.numel() for k, w in model.named_parameters() if "blocks" in k and w.dim() > 1)

    wide = made("wide_residual", direct=direct, stream_multiple=ratio, mlp_multiple=8)
    plain = made("llama", mlp_multiple=8)
    F_ = 88
    expected = 4 * 32 * 32 * ratio + 3 * 32 * F_ * ratio
    if not direct:  # down, q, k, v, out; down, gate, up, out
        expected = 32 * 32 * (ratio + 3 + ratio) + 32 * 32 * ratio + 32 * F_ * (2 + ratio)

    assert num_in_blocks(wide) == 3 * expected
    assert num_in_blocks(wide) / num_in_blocks(plain) == pytest.approx(cost, rel=0.05)


def test_a_loop_that_keeps_all_and_takes_nothing_is_its_blocks_on_the_normed_input():
    model = shaken(made("looped", num_loops=1))
    model.carry.log_step.data.fill_(-40.0)
    x_BTC = model.token_table(tokens())
    turn = module_of("looped").rotary(torch.arange(16), 8, 10000.0)
    first, middle, last = model.blocks
    e_BTC = model.input_norm(first(x_BTC, turn))
    expected = model.head(model.final_norm(last(middle(e_BTC, turn), turn)))

    assert_same(model(tokens()), expected)


def test_a_state_stays_bounded_in_two_hundred_rounds_and_the_naive_one_does_not_fade():
    model = shaken(made("looped", num_loops=200))
    model.carry.log_step.data.fill_(-1.0)
    x_BTC = model.token_table(tokens())
    turn = module_of("looped").rotary(torch.arange(16), 8, 10000.0)
    wrote = []
    model.blocks[1].mlp.register_forward_hook(lambda m, given, made: wrote.append(made.abs().max()))
    model.blocks[1].attention.register_forward_hook(
        lambda m, given, made: wrote.append(made.abs().max())
    )
    h_BTC = model.loop(x_BTC, turn)
    kept = torch.exp(-model.carry.log_step.exp() * model.carry.log_rate.exp())
    taken = model.carry(torch.zeros(32), model.input_norm(x_BTC)).abs().max()
    bound = (taken + 2 * max(wrote)) / (1 - kept.max()) + model.input_norm(x_BTC).abs().max()

    assert kept.min() > 0 and kept.max() < 1
    assert h_BTC.abs().max() < bound < 100


def test_without_blocks_the_state_moves_to_the_input_over_the_rate_whatever_the_step():
    carry, e_BTC = shaken(made("looped").carry, 0.5), normal(1, 3, 32)
    for step in (-3.0, 0.0):
        carry.log_step.data.fill_(step)
        h_BTC = torch.zeros(1, 3, 32)
        for _ in range(1000):
            h_BTC = carry(h_BTC, e_BTC)
        assert_same(h_BTC, carry.input_gain * e_BTC / carry.log_rate.exp())


def test_rounds_cost_no_parameters_and_remember_each_for_itself():
    sizes = [sum(w.numel() for w in made("looped", num_loops=n).parameters()) for n in (1, 4)]
    kept = [num_cached(made("looped", num_loops=n)) for n in (1, 4)]

    assert sizes[0] == sizes[1]
    assert kept == [3 * 2 * 32, 6 * 2 * 32]


# ---- norms


def test_a_gate_of_a_normed_position_sees_no_scale_and_lies_between_0_and_2():
    model = shaken(made("gated_norm"), 0.4)
    block = model.blocks[0]
    x_BTC = normal(2, 5, 32)
    u_BTC = block.attention_norm(x_BTC)
    g_BTC = block.attention_gate(u_BTC) / u_BTC

    assert 0 < g_BTC.min() < 0.5 and 1.5 < g_BTC.max() < 2
    assert_same(block.attention_gate(block.attention_norm(100 * x_BTC)), g_BTC * u_BTC)


def test_dividing_by_depth_is_a_gain_of_that_size():
    model = shaken(made("depth_scaled_norm"))
    llama = with_weights_of(model, "llama")
    for index, block in enumerate(llama.blocks):
        block.attention_norm.weight.data /= (index + 1) ** 0.5
        block.mlp_norm.weight.data /= (index + 1) ** 0.5

    assert_same(model(tokens()), llama(tokens()))


def test_a_keel_keeps_the_stream_at_the_size_of_its_gains():
    model = made("keel")
    sizes = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, given, made: sizes.append(made.square().mean(-1)))
    x_BTC = model.hidden(tokens())

    for size in [*sizes, x_BTC.square().mean(-1)]:
        assert_same(size, torch.ones(2, 16))


def test_a_keel_weighs_the_stream_by_the_number_of_layers():
    assert [made(name).blocks[0].skip_weight for name in ("keel", "keel_sqrt", "post_norm")] == [
        6,
        pytest.approx(6**0.5),
        1,
    ]
    block, x_BTC = shaken(made("keel")).blocks[0], normal(2, 6, 32)
    turn = (torch.ones(6, 8), torch.zeros(6, 8))
    block.skip_weight = 1e6
    assert_same(block(x_BTC, turn), block.mlp_sum_norm(block.attention_sum_norm(x_BTC)))

    block.skip_weight = 2.0
    expected = block(x_BTC, turn)
    block.skip_weight = 1.0
    block.attention.output.weight.data /= 2
    block.mlp.down.weight.data /= 2
    assert_same(block(x_BTC, turn), expected)


# ---- attention


def test_pairs_have_one_set_of_keys_and_keep_half():
    llama, model = made("llama", num_blocks=4), made("kv_reuse", num_blocks=4)
    owners = [hasattr(block.attention, "key") for block in model.blocks]
    tail = [hasattr(block.attention, "key") for block in made("kv_tail", num_blocks=5).blocks]

    assert owners == [True, False, True, False]
    assert tail == [True, True, True, False, False]
    assert 2 * num_cached(model) == num_cached(llama)
    sizes = [sum(w.numel() for w in one.parameters()) for one in (llama, model)]
    assert sizes[0] - sizes[1] == 2 * 2 * 32 * 32


def test_a_block_that_reuses_keys_is_one_with_the_same_matrices_on_the_same_input():
    """With queries of the first as well, both blocks of a pair find the same."""
    model = shaken(made("kv_reuse", num_blocks=2))
    first, second = (block.attention for block in model.blocks)
    second.query.weight.data.copy_(first.query.weight.data)
    second.output.weight.data.copy_(first.output.weight.data)
    u_BTC = normal(2, 6, 32)
    turn = module_of("kv_reuse").rotary(torch.arange(6), 8, 10000.0)
    y_BTC, kv = first(u_BTC, turn, ())

    torch.testing.assert_close(second(u_BTC, turn, kv)[0], y_BTC)


@pytest.mark.parametrize(
    ("name", "part"), [("kv_reuse", "key"), ("kv_tail", "key"), ("shared_value", "value")]
)
def test_users_train_the_source(name, part):
    model = shaken(made(name, num_blocks=3))
    model.blocks[0].attention.output.weight.data.zero_()  # it makes no use of them itself
    model(tokens()).square().sum().backward()

    assert getattr(model.blocks[0].attention, part).weight.grad.abs().max() > 1e-3


def test_values_of_one_layer_are_kept_once():
    assert num_cached(made("shared_value")) == (3 + 1) * 32
    assert [hasattr(b.attention, "value") for b in made("shared_value").blocks] == [1, 0, 0]


def test_the_upper_half_reads_keys_from_the_middle():
    model = shaken(made("kv_midpoint", num_blocks=4))
    seen = {}
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, given, made, i=index: seen.update({i: given}))
    model(tokens())

    assert all(seen[i][0] is seen[i][1] for i in (0, 1, 2))
    assert seen[3][1] is seen[2][0] and seen[3][0] is not seen[2][0]


@pytest.mark.parametrize("per_head", [False, True])
def test_a_gain_of_one_is_qk_norm_and_one_of_two_doubles_the_scores(per_head):
    plain = shaken(made("qk_norm"))
    for block in plain.blocks:
        block.attention.query_norm.weight.data.fill_(1.0)
        block.attention.key_norm.weight.data.fill_(1.0)
    model = with_weights_of(plain, "qk_gain", per_head=per_head)
    assert_same(model(tokens()), plain(tokens()))

    for block, other in zip(model.blocks, plain.blocks, strict=True):
        block.attention.gain.data.fill_(2.0)
        other.attention.query_norm.weight.data.fill_(2.0)
    assert_same(model(tokens()), plain(tokens()))
    model(tokens()).square().sum().backward()
    assert model.blocks[0].attention.gain.grad.abs().max() > 0


@pytest.mark.parametrize("num_keys", [10, 100, 1000])
def test_a_key_that_stands_out_keeps_its_share_among_more(num_keys):
    attention = made("ssmax").blocks[0].attention
    attention.sharpness.data.fill_(0.43)
    factor = attention.sharpen(torch.tensor([float(num_keys)]))[0, 0, 0]
    scores = torch.full((num_keys,), -2.0)
    scores[3] = 3.0
    expected = {10: (0.943, 0.940), 100: (0.600, 0.995), 1000: (0.129, 1.000)}[num_keys]

    shares = [scores.softmax(0)[3].item(), (factor * scores).softmax(0)[3].item()]
    assert shares == pytest.approx(expected, abs=1e-3)


def test_sharpness_starts_at_one_in_the_mean_over_the_lengths_trained_on():
    start = made("ssmax", max_len=1024).blocks[0].attention

    assert start.sharpness[0].item() == pytest.approx(0.1685, abs=1e-4)
    assert start.sharpen(torch.arange(1.0, 1025)).mean().item() == pytest.approx(1, abs=1e-3)


def test_a_sink_is_a_gate_driven_by_the_row_s_own_mass():
    """The output is the softmax's times sigmoid(log-sum-exp - the sink's score)."""
    llama = shaken(made("llama", num_blocks=1))
    model = with_weights_of(llama, "attention_sinks", num_blocks=1)
    attention, plain = model.blocks[0].attention, llama.blocks[0].attention
    attention.sink.data.copy_(normal(4))
    u_BTC = normal(2, 6, 32)
    turn = (torch.ones(6, 8), torch.zeros(6, 8))
    q, k, v = (plain.split(part(u_BTC)) for part in (plain.query, plain.key, plain.value))
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    scores = (q @ k.mT / 8**0.5).masked_fill(later, -torch.inf)
    gate = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - attention.sink[:, None, None])
    y_BTC = plain.output((gate * (scores.softmax(-1) @ v)).transpose(1, 2).flatten(2))

    assert_same(attention(u_BTC, turn), y_BTC)


def test_a_sink_is_in_no_cache_and_one_that_is_not_learned_is_no_parameter():
    sinks = made("attention_sinks")

    assert num_cached(sinks) == num_cached(made("llama"))
    assert not [k for k, _ in made("softmax_one").named_parameters() if "sink" in k]


def test_only_the_last_of_four_blocks_ignores_the_order():
    kinds = [b.attention.rotary for b in made("nope_layers", num_blocks=8, nope_every=4).blocks]
    assert kinds == [True, True, True, False] * 2

    mixed = tokens()[:, [3, 1, 0, 2, *range(4, 16)]]
    for every, same in ((1, True), (2, False)):
        model = shaken(made("nope_layers", num_blocks=1, nope_every=every))
        moved = (model(mixed)[:, 4:] - model(tokens())[:, 4:]).abs().max()
        assert (moved < 1e-4) == same


def test_a_broken_stick_is_a_loop_over_keys():
    scores = 2 * normal(2, 3, 6, 6)
    weights, rest = module_of("stick_breaking").break_stick(scores)
    for t in range(6):
        left = torch.ones(2, 3)
        for s in range(t - 1, -1, -1):
            share = torch.sigmoid(scores[..., t, s])
            torch.testing.assert_close(weights[..., t, s], share * left)
            left = left * (1 - share)
        torch.testing.assert_close(rest[..., t, 0], left)
        assert not weights[..., t, t:].any()


def test_scores_of_zero_halve_what_is_left_each_time():
    weights, rest = module_of("stick_breaking").break_stick(torch.zeros(1, 1, 4, 4))

    assert weights[0, 0, 3].tolist() == [0.125, 0.25, 0.5, 0.0]
    assert rest[0, 0, :, 0].tolist() == [1.0, 0.5, 0.25, 0.125]


def test_without_positions_a_stick_feels_the_order_and_what_nobody_takes_is_ones_own():
    model = shaken(made("stick_breaking", num_blocks=1))
    mixed = tokens()[:, [3, 1, 0, 2, *range(4, 16)]]
    assert (model(mixed)[:, 4:] - model(tokens())[:, 4:]).abs().max() > 1e-3

    weights, rest = module_of("stick_breaking").break_stick(torch.full((1, 1, 5, 5), -200.0))
    assert not weights.any() and rest.min() == 1


def delta_inputs(T: int, gate: float, H: int = 2, D: int = 4):
    q, k, v = (normal(1, H, T, D, seed=seed).double() for seed in range(3))
    g = gate * torch.rand(1, H, T, generator=torch.Generator().manual_seed(3)).double()
    beta = torch.rand(1, H, T, generator=torch.Generator().manual_seed(4)).double()
    return q, F.normalize(k, dim=-1), v, g, beta, normal(1, H, D, D, seed=5).double()


@pytest.mark.parametrize(
    ("T", "gate"), list(itertools.product([1, 5, 8, 21], [0.0, -1.0, -30.0]))
)  # chunks of 8: less than one, one, and a part
def test_chunks_of_the_gated_delta_rule_are_a_loop_over_positions(T, gate):
    module = module_of("gated_deltanet")
    *parts, state = (x.requires_grad_() for x in delta_inputs(T, gate))
    found, last = module.delta_chunks(*parts, state, 8)
    steps, now = [], state
    for t in range(T):
        o_BHD, now = module.delta_step(*(part[:, :, t] for part in parts), now)
        steps.append(o_BHD)
    expected = torch.stack(steps, dim=2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(last, now)

    weight = normal(*found.shape).double()
    grads = [
        torch.autograd.grad((y * weight).sum(), [*parts, state], retain_graph=True)
        for y in (found, expected)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_strong_gates_are_finite():
    """Masked behind exp, the forward pass is right and these are NaN."""
    module = module_of("gated_deltanet")
    parts = [x.float().detach().requires_grad_() for x in delta_inputs(32, -60.0)]
    module.delta_chunks(*parts, 16)[0].sum().backward()

    assert all(part.grad.isfinite().all() for part in parts)


def test_nearly_equal_keys_are_solved_as_the_loop_does():
    """A product of powers in place of the solve is off by 1e11 here."""
    module = module_of("gated_deltanet")
    q, k, v, g, beta, state = (x.float() for x in delta_inputs(64, 0.0))
    k = F.normalize(k[:, :, :1] + 1e-3 * k, dim=-1)
    found, _ = module.delta_chunks(q, k, v, g, torch.ones_like(beta), 0 * state, 64)
    now, steps = 0 * state, []
    for t in range(64):
        parts = (x[:, :, t] for x in (q, k, v, g, torch.ones_like(beta)))
        o_BHD, now = module.delta_step(*parts, now)
        steps.append(o_BHD)

    torch.testing.assert_close(found, torch.stack(steps, 2), rtol=1e-3, atol=1e-3)


def test_the_delta_rule_does_what_is_worked_out_by_hand():
    """A key twice, with values 2 then 5, fading by half and correcting half: 2, then 3."""
    module = module_of("gated_deltanet")
    one = torch.tensor([1.0, 0.0]).expand(1, 1, 2, 2)
    values = torch.tensor([[[[2.0, 0.0], [5.0, 0.0]]]])
    gates = torch.tensor([[[0.0, math.log(0.5)]]])
    found, _ = module.delta_chunks(
        one, one, values, gates, torch.tensor([[[1.0, 0.5]]]), torch.zeros(1, 1, 2, 2), 4
    )

    assert found[0, 0, :, 0].tolist() == pytest.approx([2.0, 3.0])


def test_a_state_gives_back_what_was_stored_and_nothing_that_was_not():
    module = module_of("gated_deltanet")
    keys, values = torch.eye(4).expand(1, 1, 4, 4), normal(1, 1, 4, 4)
    full, none = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    _, state = module.delta_chunks(keys, keys, values, none, full, torch.zeros(1, 1, 4, 4), 4)
    torch.testing.assert_close(keys @ state, values)

    found, _ = module.delta_chunks(keys, keys, values, none, none, torch.zeros(1, 1, 4, 4), 4)
    assert not found.any()
    twice = keys[:, :, :1].expand(1, 1, 4, 4)
    found, _ = module.delta_chunks(twice, twice, values, none, full, torch.zeros(1, 1, 4, 4), 4)
    torch.testing.assert_close(found, values)
    gone = torch.full((1, 1, 4), -1e4)
    found, _ = module.delta_chunks(keys, keys, values, gone, full, torch.zeros(1, 1, 4, 4), 4)
    torch.testing.assert_close(found, values)  # each key asks for the present token only


def test_most_heads_of_a_gated_deltanet_remember_at_the_start():
    """A library's start, meant for loading weights, has a median of 3e-5."""
    model = made("gated_deltanet", width=256, num_heads=64, num_blocks=4, attention_every=0)
    u_BTC = normal(1, 4, 256)
    kept = torch.cat([b.attention.decay(u_BTC).exp().flatten() for b in model.blocks])

    assert 0.8 < kept.median() < 0.99
    assert [type(b.attention).__name__ for b in made("gated_deltanet", num_blocks=4).blocks] == [
        "DeltaAttention",
        "Attention",
    ] * 2  # TINY attends in full every second block
    assert num_cached(made("gated_deltanet", attention_every=0), T=8) == 0


# ---- MLP and input


def mixture(**values) -> nn.Module:
    return shaken(made("moe", **values)).blocks[0].mlp


def test_one_expert_as_wide_as_llamas_mlp_is_it():
    llama = shaken(made("llama"))
    state = {k.replace("mlp.", "mlp.experts.0."): w for k, w in llama.state_dict().items()}
    values = {"num_experts": 1, "experts_per_token": 1, "expert_split": 1, "shared": False}
    model = made("moe", mlp_multiple=64, **values)
    model.load_state_dict(state, strict=False)

    assert_same(model(tokens()), llama(tokens()))


def test_the_bias_chooses_and_never_weighs():
    """The numbers are worked out by hand; weights from biased scores would be .516 and .484."""
    one = mixture()
    scores = torch.tensor([0.9, 0.8, 0.3, 0.6])
    one.router = nn.Module()
    one.router.forward = lambda x_NC: torch.logit(scores).expand(len(x_NC), -1)
    one.bias.copy_(torch.tensor([-0.3, 0.0, 0.1, 0.15]))
    chosen, shares = one.route(normal(3, 32))
    found = dict(zip(chosen[0].tolist(), shares[0].tolist(), strict=True))

    assert found == {1: pytest.approx(0.5714, abs=1e-4), 3: pytest.approx(0.4286, abs=1e-4)}
    one.bias += 0.7
    assert torch.equal(one.route(normal(3, 32))[0], chosen)


def test_positions_get_the_weighted_sum_of_their_experts_and_the_shared_one():
    one, x_BTC = mixture(), normal(2, 9, 32)
    chosen, shares = one.route(x_BTC.flatten(0, 1))
    every = torch.stack([expert(x_BTC) for expert in one.experts], dim=2)
    weights = torch.zeros(18, 4).scatter(1, chosen, shares)
    expected = (every.flatten(0, 1) * weights[..., None]).sum(1).unflatten(0, (2, 9))

    assert_same(one(x_BTC), expected + one.shared(x_BTC))
    torch.testing.assert_close(shares.sum(-1), torch.ones(18))


def test_the_load_is_counted_while_training_only_and_moves_the_bias_against_itself():
    model = shaken(made("moe"))
    one = model.blocks[0].mlp
    model(tokens())
    assert not one.load.any()

    model.train()(tokens())
    model(tokens())
    load = one.load.clone()
    assert load.sum() == 2 * 2 * 16 * 2  # passes, rows, positions, experts of each
    model.at(0.0)
    model.after_step()
    mean = load.sum() / 4
    assert torch.equal(one.bias, 0.01 * torch.sign(mean - load))
    assert not one.load.any()


def test_skewed_loads_even_out():
    one = mixture()
    x_BTC = normal(8, 64, 32) + 2 * one.router.weight[0].detach() / one.router.weight[0].norm()
    one.train()

    def worst() -> float:
        one.load.zero_()
        one(x_BTC)
        return (one.load.max() / one.load.float().mean() - 1).item()

    before = worst()
    for _ in range(150):
        one.balance(0.01)
        one(x_BTC)
    assert worst() < 0.3 * before


def test_quantiles_even_out_a_skewed_load_within_four_steps():
    one = shaken(made("moe_quantile", num_experts=8)).blocks[0].mlp.train()
    x_NC = normal(2048, 32) + 2 * one.router.weight[0].detach() / one.router.weight[0].norm()

    def worst() -> float:
        chosen, _ = one.route(x_NC)
        load = torch.bincount(chosen.flatten(), minlength=8)
        return (load.max() / load.float().mean() - 1).item()

    before = worst()
    for _ in range(4):
        one.balance()
        after = worst()
    assert before > 1 and after < 0.15


def test_xielu_has_the_values_slopes_and_ends_of_its_formula():
    f = module_of("xielu").XIELU(True)
    x = torch.tensor([-5.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    y = f(x)
    expected = [0.705, -0.206, -0.165, 0.0, 0.45, 1.3, 4.2]
    assert y.tolist() == pytest.approx(expected, abs=1e-3)

    near = torch.tensor([-1e-3, 1e-3], requires_grad=True)
    f(near).sum().backward()
    assert near.grad.tolist() == pytest.approx([0.5, 0.5], abs=2e-3)
    far = torch.tensor([100.0, -100.0], requires_grad=True)
    f(far).sum().backward()
    assert far.grad.isfinite().all() and f.raw.grad.isfinite().all()
    f.raw.data[0] = -200.0
    torch.testing.assert_close(f(torch.tensor([3.0])), torch.tensor([1.5]))


def test_rows_of_ngrams_are_the_digits_modulo_the_table():
    """The ids are worked out; and what stands before the first token is no token."""
    module = module_of("over_encoding")
    values = {"vocab_size": 50256, "width": 4, "num_heads": 1, "rows_per_token": 8}
    with torch.device("meta"):
        table = module.NgramEmbedding(module.Config(**values))
    rows = table.rows(torch.tensor([[5, 9, 5, 9]]))
    sizes = [402_049, 402_051, 402_053, 402_055]
    assert [t.num_embeddings for t in table.tables] == sizes
    assert rows[0][0, 1:].tolist() == [251_294, 452_318 % 402_049, 251_294]  # digits of base 50257
    assert rows[2][0, 2].item() == (5 + 9 * 50257 + 5 * 50257**2) % 402_053

    small = made("over_encoding").ngrams
    rows = torch.stack(
        small.rows(torch.tensor([[1, 2, 3, 4, 9, 2, 3, 4], [0, 1, 2, 3, 5, 6, 7, 8]]))
    )
    assert torch.equal(rows[:, 0, 3], rows[:, 0, 7])  # 2 3 4 twice
    assert (rows[:, 0, 0] != rows[:, 1, 1]).any()  # 1 as the first token, and behind token 0
    assert all(
        (r >= 0).all() and (r < t.num_embeddings).all()
        for r, t in zip(rows, small.tables, strict=True)
    )


def test_what_collides_in_one_table_does_not_in_the_other():
    table = made("over_encoding").ngrams
    pairs = torch.cartesian_prod(torch.arange(61), torch.arange(61))
    first, second = (rows[:, 1] for rows in table.rows(pairs)[:2])
    same_first = first[:, None] == first
    same_second = second[:, None] == second

    assert same_first.sum() > 61**2  # there are collisions
    assert (same_first & ~same_second).any()


# ---- training procedure


def test_bags_are_scored_as_a_loop_over_bags_says():
    model = shaken(made("token_superposition"))
    model.at(0.1)
    tokens_BT, targets_BT = tokens(T=15), tokens(T=16)[:, 1:]
    tokens_BT = tokens(T=16)[:, :15]
    e_BTC = model.token_table(tokens_BT[:, :12]).unflatten(1, (3, 4)).mean(2)
    hook = model.token_table.register_forward_hook(lambda module, given, made: e_BTC)
    logits = model(tokens_BT[:, :3]).log_softmax(-1)  # of three positions that hold these means
    hook.remove()
    expected = torch.zeros(2, 15)
    for t in range(3, 15):  # the target of t is token t + 1, in bag (t + 1) // 4
        bag = (t + 1) // 4 - 1
        expected[:, t] = -logits[:, bag].gather(1, targets_BT[:, t : t + 1])[:, 0]

    assert_same(model.training_loss(tokens_BT, targets_BT), expected * 15 / 12)


def test_no_bag_is_asked_for_what_it_has_read():
    """Shifted by one token, a bag's targets would be tokens that it holds."""
    model = shaken(made("token_superposition"))
    model.at(0.0)
    e_BTC = []
    hook = model.token_table.register_forward_hook(
        lambda m, given, made: e_BTC.append(made.retain_grad() or made)
    )
    tokens_BT, targets_BT = tokens(T=16), tokens(T=16).roll(-1, 1)
    nats_BT = model.training_loss(tokens_BT, targets_BT)
    hook.remove()
    nats_BT[:, 7:11].sum().backward()  # the targets in bag 2: tokens 8 to 11

    assert e_BTC[0].grad[:, 4:8].abs().max() > 0 and not e_BTC[0].grad[:, 8:].any()
    changed = tokens_BT.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 61
    after = model.training_loss(changed, changed.roll(-1, 1))
    torch.testing.assert_close(after[:, :11], nats_BT[:, :11])


def test_behind_the_bags_training_is_llamas():
    llama = shaken(made("llama"))
    model = with_weights_of(llama, "token_superposition")
    model.at(0.3)
    targets_BT = tokens().roll(-1, 1)
    targets_BT[:, 3] = -100
    sums = [Objective(m).train()(tokens(), targets_BT).objective for m in (model, llama)]
    torch.testing.assert_close(*sums)

    single = with_weights_of(llama, "token_superposition", bag=1)
    torch.testing.assert_close(Objective(single).train()(tokens(), targets_BT).objective, sums[1])


def seen_from(model: nn.Module, position: int) -> list[int]:
    """The positions whose logits move with the token at this one."""
    changed = tokens().clone()
    changed[:, position] = (changed[:, position] + 1) % 61
    moved_T = (model(changed) - model(tokens())).abs().amax((0, 2)) > 0
    return moved_T.nonzero().flatten().tolist()


def test_what_a_token_says_stays_in_its_fragment_or_window_until_the_ladder_ends():
    model = shaken(made("context_ladder", num_blocks=2))
    model.at(0.0)
    assert seen_from(model, 5) == [5, 6, 7]
    model.at(0.3)  # half way: 4 + 12 / 2 = 10, of which 8
    assert seen_from(model, 5) == [5, 6, 7]
    assert seen_from(model, 9) == list(range(9, 16))
    model.at(0.6)
    assert seen_from(model, 5) == list(range(5, 16))

    sliding = shaken(made("ladder_sliding", num_blocks=1))
    sliding.at(0.0)
    assert seen_from(sliding, 5) == [5, 6, 7, 8]


@pytest.mark.parametrize("T", [1, 3, 4, 10, 16])
def test_folded_fragments_are_attention_with_a_mask(T):
    q, k, v = (normal(2, 3, T, 8, seed=seed) for seed in range(3))
    at_T = torch.arange(T)
    mask = (at_T[:, None] >= at_T) & (at_T[:, None] // 4 == at_T // 4)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    torch.testing.assert_close(module_of("context_ladder").attend_within(q, k, v, 4), expected)
