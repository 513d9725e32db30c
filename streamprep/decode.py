"""Encoded bytes -> the wanted frames, cropped and resized.

1. The bytes must be those that were packed (sha256) and begin like a video or an image; only then FFmpeg or Pillow sees
   them, and always as bytes: a path could be a playlist that opens other files.
2. ``torchcodec``: FastVideo's pixels bit for bit, at a fraction of the memory. Every frame's presentation time is
   compared with the wanted one. Where they differ, the video is decoded in order by PyAV instead, to the same pixels,
   and only if that does not find the frames either is the sample bad.
3. ``pyav``: decoded in order, scaled by swscale; less work, and not quite the same pixels.

Videos are shown as they are stored: interlaced ones are not deinterlaced, HDR is not mapped to SDR, alpha is left out.
"""

from __future__ import annotations

import hashlib
import io

import torch
from torch import Tensor

from streamprep import decode_pyav
from streamprep.crop import crop_and_resize
from streamprep.decode_torchcodec import WrongFramesError, frames_by_number, open_decoder
from streamprep.errors import BadSample
from streamprep.images import decode_image, sniff_image
from streamprep.probe import sniff_container
from streamprep.types import DecodeRequest

_CLOCK_SECONDS = 1e-4  # times that came by different sums are the same


def decode_clip(video: bytes | memoryview, request: DecodeRequest) -> Tensor:
    """Decode the requested frames of one encoded video.

    Args:
        video: The whole encoded file.
        request: What is wanted.

    Returns:
        ``(T, C, H, W)`` uint8 RGB.

    Raises:
        BadSample: Whatever is wrong with this video.
    """
    frames = torch.empty(request.shape, dtype=torch.uint8)
    decode_into(frames, video, request)
    return frames


def decode_into(out: Tensor, video: bytes | memoryview, request: DecodeRequest) -> str:
    """The same, to where the caller says.

    Args:
        out: ``(T, C, H, W)`` uint8 to write to.
        video: The whole encoded file.
        request: What is wanted.

    Returns:
        What decoded it: ``torchcodec``; ``sequential``, because torchcodec gave other frames than those asked for;
        ``pyav``, if that was asked for; ``pillow``, for an image.

    Raises:
        BadSample: Whatever is wrong with this video.
    """
    if hashlib.sha256(video).hexdigest() != request.sha256:
        raise BadSample("digest_mismatch", f"the video's sha256 is not {request.sha256}", stage="read")
    head = video[:4096]
    if (image_format := sniff_image(head)) is not None:
        image_HWC = decode_image(video, image_format, request)
        out[:] = _crop_and_resize_one(image_HWC, request)
        return "pillow"
    container = sniff_container(head)
    if container is None:
        raise BadSample("not_a_video", f"it begins with {bytes(head[:16])!r}")
    if request.loader == "pyav":
        for rows, frame_HWC in decode_pyav.scaled_frames(video, container, request):
            out[rows] = frame_HWC.permute(2, 0, 1)
        return "pyav"
    try:
        _decode_by_number(out, video, container, request)
        return "torchcodec"
    except WrongFramesError as error:
        _decode_in_order(out, video, container, request, why=str(error))
        return "sequential"


def _decode_by_number(out: Tensor, video: bytes | memoryview, container: str, request: DecodeRequest) -> None:
    decoder = open_decoder(video, request.max_pixels)
    indices, times, tolerance_seconds = request.indices, request.timestamps, request.tolerance_seconds
    if indices is None:
        # torchcodec finds them too, but how long its frames last is not to be relied on (in MP4 with B-frames it is
        # another frame's length, in Matroska it is missing), so its answer could not be checked.
        track = decode_pyav.read_track_or_refuse(io.BytesIO(video), container)
        indices = tuple(decode_pyav.frames_on_show(track, request.timestamps))
        times = tuple(float(track.times[index] * track.time_base) for index in indices)
        tolerance_seconds = _CLOCK_SECONDS
    done = 0
    for chunk_THWC in frames_by_number(decoder, indices, times, tolerance_seconds=tolerance_seconds):
        out[done : done + len(chunk_THWC)] = crop_and_resize(
            chunk_THWC.permute(0, 3, 1, 2), height=request.height, width=request.width
        )
        done += len(chunk_THWC)


def _decode_in_order(
    out: Tensor, video: bytes | memoryview, container: str, request: DecodeRequest, *, why: str
) -> None:
    try:
        for rows, frame_HWC in decode_pyav.full_size_frames(video, container, request):
            out[rows] = _crop_and_resize_one(frame_HWC, request)
    except BadSample as error:
        message = f"{error.message} (decoded in order; torchcodec: {why})"
        raise BadSample(error.reason, message, stage=error.stage) from error


def _crop_and_resize_one(frame_HWC: Tensor, request: DecodeRequest) -> Tensor:
    frame_TCHW = frame_HWC.permute(2, 0, 1)[None]
    return crop_and_resize(frame_TCHW, height=request.height, width=request.width)
