"""Fetching ahead: in order, several at once, within the agreed bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprep.ahead import fetch_ahead

SOON = 10.0


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SOON
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


class Held:
    """Counts what is fetched and not taken, as the consumer sees it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sizes: list[int] = []
        self.most: list[list[int]] = []

    def fetch(self, size: int) -> int:
        with self.lock:
            self.sizes.append(size)
            self.most.append(list(self.sizes))
        return -size

    def taken(self, size: int) -> None:
        with self.lock:
            self.sizes.remove(size)


@given(
    sizes=st.lists(st.integers(0, 50), max_size=30),
    max_bytes=st.integers(1, 60),
    num_threads=st.integers(1, 5),
)
def test_all_come_in_order_and_never_more_is_held_than_agreed(
    sizes: list[int], max_bytes: int, num_threads: int
) -> None:
    held = Held()
    found = []
    fetched = fetch_ahead(sizes, held.fetch, size_bytes=lambda size: size, max_bytes=max_bytes, num_threads=num_threads)
    while (one := next(fetched, None)) is not None:
        size, result = one
        assert result == -size
        found.append(size)
        held.taken(size)  # room for others there is when the next one is asked for
    assert found == sizes
    for at_once in held.most:
        assert len(at_once) == 1 or sum(at_once) <= max_bytes
        assert len(at_once) <= 2 * num_threads


def test_as_many_are_fetched_at_once_as_there_are_threads() -> None:
    together = threading.Barrier(4)
    fetched = fetch_ahead(
        range(8), lambda _: together.wait(timeout=SOON), size_bytes=lambda _: 1, max_bytes=100, num_threads=4
    )
    assert len(list(fetched)) == 8


def test_a_job_that_is_long_in_coming_holds_up_nothing_before_it() -> None:
    arrived = threading.Event()

    def jobs() -> Iterator[int]:
        yield 1
        assert arrived.wait(SOON)
        yield 2

    with closing(fetch_ahead(jobs(), str, size_bytes=lambda _: 1, max_bytes=100, num_threads=2)) as fetched:
        assert next(fetched) == (1, "1")
        arrived.set()
        assert next(fetched) == (2, "2")


def test_what_a_fetch_raises_comes_in_its_place() -> None:
    def fetch(number: int) -> int:
        if number == 3:
            raise OSError("no")
        return number

    fetched = fetch_ahead(range(6), fetch, size_bytes=lambda _: 1, max_bytes=100, num_threads=3)
    assert [next(fetched)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no"):
        next(fetched)


def test_what_the_jobs_raise_comes_after_those_before() -> None:
    def jobs() -> Iterator[int]:
        yield 0
        yield 1
        raise ValueError("no more")

    fetched = fetch_ahead(jobs(), str, size_bytes=lambda _: 1, max_bytes=100, num_threads=3)
    assert [next(fetched), next(fetched)] == [(0, "0"), (1, "1")]
    with pytest.raises(ValueError, match="no more"):
        next(fetched)


def test_leaving_early_begins_nothing_more_and_leaves_no_thread() -> None:
    begun = []

    def fetch(number: int) -> int:
        begun.append(number)
        return number

    before = threading.active_count()
    fetched = fetch_ahead(count(), fetch, size_bytes=lambda _: 1, max_bytes=10, num_threads=3)
    next(fetched)
    assert until(lambda: len(begun) == 6)  # there is no room for more
    fetched.close()
    assert until(lambda: threading.active_count() == before)
    assert len(begun) == 6
