"""The encoded videos of units, read from their shards in the order of their plans.

From a folder, one after the other: the system reads ahead. From a bucket, where each request takes its time, many at
once (`streamprep.ahead`); what lies close together in a shard comes in one request. What was read may be kept on a
local disk (`streamprep.cache`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from streamprep.ahead import fetch_ahead
from streamprep.cache import Cache
from streamprep.errors import BadSample
from streamprep.plan import ClipPlan, UnitPlan
from streamprep.shards import Member, read_member
from streamprep.storage import Store

READ_AHEAD_BYTES = 128 * 2**20
"""Most that is under way from a bucket, or has come and is not decoding yet; one larger video comes alone."""
_REQUESTS_AT_ONCE = 12
_TOGETHER_BYTES = 4 * 2**20
_GAP_BYTES = 64 * 2**10

Video = bytes | BadSample
"""An encoded video, or why it could not be read."""


def read_units(
    store: Store, units: Iterable[UnitPlan], cache: Cache | None = None
) -> Iterator[tuple[UnitPlan, ClipPlan, Video]]:
    """Each clip of each unit with its video; of a shard that ends too soon, those it lacks are bad.

    Args:
        store: The shards.
        units: Taken one by one, as reading gets to them, from a bucket by another thread.
        cache: Where what comes from a bucket is kept.

    Raises:
        OSError: where the store fails.
    """
    if store.local_path() is not None:
        for unit in units:
            for clip in unit.clips:
                yield unit, clip, _read(store, unit.shard, clip.video)
        return
    stretches = fetch_ahead(
        (stretch for unit in units for stretch in cut_into_stretches(unit)),
        lambda stretch: _fetch(store, stretch, cache),
        size_bytes=lambda stretch: stretch.size_bytes,
        max_bytes=READ_AHEAD_BYTES,
        num_threads=_REQUESTS_AT_ONCE,
    )
    with closing(stretches):
        for stretch, videos in stretches:
            for clip in stretch.clips:
                yield stretch.unit, clip, videos[clip.video]


@dataclass(slots=True, kw_only=True)
class Stretch:
    """A part of a shard with the videos of some clips that follow one another."""

    unit: UnitPlan
    offset: int
    end: int
    clips: list[ClipPlan] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Of the part."""
        return self.end - self.offset

    def takes(self, clip: ClipPlan) -> bool:
        """Whether one more clip lies in it, or close behind it."""
        start, end = clip.video.offset, clip.video.offset + clip.video.size
        if self.offset <= start and end <= self.end:  # another clip of a video that is read anyhow
            return True
        return self.offset <= start <= self.end + _GAP_BYTES and end - self.offset <= _TOGETHER_BYTES


def cut_into_stretches(unit: UnitPlan) -> Iterator[Stretch]:
    """The clips of a unit, those together that one request may bring."""
    stretch: Stretch | None = None
    for clip in unit.clips:
        if stretch is None or not stretch.takes(clip):
            if stretch is not None:
                yield stretch
            stretch = Stretch(unit=unit, offset=clip.video.offset, end=clip.video.offset)
        stretch.clips.append(clip)
        stretch.end = max(stretch.end, clip.video.offset + clip.video.size)
    if stretch is not None:
        yield stretch


def _fetch(store: Store, stretch: Stretch, cache: Cache | None) -> Mapping[Member, Video]:
    members = dict.fromkeys(clip.video for clip in stretch.clips)
    if cache is None:
        return _fetch_from_store(store, stretch, members)
    found: dict[Member, Video] = {member: data for member in members if (data := cache.get(member.sha256)) is not None}
    if len(found) < len(members):
        for member, video in _fetch_from_store(store, stretch, members).items():
            if member not in found and isinstance(video, bytes):
                cache.put(member.sha256, video)
            found[member] = video
    return found


def _fetch_from_store(store: Store, stretch: Stretch, members: Iterable[Member]) -> Mapping[Member, Video]:
    shard = stretch.unit.shard
    try:
        data = store.read_range(shard, stretch.offset, stretch.size_bytes)
    except EOFError:
        return {member: _read(store, shard, member) for member in members}
    starts = {member: member.offset - stretch.offset for member in members}
    return {member: data[start : start + member.size] for member, start in starts.items()}


def _read(store: Store, shard: str, member: Member) -> Video:
    try:
        return read_member(store, shard, member)
    except BadSample as error:
        return error
