from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprep.config import PackConfig
from streamprep.crashpoints import PACK_STEPS
from streamprep.errors import UserError
from streamprep.manifest import Manifest, load_index, load_manifest
from streamprep.pack import cut_into_shards, pack
from streamprep.pack_shard import pack_shard
from streamprep.shards import ShardSample
from streamprep.sources import list_dataset
from streamprep.sources._files import OpenFile
from streamprep.sources._tree import LocalTree
from streamprep.storage import open_store
from streamprep.types import RawSample, VideoInfo

CAPTIONS = {
    "b.mp4": "a ball",
    "a.MP4": "an apple",
    "deep/v1.5.mp4": "日本",
    "deep/v1.6.mp4": "",
    "c.mp4": "a cat",
    "d.mp4": "a dog",
    "not_a_video.mp4": "text",
}
VIDEO_BYTES = 400 * 2**10  # so that two fit in a shard of 1 MiB


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    """Six real videos, a file that is none, and one that is listed but missing."""
    root = tmp_path_factory.mktemp("dataset")
    for number, name in enumerate(CAPTIONS):
        make_video(root / "videos" / name, seed=number, num_frames=8 + number, padding_bytes=VIDEO_BYTES)
    (root / "videos" / "not_a_video.mp4").write_text("#EXTM3U\nhttps://example.com/\n")
    rows: list[dict[str, Any]] = [{"path": name, "cap": [caption, "more"]} for name, caption in CAPTIONS.items()]
    rows[0] |= {"fps": 16, "score": 0.5}
    (root / "videos2caption.json").write_text(json.dumps([*rows, {"path": "missing.mp4", "cap": "nothing"}]))
    return root


@pytest.fixture(scope="module")
def packed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its shards, made undisturbed by one worker."""
    shards = tmp_path_factory.mktemp("packed")
    pack_into(shards, dataset)
    return shards


def pack_into(shards: Path, dataset: Path, **options: Any) -> Manifest:
    return pack(
        PackConfig(dataset=str(dataset), shards=str(shards), **{"shard_size_mb": 1, "num_workers": 1} | options)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished_files(folder: Path) -> dict[str, bytes]:
    """Without what is half written, and the marks of who is at which shard."""
    return {name: data for name, data in contents(folder).items() if not name.startswith((".tmp/", "_streamprep/"))}


def packed_samples(shards: Path) -> list[tuple[ShardSample, dict[str, bytes]]]:
    """Every sample as its index has it, with its members as Python's tarfile reads them."""
    store = open_store(shards)
    samples = []
    for shard in load_manifest(store).shards:
        with tarfile.open(shards / shard.name, "r:", errorlevel=2) as tar:
            members = {info.name: file.read() for info in tar if (file := tar.extractfile(info))}
        for sample in load_index(store, shard).samples:
            samples.append((sample, {ext: members.pop(f"{sample.key}.{ext}") for ext in sample.members}))
        assert members == {}
    return samples


# --- what is in a shard


def test_the_shards_hold_the_files_themselves(dataset: Path, packed: Path) -> None:
    samples = packed_samples(packed)
    assert [sample.metadata["file_name"] for sample, _ in samples] == sorted(CAPTIONS)
    for sample, members in samples:
        original = (dataset / "videos" / sample.metadata["file_name"]).read_bytes()
        assert members["mp4"] == original
        assert sample.metadata["sha256"] == hashlib.sha256(original).hexdigest()
        assert sample.video == sample.members["mp4"]
        assert {ext: member.sha256 for ext, member in sample.members.items()} == {
            ext: hashlib.sha256(data).hexdigest() for ext, data in members.items()
        }


def test_each_sample_has_its_metadata_twice_and_its_first_caption(packed: Path) -> None:
    for sample, members in packed_samples(packed):
        assert json.loads(members["json"]) == sample.metadata
        assert members["txt"].decode() == CAPTIONS[sample.metadata["file_name"]]
        assert sample.metadata["captions"] == [CAPTIONS[sample.metadata["file_name"]], "more"]


def test_metadata_has_the_documented_fields(packed: Path) -> None:
    metadata = {sample.key: sample.metadata for sample, _ in packed_samples(packed)}
    listed = {"file_name", "captions", "extension", "sha256", "declared", "extra"}
    probed = {field.name for field in dataclasses.fields(VideoInfo)}
    assert set(metadata["a"]) == listed | probed
    assert {**metadata["b"], "sha256": ""} == {
        "file_name": "b.mp4",
        "captions": ["a ball", "more"],
        "extension": "mp4",
        "sha256": "",
        "declared": {"fps": 16},
        "extra": {"score": 0.5},
        "num_frames": 8,
        "fps": 16,
        "width": 64,
        "height": 48,
        "duration_seconds": 0.5,
        "start_seconds": 0,
        "rotation": 0,
        "codec": "h264",
        "variable_frame_rate": False,
        "media_type": "video",
    }
    assert set(metadata["not_a_video"]) == listed | {"probe_error"}
    assert metadata["not_a_video"]["probe_error"].startswith("not a video: it begins with b'#EXTM3U")


def test_a_sample_without_caption_has_no_txt(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    pack_into(tmp_path / "shards", make_dataset("folder", {"a.mp4": ""}))
    ((sample, members),) = packed_samples(tmp_path / "shards")
    assert sample.metadata["captions"] == []
    assert list(members) == ["json", "mp4"]


def test_a_caption_of_half_a_surrogate_pair_is_kept(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    root = make_dataset("merged", {"a.mp4": "\ud800"})
    pack_into(tmp_path / "shards", root)
    ((sample, _),) = packed_samples(tmp_path / "shards")
    assert sample.metadata["captions"] == ["\ud800"]


def test_the_size_of_the_copying_buffer_changes_nothing(
    dataset: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamprep.pack_shard._CHUNK_BYTES", 1000)
    pack_into(tmp_path / "shards", dataset)
    assert contents(tmp_path / "shards") == contents(packed)


def test_missing_files_are_listed_in_skipped(packed: Path) -> None:
    assert (packed / "skipped.jsonl").read_text() == '{"file_name":"missing.mp4","reason":"missing"}\n'


def test_the_manifest_knows_every_file(packed: Path) -> None:
    manifest = load_manifest(open_store(packed))
    assert [shard.name for shard in manifest.shards] == ["000000.tar", "000001.tar", "000002.tar"]
    assert manifest.num_samples == len(CAPTIONS)
    for shard in manifest.shards:
        tar, index = (packed / shard.name).read_bytes(), (packed / shard.name).with_suffix(".json").read_bytes()
        assert shard.size_bytes == len(tar)
        assert shard.index_sha256 == hashlib.sha256(index).hexdigest()
    assert set(contents(packed)) == {"pack.json", "skipped.jsonl", "manifest.json"} | {
        f"{number:06d}.{ext}" for number in range(3) for ext in ("tar", "json")
    }


def test_the_shared_clips_are_packed_with_what_they_are(shared_clips: Path, tmp_path: Path) -> None:
    manifest = pack_into(tmp_path, shared_clips, shard_size_mb=2)
    assert [shard.num_samples for shard in manifest.shards] == [2, 2, 1]
    fields = ("num_frames", "fps", "width", "height", "rotation", "variable_frame_rate")
    # As `ffprobe -count_frames` finds them; the README beside the clips is wrong about backyard.mp4.
    assert {sample.key: tuple(sample.metadata[name] for name in fields) for sample, _ in packed_samples(tmp_path)} == {
        "backyard": (120, 24, 832, 480, 0, False),
        "crush-027": (114, 16, 832, 480, 0, False),
        "crush-030": (146, 16, 832, 480, 0, False),
        "crush-034": (127, 16, 832, 480, 0, False),
        "motorcycle": (120, 30, 3840, 2160, 0, False),
    }


# --- the same listing gives the same bytes


@pytest.mark.parametrize("num_workers", [2, 4])
def test_any_number_of_workers_makes_the_same_bytes(
    dataset: Path, packed: Path, tmp_path: Path, num_workers: int
) -> None:
    pack_into(tmp_path, dataset, num_workers=num_workers)
    assert contents(tmp_path) == contents(packed)


def test_a_second_run_changes_nothing(dataset: Path, packed: Path) -> None:
    def seen() -> dict[str, tuple[int, int]]:
        return {
            path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in packed.iterdir()
            if path.name != "manifest.json"
        }

    before, bytes_before = seen(), contents(packed)
    manifest = pack_into(packed, dataset)
    assert seen() == before
    assert contents(packed) == bytes_before
    assert manifest == load_manifest(open_store(packed))


def test_a_tar_that_was_removed_or_cut_is_packed_again(dataset: Path, packed: Path, tmp_path: Path) -> None:
    pack_into(tmp_path, dataset)
    (tmp_path / "000000.tar").unlink()
    os.truncate(tmp_path / "000001.tar", 1000)
    pack_into(tmp_path, dataset)
    assert contents(tmp_path) == contents(packed)


def test_shuffling_changes_only_the_order(dataset: Path, packed: Path, tmp_path: Path) -> None:
    for name, seed in ("once", 7), ("again", 7), ("other", 8):
        pack_into(tmp_path / name, dataset, shuffle=seed)
    assert contents(tmp_path / "once") == contents(tmp_path / "again")
    orders = [[sample.key for sample, _ in packed_samples(shards)] for shards in (packed, *sorted(tmp_path.iterdir()))]
    assert orders[1] == orders[2] != orders[3]
    assert orders[0] not in orders[1:]
    assert {tuple(sorted(order)) for order in orders} == {tuple(orders[0])}


# --- cutting


def raw_samples(sizes: list[int]) -> list[RawSample]:
    return [
        RawSample(key=str(number), file_name="", path="", size_bytes=size, version="", captions=())
        for number, size in enumerate(sizes)
    ]


@given(sizes=st.lists(st.integers(0, 30), max_size=20), limit=st.integers(1, 40), shuffle=st.none() | st.integers(0))
def test_every_video_is_in_one_shard_of_the_size_asked_for(sizes: list[int], limit: int, shuffle: int | None) -> None:
    samples = raw_samples(sizes)
    shards = cut_into_shards(samples, shard_size_bytes=limit, shuffle=shuffle)
    assert sorted((sample.key for shard in shards for sample in shard), key=int) == [sample.key for sample in samples]
    assert all(len(shard) == 1 or sum(sample.size_bytes for sample in shard) <= limit for shard in shards)
    assert all(
        sum(sample.size_bytes for sample in shard) + next_shard[0].size_bytes > limit
        for shard, next_shard in zip(shards, shards[1:], strict=False)
    )


def test_a_video_larger_than_a_shard_has_its_own() -> None:
    shards = cut_into_shards(raw_samples([4, 4, 25, 4]), shard_size_bytes=10, shuffle=None)
    assert [[sample.size_bytes for sample in shard] for shard in shards] == [[4, 4], [25], [4]]


# --- what is refused


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"shuffle": 1}, "(shuffle: None then, 1 now)"),
        ({"shard_size_mb": 2}, "(num_shards: 3 then, 2 now; shard_size_mb: 1 then, 2 now)"),
    ],
)
def test_other_options_are_refused(dataset: Path, packed: Path, options: dict[str, int], difference: str) -> None:
    before = contents(packed)
    with pytest.raises(UserError, match="was packed from another listing or with other options") as caught:
        pack_into(packed, dataset, **options)
    assert difference in str(caught.value)
    assert contents(packed) == before


def test_another_listing_is_refused(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    root, shards = make_dataset("merged", {"a.mp4": "one", "b.mp4": "two"}), tmp_path / "shards"
    pack_into(shards, root)
    before = contents(shards)
    for changed in {"a.mp4": "one", "b.mp4": "another caption"}, {"a.mp4": "one", "b.mp4": "two", "c.mp4": "more"}:
        with pytest.raises(UserError, match=r"listing_sha256: .* then, .* now.*: pack into a new folder"):
            pack_into(shards, make_dataset("merged", changed))
    assert contents(shards) == before


def test_nothing_is_written_for_a_dataset_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    with pytest.raises(UserError, match="none of the layouts"):
        pack_into(tmp_path / "shards", tmp_path / "dataset")
    assert not (tmp_path / "shards").exists()


def test_a_disk_too_small_is_refused(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    needed = shutil.disk_usage(tmp_path).free // 2**32 + 20  # others may free some meanwhile
    root = make_dataset("folder", {f"{number}.mp4": "" for number in range(needed)})
    for video in root.glob("*.mp4"):
        os.truncate(video, 2**32)  # which takes no space
    with pytest.raises(UserError, match=r"has .* free, the shards need "):
        pack_into(tmp_path / "shards", root)
    assert not (tmp_path / "shards").exists()


def test_a_file_that_changes_after_it_was_listed_stops_the_packing(dataset: Path, tmp_path: Path) -> None:
    samples = list_dataset(dataset, "auto").samples
    stale = dataclasses.replace(samples[1], size_bytes=samples[1].size_bytes - 1)
    with pytest.raises(OSError, match=r"b\.mp4 changed while it was packed; let it settle"):
        pack_shard(OpenFile(LocalTree(dataset)), open_store(tmp_path), "000000.tar", [samples[0], stale])
    assert contents(tmp_path) == {}


# --- the manifest


def test_unfinished_and_foreign_shards_are_told_apart(packed: Path, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(UserError, match=r"holds no shards \(no manifest.json\): make them by `streamprep pack"):
        load_manifest(store)
    (tmp_path / "pack.json").touch()
    with pytest.raises(UserError, match="packing is not finished; run the same `streamprep pack` again"):
        load_manifest(store)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is not JSON"):
        load_manifest(store)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest.json is not a manifest of format streamprep-shards/1"):
        load_manifest(store)


def test_an_index_that_changed_is_refused(packed: Path, tmp_path: Path) -> None:
    shard = load_manifest(open_store(packed)).shards[0]
    (tmp_path / "000000.json").write_bytes((packed / "000000.json").read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"000000.json is not the index it was"):
        load_index(open_store(tmp_path), shard)


# --- killed anywhere, run again


@pytest.mark.parametrize(
    "crash_at",
    [
        *(step for step in PACK_STEPS),
        *(pytest.param(f"{step}.after", marks=pytest.mark.slow) for step in PACK_STEPS),
        "shard:3",
        "shard_index:2",
    ],
)
def test_packing_goes_on_from_any_kill(
    dataset: Path,
    packed: Path,
    tmp_path: Path,
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
    crash_at: str,
) -> None:
    command = ("pack", dataset, tmp_path, "--shard-size-mb", 1, "--num-workers", 1)
    assert run_cli(*command, crash_at=crash_at).returncode == 137
    assert all(data == contents(packed)[name] for name, data in finished_files(tmp_path).items())
    pack_into(tmp_path, dataset)
    assert contents(tmp_path) == contents(packed)
    assert not (tmp_path / ".tmp").exists()


def test_packing_fails_when_a_worker_dies_and_goes_on_when_run_again(
    dataset: Path, packed: Path, tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    command = ("pack", dataset, tmp_path, "--shard-size-mb", 1, "--num-workers", 2)
    failed = run_cli(*command, crash_at="shard.after")
    assert failed.returncode == 1
    assert "a packing process died; run the same command again to go on" in failed.stderr
    assert run_cli(*command).returncode == 0
    assert contents(tmp_path) == contents(packed)


def test_workers_do_not_outlive_their_command(dataset: Path, tmp_path: Path, repo_root: Path) -> None:
    # A pool's idle worker waits for work that a killed parent never sends.
    command = [sys.executable, "-m", "streamprep", "pack", str(dataset), str(tmp_path)]
    running = subprocess.Popen([*command, "--shard-size-mb", "1", "--num-workers", "2"], cwd=repo_root)
    parent = psutil.Process(running.pid)
    while running.poll() is None and len(children := parent.children(recursive=True)) < 3:
        time.sleep(0.002)  # the resource tracker, the fork server, a worker
    running.kill()
    running.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert alive == []


@pytest.mark.parametrize("seed", range(3))
def test_packing_goes_on_after_a_kill_of_all_its_processes_at_any_moment(
    dataset: Path, packed: Path, tmp_path: Path, repo_root: Path, seed: int
) -> None:
    command = [sys.executable, "-m", "streamprep", "pack", str(dataset), str(tmp_path)]
    running = subprocess.Popen(
        [*command, "--shard-size-mb", "1", "--num-workers", "2"],
        cwd=repo_root,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(random.Random(seed).uniform(0.2, 1.0))
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    pack_into(tmp_path, dataset)
    assert contents(tmp_path) == contents(packed)
    assert not (tmp_path / ".tmp").exists()


def test_videos_without_captions_are_counted_before_they_are_packed(
    tmp_path: Path, make_video: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        make_video(tmp_path / "dataset" / f"{name}.mp4")
    (tmp_path / "dataset/a.txt").write_text("A video.")
    (tmp_path / "dataset/b.txt").write_text(" ")
    pack(PackConfig(dataset=str(tmp_path / "dataset"), shards=str(tmp_path / "shards"), num_workers=1))
    assert "in 1 shard, 0 done; 2 without a caption: `encode` will drop them" in capsys.readouterr().err
