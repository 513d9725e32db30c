"""Generators joined by threads and bounded queues: every stage runs while the others do.

``for x in pipeline.stage("encode", encode(pipeline.stage("batch", collate(clips))))`` reads like nested generators and
runs them side by side. An error in a stage comes out where its next item would have; leaving the ``with`` block stops
all threads. The time each stage worked and waited is always measured.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class StageTimes:
    """Seconds a stage spent, while the pipeline ran."""

    name: str
    total_seconds: float = 0.0
    """Making items, waiting for the stage before included."""
    blocked_seconds: float = 0.0
    """Waiting for the stage after it to take an item."""
    starved_seconds: float = 0.0
    """What the stage after it waited for its items."""


class Pipeline:
    """Runs stages in threads; with ``serial`` all in the caller's, one item at a time."""

    def __init__(self, *, serial: bool = False) -> None:
        self.serial = serial
        self.stages: list[StageTimes] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._threads: list[threading.Thread] = []

    def stage(self, name: str, items: Iterator[T], *, max_items: int) -> Iterator[T]:
        """The same items, made ahead by a thread of its own.

        Args:
            name: For the measured times; stages are created in the order items pass them.
            items: Run in the new thread.
            max_items: How many may lie ready.
        """
        times = StageTimes(name)
        self.stages.append(times)
        if self.serial:
            return _timed(items, times, in_callers_thread=True)
        queue: deque[Any] = deque()
        thread = threading.Thread(
            target=self._fill, args=(queue, items, max_items, times), name=f"streamprep-{name}", daemon=True
        )
        self._threads.append(thread)
        thread.start()
        return self._drain(queue, times)

    def busy_seconds(self, times: StageTimes) -> float:
        """What a stage worked, without waiting for the one before it."""
        number = self.stages.index(times)
        return times.total_seconds - (self.stages[number - 1].starved_seconds if number else 0.0)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _fill(self, queue: deque[Any], items: Iterator[Any], max_items: int, times: StageTimes) -> None:
        try:
            for item in _timed(items, times):
                if not self._put(queue, (item, None), max_items, times):
                    break
                del item
            else:
                self._put(queue, None, max_items + 1, times)
        except _StoppedWaiting:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised again where the items are taken
            self._put(queue, (None, error), max_items + 1, times)
        finally:
            if isinstance(items, Generator):
                items.close()

    def _put(self, queue: deque[Any], entry: Any, max_items: int, times: StageTimes) -> bool:
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: len(queue) < max_items or self._stopping)
            times.blocked_seconds += time.monotonic() - started
            if self._stopping:
                return False
            queue.append(entry)
            self._changed.notify_all()
        return True

    def _drain(self, queue: deque[Any], times: StageTimes) -> Iterator[Any]:
        while True:
            started = time.monotonic()
            with self._changed:
                self._changed.wait_for(lambda: queue or self._stopping)
                times.starved_seconds += time.monotonic() - started
                if self._stopping:
                    raise _StoppedWaiting
                entry = queue.popleft()
                self._changed.notify_all()
            if entry is None:
                return
            item, error = entry
            if error is not None:
                raise error
            del entry
            yield item
            del item


class _StoppedWaiting(BaseException):
    """The pipeline was left while this thread waited for an item."""


def _timed(items: Iterator[T], times: StageTimes, *, in_callers_thread: bool = False) -> Iterator[T]:
    while True:
        started = time.monotonic()
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            seconds = time.monotonic() - started
            times.total_seconds += seconds
            times.starved_seconds += seconds if in_callers_thread else 0.0
        yield item
        del item
