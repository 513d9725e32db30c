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

from streamprep import ahead
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


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch-ahead")]


class Source:
    """Numbers without end, from a generator that says when it was closed."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.closed = threading.Event()
        self._fails_at = fails_at

    def numbers(self) -> Iterator[int]:
        try:
            for number in count():
                if number == self._fails_at:
                    raise ValueError("no more")
                yield number
        finally:
            time.sleep(0.1)  # so that who does not wait is gone before
            self.closed.set()


def test_leaving_early_begins_nothing_more_and_leaves_no_thread() -> None:
    begun = []

    def fetch(number: int) -> int:
        begun.append(number)
        return number

    source = Source()
    fetched = fetch_ahead(source.numbers(), fetch, size_bytes=lambda _: 1, max_bytes=10, num_threads=3)
    next(fetched)
    assert until(lambda: len(begun) == 6)  # there is no room for more
    assert own_threads()
    fetched.close()
    assert own_threads() == [] and source.closed.is_set()
    assert len(begun) == 6


def test_an_error_of_the_consumer_ends_all_threads() -> None:
    source = Source()
    fetched = fetch_ahead(source.numbers(), str, size_bytes=lambda _: 1, max_bytes=10, num_threads=3)
    with pytest.raises(ArithmeticError), closing(fetched):
        for number, _ in fetched:
            if number == 20:
                raise ArithmeticError
    assert own_threads() == [] and source.closed.is_set()


def test_an_error_of_a_fetch_ends_all_threads() -> None:
    source = Source()
    fetched = fetch_ahead(
        source.numbers(), lambda number: 1 // (5 - number), size_bytes=lambda _: 1, max_bytes=10, num_threads=3
    )
    with pytest.raises(ZeroDivisionError):
        list(fetched)
    assert own_threads() == [] and source.closed.is_set()


@pytest.mark.parametrize("where", ["jobs", "size"])
def test_an_error_of_the_source_ends_all_threads(where: str) -> None:
    source = Source(fails_at=7 if where == "jobs" else None)
    fetched = fetch_ahead(
        source.numbers(),
        str,
        size_bytes=lambda number: 1 // (7 - number) if where == "size" else 1,
        max_bytes=10,
        num_threads=3,
    )
    with pytest.raises((ValueError, ZeroDivisionError)):
        list(fetched)
    assert own_threads() == [] and source.closed.is_set()


def test_jobs_that_end_badly_when_they_are_closed_end_all_the_same() -> None:
    def jobs() -> Iterator[int]:
        try:
            yield from count()
        finally:
            raise OSError("not so")

    fetched = fetch_ahead(jobs(), str, size_bytes=lambda _: 1, max_bytes=10, num_threads=3)
    assert next(fetched) == (0, "0")
    fetched.close()
    assert own_threads() == []


def test_a_source_that_hangs_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_LEAVE_SECONDS", 0.3)
    come_on, closed = threading.Event(), threading.Event()

    def jobs() -> Iterator[int]:
        try:
            yield 0
            assert come_on.wait(SOON)
            yield 1
        finally:
            closed.set()

    fetched = fetch_ahead(jobs(), str, size_bytes=lambda _: 1, max_bytes=10, num_threads=3)
    assert next(fetched) == (0, "0")
    began = time.monotonic()
    fetched.close()
    assert time.monotonic() - began < 3
    assert own_threads() == ["fetch-ahead-jobs"] and not closed.is_set()
    come_on.set()
    assert until(lambda: own_threads() == []) and closed.is_set()
