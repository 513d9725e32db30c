"""Bytes -> pixels: FastVideo's pixels bit for bit, and the right frames or none."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
import subprocess
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered_videos import decode_in_order, make_video, read_numbers, steady
from torch import Tensor
from torchcodec.decoders import VideoDecoder

from streamprep import decode, decode_pyav, decode_torchcodec
from streamprep.crop import center_crop_box, crop_and_resize
from streamprep.decode import decode_clip, decode_into
from streamprep.decode_pool import DecodePool
from streamprep.decode_pyav import full_size_frames
from streamprep.decoder import DecodeTask, InlineDecoder
from streamprep.errors import BadSample
from streamprep.plan import SamplingRules, plan_clips
from streamprep.probe import probe_video, sniff_container
from streamprep.shards import Member, ShardSample
from streamprep.types import DecodeRequest

av.logging.set_level(av.logging.PANIC)

WIDTH, HEIGHT = 128, 64
NUM_FRAMES = 60
STEADY = steady(NUM_FRAMES)
UNSTEADY = tuple(
    Fraction(int(hundredths), 100) for hundredths in np.cumsum(np.random.default_rng(0).integers(2, 15, NUM_FRAMES))
)
B_FRAMES = {"bf": "3", "b_strategy": "0"}
SHORT_GOPS = B_FRAMES | {"g": "12"}


# Videos


def remux(video: bytes, shift_seconds: float = 0.0, *, equal_times: bool = False) -> bytes:
    """The same packets at other times; what then lies before 0 gets hidden by an edit list."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(buffer, "w", format="mp4") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        source.seek(int(shift_seconds * 1e6))  # to the key frame before
        for number, packet in enumerate(packet for packet in source.demux(stream) if packet.dts is not None):
            ticks = int(shift_seconds / stream.time_base)
            packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
            if equal_times and number % 2 == 0:
                packet.pts += packet.duration
            packet.stream = copy
            target.mux(packet)
    return buffer.getvalue()


both_loaders = pytest.mark.parametrize("loader", ["torchcodec", "pyav"])


@cache
def numbered() -> bytes:
    return make_video(codec_options=B_FRAMES)


def make_request(video: bytes, **changes: Any) -> DecodeRequest:
    """What pack and plan make of a video: 17 frames at 16 fps of the video's own size, but for ``changes``."""
    defaults: dict[str, Any] = {
        "max_height": HEIGHT,
        "max_width": WIDTH,
        "num_frames": 17,
        "train_fps": 16.0,
        "video_length_tolerance_range": None,
        "speed_factor": 1.0,
        "max_pixels": 10**8,
        "video_loader_type": "torchcodec",
    }
    metadata: dict[str, Any] = {
        "file_name": "a.mp4",
        "captions": ["A number."],
        "extension": "mp4",
        "sha256": hashlib.sha256(video).hexdigest(),
        "declared": {},
        "extra": {},
    }
    metadata |= dataclasses.asdict(probe_video(io.BytesIO(video)))
    member = Member(offset=0, size=len(video), sha256=metadata["sha256"])
    sample = ShardSample(key="a", members={"mp4": member}, metadata=metadata)
    return plan_clips(sample, SamplingRules(**defaults | changes))[0].request


def wanted_numbers(video: bytes, request: DecodeRequest) -> list[int | None]:
    """By decoding everything in order with PyAV."""
    times, numbers = decode_in_order(video)
    if request.indices is not None:
        return [numbers[index] for index in request.indices]
    return [numbers[np.searchsorted(times, moment + 1e-6, side="right") - 1] for moment in request.timestamps]


def container_of(video: bytes) -> str:
    container = sniff_container(video)
    assert container is not None
    return container


def bad_reason(video: bytes, request: DecodeRequest) -> str:
    with pytest.raises(BadSample) as caught:
        decode_clip(video, request)
    return caught.value.reason


# Pixels


def fastvideo_crop_and_resize(frames_TCHW: Tensor, height: int, width: int) -> Tensor:
    """``CenterCropResizeVideo``, on what its decoders give: contiguous NCHW."""
    h, w = frames_TCHW.shape[-2:]
    tr = height / width
    new_h, new_w = (int(w * tr), w) if h / w > tr else (h, int(h / tr))
    i, j = int(round((h - new_h) / 2.0)), int(round((w - new_w) / 2.0))  # noqa: RUF046
    cropped = frames_TCHW[:, :, i : i + new_h, j : j + new_w]
    return torch.nn.functional.interpolate(
        cropped, size=(height, width), mode="bilinear", align_corners=True, antialias=True
    )


@given(
    source=st.tuples(st.integers(2, 150), st.integers(2, 150)),
    target=st.tuples(st.integers(2, 100), st.integers(2, 100)),
    seed=st.integers(0, 9),
)
def test_cropping_and_resizing_a_channels_last_view_is_fastvideos_bit_for_bit(
    source: tuple[int, int], target: tuple[int, int], seed: int
) -> None:
    top, left, crop_height, crop_width = center_crop_box(*source, height=target[0], width=target[1])
    assert 0 <= top <= source[0] - crop_height
    assert 0 <= left <= source[1] - crop_width
    frames_THWC = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (2, *source, 3), np.uint8))
    view_TCHW = frames_THWC.permute(0, 3, 1, 2)
    got = crop_and_resize(view_TCHW, height=target[0], width=target[1])
    assert got.shape == (2, 3, *target)
    assert got.dtype == torch.uint8
    if int(source[0] * target[1] / target[0]) and int(source[1] * target[0] / target[1]):
        assert torch.equal(got, fastvideo_crop_and_resize(view_TCHW.contiguous(), *target))


def test_a_video_far_thinner_than_wanted_is_cropped_to_one_pixel_not_to_none() -> None:
    """The crop was 0 pixels high, which stopped the whole job by an error of `interpolate`."""
    frames = crop_and_resize(torch.full((1, 3, 9, 1), 7, dtype=torch.uint8), height=64, width=96)
    assert torch.equal(frames, torch.full((1, 3, 64, 96), 7, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("size", "pix_fmt"),
    [((192, 108), "yuv420p"), ((102, 180), "yuv420p"), ((101, 77), "yuv444p"), ((32, 18), "yuv420p")],
    ids=["landscape", "portrait", "odd", "upscaled"],
)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (80, 48)])
def test_pixels_are_fastvideos_bit_for_bit(size: tuple[int, int], pix_fmt: str, height: int, width: int) -> None:
    video = make_video(STEADY[:30], size=size, noise=True, pix_fmt=pix_fmt)
    request = make_request(video, max_height=height, max_width=width)
    indices = np.arange(0, 30, 24 / 16).astype(int)[:17].tolist()
    full_TCHW = VideoDecoder(video).get_frames_at(indices).data.contiguous()
    assert torch.equal(decode_clip(video, request), fastvideo_crop_and_resize(full_TCHW, height, width))


@pytest.mark.parametrize("chunk_frames", [1, 3, 16, 17, 100])
def test_decoding_in_chunks_gives_the_same_as_at_once(monkeypatch: pytest.MonkeyPatch, chunk_frames: int) -> None:
    unsteady = make_video(UNSTEADY, codec_options=B_FRAMES)
    for video in (numbered(), unsteady):
        request = make_request(video, max_height=48, max_width=48)
        at_once = decode_clip(video, request)
        with monkeypatch.context() as patch:
            patch.setattr(decode_torchcodec, "_CHUNK_BYTES", chunk_frames * 3 * WIDTH * HEIGHT)
            assert torch.equal(decode_clip(video, request), at_once)


def test_frames_are_written_where_the_caller_says() -> None:
    request = make_request(numbered())
    out = torch.zeros(request.shape, dtype=torch.uint8)
    assert decode_into(out, memoryview(bytearray(numbered())), request) == "torchcodec"
    assert torch.equal(out, decode_clip(numbered(), request))


@both_loaders
@pytest.mark.parametrize("counter_clockwise", [90, 180, 270])
def test_rotation_is_applied(counter_clockwise: int, loader: str) -> None:
    video = make_video(turned=counter_clockwise)
    height, width = (WIDTH, HEIGHT) if counter_clockwise != 180 else (HEIGHT, WIDTH)
    request = make_request(video, max_height=height, max_width=width, video_loader_type=loader)
    frames_TCHW = decode_clip(video, request)
    assert read_numbers(frames_TCHW) == [None] * 17  # a picture lying on its side is not read by mistake
    upright_TCHW = torch.rot90(frames_TCHW, -counter_clockwise // 90, (2, 3))
    assert read_numbers(upright_TCHW) == wanted_numbers(make_video(), make_request(video))


def test_audio_tracks_are_ignored() -> None:
    video = make_video(codec_options=B_FRAMES, audio=True)
    with av.open(io.BytesIO(video)) as file:
        assert len(file.streams.audio) == 1
    assert torch.equal(decode_clip(video, make_request(video)), decode_clip(numbered(), make_request(numbered())))


# Decoding in order, as torchcodec does by number


PICTURES: dict[str, dict[str, Any]] = {
    "h264": {},
    "h264 with B-frames": {"codec_options": B_FRAMES},
    "h264 bt709": {"codec_options": {"colorspace": "bt709"}},
    "h264 full range": {"pix_fmt": "yuvj420p"},
    "h264 4:2:2": {"pix_fmt": "yuv422p"},
    "h264 4:4:4 of odd size": {"pix_fmt": "yuv444p", "size": (101, 77)},
    "h264 10 bit": {"pix_fmt": "yuv420p10le"},
    "h264 grey": {"pix_fmt": "gray"},
    "h264 interlaced": {"codec_options": {"x264-params": "tff=1"}},
    "h264 turned": {"turned": 90},
    "hevc 10 bit bt2020": {
        "codec": "libx265",
        "pix_fmt": "yuv420p10le",
        "codec_options": {"x265-params": "log-level=none:colormatrix=bt2020nc"},
    },
    "vp9 of odd size": {
        "container": "webm",
        "codec": "libvpx-vp9",
        "codec_options": {"cpu-used": "8", "deadline": "realtime"},
        "size": (101, 77),
    },
    "av1": {"codec": "libsvtav1", "codec_options": {"preset": "12"}},
    "mpeg4": {"container": "avi", "codec": "mpeg4", "codec_options": {"bf": "0"}, "size": (101, 77)},
    "mjpeg": {"container": "mov", "codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "prores": {"container": "mov", "codec": "prores", "pix_fmt": "yuv422p10le"},
    "png with alpha": {"container": "mov", "codec": "png", "pix_fmt": "rgba"},
    "gif": {"container": "gif", "codec": "gif", "pix_fmt": "rgb8"},
    "wmv": {"container": "asf", "codec": "wmv2"},
}


@pytest.mark.parametrize("name", PICTURES)
def test_frames_decoded_in_order_are_torchcodecs_bit_for_bit(name: str) -> None:
    """10 bits too: PyAV's own conversion to RGB was 28 dB off, the graph of filters it is made with now is not."""
    video = encode_or_skip({"noise": True, **PICTURES[name]}, STEADY[:20])
    request = make_request(video, num_frames=9)
    assert request.indices is not None
    in_order = {row: frame for rows, frame in full_size_frames(video, container_of(video), request) for row in rows}
    by_number_THWC = VideoDecoder(video, dimension_order="NHWC").get_frames_at(list(request.indices)).data
    assert torch.equal(torch.stack([in_order[row] for row in range(9)]), by_number_THWC)


@pytest.mark.parametrize("in_processes", [False, True])
def test_what_decoded_a_clip_is_said(in_processes: bool) -> None:
    """No silent fallback."""
    ordinary, misread = numbered(), make_video(**TROUBLESOME["ts mpeg2"])
    wanted = [(ordinary, "torchcodec"), (misread, "torchcodec"), (ordinary, "pyav"), (misread, "pyav"), (b"?", "pyav")]
    tasks = []
    for number, (video, loader) in enumerate(wanted):
        request = make_request(video if video != b"?" else ordinary, video_loader_type=loader)
        tasks.append(DecodeTask(key=str(number), video=video, request=request))
    with open_pool() if in_processes else InlineDecoder() as decoder:
        assert [decoded.decoder for decoded in decoder.map(tasks)] == ["torchcodec", "sequential", "pyav", "pyav", None]
        assert decoder.stats.sequential == 1


def open_pool() -> DecodePool:
    return DecodePool(num_workers=1, num_slots=2, slot_bytes=2**20, timeout_seconds=60, memory_bytes=2**32)


# The fast loader


def psnr(frames: Tensor, other: Tensor) -> float:
    error = ((frames.double() - other.double()) ** 2).mean()
    return float("inf") if error == 0 else float(10 * torch.log10(255**2 / error))


def resize_at_pixel_centres(video: bytes, request: DecodeRequest) -> Tensor:
    assert request.indices is not None
    frames_TCHW = VideoDecoder(video).get_frames_at(list(request.indices)).data
    top, left, height, width = center_crop_box(*frames_TCHW.shape[-2:], height=request.height, width=request.width)
    return torch.nn.functional.interpolate(
        frames_TCHW[..., top : top + height, left : left + width],
        size=(request.height, request.width),
        mode="bilinear",
        antialias=True,
    )


@pytest.mark.parametrize("name", PICTURES)
def test_the_fast_loaders_pixels_are_nearly_those_of_the_exact_one(name: str) -> None:
    """On pictures of hard edges; as much as swscale and torch differ where the centres of pixels lie."""
    settings = PICTURES[name]
    width, height = settings.get("size", (320, 240))
    video = encode_or_skip({**settings, "size": (width, height)}, STEADY[:20])
    if "turned" in settings:
        width, height = height, width
    for changes in ({"max_height": height, "max_width": width}, {"max_height": 48, "max_width": 80}):
        request = make_request(video, num_frames=9, video_loader_type="pyav", **changes)
        exact = resize_at_pixel_centres(video, request)
        assert psnr(decode_clip(video, request), exact) > 31, changes


@pytest.mark.parametrize("size", [(96, 64), (640, 480)])
def test_at_the_sources_own_size_the_fast_loaders_pixels_are_the_exact_ones(size: tuple[int, int]) -> None:
    video = make_video(STEADY[:20], size=size, noise=True, codec_options=B_FRAMES)
    request = make_request(video, max_width=size[0], max_height=size[1], num_frames=9)
    fast = dataclasses.replace(request, loader="pyav")
    assert torch.equal(decode_clip(video, fast), decode_clip(video, request))


def test_on_real_clips_the_fast_loaders_pixels_are_nearly_those_of_the_exact_one(shared_clips: Path) -> None:
    for name in ("backyard", "crush-027"):
        video = (shared_clips / f"videos/{name}.mp4").read_bytes()
        request = make_request(video, max_height=256, max_width=448, video_loader_type="pyav")
        frames = decode_clip(video, request)
        assert psnr(frames, resize_at_pixel_centres(video, request)) > 40, name
        assert psnr(frames, decode_clip(video, dataclasses.replace(request, loader="torchcodec"))) > 34, name


SKIPPED: dict[str, dict[str, Any]] = {
    "h264": {"codec_options": B_FRAMES},
    "h264 with a pyramid": {"codec_options": B_FRAMES | {"x264-params": "b-pyramid=normal"}},
    "h264 interlaced": {"codec_options": B_FRAMES | {"x264-params": "tff=1"}},
    "h264 ts": {"container": "mpegts", "codec_options": SHORT_GOPS},
    "mpeg2": {"container": "mpegts", "codec": "mpeg2video", "codec_options": {"bf": "2"}},
    "mpeg4": {"codec": "mpeg4", "codec_options": {"bf": "2"}},
}


@pytest.mark.parametrize("name", SKIPPED)
def test_frames_that_are_passed_over_change_no_pixel_of_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_video(size=(320, 240), **SKIPPED[name])
    request = make_request(video, max_height=240, max_width=320, train_fps=6.0, num_frames=15, video_loader_type="pyav")
    skipping, saw_skipping = decode_and_look(monkeypatch, video, request)
    monkeypatch.setattr(decode_pyav, "_SKIPS_EXACTLY", ())
    decoding, saw_decoding = decode_and_look(monkeypatch, video, request)
    assert torch.equal(skipping, decoding)
    assert saw_skipping != saw_decoding  # of a frame passed over FFmpeg gives nothing, or what was in its memory


def decode_and_look(
    monkeypatch: pytest.MonkeyPatch, video: bytes, request: DecodeRequest
) -> tuple[Tensor, list[bytes]]:
    """The clip, and every frame that FFmpeg gave on the way."""
    seen = []

    def seconds(frame: av.VideoFrame) -> Fraction:
        seen.append(frame.to_ndarray(format="rgb24").tobytes())
        return frame.pts * frame.time_base

    with monkeypatch.context() as patch:
        patch.setattr(decode_pyav, "_seconds", seconds)
        frames = decode_clip(video, request)
    return frames, seen


# The right frames


ORDINARY: dict[str, dict[str, Any]] = {
    "mp4": {"codec_options": {"bf": "0"}},
    "mp4 with B-frames": {"codec_options": B_FRAMES},
    "mp4 with B-frames and key frames": {"codec_options": SHORT_GOPS},
    "mp4 of fragments": {"codec_options": B_FRAMES, "options": {"movflags": "frag_keyframe+empty_moov"}},
    "mov": {"container": "mov", "codec_options": SHORT_GOPS},
    "mkv": {"container": "matroska", "codec_options": SHORT_GOPS},
    "webm vp9": {
        "container": "webm",
        "codec": "libvpx-vp9",
        "codec_options": {"cpu-used": "8", "deadline": "realtime"},
    },
    "flv": {"container": "flv", "codec_options": SHORT_GOPS},
    "ts": {"container": "mpegts", "codec_options": {"bf": "0"}},
}
TROUBLESOME: dict[str, dict[str, Any]] = {
    "ts with B-frames": {"container": "mpegts", "codec_options": SHORT_GOPS},
    "ts mpeg2": {"container": "mpegts", "codec": "mpeg2video", "codec_options": {"bf": "2"}},
    "avi with B-frames": {"container": "avi", "codec": "mpeg4", "codec_options": {"bf": "2"}},
}


def encode_or_skip(settings: dict[str, Any], times: tuple[Fraction, ...] = STEADY) -> bytes:
    codec = settings.get("codec", "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV was built without {codec}")
    return make_video(times, **settings)


VIDEOS = ORDINARY | TROUBLESOME


@both_loaders
@pytest.mark.parametrize("name", VIDEOS)
def test_a_steady_video_gives_the_frames_planned_by_number(name: str, loader: str) -> None:
    video = encode_or_skip(VIDEOS[name])
    request = make_request(video, video_loader_type=loader)
    assert request.indices is not None
    assert read_numbers(decode_clip(video, request)) == np.arange(0, NUM_FRAMES, 24 / 16).astype(int)[:17].tolist()


@both_loaders
@pytest.mark.parametrize("name", ORDINARY)
def test_an_unsteady_video_gives_the_frames_on_show(name: str, loader: str) -> None:
    """The check against torchcodec's frame lengths refused all but MP4 without B-frames."""
    video = encode_or_skip(ORDINARY[name], UNSTEADY)
    request = make_request(video, video_loader_type=loader)
    assert request.indices is None
    start = UNSTEADY[0]
    on_show = [max(n for n, time in enumerate(UNSTEADY) if time - start <= Fraction(k, 16)) for k in range(17)]
    assert len(set(on_show)) < 17  # some are shown for longer
    assert any(after - before > 1 for before, after in pairwise(on_show))  # some are passed over
    assert read_numbers(decode_clip(video, request)) == on_show


@both_loaders
def test_a_source_slower_than_wanted_gives_its_frames_again(loader: str) -> None:
    request = make_request(numbered(), train_fps=60.0, video_loader_type=loader)
    assert request.indices is not None and len(set(request.indices)) < 17
    assert read_numbers(decode_clip(numbered(), request)) == list(request.indices)


@both_loaders
@pytest.mark.parametrize("times", [STEADY, UNSTEADY], ids=["steady", "unsteady"])
@pytest.mark.parametrize("codec_options", [{"bf": "0"}, B_FRAMES, SHORT_GOPS], ids=["plain", "B-frames", "short GOPs"])
@pytest.mark.parametrize("seconds", [0.31, 0.7])
def test_an_edit_list_gives_the_right_frames(
    times: tuple[Fraction, ...], codec_options: dict[str, str], seconds: float, loader: str
) -> None:
    """torchcodec gives others for nearly all of these, without an error."""
    video = remux(make_video(times, codec_options=codec_options), seconds)
    assert b"elst" in video
    assert decode_in_order(video)[1][0] > 0
    assert_right(video, loader)


@both_loaders
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
@pytest.mark.parametrize("codec_options", [B_FRAMES, SHORT_GOPS], ids=["B-frames", "short GOPs"])
@pytest.mark.parametrize("container", ["mp4", "mov", "mkv", "ts"])
def test_what_ffmpeg_cuts_without_encoding_gives_the_right_frames(
    codec_options: dict[str, str], container: str, loader: str, tmp_path: Path
) -> None:
    (tmp_path / "whole.mp4").write_bytes(make_video(codec_options=codec_options))
    command = f"ffmpeg -v error -ss 0.7 -i {tmp_path}/whole.mp4 -c copy {tmp_path}/cut.{container}"
    subprocess.run(command.split(), check=True, timeout=60)
    assert_right((tmp_path / f"cut.{container}").read_bytes(), loader)


def assert_right(video: bytes, loader: str) -> None:
    request = make_request(video, video_loader_type=loader)
    expected = wanted_numbers(video, request)
    assert None not in expected
    assert read_numbers(decode_clip(video, request)) == expected


# Bad samples


@both_loaders
@pytest.mark.parametrize("container", ["mpegts", "matroska", "mp4"])
def test_frames_that_change_size_are_refused_if_they_are_wanted(container: str, loader: str) -> None:
    video = join_two_sizes(container)
    before = make_request(video, num_frames=10, train_fps=24.0, video_loader_type=loader)
    assert None not in read_numbers(decode_clip(video, before))
    across = make_request(video, num_frames=38, train_fps=24.0, video_loader_type=loader)
    with pytest.raises(BadSample, match="resolution_change: a frame is of 160x96 pixels, the first was of 128x64"):
        decode_clip(video, across)


def join_two_sizes(container: str, *, frames_each: int = 20) -> bytes:
    """Half of it 128x64, half of it 160x96."""
    buffer = io.BytesIO()
    settings: dict[str, Any] = {"container": "mpegts", "codec_options": {"bf": "0"}}
    with av.open(buffer, "w", format=container) as target:
        halves = [
            make_video(steady(frames_each), size=size, first=frames_each * n, **settings)
            for n, size in enumerate(((128, 64), (160, 96)))
        ]
        for number, half in enumerate(halves):
            with av.open(io.BytesIO(half)) as source:
                if number == 0:
                    copy = target.add_stream_from_template(source.streams.video[0])
                for index, packet in enumerate(p for p in source.demux(video=0) if p.dts is not None):
                    packet.pts = packet.dts = (frames_each * number + index) * 3750
                    packet.time_base, packet.stream = Fraction(1, 90000), copy
                    target.mux(packet)
    return buffer.getvalue()


def test_frames_at_other_times_than_planned_are_refused() -> None:
    request = make_request(numbered())
    later = tuple(time + 1 / 24 for time in request.timestamps)
    with pytest.raises(BadSample, match=r"timestamps: frame 0 should be at 0\.0417 s and is at 0\.0000 s"):
        decode_clip(numbered(), dataclasses.replace(request, timestamps=later))


def test_frames_of_equal_times_are_refused() -> None:
    """FFmpeg does not say which of them is which."""
    video = remux(make_video(codec_options={"bf": "0"}), equal_times=True)
    assert bad_reason(video, make_request(video)) == "timestamps"


def test_bytes_that_changed_since_packing_are_refused() -> None:
    damaged = bytearray(numbered())
    damaged[len(damaged) // 2] ^= 1
    with pytest.raises(BadSample, match="digest_mismatch: the video's sha256 is not") as caught:
        decode_clip(bytes(damaged), make_request(numbered()))
    assert caught.value.stage == "read"


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", b"ffconcat version 1.0\nfile a.mp4\n", b"\x89PNG\r\n\x1a\n"],
    ids=["nothing", "text", "playlist", "ffconcat", "image"],
)
def test_what_is_no_video_never_reaches_ffmpeg(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "open_decoder", lambda *_: pytest.fail("it was opened"))
    request = dataclasses.replace(make_request(numbered()), sha256=hashlib.sha256(content).hexdigest())
    assert bad_reason(content, request) == "not_a_video"


def test_a_file_with_sound_alone_is_refused() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        sound = file.add_stream("aac", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        file.mux(sound.encode(samples))
        file.mux(sound.encode(None))
    content = buffer.getvalue()
    request = dataclasses.replace(make_request(numbered()), sha256=hashlib.sha256(content).hexdigest())
    assert bad_reason(content, request) == "no_video_stream"


def test_frames_of_too_many_pixels_are_refused() -> None:
    request = make_request(numbered(), max_pixels=WIDTH * HEIGHT)
    decode_clip(numbered(), request)
    with pytest.raises(BadSample, match=r"too_large: frames of 128x64 pixels, more than the 8191 of --max-pixels"):
        decode_clip(numbered(), dataclasses.replace(request, max_pixels=WIDTH * HEIGHT - 1))


def test_frames_beyond_the_end_are_refused() -> None:
    request = make_request(numbered())
    beyond = dataclasses.replace(request, indices=(0, NUM_FRAMES), timestamps=(0.0, NUM_FRAMES / 24))
    with pytest.raises(BadSample, match="truncated: frame 60 is wanted but the file holds 60"):
        decode_clip(numbered(), beyond)


def test_of_a_file_cut_in_half_only_frames_that_are_there_are_given(tmp_path: Path) -> None:
    (tmp_path / "whole.mp4").write_bytes(numbered())
    with (
        av.open(tmp_path / "whole.mp4") as source,
        av.open(tmp_path / "front.mp4", "w", options={"movflags": "faststart"}) as target,
    ):  # the index first, so that it survives the cut
        copy = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    whole = (tmp_path / "front.mp4").read_bytes()
    half = whole[: len(whole) * 3 // 5]
    start = make_request(half, num_frames=5)
    assert read_numbers(decode_clip(half, start)) == wanted_numbers(numbered(), start)
    assert bad_reason(half, make_request(half, num_frames=39)) in ("truncated", "decode_error", "timestamps")


@pytest.mark.parametrize("seed", range(5))
def test_a_file_that_was_corrupt_when_packed_gives_frames_or_a_bad_sample(seed: int) -> None:
    """FFmpeg conceals much of the damage; what decodes at the right times is not told from a bad recording."""
    damaged = bytearray(numbered())
    media = damaged.index(b"mdat") + 8
    middle = (media + damaged.index(b"moov")) // 2
    damaged[middle : middle + 200] = np.random.default_rng(seed).integers(0, 256, 200, np.uint8).tobytes()
    request = make_request(bytes(damaged))
    try:
        frames = decode_clip(bytes(damaged), request)
    except BadSample as error:
        assert error.reason == "decode_error"
    else:
        assert torch.equal(frames[:3], decode_clip(numbered(), make_request(numbered()))[:3])
