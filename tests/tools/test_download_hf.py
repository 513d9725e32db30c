from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_hub
import pytest

Download = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    (root / "videos").mkdir()
    (root / "videos" / "a.mp4").write_bytes(b"a video")
    (root / "videos2caption.json").write_text("[]")
    return root


@pytest.fixture(scope="module")
def download(repository: Path, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Download]:
    with fake_hub.serve({"org/clips": repository}) as url:
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path_factory.mktemp("home"))}

        def run(*arguments: object) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "tools/download_hf.py", *map(str, arguments)]
            return subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, timeout=120)

        yield run


@pytest.mark.parametrize(
    "flags", [("--repo_id", "--local_dir", "--repo_type"), ("--repo-id", "--local-dir", "--repo-type")]
)
def test_a_dataset_lands_in_the_folder(download: Download, tmp_path: Path, flags: tuple[str, str, str]) -> None:
    name, folder, kind = flags
    ran = download(name, "org/clips", folder, tmp_path, kind, "dataset")
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path}\n"), ran.stderr
    assert (tmp_path / "videos" / "a.mp4").read_bytes() == b"a video"
    assert (tmp_path / "videos2caption.json").read_text() == "[]"


def test_one_file_of_it(download: Download, tmp_path: Path) -> None:
    where = ("--repo_id", "org/clips", "--local_dir", tmp_path, "--repo_type", "dataset")
    assert download(*where, "--file_name", "videos/a.mp4").returncode == 0
    assert (tmp_path / "videos" / "a.mp4").read_bytes() == b"a video"
    assert not (tmp_path / "videos2caption.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [("org/nothing",), ("org/clips", "--revision", "v9"), ("org/clips", "--file_name", "x.mp4"), ("not a name",)],
)
def test_what_is_not_there_is_wrong_usage(download: Download, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    name, *more = arguments
    ran = download("--repo_id", name, "--local_dir", tmp_path, "--repo_type", "dataset", *more)
    assert ran.returncode == 2
    assert f"download_hf.py: the hub has no such dataset {name}" in ran.stderr
