from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamprep.sources import list_dataset
from tools import prepare_json_file as tool

CAPTIONS = {"a.mp4": "an apple", "deep/down/b.mp4": "日本", os.fsdecode(b"caf\xe9.mp4"): "coffee"}


@pytest.fixture
def video(make_video: Callable[..., Path]) -> Callable[[Path], Path]:
    return lambda path: make_video(path, size=(64, 48), fps=24, num_frames=12)


def rows_of(file: Path) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in json.loads(file.read_text())}


@pytest.mark.parametrize("dashes", [False, True])
def test_a_raw_folder_becomes_a_merged_one(
    make_dataset: Callable[..., Path], video: Callable[[Path], Path], dashes: bool
) -> None:
    root = make_dataset("raw", {name: CAPTIONS[name] for name in ("a.mp4", "deep/down/b.mp4")}, video=video)
    flag = "--data-folder" if dashes else "--data_folder"
    assert tool.main([flag, str(root), "--output", "videos2caption.json"]) == 0
    rows = rows_of(root / "videos2caption.json")
    assert list(rows) == ["a.mp4", "deep/down/b.mp4"]
    assert rows["a.mp4"] == {
        "path": "a.mp4",
        "resolution": {"width": 64, "height": 48},
        "size": (root / "videos" / "a.mp4").stat().st_size,
        "fps": 24.0,
        "duration": 0.5,
        "num_frames": 12,
        "cap": ["an apple"],
    }
    merged = list_dataset(root, "auto").samples
    assert [(sample.file_name, sample.captions) for sample in merged] == [
        ("a.mp4", ("an apple",)),
        ("deep/down/b.mp4", ("日本",)),
    ]
    assert merged[0].declared == {name: rows["a.mp4"][name] for name in ("fps", "num_frames", "duration", "resolution")}
    assert not (root / ".tmp").exists()


@pytest.mark.parametrize("where", ["", "videos/", "more/videos/"])
def test_videos_with_captions_beside_them_are_found_again(
    make_dataset: Callable[..., Path], video: Callable[[Path], Path], where: str
) -> None:
    root = make_dataset("folder", {f"{where}{name}": caption for name, caption in CAPTIONS.items()}, video=video)
    assert tool.main(["--data_folder", str(root), "--output", "videos2caption.json"]) == 0
    inside = where.removeprefix("videos/")
    assert set(rows_of(root / "videos2caption.json")) == {f"{inside}{name}" for name in CAPTIONS}
    listing = list_dataset(root, "merged")
    assert sorted(sample.captions[0] for sample in listing.samples) == sorted(CAPTIONS.values())
    assert listing.skipped == []


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("x.json", "dataset/x.json"),
        ("{}/y/z.json", "y/z.json"),
        ("{}/y/", "y/videos2caption.json"),
        ("{}", "videos2caption.json"),
    ],
)
def test_the_output_is_a_name_a_path_or_a_folder(
    make_dataset: Callable[..., Path], video: Callable[[Path], Path], tmp_path: Path, output: str, expected: str
) -> None:
    root = make_dataset("folder", {"a.mp4": "an apple"}, video=video)
    assert tool.main(["--data_folder", str(root), "--output", output.format(tmp_path)]) == 0
    assert list(rows_of(tmp_path / expected)) == ["a.mp4"]


def test_what_cannot_be_read_is_left_out_and_named(
    make_dataset: Callable[..., Path], video: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_dataset("raw", {"a.mp4": "an apple", "b.mp4": "b", "c.mp4": "c"}, video=video)
    (root / "videos" / "b.mp4").write_text("text")
    (root / "videos" / "c.mp4").unlink()
    assert tool.main(["--data_folder", str(root), "--output", "videos2caption.json"]) == 0
    out, err = capsys.readouterr()
    assert list(rows_of(root / "videos2caption.json")) == ["a.mp4"]
    assert "left out b.mp4: not a video" in err and "left out c.mp4: missing" in err
    assert out == f"1 video in {root}/videos2caption.json, 2 left out\n"


@pytest.mark.parametrize(
    ("captions", "message"),
    [({}, "lists no videos"), ({"a.mp4": "", "b.mp4": " "}, "none of 2 videos has a caption, a .txt beside it")],
)
def test_a_folder_without_videos_or_captions_is_refused(
    make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str], captions: dict[str, str], message: str
) -> None:
    root = make_dataset("folder", captions)
    assert tool.main(["--data_folder", str(root), "--output", "videos2caption.json"]) == 2
    assert message in capsys.readouterr().err
    assert not (root / "videos2caption.json").exists()
