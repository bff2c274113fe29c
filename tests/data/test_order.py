"""The order of training loses nothing, repeats nothing, and is known in advance."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmplay.data.order import Mixture, Rows, num_rows, permuted

REMEMBERED = [6, 7, 2, 4, 5, 1, 0, 3, 9, 8]  # of 10 rows
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=8)
mixtures = st.one_of(
    st.tuples(st.sampled_from(["first_exhausted", "all_exhausted"]), st.integers(1, 5)),
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5).map(lambda s: (s, len(s))),
)


def ends_of(shard_lengths):
    ends = []
    for length in shard_lengths:
        ends.append((ends[-1] if ends else 0) + length)
    return ends


@given(n=st.integers(1, 400), seed=st.integers(0, 2**40))
def test_a_permutation_reaches_every_place_once(n, seed):
    assert sorted(permuted(i, n, seed, "data", 0, 0) for i in range(n)) == list(range(n))


def test_a_permutation_differs_by_seed_dataset_epoch_and_shard():
    orders = {
        tuple(permuted(i, 100, seed, name, epoch, shard) for i in range(100))
        for seed in (0, 1)
        for name in ("a", "b")
        for epoch in (0, 1)
        for shard in (0, 1)
    }

    assert len(orders) == 16


def test_a_permutation_mixes():
    n = 1000
    order = [permuted(i, n, 0, "data", 0, 0) for i in range(n)]
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(order))
    first_half = sum(place < n // 2 for place in order[: n // 2])

    assert neighbours < 10  # 2 expected
    assert 200 < first_half < 300  # 250 expected


def test_the_permutation_never_changes():
    order = [permuted(i, 10, 0, "data", 0, 0) for i in range(10)]

    assert order == REMEMBERED, "another order is another training: raise order._VERSION with it"


@given(shard_lengths=lengths, T=st.integers(1, 50), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_has_every_row_once(shard_lengths, T, seed, epoch):
    ends = ends_of(shard_lengths)
    rows = Rows(ends, complete=True, T=T)

    order = [rows.row(p, seed, "data", epoch) for p in range(rows.num_known)]

    assert sorted(order) == list(range(num_rows(ends[-1], T)))


@given(shard_lengths=lengths, T=st.integers(1, 50), data=st.data())
def test_a_growing_source_has_the_order_of_the_whole(shard_lengths, T, data):
    ends = ends_of(shard_lengths)
    so_far = data.draw(st.integers(0, len(ends) - 1))
    whole = Rows(ends, complete=True, T=T)
    growing = Rows(ends[:so_far], complete=False, T=T)

    order = [growing.row(p, 3, "data", 0) for p in range(growing.num_known)]

    assert order == [whole.row(p, 3, "data", 0) for p in range(growing.num_known)]
    assert all((row + 1) * T < (ends[so_far - 1] if so_far else 0) for row in order)


@given(shard_lengths=lengths, T=st.integers(1, 50))
def test_rows_come_shard_by_shard(shard_lengths, T):
    ends = ends_of(shard_lengths)
    rows = Rows(ends, complete=True, T=T)
    last_targets = [
        min((rows.row(p, 0, "data", 0) + 1) * T, ends[-1] - 1) for p in range(rows.num_known)
    ]
    shards = [sum(end <= position for end in ends) for position in last_targets]

    assert shards == sorted(shards)


@given(mixture=mixtures, num=st.integers(0, 200))
def test_a_dataset_gives_its_rows_in_order_without_a_gap(mixture, num):
    mixed = Mixture(*mixture)
    given_so_far = Counter()

    for k in range(num):
        dataset, before = mixed.at(k)
        assert before == given_so_far[dataset] == mixed.drawn(k, dataset)
        given_so_far[dataset] += 1

    assert [mixed.drawn(num, i) for i in range(mixture[1])] == [
        given_so_far[i] for i in range(mixture[1])
    ]


def test_without_shares_the_datasets_take_turns():
    mixed = Mixture("first_exhausted", 3)

    assert [mixed.at(k)[0] for k in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@given(shares=st.lists(st.integers(1, 100), min_size=1, max_size=5), k=st.integers(0, 10**9))
def test_shares_are_kept_at_every_moment(shares, k):
    mixed = Mixture([float(share) for share in shares], len(shares))

    for dataset, share in enumerate(shares):
        due = Fraction(share * k, sum(shares))
        assert abs(mixed.drawn(k, dataset) - due) < len(shares)


@given(mixture=mixtures, data=st.data())
def test_an_epoch_ends_with_the_row_that_uses_a_dataset_up(mixture, data):
    mixed = Mixture(*mixture)
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=mixture[1], max_size=mixture[1]))

    length, final = mixed.epoch(sizes, [True] * len(sizes))

    used_up = [mixed.drawn(length, i) >= size for i, size in enumerate(sizes)]
    before = [mixed.drawn(length - 1, i) >= size for i, size in enumerate(sizes)]
    finished = all if mixture[0] == "all_exhausted" else any
    assert final and finished(used_up) and not finished(before)


@given(mixture=mixtures, data=st.data())
def test_what_is_known_of_a_growing_epoch_holds(mixture, data):
    mixed = Mixture(*mixture)
    m = mixture[1]
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=m, max_size=m))
    complete = data.draw(st.lists(st.booleans(), min_size=m, max_size=m))
    known = [
        size if done else data.draw(st.integers(0, size))
        for size, done in zip(sizes, complete, strict=True)
    ]
    true_length, _ = mixed.epoch(sizes, [True] * m)

    length, final = mixed.epoch(known, complete)

    assert length == true_length if final else length <= true_length


@pytest.mark.parametrize("T", [1, 7])
def test_a_stream_of_one_token_has_no_row(T):
    assert num_rows(1, T) == num_rows(0, T) == 0
