"""What is encoded, what is dropped and why, in which batches: everything is decided here, from the shards' indexes.

No tar is opened, nothing is decoded, and the same index with the same rules always gives the same plan. A *unit* is
one shard: it is taken, encoded and committed as a whole.

For each sample: may it be used (`streamprep.where`, its captions, its length, `streamprep.filters`)? At which size
(`streamprep.buckets`)? Which frames (`streamprep.sampling`), by the fps and num_frames that the dataset declares where
they agree with the file?

A video gives one clip, or several windows (``#NN``); an image is a clip of one frame, for buckets of one frame, which
videos leave to images where there are longer ones. A clip is decoded and encoded once and becomes a *row* for each
caption that is chosen for it (``@NN``). Where only captions are encoded, a sample's video is not looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from streamprep.buckets import Bucket, choose_bucket, upscaling
from streamprep.errors import BAD_REASONS, BadSample
from streamprep.filters import Filters
from streamprep.held_out import HeldOut
from streamprep.progress import count
from streamprep.sampling import ResampledVideo, resample, uniform, window_starts
from streamprep.shards import Member, ShardIndex, ShardSample
from streamprep.types import DecodeRequest, VideoLoader
from streamprep.where import Where

DROP_REASONS = {
    "empty_caption": "it has no caption, or an empty one",
    "caption_encoding": "its caption cannot be written as UTF-8",
    "no_video": "its shard holds only its caption, packed by --captions-only",
    "where": "--where is not true of it",
    "upscale": "it would be enlarged more than --max-upscale allows",
    "too_short": "it has fewer frames than --num-frames (or the shortest bucket) at --train-fps, or is an image and no "
    "bucket is of one frame",
    "too_long": "it is longer than --video-length-tolerance-range allows",
    "filter": "--filters leaves it out",
    "empty_tensor": "a tensor of its row in FastVideo's own Parquet has no values",
    "repeated_row": "FastVideo's own Parquet has its row a second time: the same id, caption and latent",
    "validation": "--validation-split holds it out of the output, for validation.json",
}
"""Why a rule excludes a sample: the closed list; a filter's reason is ``filter:NAME``."""

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
    workload_type: str = "t2v"
    """``text`` looks at captions only."""
    caption: str = "first"
    """Which of a sample's captions: ``first``, ``random`` or ``all``."""
    training_cfg_rate: float = 0.0
    """Share of the rows whose prompt is empty."""
    filters: tuple[str, ...] = ()
    """As `streamprep.filters.Filters` takes them."""
    where: str | None = None
    """An SQL expression that a sample's metadata must fulfil."""
    window: str = "first"
    """One of `streamprep.sampling.WINDOWS`."""
    num_windows: int = 1
    window_stride: int | None = None
    """None is ``num_frames`` of the clip: windows side by side."""
    drop_short_ratio: float = 1.0
    """Share of the videos with too few frames that are dropped; the others give shorter clips."""
    buckets: tuple[Bucket, ...] = ()
    """Sizes to choose from; without any, ``max_height`` x ``max_width`` x ``num_frames``."""
    max_upscale: float | None = None
    frame_step: int = 4
    """The model's: clips have ``frame_step * k + 1`` frames."""
    validation_split: str | None = None
    """As `streamprep.held_out.parse_split` takes it."""
    video_loader_type: VideoLoader = "torchcodec"
    seed: int = 42
    """With the key, it decides what is random."""

    @property
    def sizes(self) -> tuple[Bucket, ...]:
        """The buckets, at least one."""
        return self.buckets or (Bucket(self.max_height, self.max_width, self.num_frames),)

    @property
    def several_windows(self) -> bool:
        """Whether a video may give several clips: then each has a number."""
        return self.window in ("uniform", "every")


@dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """A sample that is not encoded."""

    key: str
    reason: str
    """One of `DROP_REASONS` if a rule dropped it, of `errors.BAD_REASONS` if it is bad."""
    message: str
    stage: str = "plan"
    """``plan``, or ``decode`` for a row that was planned and then dropped for its frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """One row of the output: a clip, or only a sample, with one of its captions."""

    key: str
    """The clip's or sample's, with ``@NN`` for a caption that is not the first."""
    id: str
    """The file's name, with the same suffix."""
    caption: str
    """As the dataset has it."""
    prompt: str
    """What the text encoder gets: the caption, or nothing for guidance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPlan:
    """One sample whose captions are to be encoded."""

    key: str
    file_name: str
    rows: tuple[RowPlan, ...]
    unusable: tuple[Excluded, ...] = ()
    """Captions that are left out, while the sample is not."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The dataset's further columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlan(TextPlan):
    """One clip that is to be encoded, and its captions; its key is the sample's, with ``#NN`` for one of several."""

    video: Member
    """Where its bytes lie in the shard."""
    request: DecodeRequest
    source_fps: float
    media_type: str = "video"
    """Or ``image``: its only frame is all of the file."""

    @property
    def bucket(self) -> Bucket:
        """Its size."""
        return Bucket(self.request.height, self.request.width, len(self.request.timestamps))


_Planned = TypeVar("_Planned", bound=TextPlan)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlan:
    """Every decision about one shard."""

    id: str
    shard: str
    clips: tuple[ClipPlan, ...] = ()
    """By bucket, and in the order of the shard."""
    texts: tuple[TextPlan, ...] = ()
    """Where only captions are encoded, instead of clips."""
    held_out: tuple[TextPlan, ...] = ()
    """The first clip, or text, of each sample that is for validation; they are dropped, too."""
    dropped: tuple[Excluded, ...]
    bad: tuple[Excluded, ...]
    """Known to be bad without decoding: no readable header, or one that contradicts the dataset."""
    retried: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """In a retry: how many of its rows were bad for each reason."""
    batched: tuple[ClipPlan, ...] | None = None
    """In a retry: all clips of the unit, in whose batches its own have their places."""

    def only(self, keys: Collection[str], retried: Mapping[str, int]) -> UnitPlan:
        """A retry of some of its rows; everything else about it is known already."""

        def chosen(samples: Sequence[_Planned]) -> tuple[_Planned, ...]:
            found = (
                dataclasses.replace(sample, rows=tuple(row for row in sample.rows if row.key in keys), unusable=())
                for sample in samples
            )
            return tuple(sample for sample in found if sample.rows)

        return dataclasses.replace(
            self,
            clips=chosen(self.clips),
            texts=chosen(self.texts),
            dropped=(),
            bad=(),
            retried=retried,
            batched=self.clips,
        )

    @property
    def samples(self) -> Sequence[TextPlan]:
        """Its clips or its texts."""
        return self.clips or self.texts

    @property
    def rows(self) -> Iterator[RowPlan]:
        """Of all its samples, in their order."""
        return (row for sample in self.samples for row in sample.rows)

    def batches(self, size: int) -> Iterator[Sequence[ClipPlan | None]]:
        """The clips, at most ``size`` of one bucket at a time. Batches never cross a unit.

        In a retry they are those of the unit, with None for what is not tried again: so latents are what they would
        have been.
        """
        mine = {clip.key: clip for clip in self.clips}
        for _, clips in itertools.groupby(self.batched or self.clips, key=lambda clip: clip.bucket):
            while batch := [mine.get(clip.key) for clip in itertools.islice(clips, size)]:
                if any(batch):
                    yield batch


def plan_unit(
    unit_id: str, index: ShardIndex, rules: SamplingRules, filters: Filters | None = None, *, limit: int | None = None
) -> UnitPlan:
    """Decide about every sample of a shard.

    Args:
        unit_id: The unit's name.
        index: The shard's samples.
        rules: What the settings say.
        filters: Those of the rules, which have seen all samples: `prepare.open_filters`. May be left out where none of
            them has to.
        limit: Look no further once so many clips, or samples of which only captions are encoded, are found.

    Raises:
        UserError: if ``rules.where`` cannot be evaluated.
    """
    samples: list[TextPlan] = []
    dropped: list[Excluded] = []
    bad: list[Excluded] = []
    held_out: list[TextPlan] = []
    filters = Filters(rules.filters, held_out_by(rules)) if filters is None else filters
    chosen = where_of(rules).keys_of(index.samples) if rules.where else None
    for sample in index.samples:
        if limit is not None and len(samples) >= limit:
            break
        try:
            if chosen is not None and sample.key not in chosen:
                raise _Drop("where", f"--where {rules.where}")
            found = [plan_text(sample, rules)] if rules.workload_type == "text" else plan_clips(sample, rules)
            if (excluded := filters.excludes(sample)) is not None:
                raise _Drop(*excluded)
            if filters.holds_out(sample):
                held_out.append(found[0])
                raise _Drop("validation", f"--validation-split {rules.validation_split}")
            samples += found
            dropped += found[0].unusable
        except _Drop as drop:
            dropped.append(Excluded(key=sample.key, reason=drop.reason, message=drop.message))
        except BadSample as error:
            bad.append(Excluded(key=sample.key, reason=error.reason, message=error.message))
    samples = samples[:limit]
    clips = sorted((sample for sample in samples if isinstance(sample, ClipPlan)), key=lambda clip: clip.bucket)
    texts = () if rules.workload_type != "text" else tuple(samples)
    return UnitPlan(
        id=unit_id,
        shard=index.name,
        clips=tuple(clips),
        texts=texts,
        held_out=tuple(held_out),
        dropped=tuple(dropped),
        bad=tuple(bad),
    )


def held_out_by(rules: SamplingRules) -> HeldOut | None:
    """Who is held out for validation, before it has seen all samples; None if nobody is."""
    return None if rules.validation_split is None else HeldOut(rules.validation_split, seed=rules.seed)


def is_drop(reason: str) -> bool:
    """Whether it is why a rule excludes a sample, rather than why one is bad."""
    return reason.partition(":")[0] in DROP_REASONS


def explain(reason: str) -> str:
    """A reason, of either kind, in words."""
    return (DROP_REASONS | BAD_REASONS)[reason.partition(":")[0]]


@functools.lru_cache(maxsize=1)
def where_of(rules: SamplingRules) -> Where:
    """The rules' expression, which notes what columns it has seen."""
    assert rules.where is not None
    return Where(rules.where)


def plan_text(sample: ShardSample, rules: SamplingRules) -> TextPlan:
    """Choose a sample's captions.

    Raises:
        _Drop: if none can be used.
    """
    captions, unusable = _choose_captions(sample, rules)
    file_name = sample.metadata["file_name"]
    rows = _plan_rows(sample.key, file_name, captions, rules)
    return TextPlan(key=sample.key, file_name=file_name, rows=rows, unusable=unusable, extra=sample.metadata["extra"])


def plan_clips(sample: ShardSample, rules: SamplingRules) -> list[ClipPlan]:
    """Decide about one sample: its clips, at least one.

    Raises:
        _Drop: if a rule excludes it.
        BadSample: if its header is unreadable or contradicts what the dataset declares.
    """
    metadata = sample.metadata
    if "sha256" not in metadata:
        raise _Drop("no_video", DROP_REASONS["no_video"])
    if "probe_error" in metadata:
        raise BadSample("probe_failed", metadata["probe_error"], stage="plan")
    _check_size(metadata, rules)
    media_type = metadata["media_type"]
    is_video = media_type == "video"
    fps, num_frames = _declared_or_probed(metadata) if is_video else (metadata["fps"], 1)
    captions, unusable = _choose_captions(sample, rules)
    if is_video:
        _check_length(num_frames / fps, rules)
    train_fps = rules.train_fps if is_video else fps  # at a higher rate an image would be many times the same frame
    video = resample(metadata, fps=fps, num_frames=num_frames, train_fps=train_fps)
    bucket = _choose_size(sample, video, _sizes_for(media_type, rules), rules)
    starts = window_starts(
        video.length,
        bucket.num_frames,
        window=rules.window,
        num_windows=rules.num_windows,
        stride=rules.window_stride or bucket.num_frames,
        draw=uniform(rules.seed, sample.key, "window") if rules.window == "random" else 0.0,
    )
    clips = []
    for number, start in enumerate(starts):
        suffix = f"#{number:02d}" if rules.several_windows else ""
        indices, timestamps = video.window(start, bucket.num_frames)
        clips.append(
            ClipPlan(
                key=sample.key + suffix,
                file_name=metadata["file_name"],
                rows=_plan_rows(sample.key + suffix, metadata["file_name"] + suffix, captions, rules),
                unusable=unusable,
                extra=metadata["extra"],
                video=sample.video,
                source_fps=float(fps),
                media_type=media_type,
                request=DecodeRequest(
                    sha256=metadata["sha256"],
                    indices=indices,
                    timestamps=timestamps,
                    tolerance_seconds=0.5 / metadata["fps"],
                    height=bucket.height,
                    width=bucket.width,
                    max_pixels=rules.max_pixels,
                    loader=rules.video_loader_type,
                ),
            )
        )
    return clips


def _choose_captions(sample: ShardSample, rules: SamplingRules) -> tuple[dict[int, str], tuple[Excluded, ...]]:
    """The captions to encode, by number; and those that are left out because they cannot be used."""
    captions: Sequence[str] = sample.metadata["captions"]
    if rules.caption == "first":
        return {0: _usable(captions[0] if captions else None)}, ()
    usable, unusable = _usable_captions(sample.key, captions)
    if rules.caption == "all":
        return usable, unusable
    number = int(uniform(rules.seed, sample.key, "caption") * len(usable))
    return {0: list(usable.values())[number]}, unusable


def _plan_rows(key: str, name: str, captions: Mapping[int, str], rules: SamplingRules) -> tuple[RowPlan, ...]:
    rows = []
    for number, caption in captions.items():
        suffix = f"@{number:02d}" if number else ""
        prompt = caption
        if rules.training_cfg_rate and uniform(rules.seed, key + suffix, "guidance") < rules.training_cfg_rate:
            prompt = ""
        rows.append(RowPlan(key=key + suffix, id=name + suffix, caption=caption, prompt=prompt))
    return tuple(rows)


def _sizes_for(media_type: str, rules: SamplingRules) -> Sequence[Bucket]:
    """Images take buckets of one frame; videos take longer ones where there are any: a still of a video is no clip."""
    stills = [size for size in rules.sizes if size.num_frames == 1]
    if media_type == "video":
        return [size for size in rules.sizes if size.num_frames > 1] or stills
    if not stills:
        size = rules.sizes[0]
        raise _Drop(
            "too_short",
            f"an image is one frame, {size.num_frames} are wanted: for images use --num-frames 1, or a bucket of one "
            f"frame beside the others: --buckets {size},{dataclasses.replace(size, num_frames=1)}",
        )
    return stills


def _choose_size(sample: ShardSample, video: ResampledVideo, sizes: Sequence[Bucket], rules: SamplingRules) -> Bucket:
    """The bucket of a clip; a shorter clip than any bucket's where ``drop_short_ratio`` lets one through."""
    metadata = sample.metadata
    height, width = metadata["height"], metadata["width"]
    bucket = choose_bucket(sizes, height=height, width=width, num_frames=video.length)
    if rules.max_upscale is not None and (factor := upscaling(bucket, height=height, width=width)) > rules.max_upscale:
        raise _Drop("upscale", f"{height}x{width} pixels would be enlarged {factor:.2f} times for {bucket}")
    if video.length >= bucket.num_frames:
        return bucket
    if video.length and rules.drop_short_ratio <= uniform(rules.seed, sample.key, "short"):
        return dataclasses.replace(bucket, num_frames=(video.length - 1) // rules.frame_step * rules.frame_step + 1)
    raise _Drop(
        "too_short",
        f"{count(video.length, 'frame')} at {rules.train_fps:g} fps, {bucket.num_frames} are wanted "
        f"({count(metadata['num_frames'], 'frame')} at {metadata['fps']:g} fps)",
    )


class _Drop(Exception):
    def __init__(self, reason: str, message: str) -> None:
        assert is_drop(reason), reason
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


def _usable_captions(key: str, captions: Sequence[str]) -> tuple[dict[int, str], tuple[Excluded, ...]]:
    """A sample's captions by number, without those that cannot be used, and those."""
    usable: dict[int, str] = {}
    problems: dict[int, _Drop] = {}
    for number, caption in enumerate(captions):
        try:
            usable[number] = _usable(caption)
        except _Drop as drop:
            problems[number] = drop
    if not usable:
        raise next(iter(problems.values()), _Drop("empty_caption", "no caption"))
    return usable, tuple(
        Excluded(key=f"{key}@{number:02d}", reason=drop.reason, message=drop.message)
        for number, drop in problems.items()
    )


def _usable(caption: str | None) -> str:
    if caption is None or not caption.strip():
        raise _Drop("empty_caption", "no caption" if caption is None else f"the caption is {caption!r:.200}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise _Drop("caption_encoding", str(error)) from error
    return caption


def _check_length(duration_seconds: float, rules: SamplingRules) -> None:
    if rules.video_length_tolerance_range is None:
        return
    longest = rules.video_length_tolerance_range * rules.num_frames / rules.train_fps * rules.speed_factor
    if duration_seconds > longest:
        raise _Drop("too_long", f"{duration_seconds:.2f} s, at most {longest:.2f} s are allowed")
