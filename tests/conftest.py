"""What tests share: small real videos, datasets in every layout, and commands in processes of their own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import settings

from streamprep.crashpoints import VARIABLE

settings.register_profile("streamprep", deadline=None, derandomize=True, database=None)
settings.load_profile("streamprep")


@pytest.fixture(autouse=True)
def no_priority_over_others() -> Iterator[None]:
    """A test that leaves this process with real-time priority starves whatever later tests start; see SVT-AV1."""
    yield
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_clips(repo_root: Path) -> Path:
    """Five real clips in the merged layout, where the checkout lies beside them."""
    clips = repo_root.parent / "shared" / "clips"
    if not clips.is_dir():
        pytest.skip(f"no {clips}")
    return clips


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_models(variant)``: a complete model of that Wan's shape, made once. Copy it to change it."""
    from streamprep.testing.tiny_model import make_tiny_model

    @functools.cache
    def make(variant: str) -> Path:
        out = tmp_path_factory.mktemp(f"model-{variant}") / "tiny-wan"
        make_tiny_model(out, variant=variant)
        return out

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_models: Callable[[str], Path]) -> Path:
    """The text-to-video model, as the demo's."""
    return tiny_models("2.1-t2v")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """These layers are so small that threads gain nothing on a free machine and lose 20x on a busy one, waiting."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_video(
    path: Path,
    *,
    size: tuple[int, int] = (64, 48),
    fps: int = 16,
    num_frames: int = 8,
    seed: int = 0,
    codec: str = "libx264",
    padding_bytes: int = 0,
) -> Path:
    """Write an MP4 in which every frame, and every seed, looks different.

    Args:
        path: Where; folders are made.
        size: Width and height in pixels.
        fps: Frames per second.
        num_frames: How many.
        seed: Of the blurred noise that moves through the picture.
        codec: ``libx264`` or ``mpeg4``.
        padding_bytes: Size of a box at the end that players pass over, to make the file as large as wanted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            frame = np.ascontiguousarray(np.roll(picture, number * 2, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    if padding_bytes:
        with open(path, "ab") as file:
            file.write(padding_bytes.to_bytes(4, "big") + b"free" + bytes(padding_bytes - 8))
    return path


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    """`write_video`."""
    return write_video


@pytest.fixture
def mount_small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``mount_small_disk(megabytes)``: a file system with so much room, until the test ends."""
    with ExitStack() as mounted:

        def mount(megabytes: int) -> Path:
            disk = Path(tempfile.mkdtemp(prefix="disk-", dir=tmp_path))
            command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", disk]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
            mounted.callback(subprocess.run, ["umount", disk], check=True)
            return disk

        yield mount


def write_dataset(
    layout: str, root: Path, captions: Mapping[str, str], *, video: Callable[[Path], object] | None = None
) -> Path:
    """Write a dataset.

    Args:
        layout: Any of our sources'.
        root: Its folder.
        captions: Of each video, by its path in the dataset.
        video: Writes one video; without it the files hold their own names, which is enough to be listed.
    """
    videos = root / "videos" if layout in ("merged", "raw") else root
    for name in captions:
        path = videos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if video is None:
            path.write_bytes(os.fsencode(name))
        else:
            video(path)
    if layout == "merged":
        rows = [{"path": name, "cap": caption} for name, caption in captions.items()]
        (root / "videos2caption.json").write_text(json.dumps(rows))
    elif layout == "raw":
        (root / "videos.txt").write_text("".join(f"{name}\n" for name in captions))
        (root / "prompt.txt").write_text("".join(f"{caption}\n" for caption in captions.values()))
    elif layout == "folder":
        for name, caption in captions.items():
            (root / name).with_suffix(".txt").write_text(caption)
    elif layout == "manifest":
        rows = [{"video": name, "caption": caption} for name, caption in captions.items()]
        (root / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif layout == "webdataset":
        write_tars(root, captions)
    elif layout == "hf":
        write_hf_dataset(root, captions)
    else:
        raise ValueError(f"teach write_dataset the layout {layout!r}, so that the tests of every source take it")
    return root


def write_tars(root: Path, captions: Mapping[str, str]) -> None:
    """Move the videos of a folder, with their captions, into tars as webdataset writes them, two samples in each."""
    import webdataset

    names = list(captions)
    for number in range(0, len(names), 2):
        with webdataset.TarWriter(str(root / f"{number // 2:05d}.tar")) as tar:
            for name in names[number : number + 2]:
                stem, _, extension = name.rpartition(".")
                tar.write({"__key__": stem, extension: (root / name).read_bytes(), "txt": captions[name]})
    for name in names:
        (root / name).unlink()


def write_hf_dataset(root: Path, captions: Mapping[str, str]) -> None:
    """Move the videos of a folder, with their captions, into a folder as ``datasets`` saves them, bytes included."""
    import datasets

    rows = [
        {"video": {"path": name, "bytes": (root / name).read_bytes()}, "caption": captions[name]} for name in captions
    ]
    features = datasets.Features({"video": datasets.Video(decode=False), "caption": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(root))
    for name in captions:
        (root / name).unlink()


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """``make_dataset(layout, captions, video=...)``: `write_dataset` into ``tmp_path / "dataset"``."""

    def make(layout: str, captions: Mapping[str, str], **options: Any) -> Path:
        root = tmp_path / "dataset"
        root.mkdir(exist_ok=True)
        return write_dataset(layout, root, captions, **options)

    return make


@pytest.fixture(scope="session")
def run_python(repo_root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_python(*arguments, crash_at=...)``: a Python process of its own, killed at that point."""

    def run(*arguments: object, crash_at: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        if crash_at is not None:
            environment[VARIABLE] = crash_at
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=repo_root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture(scope="session")
def run_cli(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_cli("pack", ..., crash_at=...)``: the command line in a process of its own."""

    def run(*arguments: object, crash_at: str | None = None) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "streamprep", *arguments, crash_at=crash_at)

    return run
