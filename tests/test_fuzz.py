"""Thousands of damaged files through the decode pool: each gets its answer, and no process is lost."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import av
import av.logging
import pytest
from numbered_videos import make_video, numbered_picture, steady
from PIL import Image
from test_decode import make_request

from streamprep.decode_pool import DecodePool
from streamprep.decoder import Decoded, DecodeTask
from streamprep.errors import BAD_REASONS
from streamprep.probe import ProbeError, probe_video
from streamprep.types import DecodeRequest, VideoInfo

av.logging.set_level(av.logging.PANIC)

SIZE = (48, 32)
VIDEOS: dict[str, dict[str, Any]] = {
    "mp4 h264": {"codec_options": {"bf": "2", "g": "8"}},
    "mp4 of fragments": {"options": {"movflags": "frag_keyframe+empty_moov"}, "codec_options": {"bf": "2", "g": "8"}},
    "mp4 h264 10 bit, turned": {"pix_fmt": "yuv420p10le", "turned": 90},
    "mp4 hevc": {
        "codec": "libx265",
        "codec_options": {"x265-params": "log-level=none"},
        "size": (96, 64),
    },  # else x265 dies
    "mp4 av1": {"codec": "libsvtav1", "codec_options": {"preset": "12"}, "size": (64, 64)},
    "mov mjpeg": {"container": "mov", "codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mov png": {"container": "mov", "codec": "png", "pix_fmt": "rgba"},
    "mkv h264": {"container": "matroska"},
    "webm vp9": {
        "container": "webm",
        "codec": "libvpx-vp9",
        "codec_options": {"cpu-used": "8", "deadline": "realtime"},
    },
    "webm vp8": {"container": "webm", "codec": "libvpx", "codec_options": {"cpu-used": "8", "deadline": "realtime"}},
    "avi mpeg4": {"container": "avi", "codec": "mpeg4", "codec_options": {"bf": "2"}},
    "ts h264": {"container": "mpegts"},
    "ts mpeg2": {"container": "mpegts", "codec": "mpeg2video", "codec_options": {"bf": "2"}},
    "flv h264": {"container": "flv"},
    "wmv": {"container": "asf", "codec": "wmv2"},
    "gif": {"container": "gif", "codec": "gif", "pix_fmt": "rgb8"},
}
IMAGES = {"jpeg": "JPEG", "png image": "PNG", "webp image": "WEBP"}
ALL = (*VIDEOS, *IMAGES)


@cache
def whole(name: str) -> bytes:
    if name in IMAGES:
        buffer = io.BytesIO()
        Image.fromarray(numbered_picture(7, *SIZE)).save(buffer, format=IMAGES[name])
        return buffer.getvalue()
    if VIDEOS[name].get("codec", "libx264") not in av.codecs_available:
        pytest.skip(f"PyAV was built without the codec of {name}")
    return make_video(steady(12), **{"size": SIZE, **VIDEOS[name]})


@cache
def planned(name: str, loader: str) -> DecodeRequest:
    """What was planned for the file before it was damaged."""
    return make_request(
        whole(name),
        num_frames=1 if name in IMAGES else 8,
        train_fps=1.0 if name in IMAGES else 16.0,
        max_height=32,
        max_width=48,
        max_pixels=2**22,
        video_loader_type=loader,
    )


Mutation = Callable[[bytearray, random.Random], object]


def _place(data: bytearray, rng: random.Random) -> int:
    """Anywhere, or among the headers, of which there are some at both ends."""
    end = len(data)
    return rng.choice([rng.randrange(end), rng.randrange(min(end, 600)), end - 1 - rng.randrange(min(end, 900))])


def flip_a_bit(data: bytearray, rng: random.Random) -> None:
    data[_place(data, rng)] ^= 1 << rng.randrange(8)


def write_noise(data: bytearray, rng: random.Random) -> None:
    position, size = _place(data, rng), rng.choice([1, 4, 50])
    data[position : position + size] = rng.randbytes(len(data[position : position + size]))


def write_an_extreme_number(data: bytearray, rng: random.Random) -> None:
    position = _place(data, rng)
    number = rng.choice(
        [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1", b"\0\1\0\0"]
    )
    data[position : position + 4] = number[: len(data) - position]


def write_zeros(data: bytearray, rng: random.Random) -> None:
    position, size = _place(data, rng), rng.choice([8, 100, 1000])
    data[position : position + size] = bytes(len(data[position : position + size]))


def cut_out(data: bytearray, rng: random.Random) -> None:
    position = _place(data, rng)
    del data[position : position + rng.choice([1, 4, 188, 500])]


def put_in(data: bytearray, rng: random.Random) -> None:
    position = _place(data, rng)
    data[position:position] = rng.randbytes(rng.choice([1, 4, 188, 500]))


def say_twice(data: bytearray, rng: random.Random) -> None:
    position, size = _place(data, rng), rng.choice([4, 188, 1000])
    data[position:position] = data[position : position + size]


def exchange(data: bytearray, rng: random.Random) -> None:
    first, second, size = _place(data, rng), _place(data, rng), rng.choice([4, 64, 188])
    if abs(first - second) >= size and max(first, second) + size <= len(data):
        one, other = data[first : first + size], data[second : second + size]
        data[first : first + size], data[second : second + size] = other, one


def cut_off(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def go_on_as_another(data: bytearray, rng: random.Random) -> None:
    other = whole(rng.choice(ALL))
    data[_place(data, rng) :] = other[rng.randrange(len(other)) :]


def spread_noise(data: bytearray, rng: random.Random) -> None:
    for _ in range(max(1, len(data) // 200)):
        data[rng.randrange(len(data))] = rng.randrange(256)


MUTATIONS: tuple[Mutation, ...] = (
    flip_a_bit,
    write_noise,
    write_an_extreme_number,
    write_zeros,
    cut_out,
    put_in,
    say_twice,
    exchange,
    cut_off,
    go_on_as_another,
    spread_noise,
)


def mutate(name: str, seed: int) -> bytes:
    rng = random.Random(f"{name} {seed}")
    data = bytearray(whole(name))
    for _ in range(rng.choice([1, 1, 2, 4])):
        if data:
            rng.choice(MUTATIONS)(data, rng)
    return bytes(data)


def damaged_tasks(num_files: int, seed: int) -> Iterator[DecodeTask]:
    for number in range(num_files):
        name, loader = ALL[number % len(ALL)], ("torchcodec", "pyav")[number // len(ALL) % 2]
        video = mutate(name, seed * 1_000_000 + number)
        request = dataclasses.replace(planned(name, loader), sha256=hashlib.sha256(video).hexdigest())
        yield DecodeTask(key=f"{number} {name} {loader}", video=video, request=request)


def fuzz(num_files: int, *, seed: int) -> Counter[str]:
    """Decode so many damaged files; how often each kind of answer came."""
    for name in ALL:
        planned(name, "pyav")  # or skip, in this thread
    answers: Counter[str] = Counter()
    slowest = 0.0
    with DecodePool(
        num_workers=2, num_slots=8, slot_bytes=2**20, timeout_seconds=30, memory_bytes=2**31, max_ahead_bytes=2**24
    ) as pool:
        for number, decoded in enumerate(pool.map(damaged_tasks(num_files, seed))):
            assert decoded.key.startswith(f"{number} ")
            answers[answer(decoded)] += 1
            slowest = max(slowest, decoded.seconds)
        # FFmpeg says that it has no memory when a file claims a table of more than 2 GB; each such file is tried twice.
        assert pool.stats.restarts == 2 * answers["decoder_memory"], answers
    assert answers.total() == num_files
    print(f"{num_files} files, slowest {slowest:.2f} s: {dict(answers.most_common())}")
    return answers


def answer(decoded: Decoded) -> str:
    if decoded.bad is None:
        assert decoded.frames is not None and decoded.decoder is not None
        return f"frames by {decoded.decoder}"
    assert decoded.bad.reason in BAD_REASONS
    assert decoded.bad.message and "\n" not in decoded.bad.message, decoded.bad
    return decoded.bad.reason


def test_every_damaged_file_is_answered() -> None:
    answers = fuzz(4000, seed=0)
    decoders = ("torchcodec", "sequential", "pyav", "pillow")
    assert set(answers) >= {
        *(f"frames by {decoder}" for decoder in decoders),
        "decode_error",
        "truncated",
        "timestamps",
    }
    assert not {"decoder_crash", "decoder_timeout", "read_error", "digest_mismatch"} & set(answers)
    assert answers["decoder_memory"] < 40


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_one_of_thousands_of_damaged_files_is_answered(seed: int) -> None:
    answers = fuzz(30_000, seed=seed)
    assert not {"decoder_crash", "decoder_timeout"} & set(answers)


def test_probing_a_damaged_file_gives_an_answer_or_a_probe_error() -> None:
    for number in range(1000):
        data = mutate(ALL[number % len(ALL)], number)
        began = time.monotonic()
        try:
            assert isinstance(probe_video(io.BytesIO(data)), VideoInfo)
        except ProbeError as error:
            assert str(error) and "\n" not in str(error)
        assert time.monotonic() - began < 10, number
