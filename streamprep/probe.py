"""Container headers -> frames, fps, size, rotation, codec, without decoding the video.

1. The file must begin like a video container; nothing else ever reaches FFmpeg. Images go to `streamprep.images`.
2. MP4 and MOV are read by our own box walk (`streamprep.mp4`), from their index alone.
3. What that finds unusual, and all other containers, FFmpeg reads: its packets, which are frames not yet decoded. Only
   where the picture may have to be turned, the first frame is decoded too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from streamprep.images import ImageError, probe_image, sniff_image
from streamprep.mp4 import BrokenMp4Error, UnusualMp4Error, VideoTrack, read_mp4_track
from streamprep.types import VideoInfo

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

_HEAD_BYTES = 4096
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_IMAGE_BRANDS = (b"avif", b"heic", b"heix", b"heim", b"heis", b"mif1")
_ASF_GUID = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")

_DEMUXERS = {"mpegps": "mpeg"}
"""Containers that FFmpeg has another name for."""
_MAX_PIXELS = 2**27
"""Of a frame that FFmpeg may look into: 16 000 x 16 000 pixels, which fit in a file of 1 MB, take it 4 GB."""
_CODEC_OPTIONS = {"max_pixels": str(_MAX_PIXELS), "threads": "1"}


class ProbeError(ValueError):
    """The header cannot be read; the message says why in one line."""


class NoVideoStreamError(ProbeError):
    """A container without a video."""


def probe_video(file: BinaryIO) -> VideoInfo:
    """What the headers of a video file say; an image is a video of one frame that is shown for a second.

    Args:
        file: Seekable, such as ``open(path, "rb")`` or ``io.BytesIO(data)``; never read as a whole if it is MP4.

    Raises:
        ProbeError: It is no video, or its header cannot be read.
    """
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    if (image_format := sniff_image(head)) is not None:
        return _probe_image(file, image_format)
    container = sniff_container(head)
    if container is None:
        raise ProbeError(f"not a video: it begins with {head[:16]!r}")
    return _to_video_info(read_track(file, container))


def _probe_image(file: BinaryIO, image_format: str) -> VideoInfo:
    try:
        return probe_image(file, image_format)
    except ImageError as error:
        raise ProbeError(str(error)) from error


def read_track(file: BinaryIO, container: str) -> VideoTrack:
    """The video stream of a file, without decoding it.

    Args:
        file: Seekable.
        container: As `sniff_container` names it.

    Raises:
        ProbeError: It has none, or its header cannot be read.
    """
    try:
        if container == "mp4":
            with suppress(UnusualMp4Error):
                return read_mp4_track(file)
    except BrokenMp4Error as error:
        raise ProbeError(str(error)) from error
    return read_track_with_ffmpeg(file, container)


def sniff_container(head: bytes | memoryview) -> str | None:
    """Name the video container that a file begins like, or None for all else: playlists, SDP, text, images.

    Stricter than the magic numbers ask for. FFmpeg gives a file to the demuxer that scores best, and two that open
    other files or the network look for their mark anywhere in the first 2 KB: so a GIF of width 0 that goes on with an
    SDP's connection line would be played from the network. What we name here, FFmpeg's own demuxer is sure of.

    Args:
        head: The first bytes of the file, 4096 or all if it is shorter.

    Returns:
        ``mp4`` (mov too), ``matroska`` (webm too), ``avi``, ``mpegts``, ``mpegps``, ``ogg``, ``flv``, ``asf`` (wmv),
        ``gif`` or None.
    """
    head = bytes(head[:_HEAD_BYTES])
    if b"<mpd" in head.lower() or b"\nc=IN IP" in head.replace(b"\r", b"\n"):
        return None
    return next((name for name, begins_like in _CONTAINERS.items() if begins_like(head)), None)


def _is_mp4(head: bytes) -> bool:
    box = head[4:8]
    # A first byte of 9 or more could be text, or a box of 150 MB, as only the media data is.
    return box in _MP4_BOXES and (head[0] < 9 or box == b"mdat") and not _is_image(head)


def _is_image(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS


def _is_matroska(head: bytes) -> bool:
    return head.startswith(b"\x1a\x45\xdf\xa3") and any(name in head[:128] for name in (b"matroska", b"webm"))


def _is_avi(head: bytes) -> bool:
    return head.startswith(b"RIFF") and head[8:12] == b"AVI "


def _is_mpegts(head: bytes) -> bool:
    """A sync byte at the start of each packet; those of Blu-ray and AVCHD have 4 bytes of time before it."""
    return any(
        len(head) > 2 * size + offset and set(head[offset:2048:size]) == {0x47} for size, offset in ((188, 0), (192, 4))
    )


def _is_mpegps(head: bytes) -> bool:
    return head.startswith(b"\x00\x00\x01\xba")


def _is_ogg(head: bytes) -> bool:
    return head.startswith(b"OggS\x00") and len(head) > 5 and head[5] <= 7


def _is_flv(head: bytes) -> bool:
    return head.startswith(b"FLV") and len(head) > 8 and head[3] < 5 and head[5] == 0


def _is_asf(head: bytes) -> bool:
    return head.startswith(_ASF_GUID)


def _is_gif(head: bytes) -> bool:
    return head.startswith((b"GIF87a", b"GIF89a")) and len(head) > 9 and any(head[6:8]) and any(head[8:10])


_CONTAINERS = {
    "mp4": _is_mp4,
    "matroska": _is_matroska,
    "avi": _is_avi,
    "mpegts": _is_mpegts,
    "mpegps": _is_mpegps,
    "ogg": _is_ogg,
    "flv": _is_flv,
    "asf": _is_asf,
    "gif": _is_gif,
}


def _to_video_info(track: VideoTrack) -> VideoInfo:
    duration = (track.end - track.times[0]) * track.time_base
    rate = track.frame_rate or (len(track.times) / duration if duration > 0 else None)
    if rate is None:
        raise ProbeError(f"its {len(track.times)} frames take no time")
    turned = track.rotation in (90, 270)
    return VideoInfo(
        num_frames=len(track.times),
        fps=float(rate),
        width=track.height if turned else track.width,
        height=track.width if turned else track.height,
        duration_seconds=float(duration),
        start_seconds=float(track.times[0] * track.time_base),
        rotation=track.rotation,
        codec=track.codec,
        variable_frame_rate=not _keeps_rate(track.times, 1 / (rate * track.time_base)),
    )


def _keeps_rate(times: Sequence[int], ticks_per_frame: Fraction) -> bool:
    """Whether each frame is within half a frame of where a steady rate has it."""
    numerator, denominator = ticks_per_frame.as_integer_ratio()
    first = times[0]
    if denominator == 1 and times == list(range(first, first + numerator * len(times), numerator)):
        return True  # nearly all videos: 10 times faster
    return all(
        2 * abs((time - first) * denominator - index * numerator) <= numerator for index, time in enumerate(times)
    )


def read_track_with_ffmpeg(file: BinaryIO, container: str) -> VideoTrack:
    """The best video stream by FFmpeg's packets; reads the whole file.

    Args:
        file: Seekable.
        container: As `sniff_container` names it. FFmpeg does not get to choose: some of its demuxers open other files.
    """
    import av

    try:
        with open_container(file, container) as opened:
            return _read_best_stream(opened, may_be_turned=container in ("mp4", "matroska"))
    except av.FFmpegError as error:
        raise ProbeError(f"FFmpeg cannot read this {container} file: {error.strerror}") from error
    except IndexError as error:  # PyAV's, for a packet of a stream that was not there when the file was opened
        raise ProbeError(f"a stream of this {container} file begins too late for PyAV") from error


def open_container(file: BinaryIO, container: str) -> InputContainer:
    """Open a file with the demuxer of its container and no other.

    Args:
        file: Seekable.
        container: As `sniff_container` names it.

    Raises:
        ProbeError: It asks for another file.
        av.FFmpegError: FFmpeg cannot open it.
    """
    import av

    file.seek(0)
    opened: InputContainer = av.open(
        file,
        "r",
        format=_DEMUXERS.get(container, container),
        options=_CODEC_OPTIONS,
        metadata_errors="replace",
        io_open=_refuse_to_open,
    )
    return opened


def _refuse_to_open(url: str, *_: object) -> NoReturn:
    raise ProbeError(f"it asks for another file: {url!r}")


def _read_best_stream(opened: InputContainer, *, may_be_turned: bool) -> VideoTrack:
    stream = best_stream(opened)
    width, height = stream.width, stream.height  # now: a broken first frame would change them
    rotation = None if may_be_turned else 0
    shown: list[tuple[int, int]] = []
    for packet in opened.demux(stream):
        if rotation is None:
            rotation = _read_rotation(packet)
        if _is_shown(packet, stream):
            shown.append((_time(packet), packet.duration or 0))
    if not shown or stream.time_base is None:
        raise ProbeError("no frames")
    shown.sort()
    times, rate = [time for time, _ in shown], stream.average_rate
    return VideoTrack(
        codec=stream.codec_context.codec.canonical_name,
        width=width,
        height=height,
        rotation=rotation or 0,
        times=times,
        end=times[-1] + (shown[-1][1] or (round(1 / (rate * stream.time_base)) if rate else 0)),
        time_base=stream.time_base,
        # For a variable rate it is a guess from the first few frames.
        frame_rate=rate if rate and _keeps_rate(times, 1 / (rate * stream.time_base)) else None,
    )


def best_stream(opened: InputContainer) -> VideoStream:
    """The stream that FFmpeg would show, with one thread to decode it.

    Raises:
        ProbeError: There is none, or it cannot be decoded.
    """
    from av.stream import Disposition
    from av.video.stream import VideoStream

    stream = opened.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise NoVideoStreamError("no video stream")
    if stream.codec_context is None or stream.width == 0 or stream.height == 0:
        raise ProbeError(f"its frames have more than {_MAX_PIXELS} pixels, or no size, or FFmpeg lacks the codec")
    stream.codec_context.options = _CODEC_OPTIONS
    return stream


def _read_rotation(packet: Packet[VideoStream]) -> int | None:
    """Clockwise degrees, or None before the first frame: PyAV has the display matrix only of decoded frames."""
    import av

    try:
        frames = packet.decode()
    except av.FFmpegError:
        return 0  # decoding will tell; packing does not judge
    return round(-frames[0].rotation / 90) * 90 % 360 if frames else None


def _is_shown(packet: Packet[VideoStream], stream: VideoStream) -> bool:
    if packet.size == 0 or packet.is_discard:  # the end of the stream; outside the edit list
        return False
    # A bit of the first byte says whether a VP8 frame is shown, or only there to predict others from.
    return stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] & 0x10)


def _time(packet: Packet[VideoStream]) -> int:
    time = packet.pts if packet.pts is not None else packet.dts
    if time is None:
        raise ProbeError("a frame without a time")
    return time
