"""``black``: leave out clips of which almost all frames are almost all dark.

A pixel is dark if red, green and blue are at most ``level``; a frame is black if at least the share ``pixels`` of its
pixels is dark; a clip is left out if at least the share ``frames`` of its frames is black. The defaults, of which any
may be given otherwise: ``black:level=32,pixels=0.98,frames=0.9``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamprep.filters import _arguments

if TYPE_CHECKING:
    from torch import Tensor

_DEFAULTS = {"level": 32, "pixels": 0.98, "frames": 0.9}


class _Black:
    def __init__(self, *, level: int, pixels: float, frames: float) -> None:
        self._level, self._pixels, self._frames = level, pixels, frames

    def excludes_frames(self, frames: Tensor) -> str | None:
        num_bright = 0
        for frame in frames.numpy():  # torch's threads would wait for cores that decoding holds
            dark = frame.max(axis=0) <= self._level
            num_bright += int(dark.sum()) < self._pixels * dark.size
            if len(frames) - num_bright < self._frames * len(frames):
                return None
        return (
            f"{len(frames) - num_bright} of {len(frames)} frames are black: {self._pixels:.1%} of the pixels or more "
            f"are at most {self._level}"
        )


def make_filter(argument: str) -> _Black:
    """A filter for these thresholds."""
    settings = _arguments.parse_settings(argument, _DEFAULTS)
    level = _arguments.check_level(settings)
    _arguments.check_share(settings, "pixels", "frames")
    return _Black(level=level, pixels=settings["pixels"], frames=settings["frames"])
