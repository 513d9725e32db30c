"""Several processes that call one function again and again, for jobs as they are handed out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from streamprep.claims import Wait
from streamprep.watchdog import end_with_the_parent

J = TypeVar("J")
T = TypeVar("T")

_ALL_BUSY = Wait(3600.0)


class JobFailed(Exception):
    """A job could not be done.

    Args:
        job: Which; None if it is not known.
        error: Why.
        died: Whether its process has died.
    """

    def __init__(self, job: Any, error: Exception, *, died: bool = False) -> None:
        super().__init__(str(error))
        self.job, self.error, self.died = job, error, died


def num_processes(num_workers: int, *, local_world_size: int = 1) -> int:
    """As asked for, or if that is 0 one for each core; ranks on one machine divide them."""
    return num_workers or max(1, len(os.sched_getaffinity(0)) // local_world_size)


def in_processes(
    work: Callable[..., T], jobs: Mapping[int, tuple[Any, ...]], num_workers: int
) -> Iterator[tuple[int, T]]:
    """Call a function for each job, several at a time, and yield (job, result) as each is done.

    Args:
        work: A function of a module.
        jobs: What to call it with.
        num_workers: Processes; 0 is one for each core, 1 is this process.
    """
    waiting = iter(jobs)
    workers = min(num_processes(num_workers), len(jobs))
    try:
        with closing(as_taken(work, lambda: next(waiting, None), jobs.__getitem__, workers)) as results:
            yield from results
    except JobFailed as failed:
        raise failed.error from failed.error.__cause__


def as_taken(
    work: Callable[..., T],
    take: Callable[[], J | Wait | None],
    arguments: Callable[[J], tuple[Any, ...]],
    num_workers: int,
) -> Generator[tuple[J, T], None, None]:
    """Call a function for each job that can be had, several at a time, and yield (job, result) as each is done.

    Args:
        work: A function of a module.
        take: Asked whenever a process is free: a job, or how long to wait for one, or None if there are no more.
        arguments: What to call the function with.
        num_workers: Processes; 0 and 1 are this process.

    Raises:
        JobFailed: as soon as one has.
    """
    running: dict[Future[T], J] = {}
    with _open_pool(num_workers) as pool:
        try:
            while True:
                job = take() if len(running) < max(1, num_workers) else _ALL_BUSY
                if job is None and not running:
                    return
                if job is None or isinstance(job, Wait):
                    for future in _some_done(running, (job or _ALL_BUSY).seconds):
                        yield running[future], _result(running[future], future)
                        del running[future]
                else:
                    running[pool.submit(work, *arguments(job))] = job
        except BrokenProcessPool as error:
            died = OSError("a packing process died; run the same command again to go on")
            died.__cause__ = error
            only = next(iter(running.values())) if len(running) == 1 else None
            raise JobFailed(only, died, died=True) from error


def _some_done(running: Mapping[Future[T], Any], seconds: float) -> set[Future[T]]:
    """At least one that is done, unless none is within so many seconds."""
    if not running:
        time.sleep(seconds)
        return set()
    return wait(running, timeout=seconds, return_when=FIRST_COMPLETED).done


def _result(job: Any, future: Future[T]) -> T:
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        raise JobFailed(job, error) from error


class _ThisProcess(Executor):
    """Does what is submitted before it returns; what is no `Exception`, such as `Stopped`, is raised there."""

    def submit(self, work: Callable[..., T], /, *arguments: Any, **options: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(work(*arguments, **options))
        except Exception as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)
        return future


@contextmanager
def _open_pool(num_workers: int) -> Iterator[Executor]:
    if num_workers <= 1:
        yield _ThisProcess()
        return
    # Not forkserver: a process has one, and decoding children want theirs with torchcodec loaded.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_follow_parent) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Ctrl-C goes to every process of the terminal: the parent decides. If it dies, a worker would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_the_parent()
