"""Frames in decoding order, with PyAV: no seeking, so that nothing can be found in the wrong place.

1. The container says when each frame is shown (`streamprep.probe`); from that follows the time of every wanted one.
2. Packets are decoded from the first to the last that is needed; frames of other times are let go.
3. `full_size_frames` gives the pixels that torchcodec gives, bit for bit. `scaled_frames` saves work: frames that are
   not wanted and that no other refers to are not decoded, and cropping and scaling happen before the conversion to RGB.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from streamprep.crop import center_crop_box
from streamprep.errors import BadSample, first_line, says_out_of_memory
from streamprep.mp4 import VideoTrack
from streamprep.probe import NoVideoStreamError, ProbeError, best_stream, open_container, read_track
from streamprep.types import DecodeRequest

if TYPE_CHECKING:
    from av import VideoFrame
    from av.filter import Graph
    from av.filter.context import FilterContext

_CLOCK_SECONDS = 1e-4  # times that came by different sums are the same
_SKIPS_EXACTLY = ("h264", "mpeg1video", "mpeg2video", "mpeg4")
"""Codecs whose frames say whether any other refers to them. In HEVC they say so for their own layer only."""

Rows = Sequence[int]
"""Where in the result a frame goes: more than one place if the source is slower than what is wanted."""


def full_size_frames(
    video: bytes | memoryview, container: str, request: DecodeRequest
) -> Iterator[tuple[Rows, Tensor]]:
    """The wanted frames, upright, as they come.

    Args:
        video: The whole encoded file.
        container: As `streamprep.probe.sniff_container` names it.
        request: What is wanted; its height and width are not looked at.

    Yields:
        Rows, and ``(H, W, C)`` uint8 RGB.

    Raises:
        BadSample: Not every wanted frame is there.
    """
    to_rgb = _Converter(lambda frame: [])
    for rows, frame, rotation in _decode(video, container, request, skip=False):
        yield rows, _turn(to_rgb(frame), rotation)


def scaled_frames(video: bytes | memoryview, container: str, request: DecodeRequest) -> Iterator[tuple[Rows, Tensor]]:
    """The same, cropped and resized by swscale, which samples at the centres of pixels (``align_corners=False``).

    Yields:
        Rows, and ``(height, width, C)`` uint8 RGB.
    """
    to_rgb: _Converter | None = None
    for rows, frame, rotation in _decode(video, container, request, skip=True):
        if to_rgb is None:
            size = (request.height, request.width)
            to_rgb = _Converter(_crop_and_scale(*(size if rotation in (0, 180) else size[::-1])))
        yield rows, _turn(to_rgb(frame), rotation)


def frames_on_show(track: VideoTrack, moments: Sequence[float]) -> list[int]:
    """Numbers of the last frames that begin no later than each moment.

    Raises:
        BadSample: Two frames have the same time.
    """
    times = [float(time * track.time_base) for time in track.times]
    if len(set(track.times)) < len(track.times):
        raise BadSample("timestamps", "two of its frames have the same time")
    return [max(0, bisect_right(times, moment + _CLOCK_SECONDS) - 1) for moment in moments]


def read_track_or_refuse(file: BinaryIO, container: str) -> VideoTrack:
    """What the container says about when frames are shown.

    Raises:
        BadSample: It cannot be read.
    """
    try:
        return read_track(file, container)
    except NoVideoStreamError as error:
        raise BadSample("no_video_stream", str(error)) from error
    except ProbeError as error:
        raise BadSample("decode_error", str(error)) from error


def _decode(
    video: bytes | memoryview, container: str, request: DecodeRequest, *, skip: bool
) -> Iterator[tuple[Rows, VideoFrame, int]]:
    """The wanted frames, once each, and the clockwise degrees to turn them by."""
    file = io.BytesIO(video)
    track = read_track_or_refuse(file, container)
    if track.width * track.height > request.max_pixels:
        raise BadSample(
            "too_large",
            f"frames of {track.width}x{track.height} pixels, more than the {request.max_pixels} of --max-pixels",
        )
    rows_by_time = _rows_by_time(track, request)
    with _errors_of_ffmpeg_are_the_videos():
        for frame in _frames(file, container, request, rows_by_time, skip=skip):
            if frame.is_corrupt:
                raise BadSample(
                    "decode_error", f"the decoder calls the frame at {float(_seconds(frame)):.4f} s corrupt"
                )
            yield rows_by_time.pop(_seconds(frame)), frame, track.rotation
    if rows_by_time:
        raise BadSample(
            "truncated",
            f"{len(rows_by_time)} wanted frames never come, first that of {float(min(rows_by_time)):.4f} s",
        )


def _rows_by_time(track: VideoTrack, request: DecodeRequest) -> dict[Fraction, list[int]]:
    """Seconds of each wanted frame -> its rows in the result."""
    indices = frames_on_show(track, request.timestamps) if request.indices is None else request.indices
    if indices[-1] >= len(track.times):
        raise BadSample("truncated", f"frame {indices[-1]} is wanted but the file holds {len(track.times)}")
    rows: defaultdict[Fraction, list[int]] = defaultdict(list)
    occurrences = Counter(track.times)
    for row, (index, wanted) in enumerate(zip(indices, request.timestamps, strict=True)):
        time = track.times[index] * track.time_base
        if request.indices is not None and abs(float(time) - wanted) > request.tolerance_seconds:
            raise BadSample("timestamps", f"frame {index} should be at {wanted:.4f} s and is at {float(time):.4f} s")
        if occurrences[track.times[index]] > 1:
            raise BadSample("timestamps", f"two of its frames have the time {float(time):.4f} s")
        rows[time].append(row)
    return rows


def _frames(
    file: BinaryIO,
    container: str,
    request: DecodeRequest,
    wanted: dict[Fraction, list[int]],
    *,
    skip: bool,
) -> Iterator[VideoFrame]:
    """Those of the wanted times, until there are none left, which the caller takes out of ``wanted``."""
    with open_container(file, container) as opened:
        stream = best_stream(opened)
        decoder = stream.codec_context
        decoder.options = {"threads": "1", "max_pixels": str(request.max_pixels)}  # of a later, larger frame as well
        skip = skip and decoder.codec.canonical_name in _SKIPS_EXACTLY
        for packet in opened.demux(stream):
            if skip:
                unwanted = packet.pts is not None and packet.pts * packet.time_base not in wanted
                decoder.skip_frame = "NONREF" if unwanted else "DEFAULT"
            for frame in packet.decode():
                if frame.pts is not None and _seconds(frame) in wanted:
                    yield frame
            if not wanted:
                return


@contextmanager
def _errors_of_ffmpeg_are_the_videos() -> Iterator[None]:
    import av

    try:
        yield
    except (av.FFmpegError, ProbeError, IndexError) as error:  # see `streamprep.probe` for the last
        if says_out_of_memory(error):
            raise MemoryError(first_line(error)) from error
        raise BadSample("decode_error", first_line(error)) from error


def _seconds(frame: VideoFrame) -> Fraction:
    return frame.pts * frame.time_base  # type: ignore[no-any-return]


class _Converter:
    """Frames -> ``(H, W, C)`` RGB, by a graph of FFmpeg's filters that is made for the first.

    Args:
        filters: Those before the conversion, as (name, arguments), for frames like this one.
    """

    def __init__(self, filters: Callable[[VideoFrame], list[tuple[str, str]]]) -> None:
        self._filters = filters
        self._size: tuple[int, int] | None = None
        self._format = ""

    def __call__(self, frame: VideoFrame) -> Tensor:
        with _errors_of_ffmpeg_are_the_videos():
            return self._convert(frame)

    def _convert(self, frame: VideoFrame) -> Tensor:
        if self._size is None:
            self._size = (frame.width, frame.height)
        if self._size != (frame.width, frame.height):
            raise BadSample(
                "resolution_change",
                f"a frame is of {frame.width}x{frame.height} pixels, the first was of {self._size[0]}x{self._size[1]}",
            )
        if self._format != frame.format.name:
            self._format = frame.format.name
            self._graph, self._source = self._build(frame)
        self._source.push(frame)
        return torch.from_numpy(self._graph.pull().to_ndarray())

    def _build(self, frame: VideoFrame) -> tuple[Graph, FilterContext]:
        from av.filter import Graph

        graph = Graph()
        graph.threads = 1
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        filters = [*self._filters(frame), ("format", "rgb24"), ("buffersink", "")]
        graph.link_nodes(source, *(graph.add(name, arguments or None) for name, arguments in filters)).configure()
        return graph, source


def _crop_and_scale(height: int, width: int) -> Callable[[VideoFrame], list[tuple[str, str]]]:
    def filters(frame: VideoFrame) -> list[tuple[str, str]]:
        top, left, crop_height, crop_width = center_crop_box(frame.height, frame.width, height=height, width=width)
        return [
            ("crop", f"{crop_width}:{crop_height}:{left}:{top}:exact=1"),
            ("scale", f"{width}:{height}:flags=bilinear"),
            ("format", frame.format.name),  # scaled as it is: RGB has twice the values, and looks no better
        ]

    return filters


def _turn(frame_HWC: Tensor, rotation: int) -> Tensor:
    return torch.rot90(frame_HWC, -rotation // 90, (0, 1)) if rotation else frame_HWC
