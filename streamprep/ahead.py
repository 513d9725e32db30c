"""Fetch ahead: several at once, in their order, and never more bytes than agreed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")

_LEAVE_SECONDS = 5.0
"""What is under way when the rest is not wanted any more is waited for, but not for ever."""


def fetch_ahead(
    jobs: Iterable[J],
    fetch: Callable[[J], R],
    *,
    size_bytes: Callable[[J], int],
    max_bytes: int,
    num_threads: int,
    max_jobs: int | None = None,
) -> Generator[tuple[J, R], None, None]:
    """Each job with what was fetched for it, in the order of the jobs.

    The jobs are taken by a thread of their own: one that is long in coming holds up nothing that is there already.
    Leaving early, by an error or because the rest is not wanted, closes the jobs if they are a generator, waits for a
    moment for what is under way, and fetches nothing more.

    Args:
        jobs: Taken as far ahead as there is room.
        fetch: Runs in any of the threads. What it raises comes out in the job's place.
        size_bytes: Of what will be fetched.
        max_bytes: Most that is under way or waits to be taken, the last one taken included; one job may be larger,
            alone.
        num_threads: How many are fetched at once.
        max_jobs: Most that are under way or wait; by default twice the threads.
    """
    room = _Room(max_bytes=max_bytes, max_jobs=max_jobs or 2 * num_threads)
    work = _Work(jobs, fetch, size_bytes, room)
    threads = [threading.Thread(target=work.take_jobs, name="fetch-ahead-jobs", daemon=True)]
    threads += [
        threading.Thread(target=work.fetch_all, name=f"fetch-ahead-{number}", daemon=True)
        for number in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    try:
        yield from work.results()
    finally:
        work.stop()
        deadline = time.monotonic() + _LEAVE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


@dataclass(eq=False)
class _Slot(Generic[J, R]):
    """A job, and what came of it."""

    job: J
    size_bytes: int
    done: bool = False
    result: list[R] = field(default_factory=list)
    error: BaseException | None = None


@dataclass
class _Room:
    max_bytes: int
    max_jobs: int
    held_bytes: int = 0
    held_jobs: int = 0

    def has(self, size_bytes: int) -> bool:
        if not self.held_jobs:
            return True
        return self.held_jobs < self.max_jobs and self.held_bytes + size_bytes <= self.max_bytes

    def take(self, size_bytes: int) -> None:
        self.held_bytes += size_bytes
        self.held_jobs += 1

    def give_back(self, size_bytes: int) -> None:
        self.held_bytes -= size_bytes
        self.held_jobs -= 1


class _Work(Generic[J, R]):
    """What the threads share, under one lock."""

    def __init__(self, jobs: Iterable[J], fetch: Callable[[J], R], size_bytes: Callable[[J], int], room: _Room) -> None:
        self._jobs, self._fetch, self._size_bytes, self._room = jobs, fetch, size_bytes, room
        self._changed = threading.Condition()
        self._order: deque[_Slot[J, R]] = deque()  # what is not taken yet
        self._waiting: deque[_Slot[J, R]] = deque()  # what nobody has begun to fetch
        self._no_more = False
        self._failed: BaseException | None = None  # the jobs' own end
        self._stopping = False

    def take_jobs(self) -> None:
        """Hand the jobs to the fetching threads, as there is room."""
        try:
            try:
                for job in self._jobs:
                    if not self._hand_over(_Slot(job, self._size_bytes(job))):
                        return
            finally:
                if isinstance(self._jobs, Generator):
                    self._jobs.close()
        except BaseException as error:  # noqa: BLE001 - raised where the jobs end
            self._failed = error
        finally:
            with self._changed:
                self._no_more = True
                self._changed.notify_all()

    def _hand_over(self, slot: _Slot[J, R]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._room.has(slot.size_bytes))
            if self._stopping:
                return False
            self._room.take(slot.size_bytes)
            self._order.append(slot)
            self._waiting.append(slot)
            self._changed.notify_all()
        return True

    def fetch_all(self) -> None:
        """Fetch what waits, the first first, until there is no more."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._waiting or self._no_more)
                if self._stopping or not self._waiting:
                    return
                slot = self._waiting.popleft()
            try:
                slot.result.append(self._fetch(slot.job))
            except BaseException as error:  # noqa: BLE001 - raised where the result would be
                slot.error = error
            with self._changed:
                slot.done = True
                self._changed.notify_all()

    def results(self) -> Generator[tuple[J, R], None, None]:
        """What was fetched, in order; the room of one is free when the next is asked for."""
        while (slot := self._next()) is not None:
            if slot.error is not None:
                raise slot.error
            yield slot.job, slot.result.pop()
            with self._changed:
                self._room.give_back(slot.size_bytes)
                self._changed.notify_all()
        if self._failed is not None:
            raise self._failed

    def _next(self) -> _Slot[J, R] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._order[0].done if self._order else self._no_more)
            return self._order.popleft() if self._order else None

    def stop(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._stopping = True
            self._waiting.clear()
            self._changed.notify_all()
