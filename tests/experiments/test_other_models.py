"""Architectures that are no transformer, or not quite: what each promises."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.model.cache import Cache
from lmplay.model.experiment import load_experiment
from lmplay.model.objective import Objective
from lmplay.model.roles import roles_of
from lmplay.optim.rules import groups_of
from lmplay.plan import Optimizer
from lmplay.plan_file import read_plan


def model_of(name: str, **values):
    made = load_experiment(resolve(name))
    return made.model(made.config(**{**made.tiny, **values}), seed=3).eval()


def random_tokens(B: int, T: int, V: int = 61, seed: int = 1) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def moved_by(model: nn.Module, tokens_BT: Tensor, position: int) -> list[int]:
    """The positions whose logits depend on the token at this one."""
    changed_BT = tokens_BT.clone()
    changed_BT[:, position] = (changed_BT[:, position] + 1) % 61
    with torch.no_grad():
        distance_BT = (model(changed_BT) - model(tokens_BT)).abs().amax(-1)
    return (distance_BT.amax(0) > 0).nonzero().flatten().tolist()


NAMES = [
    *("avey", "aunet", "ftp", "ftp_blockwise", "hnet", "hourglass", "hymba", "kimi_delta", "lfm2"),
    *("llada", "megabyte", "rene", "rwkv7", "spacebyte", "tokenformer", "zamba2"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_finds_what_it_trains_and_no_decay_pulls_at_rates_or_gains(name):
    made = load_experiment(resolve(name))
    config = made.config(**made.tiny | {"width": 32})
    roles, model = roles_of(made, config), made.model(config, device="meta")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = groups_of(read_plan("quick").optimizer, model, roles)
    decayed = {names[id(p)] for group in groups if group.weight_decay for p in group.params}
    apart = {name for name in decayed if roles[name] == "vector"}
    muon = groups_of(Optimizer(name="Muon", lr=0.02), model, roles)
    orthogonal = {names[id(p)] for g in muon if g.rule.known.name == "Muon" for p in g.params}

    assert {name.rpartition(".")[2] for name in apart} <= {
        "front",
        "meta",
        "mixing",
    }  # learned rows
    assert orthogonal == {name for name, role in roles.items() if role == "matrix"}
    assert all(role == "conv" for name, role in roles.items() if name.endswith("taps"))


def test_lfm2s_convolutions_alone_see_as_far_as_their_taps_add_up_to():
    model = model_of("lfm2", num_blocks=3, attention_every=0)
    for weight in model.parameters():  # at the start a third block moves less than fp32 can tell
        weight.data += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))

    assert moved_by(model, random_tokens(B=2, T=16), 4) == list(range(4, 4 + 1 + 3 * 2))


def test_lfm2_attends_in_every_third_block():
    kinds = [
        type(block.attention).__name__
        for block in model_of("lfm2", num_blocks=7, attention_every=3).blocks
    ]

    assert kinds == ["ShortConvolution", "ShortConvolution", "Attention"] * 2 + ["ShortConvolution"]


def pattention(num_tokens: int = 24) -> nn.Module:
    module = load_experiment(resolve("tokenformer")).module
    torch.manual_seed(0)
    return module.Pattention(16, num_tokens)


def test_a_tokenformers_keys_say_directions_only():
    layer, x_BTC = pattention(), torch.randn(2, 5, 16)
    before_BTC = layer(x_BTC)
    layer.keys.data *= 7

    torch.testing.assert_close(layer(x_BTC), before_BTC)


def test_a_tokenformer_grows_by_keys_of_zeros_without_a_trace():
    layer, x_BTC = pattention(), torch.randn(2, 5, 16)
    before_BTC = layer(x_BTC)
    layer.keys = nn.Parameter(torch.cat([layer.keys, torch.zeros(8, 16)]))
    layer.values = nn.Parameter(torch.cat([layer.values, torch.randn(8, 16)]))

    torch.testing.assert_close(layer(x_BTC), before_BTC)


def test_a_tokenformers_tokens_have_no_order_and_stand_a_row_of_zeros():
    layer, x_BTC = pattention(), torch.randn(2, 5, 16)
    before_BTC, order = layer(x_BTC), torch.randperm(24)
    layer.keys.data, layer.values.data = layer.keys.data[order], layer.values.data[order]

    torch.testing.assert_close(layer(x_BTC), before_BTC)
    assert not layer(torch.zeros(1, 1, 16)).any()


def test_a_tokenformers_map_starts_with_the_spread_of_a_linear_layer():
    torch.manual_seed(0)
    layer = load_experiment(resolve("tokenformer")).module.Pattention(256, 512)
    x_BTC = torch.randn(4, 64, 256)

    assert (
        0.8
        < layer(x_BTC).std()
        / nn.functional.linear(x_BTC, 0.02 * 3**0.5 * torch.randn(256, 256)).std()
        < 1.25
    )


def delta_parts(B=2, H=3, T=37, D=8):
    """Queries, keys, values, decays, betas and a state, in fp64, with gradients."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, g = torch.randn(4, B, H, T, D, generator=draw, dtype=torch.float64)
    k = nn.functional.normalize(k, dim=-1)
    beta = torch.rand(B, H, T, generator=draw, dtype=torch.float64)
    state = torch.randn(B, H, D, D, generator=draw, dtype=torch.float64)
    return [part.requires_grad_() for part in (q, k, v, -5 * g.sigmoid(), beta, state)]


def test_the_delta_rules_chunks_equal_its_steps_in_output_and_gradient():
    module = load_experiment(resolve("kimi_delta")).module
    ours, theirs = delta_parts(), delta_parts()
    o_BHTD, state = module.delta_chunks(*ours, chunk=16)
    steps, after = [], theirs[-1]
    for t in range(37):
        one, after = module.delta_step(*(part[:, :, t] for part in theirs[:-1]), after)
        steps.append(one)
    expected_BHTD = torch.stack(steps, dim=2)
    for output in ((o_BHTD, state), (expected_BHTD, after)):
        (output[0].square().sum() + output[1].sum()).backward()

    torch.testing.assert_close(o_BHTD, expected_BHTD, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, after, rtol=1e-11, atol=1e-11)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-9, atol=1e-9)


def test_the_delta_rule_stands_the_fastest_decay_in_fp32():
    module = load_experiment(resolve("kimi_delta")).module
    parts = [part.detach().float() for part in delta_parts()]
    parts[3] = torch.full_like(parts[3], -5.0)
    parts = [part.requires_grad_() for part in parts]
    o_BHTD, state = module.delta_chunks(*parts, chunk=16)
    exact, _ = module.delta_chunks(*(part.double() for part in parts), chunk=1)
    (o_BHTD.sum() + state.sum()).backward()

    torch.testing.assert_close(o_BHTD.double(), exact, rtol=1e-5, atol=1e-5)
    assert all(part.grad.isfinite().all() for part in parts)


def test_a_delta_state_gives_back_what_was_written_and_keeps_the_second_value_of_a_key():
    module = load_experiment(resolve("kimi_delta")).module
    D = 8
    keys_TD = torch.eye(D)[:5]
    keys_TD = torch.cat([keys_TD, keys_TD[2:3]])
    values_TD = torch.randn(6, D, generator=torch.Generator().manual_seed(0))
    k, v = keys_TD[None, None], values_TD[None, None]
    still, fully = torch.zeros_like(k), torch.ones(1, 1, 6)
    _, state = module.delta_chunks(k, k, v, still, fully, torch.zeros(1, 1, D, D), chunk=4)
    said_TD = keys_TD[:5] @ state[0, 0]

    torch.testing.assert_close(said_TD[[0, 1, 3, 4]], values_TD[[0, 1, 3, 4]])
    torch.testing.assert_close(said_TD[2], values_TD[5])
    g = torch.full_like(k, -0.5)
    _, faded = module.delta_chunks(k, k, v, g, 0 * fully, state, chunk=4)
    torch.testing.assert_close(faded, state * torch.tensor(-0.5 * 6).exp())


def num_kept(name: str, T: int, **values) -> int:
    """Bytes that a cache holds of one row after T tokens."""
    model, cache = model_of(name, **values), Cache()
    model(random_tokens(B=1, T=T), cache=cache)
    cache.advance(T)
    return cache.num_bytes


def test_a_delta_models_memory_does_not_grow_with_the_text():
    assert num_kept("kimi_delta", 8, attention_every=0) == num_kept(
        "kimi_delta", 16, attention_every=0
    )


def rwkv_parts(B=2, H=2, T=75, D=8):
    """What a head of RWKV-7 reads, and a state, in fp64, with gradients."""
    draw = torch.Generator().manual_seed(0)
    r, decay, k, v, along = torch.randn(5, B, H, T, D, generator=draw, dtype=torch.float64)
    share = torch.rand(B, H, T, D, generator=draw, dtype=torch.float64)
    along = nn.functional.normalize(along, dim=-1)
    state = torch.randn(B, H, D, D, generator=draw, dtype=torch.float64)
    parts = (r, -0.6065 * decay.sigmoid(), k, v, -along, share * along, state)
    return [part.requires_grad_() for part in parts]


def test_rwkv7s_chunks_equal_its_steps_in_output_and_gradient():
    module = load_experiment(resolve("rwkv7")).module
    ours, theirs = rwkv_parts(), rwkv_parts()
    y_BHTD, state = module.state_chunks(*ours, chunk=32)
    steps, after = [], theirs[-1]
    for t in range(75):
        one, after = module.state_step(*(part[:, :, t] for part in theirs[:-1]), after)
        steps.append(one)
    expected_BHTD = torch.stack(steps, dim=2)
    for output in ((y_BHTD, state), (expected_BHTD, after)):
        (output[0].square().sum() + output[1].sum()).backward()

    torch.testing.assert_close(y_BHTD, expected_BHTD, rtol=1e-10, atol=1e-10)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-8, atol=1e-8)


def test_rwkv7_erases_what_its_state_holds_along_a_direction():
    module = load_experiment(resolve("rwkv7")).module
    r, _, k, v, read, _, state = (part.detach() for part in rwkv_parts(T=1))
    still = torch.zeros_like(r)
    parts = (r, still, 0 * k, v, read, -read, state)
    _, erased = module.state_step(*(part[:, :, 0] for part in parts[:-1]), state)

    assert (read[:, :, 0, None] @ erased).abs().max() < 1e-12
    assert (erased - state).abs().max() > 0.1


def test_rwkv7s_decays_stay_within_their_bounds_and_its_memory_does_not_grow():
    model = model_of("rwkv7")
    seen = []
    real = model.blocks[0].time.decay.forward
    model.blocks[0].time.decay.forward = lambda x: seen.append(real(x)) or 1e4 * (seen[-1] + 1)
    logits_BTV = model(random_tokens(B=1, T=16))

    assert seen and logits_BTV.isfinite().all()
    assert num_kept("rwkv7", 5) == num_kept("rwkv7", 16)


def test_rwkv7_decays_its_large_matrices_alone_and_doubles_the_rate_of_its_decays():
    made = load_experiment(resolve("rwkv7"))
    config = made.config(**made.tiny)
    model = made.model(config, device="meta")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = groups_of(read_plan("quick").optimizer, model, roles_of(made, config))
    decayed = {names[id(p)] for group in groups if group.weight_decay for p in group.params}
    faster = {names[id(p)] for group in groups if group.lr_scale == 2 for p in group.params}
    pairs = [p for p in model.modules() if type(p).__name__ == "LowRank"]

    assert len(pairs) == 7  # of decays, erasing and gates, and of values behind the first block
    assert not decayed & {names[id(p)] for pair in pairs for p in pair.parameters()}
    assert {"head.weight", "blocks.0.time.key.weight", "blocks.1.mlp.up.weight"} <= decayed
    assert {name.rpartition(".")[2] for name in faster} == {"decay_bias"}


@pytest.mark.parametrize("name", ["rene", "zamba2"])
def test_a_scans_chunks_equal_its_steps_in_output_and_gradient(name):
    module = load_experiment(resolve(name)).module

    def parts(B=2, T=45, H=3, D=4, N=5):
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(B, T, H, D, generator=draw, dtype=torch.float64)
        decay = -3 * torch.rand(B, T, H, generator=draw, dtype=torch.float64)
        write, read = torch.randn(2, B, T, N, generator=draw, dtype=torch.float64)
        state = torch.randn(B, H, D, N, generator=draw, dtype=torch.float64)
        return [part.requires_grad_() for part in (x, decay, write, read, state)]

    ours, theirs = parts(), parts()
    y_BTHD, state = module.scan_chunks(*ours, chunk=8)
    steps, after = [], theirs[-1]
    for t in range(45):
        one, after = module.scan_step(*(part[:, t] for part in theirs[:-1]), after)
        steps.append(one)
    expected_BTHD = torch.stack(steps, dim=1)
    for output in ((y_BTHD, state), (expected_BTHD, after)):
        (output[0].square().sum() + output[1].sum()).backward()

    torch.testing.assert_close(y_BTHD, expected_BTHD, rtol=1e-11, atol=1e-11)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-9, atol=1e-9)


def test_rene_feels_order_without_positions_and_keeps_a_window_at_most():
    model, tokens_BT = model_of("rene", kinds="m"), random_tokens(B=1, T=12)
    shuffled_BT = torch.cat([tokens_BT[:, [3, 1, 0, 2]], tokens_BT[:, 4:]], dim=1)

    assert (model(shuffled_BT)[:, -1] - model(tokens_BT)[:, -1]).abs().max() > 1e-7
    assert num_kept("rene", 8) == num_kept("rene", 16)


def test_zamba2_shares_one_block_and_is_a_stack_of_scans_where_no_way_leads_back():
    model, plain = model_of("zamba2"), model_of("zamba2", shared_every=0)
    for layer in model.layers:
        if layer.use is not None:
            layer.use.back.weight.data.zero_()
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens_BT = random_tokens(B=2, T=16)
    deep = model_of("zamba2", num_blocks=5)

    assert torch.equal(model(tokens_BT), plain(tokens_BT))
    assert sum(layer.use is not None for layer in deep.layers) == 5
    assert sum(type(module).__name__ == "SharedBlock" for module in deep.modules()) == 1


@pytest.mark.parametrize(
    ("name", "patch"),
    [("megabyte", "patch"), ("hourglass", "shorten")],
    ids=["megabyte", "hourglass"],
)
@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_a_patch_speaks_to_all_that_follow_it_and_to_none_before(name, patch, K):
    model, tokens_BT = model_of(name, **{patch: K}), random_tokens(B=2, T=15)
    for weight in model.parameters():  # at the start some ways are too faint for fp32
        weight.data += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))

    assert moved_by(model, tokens_BT, 6) == list(range(6, 15))
    assert moved_by(model, tokens_BT, 0) == list(range(15))


@pytest.mark.parametrize("name", ["megabyte", "hourglass"])
def test_patches_have_an_order(name):
    model, tokens_BT = model_of(name), random_tokens(B=1, T=16)
    swapped_BT = torch.cat([tokens_BT[:, 5:9], tokens_BT[:, 1:5], tokens_BT[:, 9:]], dim=1)
    swapped_BT = torch.cat([tokens_BT[:, :1], swapped_BT], dim=1)

    assert (model(swapped_BT)[:, -1] - model(tokens_BT)[:, -1]).abs().max() > 1e-7


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("the cat", [0, 3]),
        ("a  b", [0, 1]),
        ("x.", [0, 1]),
        ("1,2", [0, 1]),
        ("oé", [0, 1]),  # the lead byte of a letter beyond ASCII counts, its continuation does not
        ("o\U0001f600o", [0, 1]),
        ("ab\n\ncd", [0, 2]),
    ],
)
def test_spacebytes_words_begin_behind_what_is_no_letter(text, starts):
    word_starts = load_experiment(resolve("spacebyte")).module.word_starts
    found_BT = word_starts(torch.tensor([list(text.encode())]))

    assert found_BT[0].nonzero().flatten().tolist() == starts


def test_spacebyte_has_room_for_every_word_of_any_text():
    word_starts = load_experiment(resolve("spacebyte")).module.word_starts
    for seed in range(20):
        bytes_BT = random_tokens(B=50, T=13, V=257, seed=seed)
        assert word_starts(bytes_BT).sum(1).max() <= 13 // 2 + 1


def test_hnets_average_is_the_loops():
    smoothed = load_experiment(resolve("hnet")).module.smoothed
    draw = torch.Generator().manual_seed(0)
    y_BJL = torch.randn(2, 13, 3, generator=draw, dtype=torch.float64)
    p_BJ = torch.rand(2, 13, generator=draw, dtype=torch.float64)
    expected, last = [], torch.zeros(2, 3, dtype=torch.float64)
    for j in range(13):
        last = p_BJ[:, j, None] * y_BJL[:, j] + (1 - p_BJ[:, j, None]) * last
        expected.append(last)

    torch.testing.assert_close(smoothed(y_BJL, p_BJ), torch.stack(expected, 1), atol=1e-14, rtol=0)


def test_hnets_router_begins_a_chunk_where_a_vector_turns_and_its_aim_is_met_at_one():
    module = load_experiment(resolve("hnet")).module
    router = module.Router(4)
    x_L = torch.tensor([1.0, 2.0, -1.0, 0.5])
    model = model_of("hnet", chunk_length=4.0)
    even_BT = torch.full((1, 8), 0.25)
    even_BT[:, ::4] = 1.0  # a quarter begins a chunk, and so says the mean

    torch.testing.assert_close(
        router(torch.stack([x_L, x_L, -x_L])[None]), torch.tensor([[1.0, 0.0, 1.0]]),
        atol=1e-6, rtol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        model.ratio(torch.tensor([[1.0, 0.0, 0.0, 0.0]])), torch.tensor([[1.0]])
    )
    assert model.ratio(torch.ones(1, 8)).item() == 4.0
    assert model.ratio(torch.tensor([[1.0, 1.0, 0.0, 0.0]])).item() > 1


def test_hnets_gate_is_one_and_hands_the_router_a_gradient():
    model, tokens_BT = model_of("hnet"), random_tokens(B=2, T=16)
    model(tokens_BT).square().sum().backward()

    assert model.router.query.weight.grad.abs().max() > 0


@torch.no_grad()
def step_by_step(model: nn.Module, tokens_BT: Tensor, first: int) -> Tensor:
    """Logits of a pass over the first tokens and one for each after them."""
    cache, parts = Cache(), []
    for part_BT in tokens_BT.split([first, *[1] * (tokens_BT.shape[1] - first)], dim=1):
        parts.append(model(part_BT, cache=cache))
        cache.advance(part_BT.shape[1])
    return torch.cat(parts, dim=1)


def louder(model: nn.Module, by: float = 0.2) -> nn.Module:
    """At the start some ways are too faint for fp32."""
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        weight.data += by * noise
    return model


TEXTS = [
    b"the cat sat, 1,234 times.",
    b"a  b\n\nlong-winded words",
    b"x" * 25,
    b"    12 34567 (a+b)*c",
]


@pytest.mark.parametrize(
    "name", ["spacebyte", "hnet", "aunet", "aunet_pairs", "hourglass", "megabyte"]
)
@pytest.mark.parametrize("first", [1, 6])
@torch.no_grad()
def test_bytes_of_rows_whose_words_end_apart_are_written_as_a_whole_text_is_read(name, first):
    model = louder(model_of(name, vocab_size=257, max_len=64))
    tokens_BT = torch.tensor([list(text.ljust(25, b"."))[:25] for text in TEXTS])

    torch.testing.assert_close(
        step_by_step(model, tokens_BT, first), model(tokens_BT), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "name",
    ["avey", "hymba", "ftp", "ftp_blockwise", "kimi_delta", "rwkv7", "rene", "zamba2", "lfm2"],
)
@pytest.mark.parametrize("first", [1, 6, 9])
@torch.no_grad()
def test_what_is_written_token_by_token_is_what_a_whole_text_gives(name, first):
    model, tokens_BT = louder(model_of(name, max_len=32)), random_tokens(B=2, T=31)

    torch.testing.assert_close(
        step_by_step(model, tokens_BT, first), model(tokens_BT), atol=1e-5, rtol=1e-5
    )


def test_aveys_ranker_finds_the_chunk_that_the_last_one_repeats():
    model = model_of("avey", chunk=4, window_chunks=3, max_len=64)
    tokens_BT = random_tokens(B=2, T=24)
    tokens_BT[:, 16:20] = tokens_BT[:, 4:8]  # chunk 4 repeats chunk 1, and chunk 5 asks with it
    places_BJK, weights_BJK = model.ranked(model.token_table(tokens_BT).unflatten(1, (-1, 4)), 0)

    assert places_BJK[:, 5].tolist() == [[1, 4, 5]] * 2
    assert places_BJK[:, :2].tolist() == [[[-1, -1, 0], [-1, 0, 1]]] * 2
    assert weights_BJK.min() > 0 and weights_BJK.max() == 1


@torch.no_grad()
def test_aveys_window_is_the_text_itself_where_it_holds_all_of_it():
    model, tokens_BT = model_of("avey", chunk=3, window_chunks=6), random_tokens(B=2, T=15)
    x_BTC = model.token_table(tokens_BT)
    whole_NRC, is_real_NR = model.windows(x_BTC, 4)
    weights_BJK = model.ranked(x_BTC.unflatten(1, (-1, 3)), 4)[1].repeat_interleave(3, dim=-1)

    assert is_real_NR.tolist() == [[False] * 3 + [True] * 15] * 2
    torch.testing.assert_close(whole_NRC[:, 3:], x_BTC * weights_BJK[:, 0, 3:, None])


def test_a_mamba_scans_chunks_equal_its_steps_in_output_and_gradient():
    module = load_experiment(resolve("hymba")).module

    def parts(B=2, T=27, E=6, N=3):
        draw = torch.Generator().manual_seed(0)
        x, step = torch.randn(2, B, T, E, generator=draw, dtype=torch.float64)
        write, read = torch.randn(2, B, T, N, generator=draw, dtype=torch.float64)
        rate = 4 * torch.rand(E, N, generator=draw, dtype=torch.float64)
        state = torch.randn(B, E, N, generator=draw, dtype=torch.float64)
        return [part.requires_grad_() for part in (x, step.square(), write, read, rate, state)]

    def leaves(made: list) -> list:
        return [part.detach().requires_grad_() for part in made]

    ours, theirs = leaves(parts()), leaves(parts())
    y_BTE, state = module.scan_chunks(*ours, chunk=8)
    steps, after = [], theirs[-1]
    for t in range(27):
        one, after = module.scan_step(*(part[:, t] for part in theirs[:4]), theirs[4], after)
        steps.append(one)
    expected_BTE = torch.stack(steps, dim=1)
    for output in ((y_BTE, state), (expected_BTE, after)):
        (output[0].square().sum() + output[1].sum()).backward()

    torch.testing.assert_close(y_BTE, expected_BTE, rtol=1e-11, atol=1e-11)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_hymbas_layers_see_all_a_window_or_that_with_the_keys_of_the_one_before():
    model, tokens_BT = louder(model_of("hymba", num_blocks=4, kinds="aws")), random_tokens(2, 16)
    shared = model.blocks[2].mixer.attention

    assert [block.kind for block in model.blocks] == ["a", "w", "s", "a"]
    assert [name for name, _ in shared.named_parameters()] == ["query.weight"]
    torch.testing.assert_close(
        step_by_step(model, tokens_BT, 3), model(tokens_BT), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(UserError, match="kinds"):
        model_of("hymba", kinds="as")


@torch.no_grad()
def test_hymbas_meta_tokens_are_heard_everywhere_and_have_no_logits():
    model, tokens_BT = louder(model_of("hymba")), random_tokens(B=2, T=16)
    before_BTV = model(tokens_BT)
    model.meta[0] += 1

    assert before_BTV.shape[1] == 16
    assert ((model(tokens_BT) - before_BTV).abs().amax(-1) > 1e-5).all()


@torch.no_grad()
def test_hymba_is_a_scan_or_a_window_where_the_other_is_silent():
    model = louder(model_of("hymba", num_meta=0, num_blocks=3, kinds="w"))
    tokens_BT = random_tokens(B=2, T=12)
    mixers = [block.mixer for block in model.blocks]
    for mixer in mixers:
        mixer.mamba_norm.weight.zero_()
        mixer.attention.window = 2
    seen_in_windows = moved_by(model, tokens_BT, 2)
    for mixer in mixers:
        mixer.mamba_norm.weight.fill_(1)
        mixer.attention_norm.weight.zero_()

    assert seen_in_windows == list(range(2, 2 + 1 + 3))
    assert moved_by(model, tokens_BT, 2) == list(range(2, 12))


def test_hymba_with_the_longest_steps_stays_finite_in_bf16():
    model, tokens_BT = model_of("hymba"), random_tokens(B=2, T=16)
    for block in model.blocks:
        block.mixer.mamba.step_bias.data.fill_(50.0)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = model.train()(tokens_BT)
    logits_BTV.float().square().sum().backward()

    assert logits_BTV.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@torch.no_grad()
def test_ftps_blocks_hand_on_what_is_far_away_and_its_order():
    model, tokens_BT = louder(model_of("ftp_blockwise")), random_tokens(B=2, T=14)
    swapped_BT = tokens_BT[:, [1, 0, *range(2, 14)]]
    moved_BT = (model(swapped_BT) - model(tokens_BT)).abs().amax(-1)

    assert moved_by(model, tokens_BT, 1) == list(range(1, 14))
    assert (moved_BT[:, 3:6] > 1e-5).all()


@torch.no_grad()
def test_ftps_places_drawn_give_the_loss_over_all_positions_on_average(monkeypatch):
    model, row_BS = louder(model_of("ftp")), random_tokens(B=2, T=12)
    tokens_BT, targets_BT, K = row_BS[:, :-1], row_BS[:, 1:], model.config.num_ahead
    e_BTC = model.token_table(tokens_BT)
    vectors_BTNC = model.vectors(e_BTC)
    expected, weights = 0.0, [0.8**i for i in range(K)]
    for t in range(11):
        steps = min(K, 11 - t)
        x_BKC = model.decoded(e_BTC[:, t : t + steps], vectors_BTNC[:, t])
        nats_BK = nn.functional.cross_entropy(
            model.head(x_BKC).mT, targets_BT[:, t : t + steps], reduction="none"
        )
        expected += (nats_BK * torch.tensor(weights[:steps])).sum().item() / sum(weights)
    found = []
    for place in range(K):
        monkeypatch.setattr(
            torch, "randint", lambda *_, place=place, **__: torch.full((2, 1), place)
        )
        monkeypatch.setattr(model, "training", True)
        found.append(Objective(model).train()(tokens_BT, targets_BT).objective.item())

    assert sum(found) / K == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("the cat", [0, 3]),
        ("a  b\tc", [0, 1, 4]),
        ("x, y", [0, 1, 2]),
        ("a1234567", [0, 1, 4, 7]),
        ("oh... no", [0, 2, 5]),
        ("h\u00e9 \U0001f600", [0, 3]),
        ("letters", [0]),
    ],
)
def test_aunets_words_end_where_white_space_signs_and_digits_begin(text, ends):
    word_ends = load_experiment(resolve("aunet")).module.word_ends
    found_BT = word_ends(torch.tensor([list(text.encode())]))

    assert found_BT[0].nonzero().flatten().tolist() == ends


def test_aunets_words_of_a_prefix_are_the_prefix_of_the_words():
    word_ends = load_experiment(resolve("aunet")).module.word_ends
    bytes_BT = random_tokens(B=50, T=40, V=257)

    for T in range(1, 40):
        assert torch.equal(word_ends(bytes_BT[:, :T]), word_ends(bytes_BT)[:, :T])


@torch.no_grad()
def test_aunets_words_speak_to_their_end_and_what_follows_not_to_themselves():
    model = louder(model_of("aunet", vocab_size=257, window=1))  # so the wide blocks alone carry
    texts = [b"abc defg hi", b"abx defg hi", b"abc\ndefg hi"]
    same, letter, space = (model(torch.tensor([list(text)]))[0] for text in texts)

    assert ((letter - same).abs().amax(-1) > 1e-6).nonzero().flatten().tolist() == [2]
    assert ((space - same).abs().amax(-1) > 1e-6).nonzero().flatten().tolist() == [*range(3, 11)]


@torch.no_grad()
def test_aunet_pairs_pools_at_every_other_word_and_speaks_to_the_two_behind(monkeypatch):
    model = louder(model_of("aunet_pairs", vocab_size=257, window=1))
    words, pairs = model.levels.inner, model.levels.inner.inner
    tokens_BT = torch.tensor([list(b"ab cd ef gh ij kl")])
    said = []
    for by in (0.0, 1.0):
        for block in [*words.before, *words.after]:  # else words hand on what they hear
            monkeypatch.setattr(block, "forward", lambda x_BKC, *rest: x_BKC)
        places_K = torch.arange(4)  # the word ends 0, 1, 3 and 5, at the bytes 0, 2, 8 and 14
        more_K1 = by * (places_K == 2)[:, None]
        monkeypatch.setattr(pairs, "forward", lambda x_BKC, *rest, more=more_K1: x_BKC + more)
        said.append(model(tokens_BT))
    heard_T = (said[1] - said[0]).abs().amax(-1)[0]

    assert (heard_T > 1e-6).nonzero().flatten().tolist() == [*range(8, 14)]


def llada(T: int = 4, V: int = 5, **values) -> nn.Module:
    model = model_of("llada", vocab_size=V, max_len=T, **values)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    return model


def bound_by_enumeration(model: nn.Module, row_S: Tensor) -> float:
    """The mean over sizes l of n / l times the nats of every set of l masked targets."""
    n = len(row_S) - 1
    total = 0.0
    for l in range(1, n + 1):  # noqa: E741
        sets = list(itertools.combinations(range(n), l))
        is_masked_BT = torch.zeros(len(sets), n, dtype=torch.bool)
        for mask_T, chosen in zip(is_masked_BT, sets, strict=True):
            mask_T[list(chosen)] = True
        nats_BT = model.nats(row_S.expand(len(sets), -1), is_masked_BT)
        total += n / l * nats_BT.sum(1).mean().item()
    return total / n


@torch.no_grad()
def test_lladas_draws_give_the_bound_and_so_does_its_training_loss():
    model = llada(num_draws=3000)
    row_S = torch.tensor([1, 4, 0, 2, 2])
    exact = bound_by_enumeration(model, row_S)
    tokens_BT, targets_BT = row_S[None, :-1], row_S[None, 1:]
    torch.manual_seed(0)
    trained = model.training_loss(tokens_BT.expand(40_000, -1), targets_BT.expand(40_000, -1))

    assert model.log_likelihood(tokens_BT, targets_BT).sum().item() == pytest.approx(
        exact, rel=0.02
    )
    assert trained.sum(1).mean().item() == pytest.approx(exact, rel=0.03)


@torch.no_grad()
def test_llada_that_knows_nothing_scores_ln_v():
    model = llada(V=7)
    model.head.weight.data.zero_()
    row_BS = random_tokens(B=3, T=5, V=7)
    nats_BT = model.log_likelihood(row_BS[:, :-1], row_BS[:, 1:])

    torch.testing.assert_close(nats_BT.sum(1), torch.full((3,), 4 * math.log(7)))


@torch.no_grad()
def test_llada_never_sees_what_it_is_asked_and_scores_a_row_alike_in_any_company():
    model, row_BS = llada(V=50), random_tokens(B=6, T=5, V=50)
    tokens_BT, targets_BT = row_BS[:, :-1], row_BS[:, 1:].clone()
    is_masked_BT = torch.tensor([[False, True, False, True]]).expand(6, -1)
    other_BS = row_BS.clone()
    other_BS[:, 2] = (other_BS[:, 2] + 1) % 50
    alone = model.log_likelihood(tokens_BT[2:3], targets_BT[2:3])

    torch.testing.assert_close(
        model.nats(row_BS, is_masked_BT)[:, 3], model.nats(other_BS, is_masked_BT)[:, 3]
    )
    torch.testing.assert_close(model.log_likelihood(tokens_BT, targets_BT)[2:3], alone)
    targets_BT[:, 2:] = -100  # what is not scored has no say and no nats
    cut = model.log_likelihood(tokens_BT, targets_BT)

    assert not cut[:, 2:].any() and cut[:, :2].any()


@torch.no_grad()
def test_llada_writes_the_surest_tokens_first_and_keeps_the_prompt():
    model, prompt_BT = llada(T=12, V=9, tokens_per_step=2), random_tokens(B=2, T=5, V=9)
    new_BT = model.generate(prompt_BT, 7, lambda logits: logits.argmax(-1))

    assert new_BT.shape == (2, 7) and new_BT.max() < 9
    assert torch.equal(new_BT, model.generate(prompt_BT, 7, lambda logits: logits.argmax(-1)))


@torch.no_grad()
def test_lladas_error_is_that_of_its_draws():
    few, many = (llada(num_draws=n, V=50) for n in (16, 256))
    row_BS = random_tokens(B=20, T=5, V=50)
    sums = [Objective(m).eval()(row_BS[:, :-1], row_BS[:, 1:]) for m in (few, many)]
    error, least = (s.variance.item() ** 0.5 for s in sums)

    assert error / least == pytest.approx(16**0.5, rel=0.2)
    assert abs(sums[0].loss - sums[1].loss).item() < 3 * error
    assert sums[0].loss.item() == pytest.approx(
        few.log_likelihood(row_BS[:, :-1], row_BS[:, 1:]).sum().item(), rel=1e-5
    )
