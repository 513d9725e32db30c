"""Windows lie in the video, say when and which frames, and what is drawn follows from seed and key alone."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprep.sampling import WINDOWS, frame_indices, resample, uniform, window_starts

PROBED = {"variable_frame_rate": False, "start_seconds": 0.0, "duration_seconds": 2.0, "num_frames": 48, "fps": 24.0}
LARGEST_DRAW = 1 - 2.0**-52
"""`uniform` never gives more."""


def starts(length: int, count: int, window: str, **options: Any) -> list[int]:
    defaults: dict[str, Any] = {"num_windows": 1, "stride": count, "draw": 0.0}
    return list(window_starts(length, count, window=window, **defaults | options))


# Where windows begin


@given(
    count=st.integers(1, 81),
    more=st.integers(0, 3000),
    window=st.sampled_from(WINDOWS),
    num_windows=st.integers(1, 50),
    stride=st.integers(1, 200),
    draw=st.one_of(st.floats(0.0, LARGEST_DRAW), st.just(LARGEST_DRAW)),
)
def test_every_window_lies_in_the_video(
    count: int, more: int, window: str, num_windows: int, stride: int, draw: float
) -> None:
    found = starts(count + more, count, window, num_windows=num_windows, stride=stride, draw=draw)
    assert found
    assert found == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] + count <= count + more
    assert all(type(start) is int for start in found)


@pytest.mark.parametrize(
    ("window", "options", "expected"),
    [
        ("first", {}, [0]),
        ("middle", {}, [6]),
        ("random", {"draw": 0.0}, [0]),
        ("random", {"draw": 0.5}, [6]),
        ("random", {"draw": LARGEST_DRAW}, [12]),
        ("uniform", {"num_windows": 1}, [6]),
        ("uniform", {"num_windows": 2}, [0, 12]),
        ("uniform", {"num_windows": 4}, [0, 4, 8, 12]),
        ("every", {}, [0, 5, 10]),
        ("every", {"stride": 3}, [0, 3, 6, 9, 12]),
        ("every", {"stride": 13}, [0]),
    ],
)
def test_windows_of_5_in_17_frames(window: str, options: dict[str, Any], expected: list[int]) -> None:
    assert starts(17, 5, window, **options) == expected


@given(length=st.integers(1, 2000), count=st.integers(1, 81), stride=st.integers(1, 200))
def test_every_has_all_windows_that_fit(length: int, count: int, stride: int) -> None:
    if length >= count:
        found = starts(length, count, "every", stride=stride)
        assert set(np.diff(found)) <= {stride}
        assert found[-1] + stride + count > length


@given(more=st.integers(0, 2000), count=st.integers(1, 81), num_windows=st.integers(2, 50))
def test_uniform_goes_from_the_beginning_to_the_end(more: int, count: int, num_windows: int) -> None:
    found = starts(count + more, count, "uniform", num_windows=num_windows)
    assert (found[0], found[-1]) == (0, more)
    assert len(found) == min(num_windows, more + 1)
    assert not found[1:] or max(np.diff(found)) - min(np.diff(found)) <= 1


def test_random_takes_every_start_equally_often_the_last_too() -> None:
    drawn = Counter(starts(14, 5, "random", draw=uniform(42, f"videos/{n}", "window"))[0] for n in range(10_000))
    assert sorted(drawn) == list(range(10))
    assert all(850 < number < 1150 for number in drawn.values()), drawn  # 1000 +- 5 standard deviations


# What is drawn


@given(seed=st.integers(), key=st.text(st.characters(codec="utf-8")), purpose=st.text(st.characters(codec="utf-8")))
def test_a_draw_is_in_0_to_1_and_always_the_same(seed: int, key: str, purpose: str) -> None:
    drawn = uniform(seed, key, purpose)
    assert 0 <= drawn <= LARGEST_DRAW
    assert uniform(seed, key, purpose) == drawn


def test_another_process_draws_the_same(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = "from streamprep.sampling import uniform; print(uniform(42, 'videos/a', 'window'))"
    assert run_python("-c", code).stdout == f"{uniform(42, 'videos/a', 'window')}\n"


def test_seed_key_and_purpose_draw_independently() -> None:
    drawn = {
        uniform(seed, key, purpose) for seed in range(10) for key in "abcdefghij" for purpose in ("window", "short")
    }
    assert len(drawn) == 200
    pairs = np.array([[uniform(1, str(n), "window"), uniform(1, str(n), "short")] for n in range(2000)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.1


# Frames of a window


@given(
    num_frames=st.integers(1, 2000),
    fps=st.floats(0.5, 240.0),
    train_fps=st.floats(0.5, 240.0),
    begin=st.integers(0, 100),
    start_seconds=st.sampled_from([0.0, 1.4, 36000.0]),
)
def test_a_window_is_part_of_the_sequence_from_the_first_frame(
    num_frames: int, fps: float, train_fps: float, begin: int, start_seconds: float
) -> None:
    probed = PROBED | {"fps": fps, "num_frames": num_frames, "start_seconds": start_seconds}
    video = resample(probed, fps=fps, num_frames=num_frames, train_fps=train_fps)
    sequence = frame_indices(num_frames, fps=fps, train_fps=train_fps)
    sequence = sequence[sequence < num_frames]
    if num_frames == 1:
        sequence = sequence[:1]  # an image, perhaps: it is taken once, whatever the rate
    assert video.length == len(sequence)
    if begin < video.length:
        numbers, times = video.window(begin, video.length - begin)
        assert numbers == tuple(sequence[begin:].tolist())
        assert times == pytest.approx([start_seconds + number / fps for number in numbers])


@given(duration=st.floats(0.1, 500.0), train_fps=st.sampled_from([8.0, 15.0, 16.0, 24.0, 30000 / 1001]))
def test_windows_of_a_variable_frame_rate_lie_in_its_time(duration: float, train_fps: float) -> None:
    probed = PROBED | {"variable_frame_rate": True, "duration_seconds": duration, "start_seconds": 3.0}
    video = resample(probed, fps=24.0, num_frames=10, train_fps=train_fps)
    assert video.length >= 1
    for window in WINDOWS:
        for start in starts(video.length, min(5, video.length), window, num_windows=3, stride=2, draw=LARGEST_DRAW):
            numbers, times = video.window(start, min(5, video.length))
            assert numbers is None
            assert times[0] == pytest.approx(3.0 + start / train_fps)
            assert np.allclose(np.diff(times), 1 / train_fps)
            assert 3.0 <= times[0] <= times[-1] < 3.0 + duration
