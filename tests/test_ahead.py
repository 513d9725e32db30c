from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprep.ahead import read_ahead


def threads_of_ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("streamprep-ahead")]


class Work:
    """Gives its argument back, and remembers how much was begun and not yet given up by who uses it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held = self.most = self.begun = 0

    def __call__(self, size: int) -> int:
        with self.lock:
            self.begun += 1
            self.held += size
            self.most = max(self.most, self.held)
        return size

    def use(self, size: int) -> None:
        with self.lock:
            self.held -= size


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(1, 5), st.integers(0, 30))
def test_all_comes_in_order_and_no_more_is_held_than_allowed(sizes: list[int], at_once: int, limit: int) -> None:
    work, seen = Work(), []
    for size in read_ahead(work, sizes, at_once=at_once, size_of=lambda size: size, max_bytes=limit):
        seen.append(size)
        work.use(size)
    assert seen == sizes
    assert work.most <= max(limit, max(sizes, default=0))
    assert threads_of_ours() == []


def test_so_many_calls_run_side_by_side() -> None:
    meeting = threading.Barrier(3, timeout=30)
    assert list(read_ahead(lambda _: meeting.wait() >= 0, range(6), at_once=3)) == [True] * 6


def test_one_is_read_while_another_is_at_use() -> None:
    begun = [threading.Event() for _ in range(3)]
    reading = read_ahead(lambda number: begun[number].set(), range(3), at_once=1)
    next(reading)
    assert begun[1].wait(30)
    time.sleep(0.05)
    assert not begun[2].is_set()
    reading.close()


def test_an_error_comes_where_its_result_would_have() -> None:
    def work(number: int) -> int:
        return 10 // (3 - number)

    seen = []
    with pytest.raises(ZeroDivisionError):
        for result in read_ahead(work, range(8), at_once=4):
            seen.append(result)
    assert seen == [3, 5, 10]
    assert threads_of_ours() == []


def test_who_leaves_leaves_no_thread_and_no_result_behind() -> None:
    work, discarded = Work(), list[int]()
    with (
        pytest.raises(KeyError),
        closing(read_ahead(work, range(1, 50), at_once=4, discard=discarded.append)) as reading,
    ):
        assert next(reading) == 1
        raise KeyError
    assert threads_of_ours() == []
    assert discarded == list(range(2, work.begun + 1))
    assert work.begun <= 6
