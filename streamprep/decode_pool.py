"""Decode clips in child processes that can be killed: a file that hangs or crashes its decoder costs one sample.

1. The feeder thread pulls tasks, which is where storage is read, until ``max_ahead_bytes`` of encoded video wait.
2. The supervisor thread gives each task, in order, a slot of the ring and a child that is ready. No free slot, no
   work: that is how a slow consumer holds everything back.
3. The child decodes straight into the slot (`decode_child`) and says so on its own channel. Children share no queue and
   no lock, so one that dies, whenever it does, takes nothing with it; it is replaced.
4. A child that dies or is not done in time is killed and its task tried once more, then the sample is bad.
5. The consumer gets results in the order of the tasks, each a view of its slot until the next is asked for.

The ring is one ``memfd``: independent of ``/dev/shm`` (64 MB in Docker), and gone with the last process that maps it.
"""

from __future__ import annotations

import math
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any

from torch import Tensor

from streamprep.decode_child import ChildProcess, map_ring, slot_frames
from streamprep.decoder import Decoded, DecodeStats, DecodeTask, pull
from streamprep.errors import BadSample
from streamprep.types import DecodeRequest

_ATTEMPTS = 2
_MAX_FAILED_STARTS = 3
_START_SECONDS = 300.0  # importing torch takes 3 s, on a cold network disk minutes
_TAKE_SECONDS = 5.0  # a limit shorter than a busy machine takes to wake a child would be the clip's fault
_TASK_BYTES = 4096  # what a task counts for besides its video, so that a run of bad samples is bounded as well


class DecodePool:
    """Decodes in child processes, which start now and stay from one `map` to the next.

    Args:
        num_workers: Child processes.
        num_slots: Results that can be in the making or waiting for the consumer.
        slot_bytes: The largest result.
        timeout_seconds: For one clip.
        memory_bytes: For one clip: what decoding may map.
        max_ahead_bytes: Reading ahead stops when this much encoded video waits.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        num_slots: int,
        slot_bytes: int,
        timeout_seconds: float,
        memory_bytes: int,
        max_ahead_bytes: int = 256 * 2**20,
    ) -> None:
        if min(num_workers, num_slots, slot_bytes, timeout_seconds, memory_bytes, max_ahead_bytes) <= 0:
            raise ValueError(
                "all must be above 0, got "
                f"{num_workers=}, {num_slots=}, {slot_bytes=}, {timeout_seconds=}, {memory_bytes=}, {max_ahead_bytes=}"
            )
        self.stats = DecodeStats()
        self._num_workers = num_workers
        self._slot_bytes = slot_bytes
        self._timeout_seconds = timeout_seconds
        self._memory_bytes = memory_bytes
        self._max_ahead_bytes = max_ahead_bytes

        self._ring_fd = os.memfd_create("streamprep-ring")
        os.ftruncate(self._ring_fd, num_slots * slot_bytes)
        self._ring = map_ring(self._ring_fd)

        # The three threads share these, under the lock of `_changed`.
        self._changed = threading.Condition()
        self._order: deque[_Job | _End] = deque()  # everything pulled and not yet asked for, in the order of tasks
        self._queue: deque[_Job] = deque()  # those of `_order` that want a child
        self._ahead_bytes = 0
        self._free_slots = list(range(num_slots))
        self._failure: BaseException | None = None
        self._stopping = False
        self._wake_fd: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._feeder: threading.Thread | None = None

        # The supervisor's own.
        self._children: list[_Child] = []
        self._failed_starts = 0
        self._slot_wanted_since: float | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        # A thread, and not only during `map`: starting the first child blocks for the 3 s of importing torch.
        self._supervisor = threading.Thread(target=self._supervise, name="decode-supervisor", daemon=True)
        self._supervisor.start()
        # At exit multiprocessing ends all children and waits for them; the supervisor must not replace them then.
        self._at_exit = Finalize(None, self.close, exitpriority=0)

    def map(self, tasks: Iterable[DecodeTask]) -> Generator[Decoded, None, None]:
        """Decode every task; results come in the order of the tasks.

        A result's frames are a view of its slot, which the next result may overwrite. What `tasks` raises is raised
        here, after the results before it. Leaving early closes the pool.
        """
        feeder = self._start_feeder(tasks)
        finished = False
        try:
            while isinstance(job := self._next_in_order(), _Job):
                yield Decoded(
                    key=job.key, tag=job.tag, frames=job.frames, bad=job.bad, seconds=job.seconds, decoder=job.decoder
                )
                self._give_back_slot(job)
            finished = True
        finally:
            if not finished:
                self.close()
        feeder.join()
        self._feeder = None
        if job.error is not None:
            raise job.error

    def close(self) -> None:
        """End threads and children at once; may be called again."""
        with self._changed:
            self._stopping = True
            self._notify()
            feeder, self._feeder = self._feeder, None
        self._supervisor.join()
        if feeder is not None:
            feeder.join(timeout=0.5)  # it may be waiting for storage, for however long; it pulls nothing more
        self._at_exit.cancel()

    def worker_pids(self) -> list[int]:
        """Process ids of the children that have been started."""
        return [child.process.pid for child in self._children]

    def working_on(self) -> dict[int, str]:
        """Process id to key, of the children that are decoding."""
        jobs = [(child.process.pid, child.job) for child in self._children if child.taken_at is not None]
        return {pid: job.key for pid, job in jobs if job is not None}

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # The consumer

    def _start_feeder(self, tasks: Iterable[DecodeTask]) -> threading.Thread:
        with self._changed:
            if self._stopping:
                raise RuntimeError("this pool is closed")
            if self._failure is not None:
                raise self._failure
            if self._feeder is not None:
                raise RuntimeError("this pool is still busy with an earlier map()")
            self._feeder = threading.Thread(target=self._feed, args=(tasks,), name="decode-feeder", daemon=True)
            self._feeder.start()
            return self._feeder

    def _next_in_order(self) -> _Job | _End:
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._stopping or (self._order and self._order[0].done))
            self.stats.starved_seconds += time.monotonic() - began
            if self._failure is not None:
                raise self._failure
            if self._stopping:
                raise RuntimeError("this pool was closed while it was decoding")
            first = self._order.popleft()
            if isinstance(first, _Job):
                self._count_ahead(first, 0)
            return first

    def _give_back_slot(self, job: _Job) -> None:
        if job.slot is not None:
            with self._changed:
                self._free_slots.append(job.slot)
                self._notify()

    # The feeder

    def _feed(self, tasks: Iterable[DecodeTask]) -> None:
        error: BaseException | None = None
        try:
            for task in pull(tasks, self.stats):
                self._take_in(task)
                if not self._wait_for_room():
                    return
        except BaseException as raised:  # noqa: BLE001 - raised again in the consumer
            error = raised
        with self._changed:
            self._order.append(_End(error))
            self._notify()

    def _take_in(self, task: DecodeTask) -> None:
        needed_bytes = math.prod(task.request.shape)
        if needed_bytes > self._slot_bytes:
            raise ValueError(
                f"clip {task.key!r} decodes to {needed_bytes} bytes {task.request.shape} but a slot holds "
                f"{self._slot_bytes}: make the pool with a larger slot_bytes"
            )
        job = _Job(key=task.key, tag=task.tag, request=task.request)
        with self._changed:
            self._order.append(job)
            if isinstance(task.video, BadSample):
                job.bad = task.video
                self._count_ahead(job, _TASK_BYTES)
            else:
                job.video = task.video
                self._queue.append(job)
                self._count_ahead(job, _TASK_BYTES + len(task.video))
            self._notify()

    def _wait_for_room(self) -> bool:
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._ahead_bytes < self._max_ahead_bytes)
            self.stats.feeder_blocked_seconds += time.monotonic() - began
            return not self._stopping

    # The supervisor

    def _supervise(self) -> None:
        try:
            while not self._stopping:
                self._start_missing()
                self._hand_out()
                self._attend()
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            self._failure = error
        finally:
            self._end_all()

    def _start_missing(self) -> None:
        while len(self._children) < self._num_workers and not self._stopping:
            process = ChildProcess(self._ring_fd, self._memory_bytes)
            child = _Child(process=process, deadline=time.monotonic() + _START_SECONDS)
            self._children.append(child)
            self._selector.register(process.channel, selectors.EVENT_READ, child)

    def _hand_out(self) -> None:
        for child in self._children:
            if child.ready and child.job is None and (job := self._next_to_decode()) is not None:
                assert job.video is not None and job.slot is not None
                child.job, child.deadline = job, time.monotonic() + max(self._timeout_seconds, _TAKE_SECONDS)
                child.process.send_task(job.video, job.request, offset=job.slot * self._slot_bytes)

    def _next_to_decode(self) -> _Job | None:
        """The first task of the queue, with a slot: its own if this is its second attempt, else a free one."""
        with self._changed:
            slot_wanted = bool(self._queue) and self._queue[0].slot is None and not self._free_slots
            self._count_slot_wait(slot_wanted)
            if slot_wanted or not self._queue:
                return None
            job = self._queue.popleft()
            if job.slot is None:
                job.slot = self._free_slots.pop()
            self._count_ahead(job, 0)
            return job

    def _count_slot_wait(self, slot_wanted: bool) -> None:
        now = time.monotonic()
        if self._slot_wanted_since is not None:
            self.stats.slot_wait_seconds += now - self._slot_wanted_since
        self._slot_wanted_since = now if slot_wanted else None

    def _attend(self) -> None:
        """Sleep until a child, another thread or a deadline wants something."""
        deadline = min((child.deadline for child in self._children), default=math.inf)
        events = self._selector.select(None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
        for key, _ in events:
            if key.data is None:
                os.eventfd_read(key.fd)
            else:
                self._hear(key.data)
        if not events:  # what has been answered counts, however late we come to read it
            self._expire()

    def _hear(self, child: _Child) -> None:
        reply = child.process.receive()
        if reply is None:
            self._lost(child)
        elif reply["kind"] == "ready":
            child.ready, child.deadline = True, math.inf
        elif reply["kind"] == "taken":
            child.taken_at, child.has_ever_taken = time.monotonic(), True
            child.deadline = child.taken_at + self._timeout_seconds
            self._failed_starts = 0
        else:
            assert child.job is not None
            self._answered(child, child.job, reply)

    def _answered(self, child: _Child, job: _Job, reply: dict[str, Any]) -> None:
        if reply["kind"] == "bug":
            raise RuntimeError(f"decoding {job.key!r} failed, and not for the video's sake:\n{reply['message']}")
        if reply["kind"] == "memory":
            self._end(child)  # what is left of its heap is anyone's guess
            self._try_again(child, "decoder_memory", reply["message"])
            return
        child.job, child.taken_at, child.deadline = None, None, math.inf
        self._count_decoding(job, reply["seconds"])
        if reply["kind"] == "bad":
            self._finish(job, bad=BadSample(reply["reason"], reply["message"], stage=reply["stage"]))
        else:
            job.decoder = reply["decoder"]
            self.stats.sequential += job.decoder == "sequential"
            self._finish(job)

    def _lost(self, child: _Child) -> None:
        self._remove(child)
        self._try_again(child, "decoder_crash", f"the decoding process ended with {child.process.wait()}")

    def _expire(self) -> None:
        now = time.monotonic()
        for child in [child for child in self._children if child.deadline <= now]:
            if not child.ready:
                raise RuntimeError(f"a decoding process was not ready within {_START_SECONDS:.0f} s of its start")
            self._end(child)
            self._try_again(child, "decoder_timeout", f"not decoded within {self._timeout_seconds:g} s")

    def _end(self, child: _Child) -> None:
        """Kill a child, and go on when it can no longer write to its slot."""
        self._remove(child)
        child.process.kill()
        child.process.wait()

    def _remove(self, child: _Child) -> None:
        """Take a child, which is gone or will be, off the books; `_start_missing` replaces it."""
        self._selector.unregister(child.process.channel)
        self._children.remove(child)
        self.stats.restarts += 1

    def _try_again(self, child: _Child, reason: str, message: str) -> None:
        """Settle what a removed child leaves behind: its task is tried once more, or bad."""
        job = child.job
        if not child.has_ever_taken and (job is not None or not child.ready):
            self._failed_starts += 1
            if self._failed_starts == _MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"{_MAX_FAILED_STARTS} decoding processes in a row came to nothing (the last: {message}): "
                    "what they wrote to stderr may say why"
                )
        if job is None:
            return
        if child.taken_at is not None:
            job.attempts += 1
            self._count_decoding(job, time.monotonic() - child.taken_at)
        if job.attempts == _ATTEMPTS:
            self._finish(job, bad=BadSample(reason, message))
        else:
            with self._changed:
                self._queue.appendleft(job)

    def _finish(self, job: _Job, *, bad: BadSample | None = None) -> None:
        with self._changed:
            job.video = None
            if bad is None:
                assert job.slot is not None
                job.frames = slot_frames(self._ring, job.slot * self._slot_bytes, job.request)
            job.bad = bad
            self._changed.notify_all()

    def _count_decoding(self, job: _Job, seconds: float) -> None:
        job.seconds += seconds
        self.stats.decode_seconds += seconds

    def _end_all(self) -> None:
        for child in self._children:
            child.process.kill()
        for child in self._children:
            child.process.wait()
        self._children.clear()
        self._selector.close()
        os.close(self._ring_fd)
        del self._ring  # unmapped when the last view is gone
        with self._changed:
            if self._wake_fd is not None:
                os.close(self._wake_fd)
            self._wake_fd = None
            self._changed.notify_all()

    # Each of these with the lock held

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._wake_fd is not None:
            os.eventfd_write(self._wake_fd, 1)

    def _count_ahead(self, job: _Job, size_bytes: int) -> None:
        self._ahead_bytes += size_bytes - job.ahead_bytes
        job.ahead_bytes = size_bytes
        self._changed.notify_all()  # the feeder may have waited for this


@dataclass(slots=True, kw_only=True)
class _Job:
    """A task from when it was pulled until its result was handed out."""

    key: str
    tag: object
    request: DecodeRequest
    video: bytes | None = None
    """Let go once there is a result."""
    ahead_bytes: int = 0
    """What it counts for in ``max_ahead_bytes`` at present."""
    slot: int | None = None
    attempts: int = 0
    seconds: float = 0.0
    frames: Tensor | None = None
    bad: BadSample | None = None
    decoder: str | None = None

    @property
    def done(self) -> bool:
        return self.frames is not None or self.bad is not None


@dataclass(frozen=True, slots=True)
class _End:
    """Stands behind the last job; with the error if that was the end of the tasks."""

    error: BaseException | None
    done: bool = True


@dataclass(slots=True, eq=False)
class _Child:
    """A decoding process and what it is doing."""

    process: ChildProcess
    deadline: float
    """For what it is doing now; infinite while it has nothing to do."""
    ready: bool = False
    job: _Job | None = None
    taken_at: float | None = None
    """When it began with its job. If it ends before, that is not the job's fault: it may have been dead for long."""
    has_ever_taken: bool = False
