"""Videos whose frames show their numbers, in any codec and container, and how to read the numbers back.

A picture is a table of large black and white blocks in the middle, so that nothing a codec, a crop or a resize to 40
pixels does to it makes it unreadable, and turned or mirrored it reads as no number at all:

    1 1 1 0      how a picture begins that is upright
    b0 b1 b2 b3  the number, its lowest bit first
    b4 b5 b6 b7
    0 0 0 1      how it ends
"""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

FPS = 24
MARGIN = 0.2
"""Of the height and width, on each side of the table; may be cropped away."""
_COLUMNS = _ROWS = 4
_BLACK, _GREY, _WHITE = 16, 90, 235


def steady(num_frames: int, *, fps: int = FPS) -> tuple[Fraction, ...]:
    """Times of frames of equal length."""
    return tuple(Fraction(number, fps) for number in range(num_frames))


def numbered_picture(number: int, width: int, height: int) -> np.ndarray:
    """``(H, W, 3)`` uint8 that shows a number below 256; a coloured bar moves through its margin."""
    picture_HWC = np.full((height, width, 3), _GREY, np.uint8)
    picture_HWC[: max(1, height // 10), number * 5 % width :][:, : max(1, width // 8)] = (200, 30, 30)
    bits = [number >> bit & 1 for bit in range(8)]
    table = np.array([1, 1, 1, 0, *bits, 0, 0, 0, 1]).reshape(_ROWS, _COLUMNS)
    for row, column in np.ndindex(_ROWS, _COLUMNS):
        top, bottom = (round(height * _edge(row + part, _ROWS)) for part in (0, 1))
        left, right = (round(width * _edge(column + part, _COLUMNS)) for part in (0, 1))
        picture_HWC[top:bottom, left:right] = _WHITE if table[row, column] else _BLACK
    return picture_HWC


def read_numbers(frames_TCHW: Tensor, *, margin: tuple[float, float] = (MARGIN, MARGIN)) -> list[int | None]:
    """The numbers that pictures show; None where that is not certain.

    Args:
        frames_TCHW: ``(T, 3, H, W)`` uint8.
        margin: What is left of `MARGIN` above and below, and left and right, after cropping.
    """
    return [_read_number(frame_CHW.float().mean(0), margin) for frame_CHW in frames_TCHW]


def _edge(position: float, count: int, margin: float = MARGIN) -> float:
    return margin + (1 - 2 * margin) * position / count


def _read_number(grey_HW: Tensor, margin: tuple[float, float]) -> int | None:
    height, width = grey_HW.shape
    bits = []
    for row, column in np.ndindex(_ROWS, _COLUMNS):
        top, bottom = (height * _edge(row + part, _ROWS, margin[0]) for part in (0.25, 0.75))
        left, right = (width * _edge(column + part, _COLUMNS, margin[1]) for part in (0.25, 0.75))
        mean = grey_HW[int(top) : max(int(top) + 1, int(bottom)), int(left) : max(int(left) + 1, int(right))].mean()
        if 100 < mean < 150:
            return None
        bits.append(int(mean > 125))
    if bits[:4] != [1, 1, 1, 0] or bits[12:] != [0, 0, 0, 1]:
        return None
    return sum(bit << place for place, bit in enumerate(bits[4:12]))


@contextmanager
def usual_scheduling() -> Iterator[None]:
    """Leave the thread's scheduling as it was.

    SVT-AV1, where root runs it, gives the thread that encodes real-time priority, and every process that is started
    later inherits it: two decoding children then take both cores, and the process that waits for them none.
    """
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)


@usual_scheduling()
def make_video(
    times: Sequence[Fraction] = steady(60),
    *,
    size: tuple[int, int] = (128, 64),
    container: str = "mp4",
    codec: str = "libx264",
    codec_options: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    turned: int = 0,
    upright: bool = False,
    audio: bool = False,
    noise: bool = False,
    first: int = 0,
) -> bytes:
    """Encode a numbered video by PyAV.

    Args:
        times: When each frame is shown, in seconds.
        size: Width and height in pixels, as shown if `upright`, else as stored.
        container: FFmpeg's name of the muxer.
        codec: FFmpeg's name of the encoder.
        codec_options: For the encoder.
        options: For the muxer.
        pix_fmt: Of the encoded pictures.
        turned: Degrees that a player is to turn the picture by, counter-clockwise.
        upright: Store the pictures turned the other way, so that the player shows them upright.
        audio: Add a silent track.
        noise: Noise instead of numbers.
        first: Number of the first frame.
    """
    buffer = io.BytesIO()
    random = np.random.default_rng(0)
    with av.open(buffer, "w", format=container, options=dict(options or {})) as file:
        sound = file.add_stream("aac", rate=16000, layout="mono") if audio else None
        stream = file.add_stream(codec, rate=FPS, options=dict(codec_options or {}))
        stream.width, stream.height = size[::-1] if upright and turned in (90, 270) else size
        stream.pix_fmt = pix_fmt
        stream.bit_rate, stream.codec_context.thread_count = 2_000_000, 1
        # Codecs and containers that know steady rates only.
        time_base = Fraction(1, {"mpeg4": FPS, "mpeg2video": FPS, "wmv2": FPS, "gif": 100}.get(codec, 2400))
        stream.codec_context.time_base = time_base
        if turned:
            stream.set_display_rotation(turned)
        for number, time in enumerate(times, start=first):
            picture = random.integers(0, 256, (*size[::-1], 3), np.uint8) if noise else numbered_picture(number, *size)
            if upright:
                picture = np.ascontiguousarray(np.rot90(picture, -turned // 90))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = round(time / time_base), time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound:
            for number in range(40):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                samples.sample_rate, samples.pts, samples.time_base = 16000, 1024 * number, Fraction(1, 16000)
                file.mux(sound.encode(samples))
            file.mux(sound.encode(None))
    return buffer.getvalue()


def make_video_with_ffmpeg(
    path: Path, *arguments: str, num_frames: int = 60, size: tuple[int, int] = (128, 64)
) -> bytes:
    """Encode a numbered video by the ``ffmpeg`` command; the arguments say how, and come before the path."""
    raw = b"".join(numbered_picture(number, *size).tobytes() for number in range(num_frames))
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", str(FPS), "-i", "-"]
    command = ["ffmpeg", "-v", "error", "-y", *source, *arguments, str(path)]
    subprocess.run(command, input=raw, check=True, timeout=120, capture_output=True)
    return path.read_bytes()


def decode_in_order(video: bytes) -> tuple[list[float], list[int | None]]:
    """Every shown frame in the order of time, as PyAV decodes it: (seconds, number)."""
    with av.open(io.BytesIO(video)) as file:
        frames = [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in file.decode(video=0)]
    frames.sort(key=lambda frame: frame[0])
    pictures_TCHW = torch.from_numpy(np.stack([picture for _, picture in frames])).permute(0, 3, 1, 2)
    return [seconds for seconds, _ in frames], read_numbers(pictures_TCHW)
