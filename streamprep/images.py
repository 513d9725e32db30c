"""Pictures: a JPEG, PNG or WebP file is a clip of one frame."""

from __future__ import annotations

import warnings
from typing import BinaryIO, Literal

from streamprep.types import VideoInfo

MAX_PIXELS = 2**27
"""As for video frames (`streamprep.probe`)."""
_SIGNATURES: dict[Literal["jpeg", "png", "webp"], bytes] = {
    "jpeg": b"\xff\xd8\xff",
    "png": b"\x89PNG\r\n\x1a\n",
    "webp": b"RIFF",
}
_ROTATIONS = {3: 180, 6: 90, 8: 270}
"""EXIF orientation -> clockwise degrees."""
_MIRRORED = (2, 4, 5, 7)


class ImageError(ValueError):
    """The header cannot be read; the message says why in one line."""


def sniff_image(head: bytes | memoryview) -> Literal["jpeg", "png", "webp"] | None:
    """The image format that a file begins like, or None for all else.

    Args:
        head: The first bytes of the file, 16 or more.
    """
    head = bytes(head[:16])
    for name, signature in _SIGNATURES.items():
        if head.startswith(signature) and (name != "webp" or head[8:12] == b"WEBP"):
            return name
    return None


def probe_image(file: BinaryIO) -> VideoInfo:
    """What the headers of an image say; the pixels are not decoded.

    Args:
        file: Seekable, and begins like an image.

    Raises:
        ImageError: Its header cannot be read, or it is an animation or mirrored.
    """
    from PIL import Image, UnidentifiedImageError

    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, where we have a limit of our own, and of damaged EXIF
            image = Image.open(file, formats=("JPEG", "PNG", "WEBP"))
            orientation, num_pictures = image.getexif().get(0x0112, 1), getattr(image, "n_frames", 1)
    except UnidentifiedImageError as error:
        raise ImageError("it begins like an image, but its header cannot be read") from error
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, Image.DecompressionBombError) as error:
        raise ImageError(f"its header cannot be read: {error}") from error
    if num_pictures != 1:
        raise ImageError(f"an animation of {num_pictures} pictures: make it a video")
    if orientation in _MIRRORED:
        raise ImageError(f"its EXIF orientation {orientation} mirrors it")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} are more than {MAX_PIXELS} pixels")
    rotation = _ROTATIONS.get(orientation, 0)
    turned = rotation in (90, 270)
    return VideoInfo(
        num_frames=1,
        fps=1.0,
        width=height if turned else width,
        height=width if turned else height,
        duration_seconds=1.0,
        start_seconds=0.0,
        rotation=rotation,
        codec=str(image.format).lower(),
        variable_frame_rate=False,
        media_type="image",
    )
