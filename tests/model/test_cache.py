import torch
from hypothesis import given
from hypothesis.strategies import integers, lists
from torch import nn

from lmplay.model.cache import Cache


def positions(start, stop):
    """Rows that name their position: x[b, h, t, d] == t."""
    return torch.arange(start, stop).float()[:, None].expand(2, 3, -1, 4)


def steps(first, num_steps):
    """The ranges of positions that the passes of one generation cover."""
    return [(0, first), *((first + i, first + i + 1) for i in range(num_steps))]


@given(first=integers(1, 200), num_steps=integers(0, 200), capacity=integers(1, 500))
def test_append_gives_back_every_position_in_order(first, num_steps, capacity):
    cache, module = Cache(capacity), nn.Identity()

    for start, stop in steps(first, num_steps):
        keys, values = cache.append(module, positions(start, stop), -positions(start, stop))
        cache.advance(stop - start)
        assert torch.equal(keys, positions(0, stop))
        assert torch.equal(values, -positions(0, stop))


@given(first=integers(1, 200), num_steps=integers(0, 200), keep=integers(1, 90))
def test_keep_gives_back_what_the_new_positions_can_see(first, num_steps, keep):
    cache, module = Cache(), nn.Identity()

    for start, stop in steps(first, num_steps):
        (keys,) = cache.append(module, positions(start, stop), keep=keep)
        cache.advance(stop - start)
        assert torch.equal(keys, positions(max(0, start - keep + 1), stop))


def test_a_window_may_begin_after_the_first_pass():
    cache, module = Cache(), nn.Identity()

    for start, stop in steps(20, 30):
        (keys,) = cache.append(module, positions(start, stop), keep=4 if start else None)
        cache.advance(stop - start)
        assert torch.equal(keys, positions(max(0, stop - 4) if start else 0, stop))


@given(keep=integers(1, 90))
def test_a_window_uses_bounded_memory(keep):
    cache, module = Cache(), nn.Identity()
    for start, stop in steps(1000, 300):
        (keys,) = cache.append(module, positions(start, stop), keep=keep)
        cache.advance(stop - start)

    assert keys.untyped_storage().nbytes() <= max(64, 2 * keep) * 2 * 3 * 4 * 4


def test_buffers_are_not_made_anew_at_each_step():
    cache, module, places = Cache(capacity=1000), nn.Identity(), set()
    for start, stop in steps(1, 999):
        (keys,) = cache.append(module, positions(start, stop))
        cache.advance(stop - start)
        if start:
            places.add(keys.data_ptr())

    assert len(places) <= 5  # 64 positions, doubled up to 1000
    assert keys.untyped_storage().nbytes() == 1000 * 2 * 3 * 4 * 4


@given(calls=lists(integers(0, 2), min_size=1, max_size=8))
def test_each_call_of_a_shared_module_has_its_own_memory(calls):
    cache, modules = Cache(), [nn.Identity() for _ in range(3)]

    for step in range(3):
        for call, index in enumerate(calls):
            value = torch.full((1, 1, 1), 10.0 * step + call)
            (seen,) = cache.append(modules[index], value)
            state = cache.state(modules[index])
            assert seen.flatten().tolist() == [10.0 * s + call for s in range(step + 1)]
            assert state == ({} if step == 0 else {"step": step - 1, "call": call})
            state.update(step=step, call=call)
        cache.advance(1)


def test_length_changes_only_between_passes():
    cache = Cache()
    cache.append(nn.Identity(), positions(0, 5))
    during = cache.length
    cache.advance(5)

    assert (during, cache.length) == (0, 5)


def test_a_cache_counts_the_bytes_that_later_passes_need():
    cache, module = Cache(), nn.Identity()
    sizes = []
    for start, stop in steps(20, 30):
        cache.append(module, positions(start, stop))
        cache.append(module, positions(start, stop), keep=7)
        cache.state(module)["last"] = torch.zeros(5)
        cache.advance(stop - start)
        sizes.append(cache.num_bytes)

    of_position = positions(0, 1).nbytes
    assert sizes == [(20 + step + 6) * of_position + 5 * 4 for step in range(31)]


def test_a_cache_knows_whether_it_was_used():
    empty, appended, stateful = Cache(), Cache(), Cache()
    appended.append(nn.Identity(), positions(0, 1))
    stateful.state(nn.Identity())

    assert [c.used for c in (empty, appended, stateful)] == [False, True, True]


def test_the_first_tensor_settles_the_dtype():
    cache, module = Cache(), nn.Identity()
    cache.append(module, positions(0, 1).bfloat16())
    cache.advance(1)
    (keys,) = cache.append(module, positions(1, 2))

    assert keys.dtype == torch.bfloat16


@given(first=integers(1, 100), num_steps=integers(0, 100), keep=integers(1, 90))
def test_the_bytes_are_those_of_what_later_passes_see(first, num_steps, keep):
    cache, module = Cache(capacity=500), nn.Identity()
    for start, stop in steps(first, num_steps):
        cache.append(module, positions(start, stop), positions(start, stop))
        cache.append(module, positions(start, stop), keep=keep)
        cache.state(module)["last"] = positions(start, stop)[:, :, -1:]
        cache.advance(stop - start)
    num_seen = first + num_steps

    of_position = 2 * 3 * 4 * 4
    assert cache.num_bytes == of_position * (2 * num_seen + min(num_seen, keep - 1) + 1)
