"""What is encoded, what is dropped and why, in which batches: everything is decided here, from the shards' indexes.

No tar is opened, nothing is decoded, and the same index with the same rules always gives the same plan. A *unit* is
one shard: it is taken, encoded and committed as a whole.

Frames are chosen as FastVideo chooses them: ``np.arange(0, num_frames, fps / train_fps).astype(int)[:N]``, with the
fps and num_frames that the dataset declares where they agree with the file. A video of variable frame rate is sampled
by time instead: the frame on show at ``start + k / train_fps``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamprep.errors import BadSample
from streamprep.shards import Member, ShardIndex, ShardSample
from streamprep.types import DecodeRequest, VideoLoader

DROP_REASONS = {
    "empty_caption": "it has no caption, or an empty one",
    "caption_encoding": "its caption cannot be written as UTF-8",
    "too_short": "it has fewer frames than --num-frames at --train-fps",
    "too_long": "it is longer than --video-length-tolerance-range allows",
}
"""Why a rule excludes a sample: the closed list."""

_FPS_TOLERANCE = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRules:
    """What the settings say about choosing clips; all of it changes what is encoded."""

    max_height: int
    max_width: int
    num_frames: int
    train_fps: float
    video_length_tolerance_range: float | None
    speed_factor: float
    max_pixels: int
    video_loader_type: VideoLoader = "torchcodec"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlan:
    """One clip that is to be encoded."""

    key: str
    file_name: str
    caption: str
    video: Member
    """Where its bytes lie in the shard."""
    request: DecodeRequest
    source_fps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """A sample that is not encoded."""

    key: str
    reason: str
    """One of `DROP_REASONS` if a rule dropped it, of `errors.BAD_REASONS` if it is bad."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlan:
    """Every decision about one shard."""

    id: str
    shard: str
    clips: tuple[ClipPlan, ...]
    """In the order of the shard."""
    dropped: tuple[Excluded, ...]
    bad: tuple[Excluded, ...]
    """Known to be bad without decoding: no readable header, or one that contradicts the dataset."""

    def batches(self, size: int) -> Iterator[Sequence[ClipPlan]]:
        """The clips, ``size`` at a time; the last may be smaller. Batches never cross a unit."""
        for start in range(0, len(self.clips), size):
            yield self.clips[start : start + size]


def plan_unit(unit_id: str, index: ShardIndex, rules: SamplingRules, *, limit: int | None = None) -> UnitPlan:
    """Decide about every sample of a shard.

    Args:
        unit_id: The unit's name.
        index: The shard's samples.
        rules: What the settings say.
        limit: Look no further once so many clips are found.
    """
    clips: list[ClipPlan] = []
    dropped: list[Excluded] = []
    bad: list[Excluded] = []
    for sample in index.samples:
        if limit is not None and len(clips) >= limit:
            break
        try:
            clips.append(plan_clip(sample, rules))
        except _Drop as drop:
            dropped.append(Excluded(key=sample.key, reason=drop.reason, message=drop.message))
        except BadSample as error:
            bad.append(Excluded(key=sample.key, reason=error.reason, message=error.message))
    return UnitPlan(id=unit_id, shard=index.name, clips=tuple(clips), dropped=tuple(dropped), bad=tuple(bad))


def plan_clip(sample: ShardSample, rules: SamplingRules) -> ClipPlan:
    """Decide about one sample.

    Raises:
        _Drop: if a rule excludes it.
        BadSample: if its header is unreadable or contradicts what the dataset declares.
    """
    metadata = sample.metadata
    if "probe_error" in metadata:
        raise BadSample("probe_failed", metadata["probe_error"], stage="plan")
    _check_size(metadata, rules)
    fps, num_frames = _declared_or_probed(metadata)
    caption = _first_caption(metadata["captions"])
    _check_length(num_frames / fps, rules)
    if metadata["num_frames"] == 1 and rules.num_frames > 1:  # at a rate below `train_fps` it would be taken again
        raise _Drop("too_short", f"one frame, an image perhaps; {rules.num_frames} are wanted")
    indices, timestamps = _choose_frames(metadata, fps=fps, num_frames=num_frames, rules=rules)
    if len(timestamps) < rules.num_frames:
        raise _Drop(
            "too_short",
            f"{len(timestamps)} frames at {rules.train_fps:g} fps, {rules.num_frames} are wanted "
            f"({metadata['num_frames']} frames at {metadata['fps']:g} fps)",
        )
    return ClipPlan(
        key=sample.key,
        file_name=metadata["file_name"],
        caption=caption,
        video=sample.video,
        source_fps=float(fps),
        request=DecodeRequest(
            sha256=metadata["sha256"],
            indices=indices,
            timestamps=timestamps,
            tolerance_seconds=0.5 / metadata["fps"],
            height=rules.max_height,
            width=rules.max_width,
            max_pixels=rules.max_pixels,
            loader=rules.video_loader_type,
        ),
    )


def frame_indices(num_frames: int, *, fps: float, train_fps: float, limit: int) -> list[int]:
    """The source frames FastVideo takes: every ``fps / train_fps``-th, rounded down, from the first.

    Where the source is slower than ``train_fps``, frames repeat.
    """
    chosen = np.arange(0, num_frames, fps / train_fps).astype(int)[:limit]
    return [int(index) for index in chosen]


class _Drop(Exception):
    def __init__(self, reason: str, message: str) -> None:
        assert reason in DROP_REASONS, reason
        super().__init__(f"{reason}: {message}")
        self.reason, self.message = reason, message


def _check_size(metadata: Any, rules: SamplingRules) -> None:
    width, height = metadata["width"], metadata["height"]
    if width * height > rules.max_pixels:
        raise BadSample(
            "too_large",
            f"frames of {width}x{height} pixels, more than the {rules.max_pixels} of --max-pixels",
            stage="plan",
        )


def _declared_or_probed(metadata: Any) -> tuple[float, int]:
    """The dataset's fps and num_frames where given, so that we choose the frames FastVideo would."""
    declared, fps, num_frames = metadata["declared"], metadata["fps"], metadata["num_frames"]
    declared_fps, declared_frames = declared.get("fps", fps), declared.get("num_frames", num_frames)
    if abs(declared_fps - fps) > _FPS_TOLERANCE * fps or abs(declared_frames - num_frames) > 1:
        raise BadSample(
            "metadata_mismatch",
            f"the dataset says {declared_frames} frames at {declared_fps:g} fps, the file {num_frames} at {fps:g}",
            stage="plan",
        )
    return declared_fps, int(declared_frames)


def _first_caption(captions: Sequence[str]) -> str:
    if not captions or not captions[0].strip():
        raise _Drop("empty_caption", "no caption" if not captions else f"the caption is {captions[0]!r}")
    try:
        captions[0].encode()
    except UnicodeEncodeError as error:
        raise _Drop("caption_encoding", str(error)) from error
    return captions[0]


def _check_length(duration_seconds: float, rules: SamplingRules) -> None:
    if rules.video_length_tolerance_range is None:
        return
    longest = rules.video_length_tolerance_range * rules.num_frames / rules.train_fps * rules.speed_factor
    if duration_seconds > longest:
        raise _Drop("too_long", f"{duration_seconds:.2f} s, at most {longest:.2f} s are allowed")


def _choose_frames(
    metadata: Any, *, fps: float, num_frames: int, rules: SamplingRules
) -> tuple[tuple[int, ...] | None, tuple[float, ...]]:
    """(frame numbers or None for a variable frame rate, presentation times in seconds)."""
    start = metadata["start_seconds"]
    if metadata["variable_frame_rate"]:
        available = int(np.ceil(metadata["duration_seconds"] * rules.train_fps - 1e-6))
        return None, tuple(start + k / rules.train_fps for k in range(min(available, rules.num_frames)))
    indices = frame_indices(num_frames, fps=fps, train_fps=rules.train_fps, limit=rules.num_frames)
    indices = [index for index in indices if index < metadata["num_frames"]]
    return tuple(indices), tuple(start + index / metadata["fps"] for index in indices)
