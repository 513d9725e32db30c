"""The contract of every source: adding a file to ``streamprep/sources`` adds its tests here."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from quick_cases import mostly_slow

from streamprep import plugins
from streamprep.config import PackConfig
from streamprep.errors import UserError
from streamprep.manifest import load_index, load_manifest
from streamprep.pack import pack
from streamprep.sources import list_dataset
from streamprep.sources._files import Listing, SourceOptions
from streamprep.sources._tree import open_tree
from streamprep.storage import open_store
from streamprep.types import RawSample

SOURCES = [name for name in plugins.names("streamprep.sources") if name != "prompts"]  # it has no videos
FILE_SOURCES = [name for name in SOURCES if name not in ("hf", "webdataset")]
"""Those whose videos are files of their own."""
CAPTIONS = {"b.mp4": "a ball", "a.mov": "an apple", "deep/down/c.MKV": "a cat"}
VIDEO_BYTES = 400 * 2**10  # so that two fit in a shard of 1 MiB

MakeDataset = Callable[..., Path]


def seen(listing: Listing) -> dict[bytes, tuple[str, ...]]:
    """Captions by the bytes of their video."""
    found = {}
    for sample in listing.samples:
        with listing.open_video(sample) as file:
            found[file.read()] = sample.captions
            assert (file.seek(0, os.SEEK_END), file.seek(0)) == (sample.size_bytes, 0)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sample_of(listing: Listing, name: str) -> RawSample:
    (sample,) = (sample for sample in listing.samples if sample.file_name.endswith(name))
    return sample


# --- listing


@pytest.mark.parametrize("layout", SOURCES)
def test_it_lists_every_video_with_its_caption(make_dataset: MakeDataset, layout: str) -> None:
    root = make_dataset(layout, CAPTIONS)
    listing = list_dataset(root, layout)
    assert seen(listing) == {os.fsencode(name): (caption,) for name, caption in CAPTIONS.items()}
    keys = [sample.key for sample in listing.samples]
    assert keys == sorted(set(keys))
    assert sorted(Path(sample.file_name).suffix.lower() for sample in listing.samples) == [".mkv", ".mov", ".mp4"]
    assert listing.skipped == []


@pytest.mark.parametrize("layout", SOURCES)
def test_it_lists_the_same_twice(make_dataset: MakeDataset, layout: str) -> None:
    root = make_dataset(layout, CAPTIONS)
    assert list_dataset(root, layout).samples == list_dataset(root, layout).samples


@pytest.mark.parametrize("layout", SOURCES)
def test_it_is_recognised(make_dataset: MakeDataset, layout: str) -> None:
    root = make_dataset(layout, CAPTIONS)
    assert list_dataset(root, "auto").samples == list_dataset(root, layout).samples


@pytest.mark.parametrize("layout", SOURCES)
def test_it_does_not_recognise_an_empty_folder(tmp_path: Path, layout: str) -> None:
    assert not plugins.load("streamprep.sources", layout).matches(open_tree(tmp_path))
    with pytest.raises(UserError, match=r"is missing|lists no videos|contain any data files"):
        list_dataset(tmp_path, layout)


@pytest.mark.parametrize("layout", SOURCES)
def test_it_changes_a_samples_version_with_its_bytes(make_dataset: MakeDataset, layout: str) -> None:
    root = make_dataset(layout, {"a.mp4": "an apple"})
    (before,) = list_dataset(root, layout).samples
    for path in root.rglob("*"):
        os.utime(path, (0, 0))
    (after,) = list_dataset(root, layout).samples
    assert after.version != before.version


@pytest.mark.parametrize("layout", SOURCES)
def test_it_refuses_options_that_mean_nothing_to_it(make_dataset: MakeDataset, layout: str) -> None:
    known = getattr(plugins.load("streamprep.sources", layout), "OPTIONS", ())
    root = make_dataset(layout, CAPTIONS)
    for option in {"video_column", "caption_column", "split"} - {*known}:
        with pytest.raises(UserError, match=rf"--{option.replace('_', '-')} says nothing about .* the layout {layout}"):
            list_dataset(root, layout, SourceOptions(**{option: "x"}))


@pytest.mark.parametrize("layout", SOURCES)
def test_captions_no_encoder_should_see_are_skipped_with_a_reason(make_dataset: MakeDataset, layout: str) -> None:
    root = make_dataset(layout, {"a.mp4": "an apple", "b.mp4": "a\0b", "c.mp4": "x" * 100_001})
    listing = list_dataset(root, layout)
    assert seen(listing) == {b"a.mp4": ("an apple",)}
    assert sorted(skipped.reason for skipped in listing.skipped) == ["caption_nul", "caption_too_long"]


@pytest.mark.parametrize("layout", [layout for layout in SOURCES if layout != "hf"])
def test_it_refuses_two_videos_of_one_key(make_dataset: MakeDataset, layout: str) -> None:
    root = make_dataset(layout, {"a.mp4": "an apple", "b.mp4": "", "c.mp4": "", "a.mov": "another"})
    with pytest.raises(
        UserError, match=r"'a\.mp4'.* and 'a\.mov'.* have the same key 'a'|'a\.mov'.* and 'a\.mp4'.* ha"
    ):
        list_dataset(root, layout)


# --- files


@pytest.mark.parametrize("layout", FILE_SOURCES)
def test_a_link_inside_the_dataset_is_followed(make_dataset: MakeDataset, layout: str) -> None:
    root = make_dataset(layout, CAPTIONS)
    path = root / sample_of(list_dataset(root, layout), "a.mov").path
    (root / "kept").mkdir()
    path.rename(root / "kept" / "original")
    path.symlink_to(root / "kept" / "original")
    assert sample_of(list_dataset(root, layout), "a.mov").size_bytes == len("a.mov")


@pytest.mark.parametrize("layout", FILE_SOURCES)
def test_a_link_out_of_the_dataset_is_refused(make_dataset: MakeDataset, tmp_path: Path, layout: str) -> None:
    root = make_dataset(layout, CAPTIONS)
    path = root / sample_of(list_dataset(root, layout), "a.mov").path
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=rf"a\.mov is a link to {tmp_path}/outside, outside the dataset: copy it in"):
        list_dataset(root, layout)


@pytest.mark.parametrize("layout", FILE_SOURCES)
def test_a_pipe_in_the_place_of_a_video_is_refused(make_dataset: MakeDataset, layout: str) -> None:
    root = make_dataset(layout, CAPTIONS)
    listing = list_dataset(root, layout)
    sample = sample_of(listing, "a.mov")
    (root / sample.path).unlink()
    os.mkfifo(root / sample.path)
    with pytest.raises(UserError, match=r"a\.mov is not a regular file"):
        list_dataset(root, layout)
    with pytest.raises(UserError, match=r"a\.mov is not a regular file"):  # if it comes after the listing
        listing.open_video(sample)


@pytest.mark.parametrize("layout", FILE_SOURCES)
def test_images_are_listed_like_videos(make_dataset: MakeDataset, layout: str) -> None:
    root = make_dataset(layout, {"a.jpg": "an apple", "b.png": "a ball", "c.webp": "a cat", "d.mp4": "a dog"})
    assert [sample.file_name for sample in list_dataset(root, layout).samples] == ["a.jpg", "b.png", "c.webp", "d.mp4"]


# --- packing


@pytest.fixture(scope="module", params=SOURCES)
def dataset(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]
) -> tuple[str, Path]:
    """(layout, folder) of six real videos, which make three shards."""
    from conftest import write_dataset

    root = tmp_path_factory.mktemp(request.param)
    captions = {f"{'sub/' if number % 2 else ''}{number}.mp4": f"caption {number}" for number in range(6)}
    seeds = iter(range(6))
    write_dataset(
        request.param, root, captions, video=lambda path: make_video(path, seed=next(seeds), padding_bytes=VIDEO_BYTES)
    )
    return request.param, root


@pytest.fixture(scope="module")
def packed(dataset: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its shards, made undisturbed by one worker."""
    shards = tmp_path_factory.mktemp("packed")
    pack_into(shards, dataset)
    return shards


def pack_into(shards: Path, dataset: tuple[str, Path], *, num_workers: int = 1) -> None:
    layout, root = dataset
    config = PackConfig(
        dataset=str(root), shards=str(shards), dataset_type=layout, shard_size_mb=1, num_workers=num_workers
    )
    pack(config)


def test_its_shards_hold_the_videos_with_captions_and_headers(dataset: tuple[str, Path], packed: Path) -> None:
    manifest = load_manifest(open_store(packed))
    assert [shard.num_samples for shard in manifest.shards] == [2, 2, 2]
    samples = [sample for shard in manifest.shards for sample in load_index(open_store(packed), shard).samples]
    assert sorted(sample.metadata["captions"][0] for sample in samples) == [f"caption {n}" for n in range(6)]
    assert all(sample.metadata["num_frames"] == 8 and sample.metadata["extension"] == "mp4" for sample in samples)
    assert len({sample.metadata["sha256"] for sample in samples}) == 6


def test_two_workers_make_the_same_bytes(dataset: tuple[str, Path], packed: Path, tmp_path: Path) -> None:
    pack_into(tmp_path, dataset, num_workers=2)
    assert contents(tmp_path) == contents(packed)


@pytest.mark.parametrize(
    "crash_at", mostly_slow(["pack.after", "shard:2", "shard.after:2", "shard_index", "manifest"], quick=("shard:2",))
)
def test_packing_goes_on_from_a_kill(
    dataset: tuple[str, Path],
    packed: Path,
    tmp_path: Path,
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
    crash_at: str,
) -> None:
    layout, root = dataset
    command = ("pack", root, tmp_path, "--dataset-type", layout, "--shard-size-mb", 1, "--num-workers", 1)
    assert run_cli(*command, crash_at=crash_at).returncode == 137
    pack_into(tmp_path, dataset)
    assert contents(tmp_path) == contents(packed)


def test_packing_goes_on_after_a_kill_of_all_its_processes_at_any_moment(
    dataset: tuple[str, Path], packed: Path, tmp_path: Path, repo_root: Path
) -> None:
    layout, root = dataset
    command = [sys.executable, "-m", "streamprep", "pack", str(root), str(tmp_path), "--dataset-type", layout]
    running = subprocess.Popen(
        [*command, "--shard-size-mb", "1", "--num-workers", "2"],
        cwd=repo_root,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(random.Random(layout).uniform(0.4, 2.0))
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    pack_into(tmp_path, dataset, num_workers=2)
    assert contents(tmp_path) == contents(packed)
    assert not (tmp_path / ".tmp").exists()
