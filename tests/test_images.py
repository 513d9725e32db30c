from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from streamprep.cli import main
from streamprep.images import sniff_image
from streamprep.probe import ProbeError, probe_video, sniff_container
from streamprep.types import VideoInfo

FORMATS = ("JPEG", "PNG", "WEBP")


def picture(format: str, *, size: tuple[int, int] = (64, 48), orientation: int = 1, mode: str = "RGB") -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new(mode, size).save(buffer, format, exif=exif)
    return buffer.getvalue()


def probe(data: bytes) -> VideoInfo:
    return probe_video(io.BytesIO(data))


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_is_one_frame(format: str) -> None:
    assert sniff_image(picture(format)) == format.lower()
    assert sniff_container(picture(format)) is None  # FFmpeg never sees it
    assert probe(picture(format)) == VideoInfo(
        num_frames=1,
        fps=1.0,
        width=64,
        height=48,
        duration_seconds=1.0,
        start_seconds=0.0,
        rotation=0,
        codec=format.lower(),
        variable_frame_rate=False,
        media_type="image",
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("orientation", "rotation"), [(3, 180), (6, 90), (8, 270)])
def test_exif_turns_an_image_as_viewers_do(format: str, orientation: int, rotation: int) -> None:
    from PIL import ImageOps

    data = picture(format, orientation=orientation)
    info = probe(data)
    assert info.rotation == rotation
    assert (info.width, info.height) == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1"])
def test_any_mode_of_png_has_a_size(mode: str) -> None:
    assert probe(picture("PNG", mode=mode)).width == 64


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_is_no_image(format: str) -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (number * 50, 0, 0)) for number in range(3)]
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    with pytest.raises(ProbeError, match="an animation of 3 pictures: make it a video"):
        probe(buffer.getvalue())


def test_a_mirrored_image_is_refused() -> None:
    with pytest.raises(ProbeError, match="its EXIF orientation 5 mirrors it"):
        probe(picture("JPEG", orientation=5))


def test_a_picture_too_large_to_decode_is_refused_by_its_header() -> None:
    header = bytearray(picture("PNG"))
    header[16:24] = (20_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    with pytest.raises(ProbeError, match=r"20000x20000 are more than|its header cannot be read: Image size"):
        probe(bytes(header))


@pytest.mark.parametrize(
    "data", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 ", b"\xff\xd8\xff" + b"x" * 99]
)
def test_half_an_image_is_refused(data: bytes) -> None:
    with pytest.raises(ProbeError, match="header cannot be read"):
        probe(data)


@given(
    data=st.sampled_from([picture(format) for format in FORMATS]),
    position=st.integers(12, 400),
    value=st.binary(min_size=1, max_size=9),
)
def test_a_damaged_header_is_an_image_or_an_error_never_a_crash(data: bytes, position: int, value: bytes) -> None:
    try:
        info = probe(data[:position] + value + data[position + len(value) :])
    except ProbeError:
        return
    assert info.media_type == "image"


def test_images_and_videos_are_packed_side_by_side(make_video: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    make_video(root / "a.mp4")
    for name, format in (("a.jpg", "JPEG"), ("b.jpeg", "JPEG"), ("c.png", "PNG"), ("d.webp", "WEBP")):
        (root / name).write_bytes(picture(format))
        (root / name).with_suffix(".txt").write_text(f"caption of {name}")
    assert main(["pack", str(root), str(tmp_path / "shards")]) == 0
    index = json.loads((tmp_path / "shards" / "000000.json").read_text())
    assert [
        (
            sample["key"],
            sample["metadata"]["media_type"],
            sample["metadata"]["num_frames"],
            sample["metadata"]["captions"],
        )
        for sample in index["samples"]
    ] == [
        ("a", "video", 8, ["caption of a.jpg"]),
        ("b", "image", 1, ["caption of b.jpeg"]),
        ("c", "image", 1, ["caption of c.png"]),
        ("d", "image", 1, ["caption of d.webp"]),
    ]
    assert (tmp_path / "shards" / "skipped.jsonl").read_text() == '{"file_name":"a.jpg","reason":"thumbnail"}\n'
