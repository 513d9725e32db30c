"""A folder of everything that can go wrong, and of everything odd that must not: a job on it ends, and tells which.

`GOOD` are odd but whole videos; every one must be there with the right frames. `BAD` are damaged or hostile; each must
be recorded with its stage and a reason that fits. None may stop the job, hang it, or reach another file.
"""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
import pytest
from forks import Forks
from numbered_videos import make_video, make_video_with_ffmpeg, numbered_picture, read_numbers, steady
from PIL import Image
from test_decode import B_FRAMES, SHORT_GOPS, join_two_sizes, remux
from test_probe import SDP, box

from exporters.fastvideo import read_file
from streamprep.cli import main
from streamprep.decoder import InlineDecoder
from streamprep.job import open_job
from streamprep.manifest import load_index, load_manifest
from streamprep.plan import SamplingRules, plan_unit
from streamprep.storage import open_store
from streamprep.stream import decode_units
from streamprep.verify import verify_job

pytest_plugins = ["jobs"]
av.logging.set_level(av.logging.PANIC)

NUM_FRAMES = 5
TRAIN_FPS = 8
RULES = {"max_height": 32, "max_width": 64, "num_frames": NUM_FRAMES, "train_fps": TRAIN_FPS}
STEADY_NUMBERS = [0, 3, 6, 9, 12]  # of a video at 24 frames per second
UNSTEADY = tuple(Fraction(int(t), 100) for t in np.cumsum(np.random.default_rng(1).integers(1, 12, 60)))

FAST = {"cpu-used": "8", "deadline": "realtime"}
X265 = {"x265-params": "log-level=none"}
GOOD: dict[str, dict[str, Any]] = {
    "h264.mp4": {"codec_options": B_FRAMES},
    "h264.mov": {"container": "mov"},
    "h264.mkv": {"container": "matroska"},
    "h264.flv": {"container": "flv"},
    "h264.ts": {"container": "mpegts", "codec_options": SHORT_GOPS},
    "h264.m2ts": {"container": "mpegts", "options": {"mpegts_m2ts_mode": "1"}},
    "h264_fragments.mp4": {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "h264_negative_offsets.m4v": {"options": {"movflags": "negative_cts_offsets"}, "codec_options": B_FRAMES},
    "h264_audio.mp4": {"audio": True},
    "h264_10bit.mp4": {"pix_fmt": "yuv420p10le"},
    "h264_full_range.mp4": {"pix_fmt": "yuvj420p"},
    "h264_422.mp4": {"pix_fmt": "yuv422p"},
    "h264_444_odd_size.mp4": {"pix_fmt": "yuv444p", "size": (131, 67)},
    "h264_grey.mp4": {"pix_fmt": "gray"},
    "h264_interlaced.mp4": {"codec_options": {"x264-params": "tff=1"}},
    "h264_turned_90.mp4": {"turned": 90, "upright": True},
    "h264_turned_180.mp4": {"turned": 180, "upright": True},
    "h264_turned_270.mp4": {"turned": 270, "upright": True},
    "h264_turned_90.mkv": {"turned": 90, "upright": True, "container": "matroska"},
    "hevc.mp4": {"codec": "libx265", "codec_options": X265},
    "hevc_10bit.mkv": {"codec": "libx265", "codec_options": X265, "pix_fmt": "yuv420p10le", "container": "matroska"},
    "hevc.ts": {"codec": "libx265", "codec_options": X265, "container": "mpegts"},
    "vp8.webm": {"codec": "libvpx", "codec_options": FAST, "container": "webm"},
    "vp9.webm": {"codec": "libvpx-vp9", "codec_options": FAST, "container": "webm"},
    "vp9.mp4": {"codec": "libvpx-vp9", "codec_options": FAST},
    "av1.mp4": {"codec": "libsvtav1", "codec_options": {"preset": "12"}},
    "av1.webm": {"codec": "libsvtav1", "codec_options": {"preset": "12"}, "container": "webm"},
    "mpeg4.avi": {"codec": "mpeg4", "codec_options": {"bf": "2"}, "container": "avi"},
    "mpeg4.mp4": {"codec": "mpeg4", "codec_options": {"bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "codec_options": {"bf": "2"}, "container": "mpegts"},
    "mpeg2.mpg": {"codec": "mpeg2video", "codec_options": {"bf": "2"}, "container": "vob"},
    "wmv2.wmv": {"codec": "wmv2", "container": "asf"},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "container": "mov"},
    "prores.mov": {"codec": "prores", "pix_fmt": "yuv422p10le", "container": "mov"},
    "alpha.mov": {"codec": "png", "pix_fmt": "rgba", "container": "mov"},
    "called_mp4_but_is.mp4": {"container": "matroska"},
}
BY_FFMPEG = {
    "theora.ogv": ("-c:v", "libtheora", "-q:v", "8"),
    "alpha.webm": ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-deadline", "realtime", "-cpu-used", "8"),
    "rle.mov": ("-c:v", "qtrle", "-pix_fmt", "argb"),
    "small.3gp": (
        "-c:v",
        "mpeg4",
    ),
}


@cache
def whole(name: str) -> bytes:
    return make_video(steady(60), **GOOD[name])


def good_videos(scratch: Path) -> dict[str, tuple[bytes, list[int]]]:
    """Each with the numbers that its clip must show."""
    on_show = [max(n for n, time in enumerate(UNSTEADY) if time - UNSTEADY[0] <= Fraction(k, 8)) for k in range(5)]
    videos = {
        "late.mp4": (make_video([36_000 + time for time in steady(60)]), STEADY_NUMBERS),
        "gif.gif": (make_video(steady(60, fps=10), container="gif", codec="gif", pix_fmt="rgb8"), [0, 1, 2, 3, 5]),
        "slow.mp4": (make_video(steady(20, fps=2)), [0, 0, 0, 0, 1]),
        "unsteady.mkv": (make_video(UNSTEADY, container="matroska"), on_show),
        "unsteady.mp4": (make_video(UNSTEADY, codec_options=B_FRAMES), on_show),
    }
    for name, settings in GOOD.items():
        if settings.get("codec", "libx264") in av.codecs_available:
            videos[name] = whole(name), STEADY_NUMBERS
    if shutil.which("ffmpeg"):
        for name, arguments in BY_FFMPEG.items():
            videos[name] = make_video_with_ffmpeg(scratch / name, *arguments), STEADY_NUMBERS
    for name, options in (("edited.mp4", B_FRAMES), ("edited_short_gops.mp4", SHORT_GOPS)):
        # Cut at 0.7 s without encoding: an edit list hides the frames from the key frame on.
        videos[name] = remux(make_video(codec_options=options), 0.7), [17 + number for number in STEADY_NUMBERS]
    return videos


# Damaged


def front_loaded() -> bytes:
    """The index first, so that it survives what happens to the end."""
    with tempfile.TemporaryDirectory() as folder:  # faststart reads its own output again
        path = Path(folder, "a.mp4")
        with (
            av.open(io.BytesIO(make_video(steady(60), noise=True))) as source,
            av.open(path, "w", options={"movflags": "faststart"}) as target,
        ):
            copy = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = copy
                    target.mux(packet)
        return path.read_bytes()


def with_media_data(data: bytes, change: Callable[[bytearray], object]) -> bytes:
    begin = data.index(b"mdat") + 4
    end = begin - 8 + int.from_bytes(data[begin - 8 : begin - 4], "big")
    media = bytearray(data[begin:end])
    change(media)
    assert len(media) == end - begin
    return data[:begin] + media + data[end:]


def overwrite(begin: float, end: float, seed: int | None = 0) -> Callable[[bytearray], None]:
    """Noise, or zeros, over a part."""

    def change(media: bytearray) -> None:
        a, b = int(begin * len(media)), int(end * len(media))
        media[a:b] = np.random.default_rng(seed).bytes(b - a) if seed is not None else bytes(b - a)

    return change


def with_table_entry(data: bytes, kind: bytes, offset: int, value: int) -> bytes:
    """Overwrite a 32-bit number in a box, ``offset`` bytes from where its content begins."""
    position = data.index(kind) + 4 + offset
    return data[:position] + struct.pack(">I", value) + data[position + 4 :]


def only_sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        sound = file.add_stream("aac", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        file.mux(sound.encode(samples))
        file.mux(sound.encode(None))
    return buffer.getvalue()


def only_an_index() -> bytes:
    """Of a video in fragments, without one."""
    data = whole("h264_fragments.mp4")
    return data[: data.index(b"moof") - 4]


def png_of_zeros(side: int, *, bits: int, color_type: int) -> bytes:
    deflate = zlib.compressobj(1)
    rows = bytes(1 + {2: 3, 6: 4}[color_type] * bits // 8 * side) * 20
    pixels = [deflate.compress(rows) for _ in range(side // 20)]
    header = struct.pack(">IIBBBBB", side, side, bits, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"".join(pixels) + deflate.flush()), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def mux_packets(packets: list[bytes], *, codec: str, size: tuple[int, int], fps: int, extradata: bytes = b"") -> bytes:
    """A MOV of these packets, whatever is in them."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as file:
        stream = file.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "rgb24" if codec == "png" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        if extradata:
            stream.codec_context.extradata = extradata
        for number, data in enumerate(packets):
            packet = av.Packet(data)
            packet.pts = packet.dts = number
            packet.duration, packet.time_base, packet.stream, packet.is_keyframe = (
                1,
                Fraction(1, fps),
                stream,
                number == 0,
            )
            file.mux(packet)
    return buffer.getvalue()


def pixel_bomb(*, claimed: tuple[int, int]) -> bytes:
    """Pictures of 768 MB in a file of a few."""
    picture = png_of_zeros(16_000, bits=8, color_type=2)
    return mux_packets([picture] * NUM_FRAMES, codec="png", size=claimed, fps=TRAIN_FPS)


def memory_bomb() -> bytes:
    """Pictures with few enough pixels, but of 512 MB: 16 bits, and alpha."""
    picture = png_of_zeros(8000, bits=16, color_type=6)
    return mux_packets([picture] * NUM_FRAMES, codec="png", size=(8000, 8000), fps=TRAIN_FPS)


def time_bomb() -> bytes:
    """Half a second at 2000 frames a second, large ones without a change: a minute of work in 20 MB."""
    buffer, packets = io.BytesIO(), []
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 7680, 4320, "yuv420p"
        stream.codec_context.thread_count = 1
        picture = np.zeros((4320 * 3 // 2, 7680), np.uint8)
        for _ in range(2):
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p"))
        packets += stream.encode(None)
        first, second = (bytes(packet) for packet in packets)
        extradata = stream.codec_context.extradata
    return mux_packets([first, *[second] * 1200], codec="mpeg4", size=(7680, 4320), fps=2000, extradata=extradata)


def huge_gif() -> bytes:
    small = make_video(steady(5), container="gif", codec="gif", pix_fmt="rgb8")
    return small[:6] + b"\xff" * 4 + small[10:]


def save(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nSECRET\n#EXT-X-ENDLIST\n"
HEADER = {"probe_failed"}
DECODING = {"decode_error", "truncated", "timestamps"}
BAD: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "nothing.mp4": (lambda: b"", HEADER),
    "text.mp4": (lambda: b"a man walks down the street\n" * 100, HEADER),
    "noise.mp4": (lambda: np.random.default_rng(0).bytes(5000), HEADER),
    "html.mp4": (lambda: b"<!DOCTYPE html><html><head><title>404</title>", HEADER),
    "sdp.mp4": (lambda: b"v=0" + SDP, HEADER),
    "sdp.gif": (lambda: b"GIF89a\0\0\0\0" + SDP, HEADER),
    "playlist.mp4": (lambda: PLAYLIST, HEADER),
    "playlist.ts": (lambda: PLAYLIST.replace(b"SECRET", b"http://127.0.0.1:9/secret.ts"), HEADER),
    "concat.mp4": (lambda: b"ffconcat version 1.0\nfile SECRET\n", HEADER),
    "dash.mp4": (lambda: b'<?xml version="1.0"?><MPD profiles="urn:mpeg:dash:profile:isoff-live:2011">', HEADER),
    "python.mp4": (lambda: b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", HEADER),
    "sound.mp4": (only_sound, HEADER),
    "index_missing.mp4": (lambda: whole("h264.mp4")[: whole("h264.mp4").index(b"moov") - 4], HEADER),
    "index_cut.mp4": (lambda: whole("h264.mp4")[:-100], HEADER),
    "index_alone.mp4": (only_an_index, HEADER),
    "index_nested.mp4": (lambda: box(b"ftyp", b"isom") + box(b"moov", box(b"moov", box(b"moov", b""))), HEADER),
    "index_of_4_gb.mp4": (lambda: box(b"ftyp", b"isom") + b"\xff\xff\xff\xffmoov" + bytes(64), HEADER),
    "cut.mp4": (lambda: front_loaded()[:6000], DECODING),
    "zeros.mp4": (lambda: with_media_data(whole("h264.mp4"), overwrite(0, 1, None)), DECODING),
    "noise_all_over.mp4": (lambda: with_media_data(whole("h264.mp4"), overwrite(0, 1)), DECODING),
    "offsets_beyond_the_end.mp4": (lambda: with_table_entry(whole("h264.mp4"), b"stco", 8, 2**31), DECODING),
    "frame_of_2_gb.mp4": (
        lambda: with_table_entry(whole("h264.mp4"), b"stsz", 12 + 4, 2**31 - 1),
        DECODING | HEADER | {"decoder_memory"},
    ),
    "frames_without_end.mp4": (lambda: with_table_entry(whole("h264.mp4"), b"stsz", 8, 2**32 - 1), HEADER | DECODING),
    "equal_times.mp4": (lambda: remux(make_video(codec_options={"bf": "0"}), equal_times=True), {"timestamps"}),
    "two_sizes.ts": (lambda: join_two_sizes("mpegts", frames_each=8), {"resolution_change"}),
    "huge.gif": (lambda: huge_gif(), HEADER),
    "pixel_bomb.mov": (lambda: pixel_bomb(claimed=(16_000, 16_000)), {"too_large"}),
    "pixel_bomb_in_disguise.mov": (lambda: pixel_bomb(claimed=(64, 48)), {"too_large", "decode_error"}),
    "memory_bomb.mov": (memory_bomb, {"decoder_memory"}),
    "time_bomb.mov": (time_bomb, {"decoder_timeout"}),
    "animation.mp4": (
        lambda: save(
            Image.new("RGB", (9, 9)), format="PNG", save_all=True, append_images=[Image.new("RGB", (9, 9), 1)]
        ),
        HEADER,
    ),
    "broken_image.mp4": (lambda: b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + bytes(50), HEADER),
}


def image() -> bytes:
    return save(Image.fromarray(numbered_picture(1, 128, 64)), format="PNG")


def path_of(kind: str, name: str) -> str:
    """Where a file lies in the dataset, so that ``a.mp4`` and ``a.mkv`` have different keys."""
    stem, _, extension = name.rpartition(".")
    return f"{kind}/{extension}/{stem}.{extension}"


@dataclasses.dataclass
class Finished:
    """A job on a folder of all of these."""

    out: Path
    wanted: dict[str, list[int]]
    """Of each good video, by its path: the numbers its clip must show."""
    output: str


@pytest.fixture(scope="module", params=["torchcodec", pytest.param("pyav", marks=pytest.mark.slow)])
def finished(
    request: pytest.FixtureRequest, forks: Forks, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    folder = tmp_path_factory.mktemp("everything")
    secret = folder / "secret.ts"
    os.mkfifo(secret)  # whoever opens it waits for ever
    good = good_videos(folder)
    files = {path_of("good", name): data for name, (data, _) in good.items()}
    files |= {path_of("bad", name): make().replace(b"SECRET", str(secret).encode()) for name, (make, _) in BAD.items()}
    files[path_of("dropped", "image.mp4")] = image()
    for path, data in files.items():
        file = folder / "dataset" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        file.with_suffix(".txt").write_text(f"The video {path}.")
    flags: dict[str, object] = {
        **RULES,
        "model_path": model,
        "video_loader_type": request.param,
        "samples_per_file": 100,
        "encode_threads": 1,
        "dataloader_num_workers": 2,
        "decode_timeout": 5,
        "decode_memory_mb": 480,
        "max_bad_fraction": 1,
    }
    arguments = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", value)]
    process = forks.start("run", folder / "dataset", folder / "out", *arguments)
    assert process.wait() == 0, process.output
    wanted = {path_of("good", name): numbers for name, (_, numbers) in good.items()}
    return Finished(folder / "out", wanted, process.output)


def test_the_job_is_whole(finished: Finished) -> None:
    assert verify_job(open_job(open_store(finished.out))).problems == []


def test_every_good_video_is_a_row_and_nothing_else_is(finished: Finished) -> None:
    store = open_store(finished.out)
    files = [file.name for record in open_job(store).records() for file in record.files]
    rows = [row_id for name in files for row_id, _ in read_file(store, name)]
    assert len(finished.wanted) > 20
    assert sorted(rows) == sorted(finished.wanted)


def test_every_good_video_shows_the_right_frames(finished: Finished, request: pytest.FixtureRequest) -> None:
    loader = request.node.callspec.params["finished"]
    rules = SamplingRules(
        **RULES, video_length_tolerance_range=None, speed_factor=1.0, max_pixels=2**26, video_loader_type=loader
    )
    store = open_store(finished.out / "_streamprep/shards")
    units = [plan_unit("000000", load_index(store, info), rules) for info in load_manifest(store).shards]
    good = [
        dataclasses.replace(unit, clips=tuple(clip for clip in unit.clips if clip.file_name in finished.wanted))
        for unit in units
    ]
    shown = {
        clip.file_name: read_numbers(decoded.frames)
        for _, clip, decoded in decode_units(store, good, InlineDecoder())
        if decoded.frames is not None
    }
    assert shown == finished.wanted


def test_every_bad_file_is_recorded_with_a_reason_that_fits(finished: Finished) -> None:
    current = open_job(open_store(finished.out))
    found = {clip.key: clip for record in current.records() for clip in current.read_quarantine(record)}
    expected = {path_of("bad", name).rpartition(".")[0]: reasons for name, (_, reasons) in BAD.items()}
    assert {key: clip.reason for key, clip in found.items() if clip.reason not in expected.get(key, ())} == {}
    assert set(found) == set(expected)
    for clip in found.values():
        assert clip.stage == ("plan" if clip.reason == "probe_failed" else "decode") or clip.reason == "too_large"
        assert clip.exception and "\n" not in clip.exception
    (dropped,) = [dropped for record in current.records() for dropped in record.dropped]
    assert (dropped.key, dropped.reason) == ("dropped/mp4/image", "too_short")


@pytest.mark.parametrize("name", ["a.mp4", "a.ts"])
def test_what_is_no_regular_file_is_never_opened(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dataset").mkdir()
    os.mkfifo(tmp_path / "dataset" / name)
    assert main(["run", str(tmp_path / "dataset"), str(tmp_path / "out"), "--model-path", str(model)]) == 2
    assert f"{name} is not a regular file" in capsys.readouterr().err
