"""Frames by their number, with torchcodec: it seeks, and gives full-size RGB.

Frames come in chunks of at most 64 MB of full-size RGB (a 4K clip at once takes 2.3 GB, in chunks 0.8 GB). Each frame's
time is compared with the wanted one: for some edit lists and MPEG-TS files torchcodec returns other frames than those
asked for, without an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamprep.errors import BadSample, first_line, says_out_of_memory

if TYPE_CHECKING:
    from torchcodec.decoders import VideoDecoder

_CHUNK_BYTES = 64 * 2**20
_NO_VIDEO_STREAM = ("No valid stream", "best video stream is unknown")  # as torchcodec puts it


class WrongFramesError(Exception):
    """torchcodec does not give the frames asked for; that says little about the video."""


def open_decoder(video: bytes | memoryview, max_pixels: int) -> VideoDecoder:
    """A decoder that gives ``NHWC`` frames.

    Raises:
        BadSample: It cannot be opened, or has too large frames.
    """
    from torchcodec.decoders import VideoDecoder

    try:
        data = video if isinstance(video, bytes) else torch.frombuffer(video, dtype=torch.uint8)
        decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1)
    except (RuntimeError, ValueError, IndexError) as error:
        if says_out_of_memory(error):
            raise MemoryError(first_line(error)) from error
        no_stream = any(text in str(error) for text in _NO_VIDEO_STREAM)
        reason = "no_video_stream" if no_stream else "decode_error"
        raise BadSample(reason, first_line(error)) from error
    width, height = decoder.metadata.width or 0, decoder.metadata.height or 0
    if width * height > max_pixels:
        raise BadSample("too_large", f"frames of {width}x{height} pixels, more than the {max_pixels} of --max-pixels")
    return decoder


def frames_by_number(
    decoder: VideoDecoder, indices: Sequence[int], times: Sequence[float], *, tolerance_seconds: float
) -> Iterator[Tensor]:
    """The wanted frames as ``(t, H, W, C)`` uint8, a few at a time.

    Args:
        decoder: From `open_decoder`.
        indices: Numbers in presentation order, rising.
        times: When each must be shown, in seconds.
        tolerance_seconds: How far from that it may be.

    Raises:
        WrongFramesError: It has fewer frames, fails at one, or returns one of another time or size.
    """
    frame_bytes = 3 * max(1, (decoder.metadata.width or 1) * (decoder.metadata.height or 1))
    step = max(1, _CHUNK_BYTES // frame_bytes)
    size = None
    if indices[-1] >= len(decoder):
        raise WrongFramesError(f"frame {indices[-1]} is wanted but it finds {len(decoder)}")
    for start in range(0, len(indices), step):
        try:
            batch = decoder.get_frames_at(list(indices[start : start + step]))
        except (RuntimeError, ValueError, IndexError) as error:
            if says_out_of_memory(error):
                raise MemoryError(first_line(error)) from error
            raise WrongFramesError(first_line(error)) from error
        for time, found in zip(times[start : start + step], batch.pts_seconds.tolist(), strict=True):
            if abs(found - time) > tolerance_seconds:
                raise WrongFramesError(f"asked for the frame at {time:.4f} s it gives that of {found:.4f} s")
        size = size or batch.data.shape[1:]
        if batch.data.shape[1:] != size:
            raise WrongFramesError("it gives frames of different sizes")
        yield batch.data
