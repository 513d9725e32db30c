"""`streamprep verify SHARDS`: no byte of a shard can change unseen. (Outputs are verified in test_job.)"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streamprep.cli import main


@pytest.fixture(scope="module")
def packed(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for number, name in enumerate(["a.mp4", "b.mp4", "c.avi"]):
        make_video(folder / "dataset" / f"{number}.mp4", seed=number, num_frames=3)
        (folder / "dataset" / f"{number}.mp4").rename(folder / "dataset" / name)
        (folder / "dataset" / name).with_suffix(".txt").write_text(f"caption {number}")
    assert main(["pack", str(folder / "dataset"), str(folder / "shards")]) == 0
    return folder / "shards"


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "shards")


def test_untouched_shards_have_no_problem(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(shards)]) == 0
    assert "3 videos in 1 shard" in capsys.readouterr().out


def test_any_changed_byte_of_a_tar_is_found(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = shards / "000000.tar"
    data = tar.read_bytes()
    for position in [*range(0, len(data), 97), len(data) - 1]:
        damaged = bytearray(data)
        damaged[position] ^= 1
        tar.write_bytes(damaged)
        assert main(["verify", str(shards)]) == 1, position
        assert "WRONG 000000.tar" in capsys.readouterr().out


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_a_tar_of_another_size_is_found(
    shards: Path, change: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    tar = shards / "000000.tar"
    tar.write_bytes(change(tar.read_bytes()))
    assert main(["verify", str(shards)]) == 1
    assert "index says" in capsys.readouterr().out


def test_a_missing_tar_is_found(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "000000.tar").unlink()
    assert main(["verify", str(shards)]) == 1
    assert "000000.tar is missing: pack again" in capsys.readouterr().out


def test_an_index_that_the_manifest_does_not_know_is_found(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = shards / "000000.json"
    index.write_text(index.read_text().replace("caption 1", "caption 9"))
    assert main(["verify", str(shards)]) == 1
    assert "is not the index it was" in capsys.readouterr().out


def test_encode_refuses_a_shard_of_another_size_before_work(
    shards: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = shards / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    size = ["--max-height", "32", "--max-width", "48", "--num-frames", "1"]
    assert main(["encode", str(shards), str(tmp_path / "out"), "--model-path", str(tiny_model), *size]) == 2
    assert "000000.tar has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"format":"streamprep-shards/1","shards":[{"x":1}]}'])
def test_a_damaged_manifest_is_said_to_be(shards: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "manifest.json").write_text(content)
    assert main(["verify", str(shards)]) == 2
    assert "manifest.json" in capsys.readouterr().err
