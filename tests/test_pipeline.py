"""Stages side by side give what nested generators give, stop when told to, and say where the time went."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprep.pipeline import Pipeline

NAP_SECONDS = 0.02


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamprep-")]


@pytest.fixture(autouse=True)
def no_thread_outlives_its_pipeline() -> Iterator[None]:
    yield
    assert not threads()


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def doubled(items: Iterator[int]) -> Iterator[int]:
    for item in items:
        yield 2 * item


def paired(items: Iterator[int]) -> Iterator[tuple[int, ...]]:
    """Another number of items than came in."""
    while batch := tuple(islice(items, 2)):
        yield batch


def failing_at(number: int) -> Iterator[int]:
    yield from range(number)
    raise LookupError(f"item {number}")


# Order


@given(num_items=st.integers(0, 12), sizes=st.tuples(*[st.integers(1, 4)] * 3), serial=st.booleans())
def test_items_come_in_order_whether_stages_are_threads_or_not(
    num_items: int, sizes: tuple[int, int, int], serial: bool
) -> None:
    with Pipeline(serial=serial) as pipeline:
        numbers = pipeline.stage("count", iter(range(num_items)), max_items=sizes[0])
        twice = pipeline.stage("double", doubled(numbers), max_items=sizes[1])
        pairs = list(pipeline.stage("pair", paired(twice), max_items=sizes[2]))
    assert pairs == list(paired(doubled(iter(range(num_items)))))


@pytest.mark.parametrize("serial", [False, True])
def test_stages_run_in_threads_of_their_own_unless_serial(serial: bool) -> None:
    def where(items: Iterator[int]) -> Iterator[str]:
        yield from (threading.current_thread().name for _ in items)

    with Pipeline(serial=serial) as pipeline:
        names = list(pipeline.stage("look", where(iter(range(2))), max_items=1))
    assert names == ([threading.current_thread().name] if serial else ["streamprep-look"]) * 2


# Errors


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("max_items", [1, 2, 10])
@pytest.mark.parametrize("failing", [0, 1, 5])
def test_an_error_comes_out_where_its_item_would_have(serial: bool, max_items: int, failing: int) -> None:
    taken: list[int] = []
    with pytest.raises(LookupError, match=f"item {failing}"), Pipeline(serial=serial) as pipeline:
        numbers = pipeline.stage("count", failing_at(failing), max_items=max_items)
        for item in pipeline.stage("double", doubled(numbers), max_items=max_items):
            taken.append(item)
    assert taken == [2 * number for number in range(failing)]


class Stop(BaseException):
    """As KeyboardInterrupt: no `Exception`."""


def test_an_interrupt_in_a_stage_comes_out_as_well() -> None:
    def interrupted() -> Iterator[int]:
        yield 1
        raise Stop

    with pytest.raises(Stop), Pipeline() as pipeline:
        list(pipeline.stage("count", interrupted(), max_items=1))


# Leaving


@pytest.mark.parametrize("serial", [False, True])
def test_an_error_of_the_consumer_is_raised_as_it_is(serial: bool) -> None:
    with pytest.raises(ValueError, match="mine"), Pipeline(serial=serial) as pipeline:
        for _ in pipeline.stage("count", count(), max_items=1):
            raise ValueError("mine")


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_early_stops_every_stage_and_closes_its_generator(taken: int) -> None:
    closed: list[str] = []

    def endless(name: str, items: Iterator[int]) -> Iterator[int]:
        try:
            yield from items
        finally:
            closed.append(name)

    with Pipeline() as pipeline:
        first = pipeline.stage("first", endless("first", count()), max_items=1)
        second = pipeline.stage("second", endless("second", first), max_items=1)
        third = pipeline.stage("third", endless("third", second), max_items=1)
        assert list(islice(third, taken)) == list(range(taken))
        assert len(threads()) == 3
    assert not threads()
    assert sorted(closed) == ["first", "second", "third"]


def test_leaving_stops_a_stage_that_waits_for_an_item_that_never_comes() -> None:
    release = threading.Event()

    def stuck() -> Iterator[int]:
        release.wait(30)
        yield 1

    with Pipeline() as pipeline:
        pipeline.stage("double", doubled(pipeline.stage("stuck", stuck(), max_items=1)), max_items=1)
        wait_for(lambda: len(threads()) == 2)
        threading.Timer(0.05, release.set).start()
    assert not threads()


# Look-ahead


@pytest.mark.parametrize("max_items", [1, 2, 5])
def test_a_stage_runs_ahead_but_never_by_more_than_its_queue(max_items: int) -> None:
    """Ahead of what the consumer is done with: the queue, the one in the consumer's hands, the one in the making."""
    made = 0

    def making() -> Iterator[int]:
        nonlocal made
        for number in range(30):
            made += 1
            yield number

    with Pipeline() as pipeline:
        for taken, number in enumerate(pipeline.stage("make", making(), max_items=max_items)):
            assert number == taken
            wait_for(lambda now=taken: made >= min(30, now + 1 + max_items))
            assert made <= taken + max_items + 2


def test_serial_makes_nothing_ahead() -> None:
    made: list[int] = []

    def making() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    with Pipeline(serial=True) as pipeline:
        for number in pipeline.stage("double", pipeline.stage("make", making(), max_items=9), max_items=9):
            assert made[-1] == number


@pytest.mark.parametrize("serial", [False, True])
def test_an_item_that_was_used_is_let_go(serial: bool) -> None:
    """A batch of frames is 200 MB."""

    class Item:
        pass

    seen: list[weakref.ref[Item]] = []
    with Pipeline(serial=serial) as pipeline:
        items = pipeline.stage("pass", pipeline.stage("make", (Item() for _ in range(6)), max_items=1), max_items=1)
        for item in items:
            seen.append(weakref.ref(item))
            del item
            wait_for(lambda: all(reference() is None for reference in seen[:-1]))
    wait_for(lambda: all(reference() is None for reference in seen))


# Times


def napping(items: Iterator[int]) -> Iterator[int]:
    for item in items:
        time.sleep(NAP_SECONDS)
        yield item


@pytest.mark.parametrize("serial", [False, True])
def test_the_time_a_stage_works_is_measured_without_what_it_waits(serial: bool) -> None:
    with Pipeline(serial=serial) as pipeline:
        slow = pipeline.stage("slow", napping(iter(range(10))), max_items=1)
        assert list(pipeline.stage("fast", doubled(slow), max_items=1)) == [2 * number for number in range(10)]
    first, second = pipeline.stages
    assert [first.name, second.name] == ["slow", "fast"]
    assert first.total_seconds >= 10 * NAP_SECONDS
    assert pipeline.busy_seconds(first) == first.total_seconds
    assert second.total_seconds >= first.starved_seconds >= 2 * NAP_SECONDS  # who waited, waited for the slow one
    assert pipeline.busy_seconds(second) == second.total_seconds - first.starved_seconds


def test_the_time_a_stage_waits_for_a_slow_consumer_is_measured() -> None:
    with Pipeline() as pipeline:
        for _ in pipeline.stage("fast", iter(range(10)), max_items=1):
            time.sleep(NAP_SECONDS)
    (times,) = pipeline.stages
    assert times.blocked_seconds >= 2 * NAP_SECONDS
