"""MP4 and MOV headers, read by walking their boxes (ISO/IEC 14496-12).

About 0.1 ms for a file, where FFmpeg's own look at it, which decodes, takes 1 ms (64x48) to 30 ms (real clips).
Ordinary files only: whatever we are not sure to read as FFmpeg does is an `UnusualMp4Error`, and FFmpeg is asked. Every
size in a file may be a lie, so a table is read only as far as its box reaches, and never more than `_MAX_SAMPLES`
entries of it.

1. Find the index, ``moov``, among the boxes of the file.
2. Take its only video track: codec, frame size, rotation.
3. Lay the samples out in time: ``stts`` says how long each lasts, ``ctts`` how far it is shown from its place in
   decoding order.
4. Keep what the edit list shows, on FFmpeg's clock.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, chain, pairwise, repeat
from operator import add
from typing import BinaryIO

_MAX_MOOV_BYTES = 256 * 2**20
_MAX_BOXES = 10_000
_MAX_SAMPLES = 2**20
"""Nearly 5 hours at 60 frames per second."""
_MAX_TICKS = 2**28
"""FFmpeg disbelieves larger numbers in ``ctts``, and those in ``stts`` that would be negative."""

_CODECS = {
    b"avc1": "h264",
    b"avc3": "h264",
    b"hvc1": "hevc",
    b"hev1": "hevc",
    b"vp09": "vp9",
    b"av01": "av1",
    b"mp4v": "mpeg4",
    b"jpeg": "mjpeg",
    b"mjpg": "mjpeg",
    b"png ": "png",
    b"apch": "prores",
    b"apcn": "prores",
    b"apcs": "prores",
    b"apco": "prores",
    b"ap4h": "prores",
    b"ap4x": "prores",
}
"""Sample entry -> FFmpeg's name. VP8 is missing on purpose: some of its samples are never shown."""

_MPEG4_ESDS = re.compile(rb"esds\0{4}\x03[\x80-\xff]{0,3}[\0-\x7f]..\0\x04[\x80-\xff]{0,3}[\0-\x7f]\x20", re.DOTALL)
"""``mp4v`` is also MPEG-1, MPEG-2, JPEG and more; only the object type in its descriptor, 0x20, makes it MPEG-4."""

_ROTATIONS: dict[tuple[float, ...], int] = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 90, (-1, 0, 0, -1): 180, (0, -1, 1, 0): 270}
"""The turning part of a display matrix -> clockwise degrees."""
_IDENTITY = (1, 0, 0, 0, 1, 0, 0, 0, 2**14)


class BrokenMp4Error(ValueError):
    """No program can read this file: its index is missing or cut off."""


class UnusualMp4Error(Exception):
    """Not a file for the box walk; FFmpeg may know better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoTrack:
    """A video stream as its container describes it."""

    codec: str
    """FFmpeg's name."""
    width: int
    """Pixels, before rotation."""
    height: int
    """Pixels, before rotation."""
    rotation: int
    """Clockwise degrees a player turns the picture by: 0, 90, 180 or 270."""
    times: Sequence[int]
    """When each shown frame is presented, rising, in units of ``time_base``."""
    end: int
    """When the last shown frame ends."""
    time_base: Fraction
    """Seconds."""
    frame_rate: Fraction | None
    """Frames per second by the container's word; None where it has none."""


def read_mp4_track(file: BinaryIO) -> VideoTrack:
    """The video track of an MP4 or MOV file, from its index alone.

    Args:
        file: Seekable; only the box headers and the index are read.

    Raises:
        BrokenMp4Error: There is no whole index.
        UnusualMp4Error: The file is not ordinary: fragments, several video tracks, several edits, a rare codec, flipped
            pictures, tables that disagree, ...
    """
    try:
        return _read_track(_read_moov(file))
    except struct.error as error:
        raise UnusualMp4Error("a box is too short for what it should hold") from error


def _read_track(moov: memoryview) -> VideoTrack:
    movie, trak = _children(moov), _children(_only_video_trak(moov))
    media = _children(trak[b"mdia"])
    table = _children(_children(media[b"minf"])[b"stbl"])
    if b"mvex" in movie or b"cmov" in movie:
        raise UnusualMp4Error("fragmented, or a compressed index")
    codec, width, height = _read_sample_entry(table[b"stsd"])
    ticks_per_second = _read_timescale(media[b"mdhd"])
    edit = _read_edit(trak, ticks_per_second=ticks_per_second, movie_timescale=_read_timescale(movie[b"mvhd"]))
    timeline = _read_timeline(table)
    times, end = _shown(timeline, edit)
    return VideoTrack(
        codec=codec,
        width=width,
        height=height,
        rotation=_read_rotation(trak[b"tkhd"], movie[b"mvhd"]),
        times=times,
        end=end,
        time_base=Fraction(1, ticks_per_second),
        frame_rate=Fraction(ticks_per_second, timeline.step) if timeline.step else None,
    )


# Boxes


class _Children(dict[bytes, memoryview]):
    """The content of the boxes in a box by kind, the first of each."""

    def __missing__(self, kind: bytes) -> memoryview:
        raise UnusualMp4Error(f"no {kind!r} box")


def _read_moov(file: BinaryIO) -> memoryview:
    file_size = file.seek(0, 2)
    position = 0
    for _ in range(_MAX_BOXES):
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            raise BrokenMp4Error("no moov box: the file was cut off, or never finished")
        kind, header_size, size = _read_box_header(header, 0, room=file_size - position)
        if kind == b"moov":
            return _read_content(file, position + header_size, size - header_size)
        position += size
    raise BrokenMp4Error(f"no moov box among the first {_MAX_BOXES} boxes")


def _read_content(file: BinaryIO, position: int, size: int) -> memoryview:
    if size > _MAX_MOOV_BYTES:
        raise BrokenMp4Error(f"its moov box claims {size} bytes")
    file.seek(position)
    content = file.read(size)
    if len(content) < size:
        raise BrokenMp4Error(f"its moov box is cut off: {len(content)} of {size} bytes are there")
    return memoryview(content)


def _children(parent: memoryview) -> _Children:
    children = _Children()
    for kind, content in _boxes(parent):
        children.setdefault(kind, content)
    return children


def _boxes(parent: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and content of the boxes inside a box, first to last."""
    position = 0
    for _ in range(_MAX_BOXES):
        room = len(parent) - position
        if room < 8:  # QuickTime ends some lists with 4 zero bytes
            return
        kind, header_size, size = _read_box_header(parent, position, room=room)
        if size > room:
            raise UnusualMp4Error(f"a {kind!r} box of {size} bytes where {room} are left")
        yield kind, parent[position + header_size : position + size]
        position += size
    raise UnusualMp4Error(f"more than {_MAX_BOXES} boxes in one")


def _read_box_header(data: bytes | memoryview, position: int, *, room: int) -> tuple[bytes, int, int]:
    """The kind of a box, the size of its header and of the whole."""
    size, kind = struct.unpack_from(">I4s", data, position)
    header_size = 8
    if size == 0:  # to the end
        size = room
    elif size == 1:
        header_size = 16
        (size,) = struct.unpack_from(">Q", data, position + 8)
    if size < header_size:
        raise UnusualMp4Error(f"a box of {size} bytes")
    return kind, header_size, size


# The track


def _only_video_trak(moov: memoryview) -> memoryview:
    """Which of several FFmpeg calls best depends on bit rates and flags: its business."""
    traks = [box for kind, box in _boxes(moov) if kind == b"trak"]
    videos = [trak for trak in traks if _handler(trak) in (b"vide", b"auxv", b"pict")]
    if len(videos) != 1:
        raise UnusualMp4Error(f"{len(videos)} video tracks")
    return videos[0]


def _handler(trak: memoryview) -> bytes:
    return bytes(_children(_children(trak)[b"mdia"])[b"hdlr"][8:12])


def _read_sample_entry(stsd: memoryview) -> tuple[str, int, int]:
    """Codec, width and height."""
    num_entries, _, fourcc = struct.unpack_from(">II4s", stsd, 4)
    width, height = struct.unpack_from(">HH", stsd, 40)
    codec = _CODECS.get(fourcc)
    if num_entries != 1 or codec is None or width == 0 or height == 0:
        raise UnusualMp4Error(f"{num_entries} sample entries, the first {fourcc!r} of {width}x{height}")
    if codec == "mpeg4" and not _MPEG4_ESDS.search(stsd):
        raise UnusualMp4Error("mp4v, but not MPEG-4")
    return codec, width, height


def _read_timescale(header: memoryview) -> int:
    """Ticks per second, from ``mvhd`` or ``mdhd``."""
    (timescale,) = struct.unpack_from(">I", header, _by_version(header, 12, 20))
    if timescale == 0:
        raise UnusualMp4Error("a time scale of 0")
    return int(timescale)


def _read_rotation(tkhd: memoryview, mvhd: memoryview) -> int:
    a, b, u, c, d, v, _, _, w = _read_matrix(tkhd, _by_version(tkhd, 40, 52))
    rotation = _ROTATIONS.get((a, b, c, d))
    if rotation is None or (u, v, w) != (0, 0, 2**14) or _read_matrix(mvhd, _by_version(mvhd, 36, 48)) != _IDENTITY:
        raise UnusualMp4Error(f"the display matrix {(a, b, c, d)} does more than turn")
    return rotation


def _read_matrix(header: memoryview, offset: int) -> tuple[float, ...]:
    return tuple(number / 2**16 for number in struct.unpack_from(">9i", header, offset))


def _by_version(box: memoryview, version_0: int, version_1: int) -> int:
    """The offset of a field, which follows times of 32 bits in version 0 and of 64 bits in version 1."""
    (version,) = struct.unpack_from(">B", box)
    if version > 1:
        raise UnusualMp4Error(f"a box of version {version}")
    return version_1 if version else version_0


# Time


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timeline:
    """When each sample is decoded and shown, in ticks, in decoding order, before any edit."""

    decode_times: list[int]
    """One more than there are samples: the last is the end."""
    times: list[int]
    step: int | None
    """How long each sample but the last one lasts; None if they differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edit:
    """The part of the media that is shown, in ticks."""

    delay: int
    """How long nothing is shown before."""
    begin: int
    end: int


def _read_timeline(table: _Children) -> _Timeline:
    num_samples = _read_num_samples(table)
    durations = _read_runs(table[b"stts"], ">II", num_samples=num_samples)
    decode_times = list(accumulate(_expand(durations), initial=0))
    times = decode_times[:-1]
    ctts = table.get(b"ctts")
    if ctts is not None:
        # Signed in version 0 as well: QuickTime writes it so, and FFmpeg reads it so.
        offsets = _read_runs(ctts, ">Ii", num_samples=num_samples)
        times = list(map(add, times, _expand(offsets)))
    return _Timeline(decode_times=decode_times, times=times, step=_step(durations))


def _read_num_samples(table: _Children) -> int:
    """The number of frames in the file, on which the tables must agree."""
    stsz = table[b"stsz"]
    common_size, num_samples = struct.unpack_from(">II", stsz, 4)
    if not 0 < num_samples <= _MAX_SAMPLES:
        raise UnusualMp4Error(f"{num_samples} samples")
    if common_size == 0 and 0 in struct.unpack_from(f">{num_samples}I", stsz, 12):
        raise UnusualMp4Error("an empty sample, which shows no frame")
    in_chunks = _num_samples_in_chunks(table)
    if num_samples != in_chunks:
        raise UnusualMp4Error(f"{num_samples} samples, but {in_chunks} in chunks")
    return int(num_samples)


def _num_samples_in_chunks(table: _Children) -> int:
    """FFmpeg shows no more than this, whatever ``stsz`` says."""
    offsets, offset_size = (table[b"stco"], 4) if b"stco" in table else (table[b"co64"], 8)
    (num_chunks,) = struct.unpack_from(">I", offsets, 4)
    runs = _read_entries(table[b"stsc"], ">III")
    starts = [first for first, _, _ in runs] + [num_chunks + 1]
    if len(offsets) < 8 + offset_size * num_chunks or starts[0] != 1 or any(a >= b for a, b in pairwise(starts)):
        raise UnusualMp4Error("its chunks are missing or out of order")
    return sum((end - start) * run[1] for (start, end), run in zip(pairwise(starts), runs, strict=True))


def _read_runs(box: memoryview, entry: str, *, num_samples: int) -> list[tuple[int, int]]:
    """The (count, value) pairs of ``stts`` and ``ctts``, with sane values for each sample."""
    runs = [(count, value) for count, value in _read_entries(box, entry)]
    if sum(count for count, _ in runs) != num_samples:
        raise UnusualMp4Error(f"times for other than {num_samples} samples")
    if any(abs(value) >= _MAX_TICKS for _, value in runs):
        raise UnusualMp4Error(f"a sample lasts, or is shifted by, more than {_MAX_TICKS} ticks")
    return runs


def _read_entries(box: memoryview, entry: str) -> list[tuple[int, ...]]:
    """The entries of a table: version and flags, count, entries."""
    (count,) = struct.unpack_from(">I", box, 4)
    entries = box[8 : 8 + count * struct.calcsize(entry)]
    if count > _MAX_SAMPLES or len(entries) < count * struct.calcsize(entry):
        raise UnusualMp4Error(f"a table of {count} entries in a box of {len(box)} bytes")
    return list(struct.iter_unpack(entry, entries))


def _expand(runs: list[tuple[int, int]]) -> Iterator[int]:
    return chain.from_iterable(repeat(value, count) for count, value in runs)


def _step(durations: list[tuple[int, int]]) -> int | None:
    """What all samples but the last one last: muxers do not agree how long that is shown."""
    (last_count, last), others = durations[-1], {value for _, value in durations[:-1]}
    if last_count > 1 or not others:
        others.add(last)
    return others.pop() or None if len(others) == 1 else None


def _read_edit(trak: _Children, *, ticks_per_second: int, movie_timescale: int) -> _Edit | None:
    """The edit list: an empty edit or none, then one of the media. None without a list."""
    if b"edts" not in trak or (elst := _children(trak[b"edts"]).get(b"elst")) is None:
        return None
    edits = _read_entries(elst, ">QqI" if _by_version(elst, 0, 1) else ">IiI")
    if not edits:
        return None
    *before, (length, begin, rate) = edits
    if len(before) > 1 or any(time != -1 for _, time, _ in before) or begin < 0 or length == 0 or rate != 2**16:
        raise UnusualMp4Error(f"an edit list that does more than wait and then play: {edits[:3]}")

    def to_ticks(duration: int) -> int:
        return (2 * duration * ticks_per_second + movie_timescale) // (2 * movie_timescale)

    return _Edit(delay=sum(to_ticks(wait) for wait, _, _ in before), begin=begin, end=begin + to_ticks(length))


def _shown(timeline: _Timeline, edit: _Edit | None) -> tuple[list[int], int]:
    """When the shown frames are presented, rising, and when the last one ends, as FFmpeg has it.

    FFmpeg drops what is presented outside the edit. It puts the first frame shown where the edit begins, even if the
    edit begins in the middle of a frame; see ``mov_fix_index`` in its ``mov.c``.
    """
    decode_times, times, shift = timeline.decode_times, timeline.times, 0
    if edit is not None:
        times = [time for time in times if edit.begin <= time < edit.end]
        if not times:
            raise UnusualMp4Error("the edit list shows nothing")
        if min(times) < decode_times[timeline.times.index(times[0])]:
            raise UnusualMp4Error("negative offsets in the middle of the media: FFmpeg's clock is then hard to tell")
        shift = edit.delay - min(times)
    last = timeline.times.index(max(times))
    end = timeline.times[last] + decode_times[last + 1] - decode_times[last]
    return sorted(time + shift for time in times), end + shift
