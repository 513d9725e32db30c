"""Images as videos of one frame: JPEG, PNG, WebP.

1. The bytes must begin like one of the three; Pillow is given no other format to try.
2. The size is in the header, and checked before a pixel is decoded.
3. The picture is turned and mirrored as EXIF says.
4. It becomes RGB of 8 bits: grey is repeated, a palette looked up, of 16 bits the upper 8 are kept, alpha is left out
   (as `diffusers.utils.load_image` and FFmpeg do), CMYK is inverted and multiplied. Colour profiles are not applied.

Animations are refused: of a video no frame is lost without a word.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from streamprep.errors import BadSample, first_line
from streamprep.types import DecodeRequest, VideoInfo

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile
    from torch import Tensor

IMAGE_FORMATS = {"png": "PNG", "mjpeg": "JPEG", "webp": "WEBP"}
"""FFmpeg's name of the codec -> Pillow's of the format."""

_ORIENTATION = 0x0112
_DEGREES = {3: 180, 4: 180, 5: 270, 6: 90, 7: 90, 8: 270}
"""EXIF orientation -> clockwise degrees; 2, 4, 5 and 7 are mirrored besides."""
_SWAPS_SIDES = (5, 6, 7, 8)


class ImageError(ValueError):
    """The image cannot be used; the message says why in one line."""


def sniff_image(head: bytes | memoryview) -> str | None:
    """Name the image format that a file begins like: ``png``, ``mjpeg`` (JPEG), ``webp`` or None.

    Args:
        head: The first bytes of the file, 16 or more.
    """
    head = bytes(head[:16])
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:] == b"IHDR":
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "mjpeg"
    if head.startswith(b"RIFF") and head[8:15] == b"WEBPVP8":
        return "webp"
    return None


def probe_image(file: BinaryIO, image_format: str) -> VideoInfo:
    """What an image's header says, as of a video of one frame.

    Args:
        file: Seekable.
        image_format: As `sniff_image` names it.

    Raises:
        ImageError: Its header cannot be read.
    """
    with _open_image(file, image_format) as image:
        orientation = _orientation(image)
        width, height = image.size[::-1] if orientation in _SWAPS_SIDES else image.size
    return VideoInfo(
        num_frames=1,
        fps=1.0,
        width=width,
        height=height,
        duration_seconds=1.0,
        start_seconds=0.0,
        rotation=_DEGREES.get(orientation, 0),
        codec=image_format,
        variable_frame_rate=False,
        media_type="image",
    )


def decode_image(data: bytes | memoryview, image_format: str, request: DecodeRequest) -> Tensor:
    """Decode an image.

    Returns:
        ``(H, W, C)`` uint8 RGB, upright.

    Raises:
        BadSample: It is broken or too large, or more than its one frame is wanted.
    """
    if request.indices != (0,):
        raise BadSample("truncated", f"an image is one frame, {len(request.timestamps)} are wanted")
    try:
        with _open_image(io.BytesIO(data), image_format) as image:
            width, height = image.size
            if width * height > request.max_pixels:
                raise BadSample(
                    "too_large",
                    f"an image of {width}x{height} pixels, more than the {request.max_pixels} of --max-pixels",
                )
            return _to_rgb(_upright(image))
    except ImageError as error:
        reason = "truncated" if "truncated" in str(error) else "decode_error"
        raise BadSample(reason, str(error)) from error


@contextmanager
def _open_image(file: BinaryIO, image_format: str) -> Iterator[Image]:
    """Open an image; whatever Pillow makes of broken bytes, then and in the block, is an `ImageError`."""
    file.seek(0)
    try:
        with _reader(image_format)(file) as image:
            num_frames = getattr(image, "n_frames", 1)
            if num_frames > 1:
                raise ImageError(f"an animation of {num_frames} frames; make it a video or one image")
            yield image
    except (BadSample, ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise nearly anything: struct.error, KeyError, SyntaxError, ...
        raise ImageError(f"Pillow cannot read this {IMAGE_FORMATS[image_format]} file: {first_line(error)}") from error


def _reader(image_format: str) -> type[ImageFile]:
    """Not ``Image.open``, which has a limit of pixels of its own, for all of the process."""
    match image_format:
        case "png":
            from PIL.PngImagePlugin import PngImageFile

            return PngImageFile
        case "mjpeg":
            from PIL.JpegImagePlugin import JpegImageFile

            return JpegImageFile
        case _:
            from PIL.WebPImagePlugin import WebPImageFile

            return WebPImageFile


def _orientation(image: Image) -> int:
    """As the EXIF before the pixels says; 1, upright, where there is none or it is broken."""
    from PIL.Image import Exif

    exif = Exif()
    try:
        exif.load(image.info.get("exif", b""))
        return int(exif.get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - see above; players show pictures with broken EXIF as they are
        return 1


def _upright(image: Image) -> Image:
    from PIL.Image import Transpose

    method = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image) -> Tensor:
    import numpy as np
    import torch

    if image.mode.startswith("I"):  # grey of 16 bits, which `convert` would cut off at 255
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return torch.from_numpy(np.stack([grey] * 3, axis=-1))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return torch.from_numpy(np.array(image.convert("RGB")))
