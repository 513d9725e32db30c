"""Images as videos of one frame: read safely, shown upright, in RGB."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from numbered_videos import numbered_picture, read_numbers
from PIL import Image

from streamprep.crop import crop_and_resize
from streamprep.decode import decode_clip, decode_into
from streamprep.errors import BadSample
from streamprep.images import IMAGE_FORMATS, sniff_image
from streamprep.probe import ProbeError, probe_video
from streamprep.types import DecodeRequest, VideoInfo

WIDTH, HEIGHT = 96, 64
LOSSLESS: dict[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True, "exact": True}}


def numbered_image(number: int = 77) -> Image.Image:
    return Image.fromarray(numbered_picture(number, WIDTH, HEIGHT))


def save(image: Image.Image, codec: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=IMAGE_FORMATS[codec], **options)
    return buffer.getvalue()


def make_request(data: bytes, *, num_frames: int = 1, **fields: Any) -> DecodeRequest:
    defaults: dict[str, Any] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "timestamps": (0.0,) * num_frames,
        "indices": (0,) * num_frames,
        "tolerance_seconds": 0.5,
        "height": HEIGHT,
        "width": WIDTH,
        "max_pixels": 10**6,
    }
    return DecodeRequest(**defaults | fields)


def decoded(data: bytes, **fields: Any) -> np.ndarray:
    """``(H, W, C)``, of the size asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames_TCHW = decode_clip(data, make_request(data, **fields))
    return np.asarray(frames_TCHW[0].permute(1, 2, 0))


@pytest.mark.parametrize("codec", IMAGE_FORMATS)
def test_an_image_is_a_video_of_one_frame(codec: str) -> None:
    data = save(numbered_image(), codec)
    assert sniff_image(data) == codec
    assert probe_video(io.BytesIO(data)) == VideoInfo(
        num_frames=1,
        fps=1.0,
        width=WIDTH,
        height=HEIGHT,
        duration_seconds=1.0,
        start_seconds=0.0,
        rotation=0,
        codec=codec,
        variable_frame_rate=False,
        media_type="image",
    )
    request = make_request(data)
    out = torch.empty(request.shape, dtype=torch.uint8)
    assert decode_into(out, memoryview(data), request) == "pillow"
    assert read_numbers(out) == [77]


@pytest.mark.parametrize("loader", ["torchcodec", "pyav"])
@pytest.mark.parametrize("codec", LOSSLESS)
def test_pixels_are_cropped_and_resized_as_a_videos(codec: str, loader: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8)
    data = save(Image.fromarray(picture), codec, **LOSSLESS[codec])
    expected = crop_and_resize(torch.from_numpy(picture).permute(2, 0, 1)[None], height=32, width=48)
    assert torch.equal(decode_clip(data, make_request(data, height=32, width=48, loader=loader)), expected)


@pytest.mark.parametrize("codec", IMAGE_FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_and_mirrors_it(codec: str, orientation: int) -> None:
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = numbered_image(99)
    if orientation in back:
        image = image.transpose(back[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(image, codec, exif=exif)
    info = probe_video(io.BytesIO(data))
    assert (info.width, info.height) == (WIDTH, HEIGHT)
    assert info.rotation == {3: 180, 4: 180, 5: 270, 6: 90, 7: 90, 8: 270}.get(orientation, 0)
    assert read_numbers(torch.from_numpy(decoded(data)).permute(2, 0, 1)[None]) == [99]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0MM\0*\0\0\0\xff", b"\xff" * 40])
def test_a_picture_with_broken_exif_is_shown_as_it_is(exif: bytes) -> None:
    for codec in IMAGE_FORMATS:
        data = save(numbered_image(5), codec, exif=exif)
        assert probe_video(io.BytesIO(data)).rotation == 0
        assert read_numbers(decode_clip(data, make_request(data))) == [5]


# To RGB


def test_grey_is_repeated() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
    assert (decoded(save(Image.fromarray(grey), "png")) == grey[..., None]).all()
    black_and_white = Image.fromarray(grey > 127)
    assert black_and_white.mode == "1"
    assert (decoded(save(black_and_white, "png")) == 255 * (grey > 127)[..., None]).all()


def test_of_16_bits_the_upper_8_are_kept() -> None:
    """Pillow's own conversion cuts off at 255: a white picture."""
    random = np.random.default_rng(0)
    grey = random.integers(0, 2**16, (HEIGHT, WIDTH), np.uint16)
    assert (decoded(save(Image.fromarray(grey), "png")) == (grey >> 8)[..., None]).all()
    rgb = random.integers(0, 2**16, (HEIGHT, WIDTH, 3), np.uint16)
    assert (decoded(png_of_16_bits(rgb)) == rgb >> 8).all()


def png_of_16_bits(rgb: np.ndarray) -> bytes:
    """Pillow cannot write one."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    header = struct.pack(">IIBBBBB", rgb.shape[1], rgb.shape[0], 16, 2, 0, 0, 0)
    return make_png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def make_png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in chunks:
        parts += [struct.pack(">I", len(content)), kind, content, struct.pack(">I", zlib.crc32(kind + content))]
    return b"".join(parts)


@pytest.mark.parametrize("codec", LOSSLESS)
def test_alpha_is_left_out(codec: str) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
    rgba[:8, :, 3] = 0
    assert (decoded(save(Image.fromarray(rgba), codec, **LOSSLESS[codec])) == rgba[..., :3]).all()


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(200))])
def test_a_palette_is_looked_up(transparency: object) -> None:
    random = np.random.default_rng(0)
    palette, indices = random.integers(0, 256, (256, 3), np.uint8), random.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    assert (decoded(save(image, "png", **options)) == palette[indices]).all()


def test_cmyk_becomes_rgb_by_multiplication() -> None:
    cmyk = np.empty((HEIGHT, WIDTH, 4), np.uint8)
    cmyk[:] = (0, 255, 128, 51)
    rgb = decoded(save(Image.fromarray(cmyk, mode="CMYK"), "mjpeg", quality=100))
    assert abs(rgb.astype(int) - (204, 0, 102)).max() <= 3


# Refused


def bad(data: bytes, **fields: Any) -> BadSample:
    with pytest.raises(BadSample) as caught:
        decoded(data, **fields)
    return caught.value


@pytest.mark.parametrize("codec", IMAGE_FORMATS)
def test_more_frames_than_one_are_refused(codec: str) -> None:
    """Never a still video by mistake."""
    error = bad(save(numbered_image(), codec), num_frames=5)
    assert str(error) == "truncated: an image is one frame, 5 are wanted"


@pytest.mark.parametrize("codec", ["png", "webp"])
def test_animations_are_refused(codec: str) -> None:
    data = save(numbered_image(0), codec, save_all=True, append_images=[numbered_image(n) for n in (1, 2)])
    with pytest.raises(ProbeError, match=r"^an animation of 3 frames"):
        probe_video(io.BytesIO(data))
    assert bad(data).reason == "decode_error"


def test_a_phones_jpeg_with_a_second_view_is_its_first() -> None:
    buffer = io.BytesIO()
    numbered_image(1).save(buffer, format="MPO", save_all=True, append_images=[numbered_image(2)])
    data = buffer.getvalue()
    assert sniff_image(data) == "mjpeg"
    assert probe_video(io.BytesIO(data)).num_frames == 1
    assert read_numbers(torch.from_numpy(decoded(data)).permute(2, 0, 1)[None]) == [1]


@pytest.mark.parametrize("codec", IMAGE_FORMATS)
def test_too_many_pixels_are_refused_before_any_is_decoded(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = save(numbered_image(), codec)
    decoded(data, max_pixels=WIDTH * HEIGHT)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    error = bad(data, max_pixels=WIDTH * HEIGHT - 1)
    assert str(error) == "too_large: an image of 96x64 pixels, more than the 6143 of --max-pixels"


def test_a_pixel_bomb_costs_no_memory() -> None:
    """900 million pixels in 1 MB."""
    deflate = zlib.compressobj()
    rows = b"".join(deflate.compress(bytes(30_001)) for _ in range(100))  # and no more of them
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    data = make_png((b"IHDR", header), (b"IDAT", rows + deflate.flush()), (b"IEND", b""))
    assert probe_video(io.BytesIO(data)).width == 30_000
    assert bad(data).reason == "too_large"
    tracemalloc.start()
    assert bad(data, max_pixels=900_000_000 - 1).reason == "too_large"
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("codec", IMAGE_FORMATS)
def test_a_truncated_image_is_refused(codec: str) -> None:
    data = save(Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)), codec)
    assert bad(data[: len(data) // 2]).reason in ("truncated", "decode_error")


def test_a_file_of_another_format_is_not_read_whatever_it_begins_like() -> None:
    buffer = io.BytesIO()
    numbered_image().save(buffer, format="TIFF")
    assert sniff_image(buffer.getvalue()) is None
    with pytest.raises(ProbeError, match="not a video"):
        probe_video(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("codec", IMAGE_FORMATS)
def test_mutated_images_give_an_answer_or_a_bad_sample(codec: str) -> None:
    data = save(numbered_image(), codec)
    for seed in range(200):
        rng = random.Random(seed)
        changed = bytearray(data)
        for _ in range(rng.choice([1, 2, 5, 20])):
            position = rng.randrange(12, len(changed) - 8)
            changed[position : position + rng.choice([1, 4])] = rng.randbytes(rng.choice([0, 1, 4]))
        mutant = bytes(changed)
        try:
            assert isinstance(probe_video(io.BytesIO(mutant)), VideoInfo)
        except ProbeError as error:
            assert "\n" not in str(error)
        try:
            decode_clip(mutant, make_request(mutant))
        except BadSample as error:
            assert error.reason in ("decode_error", "truncated", "too_large", "not_a_video")


def test_importing_is_cheap() -> None:
    code = "import sys, streamprep.images; print(sorted({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
