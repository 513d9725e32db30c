"""``static``: leave out clips whose frames hardly differ, such as title cards and slide shows of one slide.

A pixel differs if its red, green or blue is more than ``level`` away from the first frame's; a clip is left out if in
none of its frames more than the share ``pixels`` of the pixels differs. The defaults, of which any may be given
otherwise: ``static:level=12,pixels=0.005``. A clip of one frame is no standing picture, and stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from streamprep.filters import _arguments

if TYPE_CHECKING:
    from torch import Tensor

_DEFAULTS = {"level": 12, "pixels": 0.005}


class _Static:
    def __init__(self, *, level: int, pixels: float) -> None:
        self._level, self._pixels = level, pixels

    def excludes_frames(self, frames: Tensor) -> str | None:
        if len(frames) < 2:
            return None
        first, *others = frames.numpy()  # torch's threads would wait for cores that decoding holds
        most = 0.0
        for frame in reversed(others):  # the last are likeliest to differ
            distance = np.maximum(first, frame) - np.minimum(first, frame)
            most = max(most, float((distance.max(axis=0) > self._level).mean()))
            if most > self._pixels:
                return None
        return f"at most {most:.2%} of the pixels differ by more than {self._level} from the first frame's"


def make_filter(argument: str) -> _Static:
    """A filter for these thresholds."""
    settings = _arguments.parse_settings(argument, _DEFAULTS)
    level = _arguments.check_level(settings)
    _arguments.check_share(settings, "pixels")
    return _Static(level=level, pixels=settings["pixels"])
