"""Images and videos side by side, from a folder of files to rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from exporters import fastvideo
from streamprep.cli import main
from streamprep.finalize import totals

if TYPE_CHECKING:
    from jobs import EncodeJob

    NewJob = Callable[..., EncodeJob]

pytest_plugins = ["jobs"]

PICTURES = {"landscape.jpg": (72, 48), "portrait.png": (48, 72), "large.webp": (480, 320)}
"""Their sizes; what is in them follows from those."""
BOTH = "32x48x5,32x48x1,48x32x1"


def draw(size: tuple[int, int]) -> Image.Image:
    """A smooth picture, which survives being JPEG."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


@pytest.fixture
def shards(make_video: Callable[..., Path], tmp_path: Path) -> Path:
    """Two videos, one of them too short, three images, and one that is cut off."""
    root = tmp_path / "dataset"
    make_video(root / "video.mp4", fps=1)
    make_video(root / "short.mp4", fps=1, num_frames=2)
    for name, size in PICTURES.items():
        draw(size).save(root / name, quality=95)
    draw((400, 400)).save(root / "whole.jpg", quality=95)
    (root / "damaged.jpg").write_bytes((root / "whole.jpg").read_bytes()[:-2000])
    (root / "whole.jpg").unlink()
    for path in list(root.iterdir()):
        path.with_suffix(".txt").write_text(f"Called {path.name}.")
    assert main(["pack", str(root), str(tmp_path / "shards"), "--num-workers", "1"]) == 0
    return tmp_path / "shards"


def rows_of(encoded: EncodeJob) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(encoded.out / fastvideo.FOLDER).to_pylist()}


@pytest.mark.parametrize("serial", [True, False])
def test_images_and_videos_are_rows_of_buckets_of_their_own(new_job: NewJob, shards: Path, serial: bool) -> None:
    encoded = new_job(shards)
    ended = encoded.run(serial=serial, buckets=BOTH)
    assert ended.code == 0, ended.output
    rows = rows_of(encoded)
    seen = {
        name: (row["media_type"], row["height"], row["width"], row["num_frames"], row["fps"])
        for name, row in rows.items()
    }
    assert seen == {
        "landscape.jpg": ("image", 32, 48, 1, 1.0),
        "large.webp": ("image", 32, 48, 1, 1.0),
        "portrait.png": ("image", 48, 32, 1, 1.0),
        "video.mp4": ("video", 32, 48, 2, 1.0),
    }
    assert {name: row["vae_latent_shape"][1:] for name, row in rows.items()} == {
        "landscape.jpg": [1, 4, 6],
        "large.webp": [1, 4, 6],
        "portrait.png": [1, 6, 4],
        "video.mp4": [2, 4, 6],
    }
    assert totals(encoded.job).dropped == {"too_short": 1}
    assert set(totals(encoded.job).bad) <= {"truncated", "decode_error"}
    assert sum(totals(encoded.job).bad.values()) == 1
    assert encoded.problems() == []


def test_one_picture_gives_one_latent_whatever_its_size_and_the_training_rate(new_job: NewJob, shards: Path) -> None:
    """Both show the same, one ten times larger; at 16 frames a second they are one frame all the same."""
    encoded = new_job(shards)
    assert encoded.run(serial=True, num_frames=1, train_fps=16).code == 0
    rows = rows_of(encoded)
    small, large = (
        np.frombuffer(rows[name]["vae_latent_bytes"], np.float32) for name in ("landscape.jpg", "large.webp")
    )
    assert np.abs(small - large).mean() < 0.1 * np.abs(small).mean()
    assert rows["video.mp4"]["media_type"] == rows["short.mp4"]["media_type"] == "video"
    assert {row["num_frames"] for row in rows.values()} == {1}


def test_where_there_is_no_bucket_for_images_they_are_dropped_and_plan_says_so(
    new_job: NewJob, shards: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded = new_job(shards)
    assert encoded.run(serial=True).code == 0
    assert set(rows_of(encoded)) == {"video.mp4"}
    assert totals(encoded.job).dropped == {"too_short": 5}
    size = ["--max-height", "32", "--max-width", "48", "--num-frames", "5", "--train-fps", "1"]
    capsys.readouterr()
    assert main(["plan", str(shards), "--model-path", str(model), *size, "--buckets", BOTH]) == 0
    assert "; 3 images among them" in capsys.readouterr().out
    assert main(["plan", str(shards), "--model-path", str(model), *size, "--where", "media_type = 'image'"]) == 0
    assert "encoded   0 clips in 0 rows" in capsys.readouterr().out
