from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from torchcodec.decoders import VideoDecoder

from tools import make_clips as tool


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips")
    tool.make_clips(out)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def entries(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "videos2caption.json").read_text(encoding="utf-8"))
    return rows


def test_every_clip_is_what_the_json_says(clips: Path) -> None:
    assert sorted(path.name for path in (clips / "videos").iterdir()) == [entry["path"] for entry in entries(clips)]
    for entry in entries(clips):
        path = clips / "videos" / entry["path"]
        metadata = VideoDecoder(path).metadata
        assert metadata.num_frames == entry["num_frames"]
        assert metadata.average_fps == pytest.approx(entry["fps"], rel=1e-6)
        assert metadata.duration_seconds == pytest.approx(entry["duration"], abs=2e-3)
        assert {"width": metadata.width, "height": metadata.height} == entry["resolution"]
        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == entry["num_frames"]


def test_clips_vary_in_caption_shape_rate_and_length(clips: Path) -> None:
    rows = entries(clips)
    captions = [caption for row in rows for caption in row["cap"]]
    assert len(captions) == len(set(captions)) == 24
    assert max(map(len, captions)) > 2 * min(map(len, captions))
    assert {(row["resolution"]["width"], row["resolution"]["height"]) for row in rows} == set(tool.SIZES)
    assert {row["fps"] for row in rows} == {float(rate) for rate in tool.RATES}
    assert 1.4 < min(row["duration"] for row in rows) < max(row["duration"] for row in rows) < 3.1


def test_captions_do_not_repeat_in_a_large_set() -> None:
    captions = [tool.caption(scene) for scene in tool.scenes(2000, seed=0, seconds=2)]
    assert len(set(captions)) == 2000


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(clips: Path, tmp_path: Path) -> None:
    """x264's macroblock tree made every second run differ, at widths of 240 and 320."""
    for name in ("again", "once more"):
        tool.make_clips(tmp_path / name)
        assert files(tmp_path / name) == files(clips)
    tool.make_clips(tmp_path / "other", num_clips=2, seed=1, seconds=0.5)
    assert entries(tmp_path / "other")[0]["cap"] != entries(clips)[0]["cap"]


@pytest.mark.parametrize("colour", tool.COLOURS)
def test_the_shape_has_its_colour_and_is_where_the_caption_says(colour: str, tmp_path: Path) -> None:
    left_to_right = next(motion for motion in tool.MOTIONS if motion.verb == "moves from left to right")
    size = {"width": 240, "height": 180, "fps": tool.RATES[0], "num_frames": 9, "long_caption": False}
    scene = tool.Scene(
        shape="square", colour=colour, motion=left_to_right, background="a plain black background", **size
    )
    tool.write_video(tmp_path / "clip.mp4", tool.draw(scene), fps=scene.fps, encoder=tool.find_encoder())
    frames_THWC = VideoDecoder(tmp_path / "clip.mp4", dimension_order="NHWC")[:].numpy().astype(int)
    for frame_HWC, x_share in zip(frames_THWC, np.linspace(0.2, 0.8, 9), strict=True):
        shape_HW = abs(frame_HWC - np.array(tool.COLOURS[colour])).max(-1) < 40
        assert shape_HW[90, round(x_share * 240)]
        assert shape_HW.nonzero()[1].mean() == pytest.approx(x_share * 240, abs=3)


@pytest.mark.parametrize("background", tool.BACKGROUNDS)
def test_every_colour_stands_out_from_every_background(background: str) -> None:
    size = {"width": 180, "height": 320, "fps": tool.RATES[0], "num_frames": 1, "long_caption": False}
    for shape in tool.SHAPES:
        scenes = [
            tool.Scene(shape=shape, colour=colour, motion=tool.MOTIONS[0], background=background, **size)
            for colour in tool.COLOURS
        ]
        frames_NHWC = np.stack([next(tool.draw(scene)).astype(int) for scene in scenes])
        shape_HW = (frames_NHWC != frames_NHWC[0]).any((0, 3))
        assert 0.005 < shape_HW.mean() < 0.1
        behind = np.unique(frames_NHWC[0][~shape_HW], axis=0)
        contrast = abs(behind[:, None] - np.array(list(tool.COLOURS.values()))).max(-1)
        assert contrast.min() > 60


@pytest.mark.parametrize("encoder", tool.ENCODERS)
def test_every_encoder_writes_a_readable_video(encoder: str, tmp_path: Path) -> None:
    try:
        av.Codec(encoder, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this FFmpeg has no {encoder}")
    scene = next(tool.scenes(1, seed=0, seconds=0.5))
    tool.write_video(tmp_path / "clip.mp4", tool.draw(scene), fps=scene.fps, encoder=encoder)
    decoder = VideoDecoder(tmp_path / "clip.mp4", dimension_order="NHWC")
    assert len(decoder) == scene.num_frames
    first = next(tool.draw(scene)).astype(int)
    assert abs(decoder[0].numpy().astype(int) - first).mean() < 12


def test_bare_json_has_only_path_and_cap(tmp_path: Path) -> None:
    tool.make_clips(tmp_path, num_clips=2, seconds=0.2, bare=True)
    assert [sorted(entry) for entry in entries(tmp_path)] == [["cap", "path"]] * 2


def test_the_command_says_in_one_line_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_clips.py", str(tmp_path / "out"), "--num-clips", "2", "--seconds", "0.2"])
    tool.main()
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "2 clips" in line
    assert tool.find_encoder() in line


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        tool.make_clips(tmp_path)


@pytest.mark.parametrize("wrong", [{"num_clips": 0}, {"seconds": 0.0}])
def test_nothing_to_show_is_refused(wrong: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="something to show"):
        tool.make_clips(tmp_path, **wrong)
