"""Buckets: the sizes clips are encoded at, where not all are encoded at one.

A video goes to the size nearest to its aspect ratio, and there to the longest clip that it has frames for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streamprep.errors import UserError

PRESETS = {
    "480p": ((480, 832), (832, 480), (544, 704), (704, 544), (624, 624)),
    "720p": ((720, 1280), (1280, 720), (832, 1088), (1088, 832), (960, 960)),
}
"""(height, width) that Wan's own code generates at."""

_RATIOS = (9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9)  # height to width, of cameras and telephones


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """One size of clips."""

    height: int
    """Pixels."""
    width: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.num_frames}"


def parse_buckets(text: str | None, *, height: int, width: int, num_frames: int, multiple: int) -> tuple[Bucket, ...]:
    """What ``--buckets`` asks for.

    Args:
        text: None for one bucket, the given size; ``auto``: the common aspect ratios, at the given size's area; or a
            list of ``HEIGHTxWIDTH``, ``HEIGHTxWIDTHxFRAMES`` and names of `PRESETS`, separated by commas.
        height: Of ``--max-height``.
        width: Of ``--max-width``.
        num_frames: Where an entry names none.
        multiple: That sizes of ``auto`` must be of.

    Raises:
        UserError: if it cannot be understood.
    """
    if text is None:
        return (Bucket(height, width, num_frames),)
    buckets: list[Bucket] = []
    for entry in (entry.strip() for entry in text.split(",")):
        if entry == "auto":
            sizes: Sequence[tuple[int, int]] = _sizes_of_area(height * width, multiple)
            buckets += [Bucket(h, w, num_frames) for h, w in sizes]
        elif entry in PRESETS:
            buckets += [Bucket(h, w, num_frames) for h, w in PRESETS[entry]]
        else:
            buckets.append(_parse_entry(entry, num_frames))
    return tuple(sorted(set(buckets)))


def choose_bucket(buckets: Sequence[Bucket], *, height: int, width: int, num_frames: int) -> Bucket:
    """The one for a video: the nearest aspect ratio, of those the one nearest in area, of those the longest that fits.

    Args:
        buckets: At least one.
        height: Pixels of the video, as displayed.
        width: Pixels of the video.
        num_frames: It has at the training rate; if no clip is so short, the shortest is chosen.
    """
    if len(buckets) == 1:
        return buckets[0]

    def unlikeness(bucket: Bucket) -> tuple[float, float]:
        shape = abs(math.log(bucket.height / bucket.width) - math.log(height / width))
        return round(shape, 9), round(abs(math.log(bucket.height * bucket.width / (height * width))), 9)

    best = min(buckets, key=unlikeness)
    lengths = sorted(b.num_frames for b in buckets if (b.height, b.width) == (best.height, best.width))
    fitting = [length for length in lengths if length <= num_frames]
    return Bucket(best.height, best.width, fitting[-1] if fitting else lengths[0])


def upscaling(bucket: Bucket, *, height: int, width: int) -> float:
    """How many times larger than in the video its pixels become, after the crop; below 1 they become smaller."""
    return max(bucket.height / height, bucket.width / width)


def cropped_away(bucket: Bucket, *, height: int, width: int) -> float:
    """The share of a video's pixels that the crop to the bucket's aspect ratio leaves out."""
    ratio = (bucket.height / bucket.width) / (height / width)
    return 1 - min(ratio, 1 / ratio)


def _sizes_of_area(area: int, multiple: int) -> list[tuple[int, int]]:
    sizes = []
    for ratio in _RATIOS:
        height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
        sizes.append((max(1, round(height / multiple)) * multiple, max(1, round(width / multiple)) * multiple))
    return sizes


def _parse_entry(entry: str, num_frames: int) -> Bucket:
    numbers = entry.lower().split("x")
    if len(numbers) not in (2, 3) or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(
            f"--buckets {entry}: an entry is HEIGHTxWIDTH, HEIGHTxWIDTHxFRAMES, auto, or one of {', '.join(PRESETS)}"
        )
    height, width, *frames = map(int, numbers)
    return Bucket(height, width, frames[0] if frames else num_frames)
