from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import webdataset
from quick_cases import mostly_slow

from streamprep.cli import main
from streamprep.config import IndexConfig
from streamprep.errors import UserError
from streamprep.index import index
from streamprep.manifest import load_index, load_manifest
from streamprep.shards import ShardSample
from streamprep.storage import open_store
from streamprep.verify import verify_shards

SMALL = ["--max-height", "32", "--max-width", "48", "--num-frames", "1", "--serial"]


class Pickled:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> list[bytes]:
    folder = tmp_path_factory.mktemp("videos")
    return [make_video(folder / f"{seed}.mp4", seed=seed).read_bytes() for seed in range(4)]


def write_tar(path: Path, samples: list[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for sample in samples:
            tar.write(dict(sample))
    return path


def video2dataset(root: Path, videos: list[bytes]) -> Path:
    """Two tars as video2dataset writes them, with the files beside them."""
    for shard in range(2):
        samples = [
            {
                "__key__": f"{shard:05d}{number:04d}",
                "mp4": videos[2 * shard + number],
                "txt": f"caption {shard}{number}",
                "json": {"key": "x", "url": "https://example.com/v", "fps": 25, "status": "success"},
            }
            for number in range(2)
        ]
        write_tar(root / f"{shard:05d}.tar", samples)
        (root / f"{shard:05d}_stats.json").write_text("{}")
        (root / f"{shard:05d}.parquet").write_bytes(b"")
    return root


def indexed(shards: Path) -> list[ShardSample]:
    store = open_store(shards)
    return [sample for shard in load_manifest(store).shards for sample in load_index(store, shard).samples]


def skipped_of(shards: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (shards / "skipped.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def index_of(shards: Path, **options: Any) -> None:
    index(IndexConfig(shards=str(shards), **{"num_workers": 1} | options))


# --- what other programs write


def test_tars_of_video2dataset_are_encoded_where_they_are(
    videos: list[bytes], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = video2dataset(tmp_path / "tars", videos)
    before = contents(tars)
    command = ["encode", str(tars), str(tmp_path / "out"), "--model-path", str(tiny_model), *SMALL]
    assert main(command) == 2
    assert (
        f"holds tars without an index (no manifest.json): make it by `streamprep index {tars}`"
        in capsys.readouterr().err
    )
    assert main(["index", str(tars)]) == 0
    assert capsys.readouterr().out.startswith("4 videos, 2 shards, ")
    after = contents(tars)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"00000.json", "00001.json", "manifest.json", "pack.json"}
    assert main(command) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "out" / "combined_parquet_dataset", columns=["id", "caption"]).to_pylist()
    assert sorted((row["id"], row["caption"]) for row in rows) == [
        (f"{shard:05d}{number:04d}.mp4", f"caption {shard}{number}") for shard in range(2) for number in range(2)
    ]


def test_other_fields_are_kept_and_the_video_is_probed(videos: list[bytes], tmp_path: Path) -> None:
    tars = video2dataset(tmp_path / "tars", videos)
    index_of(tars)
    metadata = indexed(tars)[0].metadata
    assert metadata["extra"] == {"key": "x", "url": "https://example.com/v", "fps": 25, "status": "success"}
    assert (metadata["declared"], metadata["num_frames"], metadata["fps"]) == ({}, 8, 16)


def test_tars_of_cosmos_curate_have_their_captions_in_a_tar_beside_them(videos: list[bytes], tmp_path: Path) -> None:
    base, part = tmp_path / "resolution_720" / "frames_0_255", "part_000000/000000.tar"
    uuids = ["1f6c0e1a-aaaa", "2f6c0e1a-bbbb"]
    windows = [{"start_frame": 0, "end_frame": 8, "qwen_caption": "a window", "qwen_enhanced_caption": "a better one"}]
    write_tar(base / "video" / part, [{"__key__": key, "mp4": videos[n]} for n, key in enumerate(uuids)])
    write_tar(base / "metas" / part, [{"__key__": key, "json": {"windows": windows, "n": key}} for key in uuids])
    evil = pickle.dumps(Pickled(tmp_path / "unpickled"))
    write_tar(base / "t5_xxl" / part, [{"__key__": key, "pickle": evil} for key in uuids])
    index_of(tmp_path)
    assert [shard.name for shard in load_manifest(open_store(tmp_path)).shards] == [
        "resolution_720/frames_0_255/video/part_000000/000000.tar"
    ]
    assert [(sample.key, sample.metadata["captions"]) for sample in indexed(tmp_path)] == [
        (key, ["a window", "a better one"]) for key in uuids
    ]
    assert indexed(tmp_path)[0].metadata["extra"] == {"windows": windows, "n": uuids[0]}
    assert not (tmp_path / "unpickled").exists()
    index_of(tmp_path, to=str(tmp_path.with_name("other")), caption_column="qwen_enhanced_caption")
    assert indexed(tmp_path.with_name("other"))[0].metadata["captions"] == ["a better one"]


def test_pickles_are_never_opened(videos: list[bytes], tmp_path: Path) -> None:
    evil = pickle.dumps(Pickled(tmp_path / "unpickled"))
    write_tar(tmp_path / "tars" / "0.tar", [{"__key__": "a", "mp4": videos[0], "pkl": evil, "pyd": evil, "txt": "x"}])
    index_of(tmp_path / "tars")
    (sample,) = indexed(tmp_path / "tars")
    assert list(sample.members) == ["mp4"]
    assert not (tmp_path / "unpickled").exists()


# --- a folder of its own


def test_an_index_elsewhere_links_to_the_tars(videos: list[bytes], tmp_path: Path) -> None:
    tars, shards = video2dataset(tmp_path / "tars", videos), tmp_path / "shards"
    before = contents(tars)
    index_of(tars, to=str(shards))
    assert contents(tars) == before
    assert (shards / "00000.tar").is_symlink()
    verdict = verify_shards(open_store(shards))
    assert (verdict.num_rows, verdict.problems) == (4, [])
    for sample in indexed(shards):
        with open(shards / f"{sample.key[:5]}.tar", "rb") as file:
            file.seek(sample.video.offset)
            assert file.read(sample.video.size) in videos


def test_damage_after_indexing_is_found_by_verify(videos: list[bytes], tmp_path: Path) -> None:
    tars = video2dataset(tmp_path / "tars", videos)
    index_of(tars)
    with open(tars / "00000.tar", "r+b") as file:
        file.seek(indexed(tars)[0].video.offset + 100)
        file.write(b"damage")
    assert verify_shards(open_store(tars)).problems == ["00000.tar: 000000000.mp4 is damaged"]


@pytest.mark.parametrize(
    "crash_at",
    mostly_slow(
        ["pack", "shard:2", "shard.after", "shard_index", "shard_index.after", "manifest"],
        quick=["shard:2", "shard_index.after", "manifest"],
    ),
)
def test_indexing_goes_on_from_any_kill(
    videos: list[bytes], tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]], crash_at: str
) -> None:
    tars = video2dataset(tmp_path / "tars", videos)
    index_of(tars, to=str(tmp_path / "undisturbed"), num_workers=2)
    command = ("index", tars, "--to", tmp_path / "killed", "--num-workers", 1)
    assert run_cli(*command, crash_at=crash_at).returncode == 137
    assert run_cli(*command).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert not (tmp_path / "killed" / ".tmp").exists()


# --- refusals


def test_damaged_tars_are_named_all_at_once_or_left_out(videos: list[bytes], tmp_path: Path) -> None:
    tars = video2dataset(tmp_path / "tars", videos)
    write_tar(tars / "good.tar", [{"__key__": f"good{n}", "mp4": videos[0], "txt": "x"} for n in range(30)])
    os.truncate(tars / "00000.tar", 3000)
    (tars / "00001.tar").write_bytes((tars / "00001.tar").read_bytes().rstrip(b"\0") + bytes(3))
    with pytest.raises(UserError, match=r"2 of the tars cannot be used.*--skip-damaged") as caught:
        index_of(tars)
    assert "00000.tar: " in str(caught.value) and "00001.tar: " in str(caught.value)
    assert not (tars / "pack.json").exists()
    index_of(tars, skip_damaged=True)
    assert [shard.name for shard in load_manifest(open_store(tars)).shards] == ["good.tar"]
    assert skipped_of(tars) == [
        {"file_name": "00000.tar", "reason": "damaged_tar"},
        {"file_name": "00001.tar", "reason": "damaged_tar"},
    ]


def test_samples_without_one_video_or_a_caption_to_read_are_skipped(videos: list[bytes], tmp_path: Path) -> None:
    good = [{"__key__": f"good{n:02d}", "mp4": videos[0], "txt": "x"} for n in range(30)]
    odd = [
        {"__key__": "only_text", "txt": "x"},
        {"__key__": "two_videos", "mp4": videos[0], "webm": b"", "txt": "x"},
        {"__key__": "thumbnail", "mp4": videos[0], "jpg": b"", "txt": "x"},
        {"__key__": "not_utf_8", "mp4": videos[0], "txt": b"\xff"},
        {"__key__": "not_json", "mp4": videos[0], "json": b"{"},
        {"__key__": "a_list", "mp4": videos[0], "json": b"[]"},
        {"__key__": "a_number", "mp4": videos[0], "json": b'{"caption": 7}'},
    ]
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False) as tar:
        for sample in [*good, *odd]:
            tar.write({k: v.encode() if isinstance(v, str) and k != "__key__" else v for k, v in sample.items()})
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    index_of(tmp_path)
    assert [sample.key for sample in indexed(tmp_path)] == [*(f"good{n:02d}" for n in range(30)), "thumbnail"]
    assert {line["file_name"]: line["reason"] for line in skipped_of(tmp_path)} == {
        "only_text": "no_video",
        "two_videos": "several_videos",
        "not_utf_8": "unreadable_caption",
        "not_json": "unreadable_caption",
        "a_list": "unreadable_caption",
        "a_number": "unreadable_caption",
    }


def test_keys_that_tars_share_are_refused_or_prefixed(videos: list[bytes], tmp_path: Path) -> None:
    for name in "x.tar", "sub/y.tar":
        write_tar(tmp_path / "tars" / name, [{"__key__": "0000", "mp4": videos[0], "txt": name}])
    with pytest.raises(UserError, match=r"'0000\.mp4' and .* have the same key '0000'.*--prefix-keys"):
        index_of(tmp_path / "tars")
    index_of(tmp_path / "tars", prefix_keys=True)
    assert [sample.key for sample in indexed(tmp_path / "tars")] == ["sub/y/0000", "x/0000"]


def test_indexing_others_tars_or_with_other_options_is_refused(videos: list[bytes], tmp_path: Path) -> None:
    tars = video2dataset(tmp_path / "tars", videos)
    index_of(tars)
    with pytest.raises(UserError, match=r"prefix_keys: False then, True now"):
        index_of(tars, prefix_keys=True)
    write_tar(tars / "more.tar", [{"__key__": "more", "mp4": videos[0]}])
    with pytest.raises(UserError, match=r"listing_sha256: .* then, .* now"):
        index_of(tars)


@pytest.mark.parametrize("name", ["00000.json", "manifest.json", "skipped.jsonl"])
def test_files_of_others_are_left_alone(videos: list[bytes], tmp_path: Path, name: str) -> None:
    tars = video2dataset(tmp_path / "tars", videos)
    (tars / name).write_text("mine")
    with pytest.raises(UserError, match=f"has a file {name} but no pack.json.*by --to"):
        index_of(tars)
    assert (tars / name).read_text() == "mine"
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00001.tar").write_text("mine")
    with pytest.raises(UserError, match=r"has a file 00001\.tar but no pack\.json"):
        index_of(tars, to=str(tmp_path / "shards"))


def test_a_folder_inside_the_tars_is_refused(videos: list[bytes], tmp_path: Path) -> None:
    tars = video2dataset(tmp_path / "tars", videos)
    with pytest.raises(UserError, match="one of the folders is inside the other"):
        index_of(tars, to=str(tars / "index"))


def test_compressed_tars_are_refused(videos: list[bytes], tmp_path: Path) -> None:
    tars = video2dataset(tmp_path / "tars", videos)
    with tarfile.open(tars / "more.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"more\.tar\.gz is compressed.*: unpack it to \.tar"):
        index_of(tars)


def test_a_link_out_of_the_folder_is_refused(videos: list[bytes], tmp_path: Path) -> None:
    tars = video2dataset(tmp_path / "tars", videos)
    (tars / "00001.tar").rename(tmp_path / "outside.tar")
    (tars / "00001.tar").symlink_to(tmp_path / "outside.tar")
    with pytest.raises(UserError, match=r"00001\.tar is a link to .*outside\.tar, outside the dataset"):
        index_of(tars)
