"""What lies in an output folder and is not known to be ours is never overwritten, nor taken for ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from streamprep.cli import main
from streamprep.errors import Stopped


@pytest.mark.parametrize("name", ["000000.tar", "000000.json", "manifest.json", "skipped.jsonl"])
def test_pack_leaves_files_of_others_alone(
    name: str, make_video: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video(tmp_path / "dataset" / "a.mp4")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / name).write_text("mine")
    assert main(["pack", str(tmp_path / "dataset"), str(tmp_path / "shards")]) == 2
    assert f"has a file {name} but no pack.json" in capsys.readouterr().err
    assert (tmp_path / "shards" / name).read_text() == "mine"


def test_records_without_a_plan_are_not_taken_for_this_jobs(
    make_video: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video(tmp_path / "dataset" / "a.mp4")
    (tmp_path / "dataset" / "a.txt").write_text("a caption")
    size = ["--max-height", "32", "--max-width", "48", "--num-frames", "1", "--serial"]
    job = ["run", str(tmp_path / "dataset"), str(tmp_path / "out"), "--model-path", str(tiny_model), *size]
    assert main(job) == 0
    (tmp_path / "out/_streamprep/index.parquet").write_bytes(b"garbage")
    (tmp_path / "out/_streamprep/records/000000.json").unlink()
    assert main(job) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    (tmp_path / "out/_streamprep/plan.json").unlink()
    assert main(job) == 2
    assert "records of a job whose _streamprep/plan.json is lost" in capsys.readouterr().err


def test_a_stop_passes_through_libraries_that_swallow_exceptions() -> None:
    assert not issubclass(Stopped, Exception)
