"""Reading ahead: a function is called for the next items while the result for one is at use."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    at_once: int,
    size_of: Callable[[T], int] = lambda _: 0,
    max_bytes: float = math.inf,
    discard: Callable[[R], None] = lambda _: None,
) -> Generator[R, None, None]:
    """What a function gives for each item, in their order; calls run in threads.

    An error is raised where its result would have come. When it is left, by an error or by ``close()``, no thread is
    left behind: what runs is waited for, and its results are discarded.

    Args:
        work: The function.
        items: Taken in the caller's thread.
        at_once: How many calls run side by side.
        size_of: What the result for an item takes, until the next result is asked for.
        max_bytes: What all results take together that are at use, made, or being made. An item that is larger has its
            turn when there is no other.
        discard: Gets results that nobody has asked for.
    """
    waiting: deque[tuple[int, Future[R]]] = deque()
    held = 0
    with ThreadPoolExecutor(at_once, thread_name_prefix="streamprep-ahead") as threads:
        try:
            for item in items:
                size = size_of(item)
                while waiting and (len(waiting) > at_once or held + size > max_bytes):
                    done, future = waiting.popleft()
                    yield future.result()
                    held -= done
                waiting.append((size, threads.submit(work, item)))
                held += size
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            _drop([future for _, future in waiting], discard)


def _drop(futures: list[Future[R]], discard: Callable[[R], None]) -> None:
    for future in futures:
        future.cancel()
    for future in futures:
        if not future.cancelled() and future.exception() is None:
            discard(future.result())
