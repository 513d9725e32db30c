"""Whatever happens to the children, every task gets its own result, in order, and nothing is left behind."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import torch

from streamprep.decode import decode_clip
from streamprep.decode_child import _forget_credentials
from streamprep.decode_pool import DecodePool
from streamprep.decoder import Decoded, DecodeTask, InlineDecoder
from streamprep.errors import BadSample
from streamprep.types import DecodeRequest

FPS = 24


@cache
def make_video(
    seed: int = 0,
    *,
    num_frames: int = 8,
    width: int = 64,
    height: int = 48,
    codec: str = "libx264",
    noise: bool = False,
) -> bytes:
    """An MP4 in which no two frames are alike; with `noise`, one that does not compress."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 40_000_000 if noise else 1_000_000
        for t in range(num_frames):
            image = np.stack([x * 2 + t * 20 + seed * 7, y * 3 + t * 11, np.full_like(x, t * 30 + seed)], axis=-1) % 256
            if noise:
                image = random.integers(0, 256, image.shape)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def make_task(
    key: str, video: bytes | None = None, *, indices: range | list[int] = range(8), **fields: Any
) -> DecodeTask:
    if video is None:
        video = make_video(int(key) % 4, codec="mpeg4" if int(key) % 2 else "libx264")
    request = DecodeRequest(
        sha256=hashlib.sha256(video).hexdigest(),
        timestamps=tuple(index / FPS for index in indices),
        indices=tuple(indices),
        tolerance_seconds=0.5 / FPS,
        height=32,
        width=32,
        max_pixels=100_000_000,
    )
    return DecodeTask(key=key, video=video, request=replace(request, **fields), tag=("tag", key))


def slow_task(key: str, num_frames: int = 200) -> DecodeTask:
    """One frame, resized again and again: 0.3 s on an idle core by default."""
    video = make_video(num_frames=2, width=640, height=480)
    return make_task(key, video, indices=[0] * num_frames, height=16, width=16)


def endless_task(key: str) -> DecodeTask:
    """Half a minute on an idle core."""
    return slow_task(key, num_frames=20_000)


def open_pool(**changes: Any) -> DecodePool:
    settings = {"num_workers": 2, "num_slots": 4, "slot_bytes": 16 * 2**20, "timeout_seconds": 60.0}
    return DecodePool(**{**settings, "memory_bytes": 4 * 2**30, **changes})


def check(task: DecodeTask, decoded: Decoded) -> None:
    assert (decoded.key, decoded.tag, decoded.bad) == (task.key, task.tag, None)
    assert decoded.frames is not None and torch.equal(decoded.frames, expected_frames(task.video, task.request))


@cache
def expected_frames(video: bytes, request: DecodeRequest) -> torch.Tensor:
    return decode_clip(video, request)


def check_all(pool: DecodePool, tasks: list[DecodeTask]) -> None:
    count = 0
    for task, decoded in zip(tasks, pool.map(tasks), strict=True):
        check(task, decoded)
        count += 1
    assert count == len(tasks)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


@contextmanager
def meanwhile(act: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `act` in a thread; its event says when to end."""
    over = threading.Event()
    thread = threading.Thread(target=act, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it may have been replaced since its pid was asked for
        os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tasks_until_all_are_busy(pool: DecodePool, made: list[DecodeTask]) -> Iterator[DecodeTask]:
    """Slow tasks until each child has been seen with one, which a child must be ready for.

    One for each at a time: children need seconds to start, and whatever is made meanwhile has to be decoded.
    """
    while True:
        for _ in range(2):
            made.append(slow_task(str(len(made)), num_frames=600))
            yield made[-1]
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if len(pool.working_on()) == 2:
                return
            time.sleep(0.005)


# Results


@pytest.mark.parametrize("num_slots", [1, 2, 8])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_results_equal_inline_decoding_in_the_order_of_the_tasks(num_workers: int, num_slots: int) -> None:
    large = make_video(num_frames=8, width=640, height=480, codec="mpeg4", noise=True)
    assert len(large) > 2**20  # more than a socket holds
    tasks = [make_task(str(n)) for n in range(12)]
    by_time = make_task("101")
    by_time = replace(by_time, request=replace(by_time.request, indices=None))
    tasks[3:3] = [make_task("100", large), by_time]
    with open_pool(num_workers=num_workers, num_slots=num_slots) as pool:
        assert len(tasks) == 14
        check_all(pool, tasks)
        assert pool.stats.decode_seconds > 0
        assert pool.stats.restarts == 0


def test_a_pool_serves_one_map_after_another() -> None:
    with open_pool() as pool:
        check_all(pool, [make_task(str(n)) for n in range(5)])
        check_all(pool, [])
        pids = pool.worker_pids()
        check_all(pool, [make_task(str(n)) for n in range(5)])
        assert pool.worker_pids() == pids


@pytest.mark.parametrize("make_decoder", [open_pool, InlineDecoder])
def test_bad_samples_come_out_in_their_place(make_decoder: Callable[[], DecodePool | InlineDecoder]) -> None:
    unread = BadSample("read_error", "the shard ends here", stage="read")
    video = make_video()
    tasks = [
        make_task("0"),
        make_task("1", b""),
        make_task("2", b"#EXTM3U\nhttp://example.com/a.ts\n"),
        replace(make_task("3"), video=unread),
        make_task("4", video, sha256="0" * 64),
        make_task("5", video[: len(video) // 2]),
        make_task("6", video, max_pixels=100),
        make_task("7", video, indices=[0, 99]),
        make_task("8"),
    ]
    with make_decoder() as decoder:
        bad = []
        for task, decoded in zip(tasks, decoder.map(tasks), strict=True):
            assert (decoded.key, decoded.tag) == (task.key, task.tag)
            if decoded.bad is None:
                check(task, decoded)
            bad.append(decoded.bad)
        assert [error and error.reason for error in bad] == [
            *(None, "not_a_video", "not_a_video", "read_error", "digest_mismatch"),
            *("decode_error", "too_large", "truncated", None),
        ]
        assert bad[3] is unread
        assert bad[4] is not None and bad[4].stage == "read" and "sha256 is not 0000" in bad[4].message
        assert decoder.stats.restarts == 0


def test_reading_ahead_is_bounded_even_when_every_sample_is_bad() -> None:
    pulled = 0

    def tasks() -> Iterator[DecodeTask]:
        nonlocal pulled
        for _ in range(1000):
            pulled += 1
            yield replace(make_task("0"), video=BadSample("read_error", "gone", stage="read"))

    with open_pool(num_workers=1, max_ahead_bytes=10_000) as pool:
        for number, _ in enumerate(pool.map(tasks()), start=1):
            assert pulled - number <= 4
        assert number == 1000
        assert pool.stats.feeder_blocked_seconds > 0


def test_a_request_larger_than_a_slot_is_refused() -> None:
    tasks = [make_task("0"), make_task("1", height=64), make_task("2")]
    with open_pool(slot_bytes=8 * 3 * 32 * 32) as pool:
        results = pool.map(tasks)
        check(tasks[0], next(results))
        with pytest.raises(ValueError, match="clip '1' decodes to 49152 bytes"):
            next(results)


def test_settings_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="num_slots=0"):
        open_pool(num_slots=0)


# Children that die or hang


def test_children_killed_while_idle_are_replaced() -> None:
    tasks = [make_task(str(n)) for n in range(12)]
    delivered: list[str] = []
    killed: list[int] = []

    def interrupted() -> Iterator[DecodeTask]:
        yield from tasks[:6]
        wait_for(lambda: len(delivered) == 6)
        killed.extend(pool.worker_pids())
        for pid in killed:
            kill(pid)
        yield from tasks[6:]

    with open_pool() as pool:
        for task, decoded in zip(tasks, pool.map(interrupted()), strict=True):
            check(task, decoded)
            delivered.append(decoded.key)
        wait_for(lambda: pool.stats.restarts == 2 and len(pool.worker_pids()) == 2)
        assert len(killed) == 2 and not set(killed) & set(pool.worker_pids())
        for pid in pool.worker_pids():  # once more, between two maps
            kill(pid)
        check_all(pool, tasks)
        wait_for(lambda: pool.stats.restarts == 4)


def test_children_killed_while_busy_are_replaced_and_their_clips_tried_again() -> None:
    tasks: list[DecodeTask] = []

    def interrupted(pool: DecodePool) -> Iterator[DecodeTask]:
        yield from tasks_until_all_are_busy(pool, tasks)
        for pid in pool.worker_pids():
            kill(pid)
        tasks.append(make_task(str(len(tasks))))
        yield tasks[-1]

    with open_pool() as pool:
        for number, decoded in enumerate(pool.map(interrupted(pool))):
            check(tasks[number], decoded)
        assert number == len(tasks) - 1
        wait_for(lambda: pool.stats.restarts == 2)


def test_children_killed_just_after_answering_are_replaced() -> None:
    tasks = [make_task(str(n)) for n in range(6)]
    with open_pool(num_workers=1, num_slots=1) as pool:
        for task, decoded in zip(tasks, pool.map(tasks), strict=True):
            kill(pool.worker_pids()[0])  # idle: its slot is ours at present
            check(task, decoded)
        wait_for(lambda: pool.stats.restarts == len(tasks))


def test_a_child_stopped_in_its_tracks_is_replaced_after_the_deadline() -> None:
    tasks = [make_task(str(n)) for n in range(6)]
    with open_pool(num_workers=1, timeout_seconds=2.0) as pool:
        check_all(pool, tasks)
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        check_all(pool, tasks)
        assert pool.stats.restarts == 1
        assert not is_alive(pid)


def test_killing_children_at_random_moments_never_mixes_up_frames() -> None:
    tasks = [slow_task(str(n), num_frames=10 + n % 7) for n in range(60)]

    def kill_now_and_then(over: threading.Event) -> None:
        random = np.random.default_rng(0)
        while not over.wait(float(random.uniform(0, 0.1))):
            for pid in list(pool.working_on())[:1]:
                kill(pid)

    with open_pool(num_workers=4, num_slots=6) as pool, meanwhile(kill_now_and_then):
        for task, decoded in zip(tasks, pool.map(tasks), strict=True):
            if decoded.bad is None:
                check(task, decoded)
            else:  # hit twice
                assert (decoded.key, decoded.bad.reason) == (task.key, "decoder_crash")
        assert pool.stats.restarts > 0


def test_a_clip_that_kills_its_child_is_bad_after_two_attempts() -> None:
    tasks = [make_task("0"), make_task("1"), endless_task("2"), make_task("3"), make_task("4")]
    killed: list[int] = []

    def kill_who_works_on_it(over: threading.Event) -> None:
        while not over.wait(0.002):
            for pid, key in pool.working_on().items():
                if key == "2" and pid not in killed:
                    kill(pid)
                    killed.append(pid)

    with open_pool(num_slots=8) as pool, meanwhile(kill_who_works_on_it):
        for task, decoded in zip(tasks, pool.map(tasks), strict=True):
            if task.key != "2":
                check(task, decoded)
                continue
            assert decoded.bad is not None and decoded.bad.reason == "decoder_crash"
            assert "signal 9 (Killed)" in decoded.bad.message
        assert len(killed) == pool.stats.restarts == 2


def test_a_limit_no_clip_can_meet_is_the_clips_fault_not_a_failed_start() -> None:
    """It was counted from before the child had its task: three in a row ended the job with a traceback."""
    tasks = [slow_task(str(n)) for n in range(3)]
    with open_pool(num_workers=1, timeout_seconds=0.0001) as pool:
        for task, decoded in zip(tasks, pool.map(tasks), strict=True):
            assert (decoded.key, decoded.bad and decoded.bad.reason) == (task.key, "decoder_timeout")


def test_a_clip_that_takes_too_long_is_bad_after_two_attempts() -> None:
    tasks = [make_task("0"), make_task("1"), endless_task("2"), make_task("3"), make_task("4")]
    with open_pool(timeout_seconds=2.0) as pool:
        began = time.monotonic()
        for task, decoded in zip(tasks, pool.map(tasks), strict=True):
            if task.key != "2":
                check(task, decoded)
                continue
            assert decoded.bad is not None and decoded.bad.reason == "decoder_timeout"
            assert time.monotonic() - began >= 4.0
        assert pool.stats.restarts == 2


# Of one frame FFmpeg fails to allocate, of two already PyTorch; PyAV, which makes no full-size RGB, manages one.
@pytest.mark.parametrize(("loader", "num_frames"), [("torchcodec", 1), ("torchcodec", 2), ("pyav", 2)])
def test_a_clip_that_takes_too_much_memory_is_bad_after_two_attempts(num_frames: int, loader: str) -> None:
    large = make_video(num_frames=2, width=3840, height=2160)
    tasks = [make_task("0"), make_task("1", large, indices=range(num_frames), loader=loader), make_task("2")]
    with open_pool(memory_bytes=32 * 2**20) as pool:
        for task, decoded in zip(tasks, pool.map(tasks), strict=True):
            if task.key != "1":
                check(task, decoded)
                continue
            assert decoded.bad is not None and decoded.bad.reason == "decoder_memory", decoded.bad
        assert pool.stats.restarts == 2


def test_any_other_error_in_a_child_is_raised_with_its_traceback() -> None:
    tasks = [make_task("0"), make_task("1", height=0)]
    with (
        open_pool() as pool,
        pytest.raises(RuntimeError, match=r"(?s)'1' failed.*Traceback.*sizes should be greater than 0"),
    ):
        list(pool.map(tasks))


def test_children_that_never_get_ready_are_an_error() -> None:
    def kill_at_birth(over: threading.Event) -> None:
        while not over.wait(0.001):
            for pid in pool.worker_pids():
                kill(pid)

    with open_pool(num_workers=1) as pool, meanwhile(kill_at_birth):
        with pytest.raises(RuntimeError, match=r"3 decoding processes in a row came to nothing .*signal 9"):
            list(pool.map(make_task(str(n)) for n in range(1000)))


def test_children_ignore_ctrl_c() -> None:
    with open_pool(num_workers=1) as pool:
        for _ in pool.map([make_task("0")]):
            pass
        os.kill(pool.worker_pids()[0], signal.SIGINT)
        check_all(pool, [make_task("1")])
        assert pool.stats.restarts == 0


def test_children_forget_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("HF_HOME", "kept")
    _forget_credentials()
    assert not {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} & set(os.environ)
    assert "HF_HOME" in os.environ


# The end


def test_an_error_of_the_tasks_comes_after_the_results_before_it() -> None:
    tasks = [make_task("0"), make_task("1")]

    def failing() -> Iterator[DecodeTask]:
        yield from tasks
        raise ConnectionError("the store is gone")

    with open_pool() as pool:
        results = pool.map(failing())
        for task in tasks:
            check(task, next(results))
        with pytest.raises(ConnectionError, match="the store is gone"):
            next(results)
        check_all(pool, tasks)  # the pool is none the worse


def test_leaving_early_leaves_no_thread_and_no_child() -> None:
    threads = set(threading.enumerate())
    pool = open_pool()
    results = pool.map(make_task(str(n)) for n in range(1000))
    next(results)
    pids = pool.worker_pids()
    assert len(pids) == 2
    results.close()
    assert not [pid for pid in pids if is_alive(pid)]
    assert set(threading.enumerate()) <= threads
    with pytest.raises(RuntimeError, match="closed"):
        next(pool.map([]))
    pool.close()


def test_leaving_does_not_wait_for_storage_and_pulls_nothing_more() -> None:
    storage_answers = threading.Event()
    pulled = []

    def tasks() -> Iterator[DecodeTask]:
        for n in range(5):
            pulled.append(n)
            if n == 2:
                storage_answers.wait()
            yield make_task(str(n))

    with open_pool() as pool:
        results = pool.map(tasks())
        next(results)
        next(results)
        wait_for(lambda: len(pulled) == 3)
        feeder = next(thread for thread in threading.enumerate() if thread.name == "decode-feeder")
        pids = pool.worker_pids()
    assert not [pid for pid in pids if is_alive(pid)]
    with pytest.raises(RuntimeError, match="closed"):
        next(results)
    storage_answers.set()
    feeder.join(timeout=60)
    assert not feeder.is_alive()
    assert pulled == [0, 1, 2]


def test_a_pool_that_is_never_used_closes() -> None:
    with open_pool():
        pass


RANK = """
import pickle, sys, time
from streamprep.decode_pool import DecodePool

with open(sys.argv[1], "rb") as file:
    tasks = pickle.load(file)
pool = DecodePool(num_workers=2, num_slots=3, slot_bytes=16 * 2**20, timeout_seconds=600, memory_bytes=2**32)
results = pool.map(tasks)
next(results)
while len(pool.working_on()) < 2:
    time.sleep(0.01)  # without, a busy machine has nothing left for the children
print(*pool.working_on(), flush=True)
next(results)
"""


def test_nothing_outlives_a_killed_rank(tmp_path: Path) -> None:
    tasks_file = tmp_path / "tasks.pickle"
    tasks_file.write_bytes(pickle.dumps([make_task("0"), endless_task("1"), endless_task("2")]))
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(tasks_file)], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    try:
        children = {int(pid) for pid in rank.stdout.readline().split()}
        everything = {process.pid for process in psutil.Process(rank.pid).children(recursive=True)}
    finally:
        rank.kill()
        rank.communicate()
    assert len(children) == 2 and children < everything  # the fork server and the resource tracker are there as well
    wait_for(lambda: not [pid for pid in everything if is_alive(pid)], seconds=3.0)


def test_three_hundred_clips_leave_no_open_file_and_no_mapping_behind() -> None:
    def count_open_files(pid: int) -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    def let_all_decode() -> None:
        busy: set[int] = set()

        def note_who_is_busy(over: threading.Event) -> None:
            while not over.wait(0.002):
                busy.update(pool.working_on())

        with meanwhile(note_who_is_busy):
            while len(busy) < 2:
                check_all(pool, [slow_task("0", 50), slow_task("1", 50)])

    rank, task = os.getpid(), make_task("0")
    with open_pool() as pool:  # starts the fork server, which stays
        check_all(pool, [task])
    closed = count_open_files(rank)
    with open_pool(num_slots=2) as pool:
        let_all_decode()
        processes = [rank, *pool.worker_pids()]
        before = {pid: count_open_files(pid) for pid in processes}
        check_all(pool, [task] * 300)
        assert {pid: count_open_files(pid) for pid in processes} == before
        assert not [pid for pid in processes if "streamprep-video" in Path(f"/proc/{pid}/maps").read_text()]
    assert count_open_files(rank) == closed
