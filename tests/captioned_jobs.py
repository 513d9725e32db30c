"""Fixtures for tests of what is written: shards with several captions a video, and their jobs, encoded in this process.

A test module says ``pytest_plugins = ["captioned_jobs"]``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamprep import cli
from streamprep.job import Job, open_job
from streamprep.storage import open_store

Encode = Callable[..., Job]

FLAGS = (
    *("--max-height=32", "--max-width=64", "--num-frames=5", "--train-fps=1", "--samples-per-file=2"),
    *("--encode-threads=1", "--device=cpu", "--serial"),
)
CAPTIONS = {"0": ["Zero."], "1": ["One.", "", "Another one."], "2": ["Two.", "Two again."], "3": ["Three."]}


@pytest.fixture(scope="session")
def captioned(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, of videos with one to three captions each."""
    root = tmp_path_factory.mktemp("dataset")
    for number in CAPTIONS:
        make_video(root / "videos" / f"{number}.mp4", fps=1, seed=int(number), padding_bytes=400_000)
    rows = [
        {"path": f"{number}.mp4", "cap": captions, "score": 0.5, "author": f"author {number}", "odd_bytes": 1}
        for number, captions in CAPTIONS.items()
    ]
    (root / "videos2caption.json").write_text(json.dumps(rows))
    assert cli.main(["pack", str(root), str(root / "shards"), "--shard-size-mb=1", "--num-workers=1"]) == 0
    return root / "shards"


@pytest.fixture(scope="session")
def encode(captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Encode:
    """``encode(model, *flags)``: the finished job."""
    done: dict[tuple[Any, ...], Job] = {}

    def run(model: Path, *flags: str) -> Job:
        if (model, *flags) not in done:
            out = tmp_path_factory.mktemp("out") / "out"
            assert cli.main(["encode", str(captioned), str(out), "--model-path", str(model), *FLAGS, *flags]) == 0
            done[model, *flags] = open_job(open_store(out))
        return done[model, *flags]

    return run
