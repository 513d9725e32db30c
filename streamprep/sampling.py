"""Which frames of a video: at the training rate, and in windows.

A video is first brought to the training rate, as FastVideo does it: frames
``np.arange(0, num_frames, fps / train_fps).astype(int)``. A video of variable frame rate is sampled by time instead:
the frame on show at ``start + k / train_fps``. Of the sequence that this gives, a clip is a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamprep import canonical

WINDOWS = ("first", "middle", "random", "uniform", "every")
"""Where in a video clips are taken: at its beginning, in its middle, at one place that follows from the seed and the
key, at ``num_windows`` places from its beginning to its end, or every ``window_stride`` frames. The last two give
several clips of a video."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResampledVideo:
    """A video at the training rate."""

    length: int
    """Frames it has at that rate."""
    indices: np.ndarray[Any, Any] | None
    """Their numbers in the file, in presentation order; None where they are found by time."""
    start_seconds: float
    source_fps: float
    """Of the file."""
    train_fps: float

    def window(self, begin: int, count: int) -> tuple[tuple[int, ...] | None, tuple[float, ...]]:
        """Some of its frames: (numbers in the file or None, presentation times in seconds)."""
        if self.indices is None:
            return None, tuple(self.start_seconds + k / self.train_fps for k in range(begin, begin + count))
        numbers = self.indices[begin : begin + count].tolist()
        return tuple(numbers), tuple(self.start_seconds + number / self.source_fps for number in numbers)


def resample(metadata: Mapping[str, Any], *, fps: float, num_frames: int, train_fps: float) -> ResampledVideo:
    """Bring a video to the training rate.

    Args:
        metadata: What the file says: see `streamprep.types.VideoInfo`.
        fps: To go by: the dataset's where it declares one.
        num_frames: To go by.
        train_fps: Frames per second.
    """
    indices = None
    if metadata["variable_frame_rate"]:
        length = int(np.ceil(metadata["duration_seconds"] * train_fps - 1e-6))
    else:
        indices = frame_indices(num_frames, fps=fps, train_fps=train_fps)
        indices = indices[indices < metadata["num_frames"]]
        if metadata["num_frames"] == 1:  # an image, perhaps: below the training rate it would be taken again and again
            indices = indices[:1]
        length = len(indices)
    return ResampledVideo(
        length=length,
        indices=indices,
        start_seconds=metadata["start_seconds"],
        source_fps=metadata["fps"],
        train_fps=train_fps,
    )


def frame_indices(num_frames: int, *, fps: float, train_fps: float) -> np.ndarray[Any, Any]:
    """The source frames FastVideo takes: every ``fps / train_fps``-th, rounded down, from the first.

    Where the source is slower than ``train_fps``, frames repeat.
    """
    return np.arange(0, num_frames, fps / train_fps).astype(int)


def window_starts(length: int, count: int, *, window: str, num_windows: int, stride: int, draw: float) -> Sequence[int]:
    """Where the clips of a video begin.

    Args:
        length: Frames there are.
        count: Frames of a clip, at most ``length``.
        window: One of `WINDOWS`.
        num_windows: For ``uniform``; places that coincide are taken once.
        stride: For ``every``.
        draw: For ``random``: in [0, 1).
    """
    last = length - count
    assert last >= 0, (length, count)
    if window == "middle":
        return [last // 2]
    if window == "random":
        return [int(draw * (last + 1))]
    if window == "uniform":
        num_places = min(num_windows, last + 1)
        places = np.linspace(0, last, num_places) if num_windows > 1 else np.array([last // 2])
        return sorted({int(place) for place in np.round(places)})
    if window == "every":
        return range(0, last + 1, stride)
    assert window == "first", window
    return [0]


def uniform(seed: int, key: str, purpose: str) -> float:
    """A number in [0, 1) that follows from the arguments alone, on every machine, in any order."""
    return int(canonical.digest([seed, key, purpose])[:13], 16) / 16**13
