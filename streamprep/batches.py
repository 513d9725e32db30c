"""Planned batches: decoded, filled up, encoded.

A batch keeps its planned size when a member turns out to be bad, or is dropped for its frames (`streamprep.filters`):
the hole is filled with another member and the result thrown away. So a clip's latents do not depend on the health of
its neighbours, nor on whether it is encoded in a retry.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamprep.cache import Cache
from streamprep.columns import keep
from streamprep.commit import EncodedBatch
from streamprep.config import EncodeConfig
from streamprep.decoder import Decoder
from streamprep.encoders import Encoder, encode_clips
from streamprep.errors import BadSample
from streamprep.filters import Filters
from streamprep.plan import ClipPlan, Excluded, RowPlan, TextPlan, UnitPlan
from streamprep.record import BadClip
from streamprep.selfcheck import check_first_frame
from streamprep.storage import Store
from streamprep.stream import decode_units
from streamprep.types import ClipBatch, EncodedClip, EncodedSample

_SHAPES_KEPT = 2
TEXTS_AT_ONCE = 256
"""Captions without clips that are encoded together, sorted by length; with 512 tokens each, 2 GB in float32."""


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """Samples of one planned batch, ready to be encoded."""

    unit: UnitPlan
    samples: Sequence[TextPlan]
    prompts: Sequence[str]
    """Distinct ones to embed first; for clips all of the unit's, with its first batch."""
    frames: ClipBatch | None = None
    """Of the planned batch, holes filled; None if every clip is bad, or there are no clips."""
    places: Sequence[int] = ()
    """Of the samples in ``frames``."""
    bad: Mapping[str, BadSample] = dataclasses.field(default_factory=dict)
    """By the sample's key."""
    dropped: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """By the sample's key, of those that filters leave out for their frames: (reason, message)."""
    decoders: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How many of its clips each decoder gave."""

    @property
    def last(self) -> bool:
        """Whether it is the unit's last."""
        return self.samples[-1] is self.unit.samples[-1]


class FrameBuffers:
    """Memory for batches of frames, used again: fresh memory costs its page faults, pinned memory far more.

    Buffers of the latest few shapes are kept, so that buckets do not add up.
    """

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._free: dict[tuple[int, ...], deque[Tensor]] = {}

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """A uint8 tensor with whatever is in it."""
        free = self._free.get(shape)
        if free:
            return free.pop()
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)

    def give_back(self, buffer: Tensor) -> None:
        """Nobody looks at it any more."""
        free = self._free.pop(buffer.shape, deque())
        self._free[buffer.shape] = free  # the latest comes last
        free.append(buffer)
        while len(self._free) > _SHAPES_KEPT:
            del self._free[next(iter(self._free))]


def batches_of_texts(units: Iterator[UnitPlan]) -> Iterator[DecodedBatch]:
    """Captions without clips: there is nothing to decode."""
    for unit in units:
        for start in range(0, len(unit.texts), TEXTS_AT_ONCE):
            texts = unit.texts[start : start + TEXTS_AT_ONCE]
            yield DecodedBatch(unit=unit, samples=texts, prompts=_distinct_prompts(texts))


def collate(
    shards: Store,
    units: Iterator[UnitPlan],
    decoder: Decoder,
    filters: Filters,
    buffers: FrameBuffers,
    *,
    batch_size: int,
    cache: Cache | None = None,
) -> Iterator[DecodedBatch]:
    """Decode the units' clips, look at their frames, and put them together in their planned batches."""
    results = decode_units(shards, units, decoder, cache)
    for unit, first, decoded in results:
        for batch in unit.batches(batch_size):
            clips = {place: clip for place, clip in enumerate(batch) if clip is not None}
            samples = list(clips.values())
            frames = buffers.take((len(batch), *samples[0].request.shape))
            bad: dict[str, BadSample] = {}
            dropped: dict[str, tuple[str, str]] = {}
            decoders: Counter[str] = Counter()
            for row, clip in clips.items():
                if clip is not first:
                    _, _, decoded = next(results)
                if decoded.bad is not None:
                    bad[clip.key] = decoded.bad
                    continue
                assert decoded.frames is not None
                frames[row] = decoded.frames
                decoders[decoded.decoder or "unknown"] += 1
                if (excluded := filters.excludes_frames(decoded.frames)) is not None:
                    dropped[clip.key] = excluded
            yield DecodedBatch(
                unit=unit,
                samples=samples,
                prompts=_distinct_prompts(unit.clips) if samples[0] is first else (),
                frames=_fill_holes({row: c.key for row, c in clips.items() if c.key not in {*bad, *dropped}}, frames),
                places=list(clips),
                bad=bad,
                dropped=dropped,
                decoders=decoders,
            )


def _distinct_prompts(samples: Sequence[TextPlan]) -> list[str]:
    return list(dict.fromkeys(row.prompt for sample in samples for row in sample.rows))


def _fill_holes(good: Mapping[int, str], frames: Tensor) -> ClipBatch | None:
    """A batch of which only these rows hold what they should: {row: key}."""
    if not good:
        return None
    filler = next(iter(good))
    for row in range(len(frames)):
        if row not in good:
            frames[row] = frames[filler]
    return ClipBatch(keys=tuple(good.get(row, "") for row in range(len(frames))), frames=frames)


def encode_batches(
    batches: Iterator[DecodedBatch],
    encoder: Encoder,
    buffers: FrameBuffers,
    config: EncodeConfig,
    columns: Mapping[str, str],
) -> Iterator[EncodedBatch]:
    """Prompts first, then clips."""
    texts: dict[str, Tensor] = {}
    encoder.limits.take_halved()  # of the self-check, which is no unit's
    for batch in batches:
        if batch.prompts:
            texts = dict(zip(batch.prompts, encoder.encode_text(batch.prompts), strict=True))
        videos: Sequence[dict[str, Tensor]] = [{}] * len(batch.samples)
        if batch.frames is not None:
            encoded = encode_clips(encoder, batch.frames)
            videos = [encoded[place] for place in batch.places]
            buffers.give_back(batch.frames.frames)
        samples, bad, dropped = [], [], []
        for sample, video in zip(batch.samples, videos, strict=True):
            if sample.key in batch.dropped:
                reason, message = batch.dropped[sample.key]
                dropped += [
                    Excluded(key=row.key, reason=reason, message=message, stage="decode") for row in sample.rows
                ]
                continue
            if encoder.contract.video is not None and video and sample.key not in batch.bad:
                check_first_frame(encoder.contract.video, video, sample.key)
            for row in sample.rows:
                try:
                    if sample.key in batch.bad:
                        raise batch.bad[sample.key]
                    tensors = {**video, "text_embedding": texts[row.prompt]}
                    samples.append(_encoded(sample, row, tensors, config, columns))
                except BadSample as error:
                    bad.append(BadClip(key=row.key, stage=error.stage, reason=error.reason, exception=error.message))
        yield EncodedBatch(
            unit=batch.unit,
            samples=tuple(samples),
            bad=tuple(bad),
            dropped=tuple(dropped),
            num_samples=len(batch.samples),
            last=batch.last,
            decoders=batch.decoders,
            halved=encoder.limits.take_halved(),
        )


def _encoded(
    sample: TextPlan, row: RowPlan, tensors: dict[str, Tensor], config: EncodeConfig, columns: Mapping[str, str]
) -> EncodedSample:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.numpy()).all():  # torch's threads would wait for cores that decoding holds: 20x
            raise BadSample("non_finite", f"{name} holds NaN or infinity", stage="encode")
    clip = None
    if isinstance(sample, ClipPlan):
        clip = EncodedClip(
            width=sample.request.width,
            height=sample.request.height,
            num_frames=len(sample.request.timestamps),
            train_fps=config.train_fps,
            source_fps=sample.source_fps,
            media_type=sample.media_type,
        )
    return EncodedSample(
        key=row.key,
        id=row.id,
        tensors=tensors,
        file_name=sample.file_name,
        caption=row.caption,
        clip=clip,
        columns=keep(sample.extra, columns),
    )
