"""Fixtures of finished outputs for the reader: made by `streamprep encode`, and tables of any size made by hand.

A test module says ``pytest_plugins = ["jobs", "latents"]``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forks import Forks

from exporters import fastvideo
from streamprep import canonical, job
from streamprep.storage import open_store

FLAGS = ("--num-frames", 5, "--train-fps", 1, "--encode-threads", 1, "--device", "cpu", "--serial")
LANDSCAPE, PORTRAIT = 9, 6
TWO_CAPTIONS = 5
"""Of the videos, the first so many have two."""
NUM_ROWS = LANDSCAPE + PORTRAIT + TWO_CAPTIONS


@dataclass(frozen=True)
class Encoded:
    """A finished output, and what a stranger's Parquet reader finds in it."""

    out: Path
    tensors: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]
    """By key and name."""

    @property
    def keys(self) -> set[str]:
        return set(self.tensors)

    @property
    def contract(self) -> Mapping[str, Any]:
        return job.open_job(open_store(self.out)).plan.contract


def read_all(out: Path) -> Encoded:
    store = open_store(out)
    tensors = {}
    for record in job.open_job(store).records():
        for file in record.files:
            for row, (_, arrays) in zip(file.rows, fastvideo.read_file(store, file.name), strict=True):
                tensors[row.key] = {name: array.numpy() for name, array in arrays.items()}
    return Encoded(out, tensors)


@pytest.fixture(scope="session")
def encode_videos(
    forks: Forks, make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``encode_videos(model, captions_of, sizes_of, *flags)``: the output."""

    def encode(model: Path, captions: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]], *flags: object) -> Path:
        root = tmp_path_factory.mktemp("latents")
        for number, name in enumerate(captions):
            make_video(root / "dataset/videos" / name, fps=1, seed=number, size=sizes[name])
        rows = [{"path": name, "cap": cap} for name, cap in captions.items()]
        (root / "dataset/videos2caption.json").write_text(json.dumps(rows))
        for verb, *arguments in (
            ("pack", root / "dataset", root / "shards", "--num-workers", 1),
            ("encode", root / "shards", root / "out", "--model-path", model, *FLAGS, *flags),
        ):
            done = forks.run(verb, *arguments)
            assert done.code == 0, done.output
        shutil.rmtree(root / "dataset")
        return root / "out"

    return encode


@pytest.fixture(scope="session")
def latents(encode_videos: Callable[..., Path], tiny_model: Path) -> Encoded:
    """Text to video: 20 rows of 15 clips in two buckets, in files of at most 3."""
    names = [f"wide_{n}.mp4" for n in range(LANDSCAPE)] + [f"tall_{n}.mp4" for n in range(PORTRAIT)]
    sizes = {name: (64, 48) if name.startswith("wide") else (48, 64) for name in names}
    captions = {
        name: [f"This is {name}.", f"Again {name}, in other and a few more words."][: 1 + (number < TWO_CAPTIONS)]
        for number, name in enumerate(names)
    }
    flags = ("--buckets", "32x48,48x32", "--caption", "all", "--samples-per-file", 3)
    return read_all(encode_videos(tiny_model, captions, sizes, *flags))


@pytest.fixture(scope="session")
def i2v_latents(encode_videos: Callable[..., Path], tiny_models: Callable[[str], Path]) -> Encoded:
    """Image to video: three rows."""
    names = [f"{n}.mp4" for n in range(3)]
    flags = ("--workload-type", "i2v", "--max-height", 32, "--max-width", 48)
    out = encode_videos(
        tiny_models("2.1-i2v"), {name: f"Video {name}" for name in names}, dict.fromkeys(names, (64, 48)), *flags
    )
    return read_all(out)


@pytest.fixture(scope="session")
def moments(encode_videos: Callable[..., Path], tiny_model: Path) -> Path:
    """Four rows with mean and log variance."""
    names = [f"{n}.mp4" for n in range(4)]
    flags = ("--max-height", 32, "--max-width", 48, "--posterior", "moments")
    exporter = ("--exporter", "moments_exporter:open_shard")
    captions = {name: f"Video {name}" for name in names}
    return encode_videos(tiny_model, captions, dict.fromkeys(names, (64, 48)), *flags, *exporter)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Encoded | Path], Path]:
    """``copy_of(latents)``: an output to damage."""

    def copy(what: Encoded | Path) -> Path:
        target = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(what.out if isinstance(what, Encoded) else what, target)
        return target

    return copy


def change_plan(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Make another contract of an output's."""
    path = out / job.PLAN
    plan = json.loads(path.read_bytes())
    change(plan["contract"])
    path.write_bytes(canonical.to_pretty_json(plan))


def change_index(out: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Make another index of an output's."""
    path = out / job.INDEX
    pq.write_table(change(pq.read_table(path)), path)


def write_table_of(out: Path, like: Path, *, num_rows: int) -> Path:
    """An output with so many rows, whose tensors lie in files of zeros that take no room.

    Args:
        out: Where.
        like: The output whose plan it has.
        num_rows: How many.
    """
    rows_per_file, file_size = 64, 10**7
    (out / "_streamprep").mkdir(parents=True)
    shutil.copy(like / job.PLAN, out / job.PLAN)
    numbers = np.arange(num_rows)
    names = [f"data/{number:06d}.bin" for number in range(-(-num_rows // rows_per_file))]
    (out / "data").mkdir()
    for name in names:
        with open(out / name, "wb") as file:
            file.truncate(file_size)
    lengths = 10 + numbers % 100
    shapes = pa.array([[16, 2, 4, 6], [16, 2, 6, 4]]).take(pa.array(numbers % 2))
    table = pa.table(
        {
            "key": [f"videos/part_{n // 1000:04d}/clip_{n:08d}" for n in range(num_rows)],
            "file": pa.array(names).take(pa.array(numbers // rows_per_file)),
            "file_size": np.full(num_rows, file_size),
            "row_group": numbers % rows_per_file,
            "bucket": pa.array(["5x32x48", "5x48x32"]).take(pa.array(numbers % 2)),
            "vae_latent_offset": numbers % rows_per_file * 100_000,
            "vae_latent_size": np.full(num_rows, 4 * 16 * 2 * 4 * 6),
            "vae_latent_dtype": ["float32"] * num_rows,
            "vae_latent_shape": shapes,
            "text_embedding_offset": numbers % rows_per_file * 100_000 + 40_000,
            "text_embedding_size": lengths * 32 * 4,
            "text_embedding_dtype": ["float32"] * num_rows,
            "text_embedding_shape": pa.ListArray.from_arrays(
                np.arange(num_rows + 1) * 2, np.stack([lengths, np.full(num_rows, 32)], axis=1).ravel()
            ),
        }
    )
    pq.write_table(table, out / job.INDEX, compression="zstd")
    return out
