"""Headers against decoding: what `probe_video` says is what PyAV shows, frame by frame."""

import io
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import av.logging
import numpy as np
import pytest
from av.stream import Disposition
from numbered_videos import usual_scheduling

from streamprep import mp4, probe
from streamprep.probe import ProbeError, probe_video, sniff_container
from streamprep.types import VideoInfo

av.logging.set_level(av.logging.PANIC)

NTSC = Fraction(30000, 1001)
FILM = Fraction(24000, 1001)
B_FRAMES = {"bf": "3", "g": "12"}
NO_B_FRAMES = {"bf": "0", "g": "12"}

MP4_VIDEOS = {
    "mp4 24": {"rate": 24},
    "mp4 25": {"rate": 25},
    "mp4 30": {"rate": 30},
    "mp4 ntsc": {"rate": NTSC},
    "mp4 film": {"rate": FILM},
    "mp4 without B-frames": {"codec_options": NO_B_FRAMES},
    "mp4 ntsc without B-frames": {"rate": NTSC, "codec_options": NO_B_FRAMES},
    "mp4 faststart": {"options": {"movflags": "faststart"}},
    "mp4 negative offsets": {"options": {"movflags": "negative_cts_offsets"}},
    "mp4 without edit list": {"options": {"use_editlist": "0"}},
    "mp4 of odd size": {"size": (66, 50)},
    "mp4 hevc": {"codec": "libx265", "codec_options": {"x265-params": "log-level=none"}},
    "mp4 hvc1": {"codec": "libx265", "codec_options": {"x265-params": "log-level=none"}, "tag": "hvc1"},
    "mp4 mpeg4": {"codec": "mpeg4", "codec_options": {"bf": "2"}},
    "mp4 vp9": {"codec": "libvpx-vp9"},
    "mp4 av1": {"codec": "libsvtav1", "codec_options": {"preset": "12"}},
    "mp4 one frame": {"num_frames": 1},
    "mp4 two frames": {"num_frames": 2},
    "mp4 late": {"times": [Fraction(3) + Fraction(i, 25) for i in range(30)]},
    "mp4 audio first": {"audio_first": True},
    "mp4 turned": {"turned": 90},
    "mp4 variable": {"times": [Fraction(t, 1000) for t in (0, 40, 90, 100, 300, 340, 600, 1000, 1040, 1100, 1500)]},
    "mp4 jitter": {"times": [Fraction(40 * i + (-1) ** i * 5 + 5, 1000) for i in range(30)]},
    "mov": {"format": "mov"},
    "mov mjpeg": {"format": "mov", "codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mov prores": {"format": "mov", "codec": "prores", "pix_fmt": "yuv422p10le"},
}
"""Ordinary files, for the box walk."""

OTHER_VIDEOS = {
    "mp4 fragmented": {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "mp4 hybrid": {"options": {"movflags": "frag_keyframe"}},
    "mp4 fragmented, turned": {"options": {"movflags": "frag_keyframe+empty_moov"}, "turned": 270},
    "mp4 mpeg2": {"codec": "mpeg2video"},
    "mp4 flipped": {"turned": 90, "flipped": True},
    "mkv": {"format": "matroska"},
    "mkv film": {"format": "matroska", "rate": FILM},
    "mkv late": {"format": "matroska", "times": [Fraction(3) + Fraction(i, 25) for i in range(30)]},
    "mkv audio first": {"format": "matroska", "audio_first": True},
    "mkv turned": {"format": "matroska", "turned": 90},
    "webm vp9": {"format": "webm", "codec": "libvpx-vp9"},
    "avi mpeg4": {"format": "avi", "codec": "mpeg4", "rate": 30},
    "ts": {"format": "mpegts", "rate": 30},
    "m2ts": {"format": "mpegts", "rate": 30, "options": {"mpegts_m2ts_mode": "1"}},
    "ts mpeg2": {"format": "mpegts", "codec": "mpeg2video"},
    "mpg": {"format": "vob", "codec": "mpeg2video"},
    "flv": {"format": "flv"},
    "wmv": {"format": "asf", "codec": "wmv2"},
    "gif": {"format": "gif", "codec": "gif", "rate": 10, "pix_fmt": "rgb8"},
}
"""Files for FFmpeg."""

VIDEOS = MP4_VIDEOS | OTHER_VIDEOS


@usual_scheduling()
def encode(
    *,
    format="mp4",
    codec="libx264",
    rate=25,
    num_frames=40,
    size=(64, 48),
    times=None,
    pix_fmt="yuv420p",
    codec_options=None,
    options=None,
    tag=None,
    turned=0,
    flipped=False,
    audio_first=False,
):
    """A video whose upper left quarter is white; ``times`` in seconds, ``turned`` counter-clockwise."""
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV was built without {codec}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video")  # faststart reads its own output again
        with av.open(path, "w", format=format, options=options or {}) as file:
            audio = file.add_stream("aac", rate=16000, layout="mono") if audio_first else None
            default = B_FRAMES if codec == "libx264" else {}
            stream = file.add_stream(codec, rate=rate, options=default if codec_options is None else codec_options)
            stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000) if times else 1 / Fraction(rate)
            stream.codec_context.thread_count = 1
            if tag:
                stream.codec_context.codec_tag = tag
            if turned or flipped:
                stream.set_display_rotation(turned, hflip=flipped)
            if audio:
                encode_silence(file, audio)
            for index, seconds in enumerate(times or [index / Fraction(rate) for index in range(num_frames)]):
                frame = av.VideoFrame.from_ndarray(picture(size, index), format="rgb24").reformat(format=pix_fmt)
                frame.time_base, frame.pts = stream.time_base, round(seconds / stream.time_base)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        return path.read_bytes()


def encode_silence(file, stream):
    for index in range(40):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * index, Fraction(1, 16000)
        file.mux(stream.encode(frame))
    file.mux(stream.encode())


def picture(size, index):
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 255
    pixels[-4:, index % width] = 128
    return pixels


@cache
def video(name):
    return encode(**VIDEOS[name])


@dataclass
class Decoded:
    times: list[Fraction]
    end: Fraction
    codec: str


def decode(data):
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.best("video")
        frames = list(file.decode(stream))
        last, codec = frames[-1], stream.codec_context.codec.canonical_name
        last_duration = last.duration * last.time_base if last.duration else 1 / stream.average_rate
    times = [frame.pts * frame.time_base for frame in frames]
    return Decoded(times=times, end=times[-1] + last_duration, codec=codec)


def assert_as_decoded(info, data):
    decoded = decode(data)
    assert info.num_frames == len(decoded.times)
    assert info.start_seconds == pytest.approx(decoded.times[0], abs=1e-9)
    assert info.duration_seconds == pytest.approx(decoded.end - decoded.times[0], abs=1e-9)
    assert info.codec == decoded.codec


def walk(data):
    return probe._to_video_info(mp4.read_mp4_track(io.BytesIO(data)))


def ask_ffmpeg(data):
    return probe._to_video_info(probe.read_track_with_ffmpeg(io.BytesIO(data), sniff_container(data)))


@pytest.mark.parametrize("name", VIDEOS)
def test_headers_say_what_decoding_shows(name):
    data = video(name)
    info = probe_video(io.BytesIO(data))
    assert_as_decoded(info, data)
    if not info.variable_frame_rate and name != "mp4 jitter":
        assert info.fps == float(VIDEOS[name].get("rate", 25))


@pytest.mark.parametrize("name", VIDEOS)
def test_size_is_the_one_torchcodec_decodes_to(name):
    from torchcodec.decoders import VideoDecoder

    data = video(name)
    info = probe_video(io.BytesIO(data))
    assert (info.height, info.width) == VideoDecoder(data)[0].shape[1:]


@pytest.mark.parametrize("name", MP4_VIDEOS)
def test_box_walk_agrees_with_ffmpeg(name):
    assert walk(video(name)) == ask_ffmpeg(video(name))


@pytest.mark.parametrize("name", [name for name in OTHER_VIDEOS if name.startswith("mp4")])
def test_unusual_mp4_is_left_to_ffmpeg(name):
    with pytest.raises(mp4.UnusualMp4Error):
        walk(video(name))


@pytest.mark.parametrize("counter_clockwise", [0, 90, 180, 270])
@pytest.mark.parametrize("format", ["mp4", "mov", "matroska"])
def test_rotation_is_how_players_turn(format, counter_clockwise):
    from torchcodec.decoders import VideoDecoder

    data = encode(format=format, turned=counter_clockwise, num_frames=2)
    shown = VideoDecoder(data)[0].float().mean(0)
    turned_by_hand = np.rot90(picture((64, 48), 0)[..., 0], k=-probe_video(io.BytesIO(data)).rotation // 90)
    assert shown.shape == turned_by_hand.shape
    assert abs(shown.numpy() - turned_by_hand).mean() < 10


def test_clips_of_the_wild(shared_clips):
    found = {}
    for path in sorted((shared_clips / "videos").glob("*.mp4")):
        with open(path, "rb") as file:
            info = probe_video(file)
        assert_as_decoded(info, path.read_bytes())
        found[path.stem] = (info.fps, info.num_frames, info.width, info.height)
    assert found == {
        "backyard": (24, 120, 832, 480),
        "crush-027": (16, 114, 832, 480),
        "crush-030": (16, 146, 832, 480),
        "crush-034": (16, 127, 832, 480),
        "motorcycle": (30, 120, 3840, 2160),
    }


def test_variable_frame_rate_is_told_from_jitter():
    variable = probe_video(io.BytesIO(video("mp4 variable")))
    assert variable.variable_frame_rate
    assert variable.fps == pytest.approx(variable.num_frames / variable.duration_seconds)
    assert not probe_video(io.BytesIO(video("mp4 jitter"))).variable_frame_rate


# Edit lists


def with_edits(data, *edits):
    """Replace the edit list of a file that has its index last by ``(milliseconds, media time)`` ones."""
    begin = data.index(b"edts") - 4
    (size,) = struct.unpack_from(">I", data, begin)
    elst = struct.pack(">II", 0, len(edits)) + b"".join(struct.pack(">IiI", *edit, 2**16) for edit in edits)
    edts = box(b"edts", box(b"elst", elst))
    return resized(data, begin, size, edts, parents=(b"moov", b"trak"))


def box(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + content


def resized(data, begin, size, replacement, *, parents):
    """Put other bytes in a place, and correct the sizes of the boxes around it."""
    changed = bytearray(data)
    changed[begin : begin + size] = replacement
    for kind in parents:
        position = data.rindex(kind, 0, begin) - 4
        struct.pack_into(">I", changed, position, struct.unpack_from(">I", data, position)[0] + len(replacement) - size)
    return bytes(changed)


FRAME = 512
"""Ticks of a frame in the files below, of 25 frames per second."""

EDITS = {
    "from a frame on": [(1600, 12 * FRAME)],
    "from the middle of a frame on": [(1600, 10 * FRAME + 100)],
    "from the start": [(1600, 0)],
    "to a frame": [(800, 2 * FRAME)],
    "to the middle of a frame": [(777, 2 * FRAME)],
    "a part": [(500, 20 * FRAME)],
    "one frame": [(40, 20 * FRAME)],
    "late": [(1234, -1), (1600, 2 * FRAME)],
    "late, a part": [(333, -1), (500, 20 * FRAME + 7)],
    "late by nothing": [(0, -1), (1600, 2 * FRAME)],
}


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("name", ["mp4 25", "mp4 without B-frames", "mov"])
def test_edit_list_shows_what_ffmpeg_shows(name, edits):
    data = encode(**VIDEOS[name] | {"codec_options": VIDEOS[name].get("codec_options", B_FRAMES)})
    assert b"edts" in data  # to be replaced
    data = with_edits(data, *edits)
    assert_as_decoded(walk(data), data)
    assert mp4.read_mp4_track(io.BytesIO(data)).times == ask_ffmpeg_for_times(data)


def ask_ffmpeg_for_times(data):
    return probe.read_track_with_ffmpeg(io.BytesIO(data), "mp4").times


@pytest.mark.parametrize(
    "edits", [[(400, 0), (400, 10 * FRAME)], [(400, -1)], [(400, -1), (400, -1), (400, 0)], [(0, 0)]]
)
def test_other_edit_lists_are_left_to_ffmpeg(edits):
    data = with_edits(video("mp4 25"), *edits)
    with pytest.raises(mp4.UnusualMp4Error):
        walk(data)


@pytest.mark.parametrize("format", ["mp4", "mov"])
@pytest.mark.parametrize("cut", [["-ss", "0.7"], ["-ss", "0.7", "-t", "0.61"]])
def test_video_cut_without_encoding_shows_what_ffmpeg_shows(tmp_path, format, cut):
    if not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg command")
    source, target = tmp_path / "source.mp4", tmp_path / f"cut.{format}"
    source.write_bytes(video("mp4 25"))
    subprocess.run(["ffmpeg", "-v", "error", *cut, "-i", source, "-c", "copy", target], check=True)
    info = walk(target.read_bytes())
    assert_as_decoded(info, target.read_bytes())
    assert info.num_frames < 40
    assert info.fps == 25


# Boxes


def test_64_bit_offsets_and_sizes():
    data = video("mp4 25")
    begin = data.index(b"stco") - 4
    size, _, count = struct.unpack_from(">III", data, begin)[0], *struct.unpack_from(">II", data, begin + 8)
    offsets = struct.unpack_from(f">{count}I", data, begin + 16)
    co64 = box(b"co64", struct.pack(f">II{count}Q", 0, count, *offsets))
    data = resized(data, begin, size, co64, parents=(b"moov", b"trak", b"mdia", b"minf", b"stbl"))
    free = data.index(b"free") - 4
    media_size = struct.unpack_from(">I", data, free + 8)[0]
    data = data[:free] + struct.pack(">I4sQ", 1, b"mdat", media_size + 8) + data[free + 16 :]
    assert walk(data) == ask_ffmpeg(data) == walk(video("mp4 25"))


def test_media_data_of_a_large_file_is_not_read(tmp_path):
    data = video("mp4 25")
    free, moov = data.index(b"free") - 4, data.index(b"moov") - 4
    with open(tmp_path / "large.mp4", "wb") as file:
        file.write(data[:free] + struct.pack(">I4sQ", 1, b"mdat", 2**40))
        file.seek(free + 2**40)
        file.write(data[moov:])
    with open(tmp_path / "large.mp4", "rb") as file:
        assert probe_video(file) == walk(data)


def test_last_frame_may_last_differently():
    data = bytearray(video("mp4 without B-frames"))
    begin = data.index(b"stts") + 4
    assert struct.unpack_from(">III", data, begin + 4) == (1, 40, FRAME)
    stts = struct.pack(">I4sIIIIII", 32, b"stts", 0, 2, 39, FRAME, 1, 3 * FRAME)
    data = resized(bytes(data), begin - 8, 24, stts, parents=(b"moov", b"trak", b"mdia", b"minf", b"stbl"))
    info = walk(data)
    assert_as_decoded(info, data)
    assert info.fps == 25
    assert info.duration_seconds == pytest.approx(42 / 25)
    assert not info.variable_frame_rate


def test_two_video_tracks_are_left_to_ffmpeg():
    data = video("mp4 25")
    begin = data.index(b"trak") - 4
    (size,) = struct.unpack_from(">I", data, begin)
    data = resized(data, begin, 0, data[begin : begin + size], parents=(b"moov",))
    with pytest.raises(mp4.UnusualMp4Error, match="2 video tracks"):
        walk(data)
    assert probe_video(io.BytesIO(data)).num_frames == 40


@pytest.mark.parametrize("kind", [b"mdia", b"mdhd", b"stsd", b"stts", b"stsz", b"stsc", b"stco", b"tkhd", b"mvhd"])
def test_missing_box_is_left_to_ffmpeg(kind):
    with pytest.raises(mp4.UnusualMp4Error, match="no b'"):
        walk(video("mp4 25").replace(kind, b"gone"))


@pytest.mark.parametrize("kind", [b"stts", b"ctts", b"stsz", b"stsc", b"stco", b"elst"])
def test_table_longer_than_its_box_is_left_to_ffmpeg(kind):
    data = bytearray(video("mp4 25"))
    position = data.index(kind) + (12 if kind == b"stsz" else 8)
    struct.pack_into(">I", data, position, 2**20)
    with pytest.raises(mp4.UnusualMp4Error):
        walk(bytes(data))


# FFmpeg's part


def test_vp8_frames_that_are_not_shown_are_not_counted(tmp_path):
    if not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg command")
    source = ["-f", "lavfi", "-i", "testsrc2=size=64x48:rate=25:duration=4"]
    coding = ["-c:v", "libvpx", "-b:v", "50k", "-auto-alt-ref", "1", "-lag-in-frames", "16"]
    for number, target in (("1", ["-f", "null", "-"]), ("2", ["vp8.webm"])):
        command = ["ffmpeg", "-v", "error", *source, *coding, "-pass", number, *target]
        subprocess.run(command, check=True, cwd=tmp_path)
    data = (tmp_path / "vp8.webm").read_bytes()
    with av.open(io.BytesIO(data)) as file:
        assert sum(packet.size > 0 for packet in file.demux(video=0)) > 100
    assert_as_decoded(probe_video(io.BytesIO(data)), data)


def test_cover_art_is_no_video():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "song.m4a")
        with av.open(path, "w", format="mp4") as file:
            audio, cover = file.add_stream("aac", rate=16000, layout="mono"), file.add_stream("mjpeg")
            cover.width, cover.height, cover.pix_fmt, cover.disposition = 64, 48, "yuvj420p", Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(picture((64, 48), 0), format="rgb24").reformat(format="yuvj420p")
            file.mux(cover.encode(frame))
            file.mux(cover.encode())
            encode_silence(file, audio)
        data = path.read_bytes()
    with pytest.raises(ProbeError, match=r"^no video stream$"):
        probe_video(io.BytesIO(data))


def test_huge_frames_are_not_looked_into():
    data = bytearray(video("gif"))
    data[6:10] = struct.pack("<HH", 65535, 65535)
    with pytest.raises(ProbeError, match="more than 134217728 pixels"):
        probe_video(io.BytesIO(data))


# Not videos


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_recognised(name):
    container = {"mp4": "mp4", "mov": "mp4", "mkv": "matroska", "webm": "matroska", "ts": "mpegts", "m2ts": "mpegts"}
    container |= {"mpg": "mpegps", "wmv": "asf"}
    kind = name.split()[0]
    assert sniff_container(memoryview(video(name))[:4096]) == container.get(kind, kind)


@pytest.mark.parametrize("box", [b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"])
def test_quicktime_may_begin_with_any_of_its_boxes(box):
    assert sniff_container(b"\0\0\0\x08" + box) == "mp4"


SDP = b"\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n"
NOT_VIDEOS = {
    "nothing": b"",
    "text": b"a man walks down the street " * 20,
    "text with a box name": b"gun free zone" * 20,
    "playlist": b"#EXTM3U\n#EXTINF:10,\nhttp://localhost/secret.ts\n",
    "concat": b"ffconcat version 1.0\nfile ../secret.mp4\n",
    "dash": b'<?xml version="1.0"?><MPD profiles="urn:mpeg:dash:profile:isoff-live:2011">',
    "sdp": b"v=0" + SDP,
    "tiff": b"II*\0\x08\0\0\0",
    "bmp": b"BM\x36\0\0\0",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg">',
    "wav": b"RIFF\x24\0\0\0WAVEfmt ",
    "avif": b"\0\0\0\x20ftypavif\0\0\0\0",
    "html": b"<!DOCTYPE html><html><head><title>404</title>",
    "one mpegts packet": b"\x47" + bytes(187),
    "gif of no size": b"GIF89a\0\0\0\0",
    "gif that is sdp": b"GIF89a\0\0\0\0" + SDP,
    "flv that is sdp": b"FLV\1\5\0\0\0\1" + SDP,
    "asf that is sdp": bytes.fromhex("3026b2758e66cf11") + SDP,
    "mpegts that is sdp": (b"G" + b"x" * 187) * 3 + SDP,
    "ogg that is sdp": b"OggS\xff" + SDP,
    "mdat that is dash": b"    mdat\n<MPD profiles='urn:mpeg:dash:profile:isoff-live:2011'>",
}
"""Those "that are sdp" FFmpeg 5.1 takes for SDP, and then waits for the network, as ``ffprobe -v debug`` shows."""


@pytest.mark.parametrize("data", NOT_VIDEOS.values(), ids=NOT_VIDEOS.keys())
def test_all_else_is_refused_before_ffmpeg_sees_it(data, monkeypatch):
    monkeypatch.setattr(av, "open", None)
    assert sniff_container(data) is None
    with pytest.raises(ProbeError, match=r"not a video: it begins with b'|its header cannot be read"):  # of an image
        probe_video(io.BytesIO(data))


def test_playlist_named_as_a_known_container_opens_nothing():
    playlist = io.BytesIO(b"#EXTM3U\n#EXTINF:10,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    for container in probe._CONTAINERS:
        with pytest.raises(ProbeError):
            probe.read_track_with_ffmpeg(playlist, container)


# Broken files


def test_file_without_index_is_an_error():
    data = video("mp4 25")
    with pytest.raises(ProbeError, match="no moov box: the file was cut off"):
        probe_video(io.BytesIO(data[: data.index(b"moov") - 4]))


def test_cut_off_index_is_an_error():
    with pytest.raises(ProbeError, match=r"moov box is cut off: \d+ of \d+ bytes are there"):
        probe_video(io.BytesIO(video("mp4 25")[:-100]))


def test_index_of_4_gb_is_an_error():
    data = video("mp4 25")
    begin = data.index(b"moov") - 4
    with pytest.raises(ProbeError, match="claims 4294967287 bytes"):
        probe_video(io.BytesIO(data[:begin] + b"\xff\xff\xff\xff" + data[begin + 4 :]))


def test_endless_small_boxes_are_an_error():
    with pytest.raises(ProbeError, match="no moov box among the first"):
        probe_video(io.BytesIO(box(b"free", b"") * 20_000))


def test_boxes_without_end_or_size_are_an_error():
    for header in (b"\0\0\0\0free", b"\0\0\0\1free", b"\0\0\0\7free", b"\0\0\0\1free" + b"\0" * 8):
        with pytest.raises(ProbeError):
            probe_video(io.BytesIO(header + bytes(64)))


def mutate(data, rng):
    """Flip bits, put in extreme numbers or noise, take bytes out or in; mostly in the index."""
    changed = bytearray(data)
    begin = max(0, data.find(b"moov"))
    for _ in range(rng.choice([1, 2, 5, 20])):
        position = rng.randrange(begin, len(changed) - 8)
        noise = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\1", b"\x7f\xff\xff\xff", rng.randbytes(8)])
        match rng.randrange(4):
            case 0:
                changed[position] ^= 1 << rng.randrange(8)
            case 1:
                changed[position : position + len(noise)] = noise
            case 2:
                del changed[position : position + rng.choice([1, 4])]
            case 3:
                changed[position:position] = noise
    return bytes(changed)


@pytest.mark.parametrize(
    "name", ["mp4 25", "mov", "mp4 late", "mp4 fragmented", "mkv", "avi mpeg4", "ts", "flv", "gif"]
)
def test_mutated_headers_give_an_answer_or_a_probe_error(name):
    for seed in range(300):
        began = time.perf_counter()
        try:
            assert isinstance(probe_video(io.BytesIO(mutate(video(name), random.Random(seed)))), VideoInfo)
        except ProbeError as error:
            assert "\n" not in str(error)
        assert time.perf_counter() - began < 1, f"seed {seed}"


def test_importing_is_cheap():
    code = "import sys, streamprep.probe; print(sorted({'torch', 'numpy', 'av'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
