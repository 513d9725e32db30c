"""The order of an epoch, and what ranks and workers get of it, however often a run is stopped and goes on elsewhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamprep import epochs
from streamprep.epochs import Epoch, Part, Pool, count_draws, make_epoch, of_worker, share
from streamprep.errors import UserError


def pool_of(buckets: list[int], *, clip: list[int] | None = None, num_drawn: int | None = None) -> Pool:
    captions = None if clip is None else np.array(clip, dtype=np.int32)
    size = len(buckets) if captions is None else len(set(captions.tolist()))
    part = Part(start=0, num_rows=len(buckets), clip=captions, num_drawn=size if num_drawn is None else num_drawn)
    return Pool(bucket=np.array(buckets, dtype=np.int32), parts=(part,))


def epoch_of(pool: Pool, *, seed: int = 0, epoch: int = 0, batch_size: int = 2, drop_last: bool = True) -> Epoch:
    return make_epoch(pool, seed=seed, epoch=epoch, batch_size=batch_size, drop_last=drop_last)


def as_torch_takes_them(numbers: range, num_workers: int) -> list[int]:
    """A ``DataLoader`` asks its workers in turn, and passes over those that have ended."""
    if not num_workers:
        return list(numbers)
    left = [list(of_worker(numbers, worker=worker, num_workers=num_workers)) for worker in range(num_workers)]
    taken = []
    while any(left):
        taken += [of_one.pop(0) for of_one in left if of_one]
    return taken


def steps_of(epoch: Epoch, consumed: int, ranks: int, workers: list[int], drop_last: bool) -> list[list[int]]:
    """For each step the batches' numbers, one of each rank."""
    of_rank = [
        as_torch_takes_them(
            share(len(epoch.batches), consumed=consumed, rank=rank, world_size=ranks, drop_last=drop_last),
            workers[rank % len(workers)],
        )
        for rank in range(ranks)
    ]
    assert len({len(numbers) for numbers in of_rank}) == 1, "ranks must take as many steps, or they wait for ever"
    return [list(step) for step in zip(*of_rank, strict=True)]


runs = st.lists(
    st.tuples(
        st.integers(1, 9),  # ranks
        st.lists(st.integers(0, 5), min_size=1, max_size=3),  # workers of each
        st.integers(0, 8),  # steps until it is stopped
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=400)
@given(
    buckets=st.lists(st.integers(0, 4), min_size=1, max_size=120),
    batch_size=st.integers(1, 9),
    drop_last=st.booleans(),
    runs=runs,
    seed=st.integers(0, 2**63),
    number=st.integers(0, 1000),
)
def test_every_key_comes_as_often_as_promised_whatever_ranks_workers_stops_and_resumes(
    buckets: list[int], batch_size: int, drop_last: bool, runs: list[tuple[int, list[int], int]], seed: int, number: int
) -> None:
    epoch = epoch_of(pool_of(buckets), seed=seed, epoch=number, batch_size=batch_size, drop_last=drop_last)
    num_batches = len(epoch.batches)
    taken: list[int] = []
    consumed = 0
    for which, (ranks, workers, stop_after) in enumerate(runs):
        steps = steps_of(epoch, consumed, ranks, workers, drop_last)
        last = which == len(runs) - 1
        done = steps if last else steps[:stop_after]
        taken += [number for step in done for number in step]
        consumed += ranks * len(done)
    assert taken == list(range(len(taken))), "the trainer sees the batches in their one order"
    seen = Counter(int(row) for number in taken for row in epoch.batches[number % num_batches])
    if drop_last:
        assert all(times == 1 for times in seen.values())
        ranks = runs[-1][0]
        assert num_batches - len(taken) < ranks
        rest = sum(times % batch_size for times in Counter(buckets).values())
        assert len(seen) == len(buckets) - rest - batch_size * (num_batches - len(taken))
    else:
        assert set(seen) == set(range(len(buckets)))


@given(
    buckets=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    drop_last=st.booleans(),
    seed=st.integers(0, 100),
)
def test_a_batch_is_of_one_bucket_and_of_the_whole_size(
    buckets: list[int], batch_size: int, drop_last: bool, seed: int
) -> None:
    epoch = epoch_of(pool_of(buckets), seed=seed, batch_size=batch_size, drop_last=drop_last)
    assert epoch.batches.shape[1:] == (batch_size,)
    for batch in epoch.batches:
        assert len({buckets[row] for row in batch}) == 1
    assert epoch.num_drawn == len(buckets)
    assert epoch.batches.size == len(buckets) - epoch.num_dropped + epoch.num_repeated
    assert not (epoch.num_repeated if drop_last else epoch.num_dropped)


@given(
    captions=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    seed=st.integers(0, 100),
    number=st.integers(0, 5),
)
def test_of_each_clip_one_caption_is_drawn(captions: list[int], seed: int, number: int) -> None:
    pool = pool_of([0] * len(captions), clip=captions)
    drawn = epoch_of(pool, seed=seed, epoch=number, batch_size=1).batches[:, 0]
    assert sorted(captions[row] for row in drawn) == sorted(set(captions))


def test_the_captions_of_a_clip_are_drawn_alike_often_over_the_epochs() -> None:
    pool = pool_of([0] * 40, clip=[row % 10 for row in range(40)])
    drawn = Counter(
        int(row) for number in range(400) for row in epoch_of(pool, epoch=number, batch_size=1).batches[:, 0]
    )
    assert all(60 < drawn[row] < 140 for row in range(40)), drawn  # 100 each, sigma 8.7


def test_the_order_follows_from_the_seed_and_the_epoch_alone() -> None:
    pool = pool_of([0, 1] * 50)
    orders = {
        (seed, number): epoch_of(pool, seed=seed, epoch=number).batches.tobytes()
        for seed in range(3)
        for number in range(3)
    }
    assert len(set(orders.values())) == 9
    assert orders == {
        (seed, number): epoch_of(pool, seed=seed, epoch=number).batches.tobytes() for seed, number in orders
    }


def test_the_order_never_changes_between_versions() -> None:
    """A run is resumed by a newer streamprep, numpy or Python: these numbers must stay."""
    epoch = epoch_of(pool_of([0, 0, 1, 0, 1, 0, 0, 1, 1, 0]), seed=7, epoch=3, batch_size=2)
    assert epoch.batches.tolist() == [[3, 5], [8, 2], [6, 1], [7, 4], [9, 0]]


def test_other_rows_are_left_out_each_epoch() -> None:
    pool = pool_of([0] * 10)
    kept = [set(epoch_of(pool, epoch=number, batch_size=4).batches.ravel().tolist()) for number in range(20)]
    assert all(len(rows) == 8 for rows in kept)
    assert set.union(*kept) == set(range(10))
    assert len({frozenset(rows) for rows in kept}) > 5


def test_other_batches_do_not_go_round_each_epoch() -> None:
    pool = pool_of([0] * 6)
    left_out = set()
    for number in range(30):
        batches = epoch_of(pool, epoch=number, batch_size=2).batches
        taken = {n for rank in (0, 1) for n in share(3, consumed=0, rank=rank, world_size=2, drop_last=True)}
        assert taken == {0, 1}
        left_out |= set(batches[2].tolist())
    assert left_out == set(range(6))


def test_every_position_of_the_order_is_as_likely_for_every_row() -> None:
    pool = pool_of([0] * 8)
    first = Counter(int(epoch_of(pool, epoch=number, batch_size=1).batches[0, 0]) for number in range(1600))
    assert all(140 < first[row] < 260 for row in range(8)), first  # 200 each, sigma 13


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    data=st.data(),
)
def test_each_source_is_drawn_as_often_as_asked_for(sizes: list[int], data: st.DataObject) -> None:
    repeats = data.draw(st.lists(st.integers(1, 4), min_size=len(sizes), max_size=len(sizes)))
    draws = count_draws(sizes, repeats=repeats, weights=None)
    assert draws == [size * times for size, times in zip(sizes, repeats, strict=True)]
    parts, start = [], 0
    for size, num_drawn in zip(sizes, draws, strict=True):
        parts.append(Part(start=start, num_rows=size, clip=None, num_drawn=num_drawn))
        start += size
    pool = Pool(bucket=np.zeros(start, np.int32), parts=tuple(parts))
    seen = Counter(epoch_of(pool, batch_size=1).batches.ravel().tolist())
    for part, times in zip(parts, repeats, strict=True):
        assert all(seen[row] == times for row in range(part.start, part.start + part.num_rows))


@given(
    sizes=st.lists(st.integers(1, 500), min_size=2, max_size=4),
    data=st.data(),
)
def test_weights_are_shares_and_no_source_is_gone_through_more_often_than_allowed(
    sizes: list[int], data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    repeats = data.draw(st.lists(st.sampled_from([0.5, 1, 2, 3.5]), min_size=len(sizes), max_size=len(sizes)))
    draws = count_draws(sizes, repeats=repeats, weights=weights)
    assume(min(draws) >= 1)
    most = [size * times for size, times in zip(sizes, repeats, strict=True)]
    assert all(number <= limit + 1e-6 for number, limit in zip(draws, most, strict=True))
    assert any(number > limit - 1 for number, limit in zip(draws, most, strict=True)), "one is used up"
    scale = max(number / weight for number, weight in zip(draws, weights, strict=True))
    assert all(abs(number - scale * weight) <= 1 + weight for number, weight in zip(draws, weights, strict=True))


def test_a_part_of_a_source_is_another_one_each_epoch() -> None:
    pool = pool_of([0] * 10, num_drawn=5)
    drawn = [frozenset(epoch_of(pool, epoch=number, batch_size=1).batches.ravel().tolist()) for number in range(20)]
    assert all(len(rows) == 5 for rows in drawn)
    assert frozenset.union(*drawn) == frozenset(range(10))
    assert len(set(drawn)) > 10


def test_two_and_a_half_times_is_each_row_twice_or_thrice() -> None:
    seen = Counter(epoch_of(pool_of([0] * 10, num_drawn=25), batch_size=1).batches.ravel().tolist())
    assert Counter(seen.values()) == {2: 5, 3: 5}


def test_an_epoch_without_a_step_is_refused_with_what_to_change() -> None:
    epoch = epoch_of(pool_of([0] * 7), batch_size=2)
    with pytest.raises(UserError, match="7 rows in 1 buckets give 3 whole batches of 2, fewer than the 4 ranks: lower"):
        epochs.check_at_least_one(epoch, world_size=4, drop_last=True, batch_size=2, num_buckets=1)
    epochs.check_at_least_one(epoch, world_size=3, drop_last=True, batch_size=2, num_buckets=1)


def test_chance_is_even() -> None:
    numbers = [epochs.chance(0, 0, "caption", f"key_{number}") / 2**64 for number in range(10_000)]
    assert abs(np.mean(numbers) - 0.5) < 0.01
    assert abs(np.mean(np.array(numbers) < 0.1) - 0.1) < 0.01
