from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_hub
import pytest
from conftest import write_dataset

from streamprep.errors import UserError
from streamprep.manifest import load_index, load_manifest
from streamprep.sources import list_dataset
from streamprep.sources._files import SourceOptions
from streamprep.storage import open_store

datasets = pytest.importorskip("datasets")

RunOnHub = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> dict[str, Path]:
    """Datasets of the fake hub: FastVideo's layout, Parquet with bytes in two files, a folder of videos."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    roots = {name: tmp_path_factory.mktemp(name) for name in ("merged", "rows", "files")}
    captions = {"a.mp4": "an apple", "sub/b.mp4": "a ball"}
    write_dataset("merged", roots["merged"], captions, video=make_video)
    for file in range(2):
        videos = [
            make_video(roots["files"] / "x.mp4", seed=10 * file + row, num_frames=4 + row).read_bytes()
            for row in range(3)
        ]
        rows = [
            {"video": {"bytes": video, "path": "x.mp4"}, "caption": f"{file}{row}", "row": row}
            for row, video in enumerate(videos)
        ]
        (roots["rows"] / "data").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), roots["rows"] / "data" / f"train-{file:05d}-of-00002.parquet")
    (roots["files"] / "x.mp4").unlink()
    for name in captions:
        make_video(roots["files"] / name)
    lines = [f"{name},{caption}" for name, caption in captions.items()]
    (roots["files"] / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    shutil.copytree(roots["files"], roots["files"] / "more")
    return {f"org/{name}": root for name, root in roots.items()}


@pytest.fixture(scope="module")
def on_hub(
    repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, repo_root: Path
) -> Iterator[RunOnHub]:
    """``on_hub("pack", ...)``: the command line in a process whose hub is the fake one."""
    home = tmp_path_factory.mktemp("home")
    with fake_hub.serve(repositories) as url:
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

        def run(*arguments: object, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "streamprep", *map(str, arguments)]
            own = environment if cache is None else environment | {"HF_HUB_CACHE": str(cache)}
            return subprocess.run(command, cwd=repo_root, env=own, capture_output=True, text=True, timeout=300)

        yield run


def packed(shards: Path) -> list[tuple[str, str, str, int]]:
    store = open_store(shards)
    return [
        (sample.key, sample.metadata["file_name"], sample.metadata["captions"][0], sample.metadata["num_frames"])
        for shard in load_manifest(store).shards
        for sample in load_index(store, shard).samples
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- a dataset repository in any layout


@pytest.mark.slow
def test_the_quick_start_runs_from_a_dataset_repository(on_hub: RunOnHub, tiny_model: Path, tmp_path: Path) -> None:
    size = ("--max-height", 32, "--max-width", 48, "--num-frames", 5, "--serial")
    command = ("run", "hf://datasets/org/merged", tmp_path / "out", "--model-path", tiny_model, *size)
    ran = on_hub(*command)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("2 rows, 1 file, ")
    again = on_hub(*command)
    assert (again.returncode, again.stdout) == (0, ran.stdout)
    assert on_hub("verify", tmp_path / "out").returncode == 0


def test_a_folder_of_a_revision_is_a_dataset_too(on_hub: RunOnHub, tmp_path: Path) -> None:
    ran = on_hub("pack", f"hf://datasets/org/merged@{fake_hub.COMMIT}/videos", tmp_path)
    assert ran.returncode == 0, ran.stderr
    store = open_store(tmp_path)
    (index,) = (load_index(store, shard) for shard in load_manifest(store).shards)
    assert [sample.key for sample in index.samples] == ["a", "sub/b"]


def test_another_download_is_the_same_listing(on_hub: RunOnHub, tmp_path: Path, repositories: dict[str, Path]) -> None:
    command = ("pack", "hf://datasets/org/merged", tmp_path / "shards")
    assert on_hub(*command).returncode == 0
    ran = on_hub(*command, cache=tmp_path / "cache of another machine")
    assert (ran.returncode, ran.stderr) == (0, "2 videos (4.3 kB) in 1 shard, 1 done\n")


@pytest.mark.parametrize("folder", ["", "more/"])
def test_a_manifest_of_a_repository_is_a_dataset_with_what_lies_beside_it(
    on_hub: RunOnHub, tmp_path: Path, folder: str
) -> None:
    ran = on_hub("pack", f"hf://datasets/org/files/{folder}metadata.csv", tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert [row[0] for row in packed(tmp_path)] == ["a", "sub/b"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://datasets/org/nothing", "the hub has no such dataset, or it needs a login"),
        ("hf://datasets/org/merged@v9", "the dataset has no revision 'v9'"),
        ("hf://datasets/org/merged/nowhere", "the repository has no 'nowhere'"),
        ("hf://datasets/org/merged/../x", "named without '..'"),
        ("hf://models/org/merged", "a dataset of the hub is hf://datasets/ORG/NAME"),
        ("https://127.0.0.1:9/dataset", "a web server lists no files"),
        ("ftp://bucket/dataset", "no store is known by such a URL"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(on_hub: RunOnHub, tmp_path: Path, url: str, message: str) -> None:
    ran = on_hub("pack", url, tmp_path / "shards")
    assert (ran.returncode, url in ran.stderr, message in ran.stderr) == (2, True, True), ran.stderr
    assert not (tmp_path / "shards").exists()


# --- datasets


def test_rows_with_bytes_are_streamed(on_hub: RunOnHub, tmp_path: Path) -> None:
    for workers in 1, 2:
        ran = on_hub("pack", "org/rows", tmp_path / str(workers), "--dataset-type", "hf", "--num-workers", workers)
        assert ran.returncode == 0, ran.stderr
    assert packed(tmp_path / "1") == [
        (f"{3 * file + row:08d}", f"{3 * file + row:08d}.mp4", f"{file}{row}", 4 + row)
        for file in range(2)
        for row in range(3)
    ]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_videos_that_are_files_keep_their_paths(on_hub: RunOnHub, tmp_path: Path) -> None:
    ran = on_hub("pack", "org/files@main", tmp_path, "--dataset-type", "hf", "--split", "train")
    assert ran.returncode == 0, ran.stderr
    assert packed(tmp_path) == [
        ("a", "a.mp4", "an apple", 8),
        ("more/a", "more/a.mp4", "an apple", 8),
        ("more/sub/b", "more/sub/b.mp4", "a ball", 8),
        ("sub/b", "sub/b.mp4", "a ball", 8),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("org/nothing",), "the hub has no dataset org/nothing"),
        (("org/rows@v9",), "the hub has no dataset org/rows at v9"),
        (("org/rows", "--split", "test"), "org/rows, split 'test': "),
        (("org/rows", "--caption-column", "x"), "no column 'x' for --caption-column; it has 'caption', 'row'"),
        (("org/rows", "--video-column", "row"), "a video is bytes, or a pair of bytes and path, got 0"),
        (("not a name",), "not a name is neither a folder nor the name of a dataset"),
    ],
)
def test_a_dataset_that_is_not_there_is_refused(
    on_hub: RunOnHub, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    ran = on_hub("pack", *arguments, tmp_path / "shards", "--dataset-type", "hf")
    assert (ran.returncode, message in ran.stderr) == (2, True), ran.stderr
    assert not (tmp_path / "shards").exists()


def test_the_name_of_a_dataset_needs_its_type_said() -> None:
    with pytest.raises(
        UserError, match="org/name is not a folder or file; for the dataset org/name of the Hugging Face hub"
    ):
        list_dataset("org/name", "auto")


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the library datasets .*: pip install streamprep\[hf\]"):
        list_dataset(tmp_path, "hf")


# --- local folders of the library


def test_a_saved_dict_of_splits_is_read_by_split(tmp_path: Path) -> None:
    splits = {
        split: datasets.Dataset.from_list([{"video": split.encode(), "caption": split}]) for split in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path))
    for split in None, "test":
        (sample,) = list_dataset(tmp_path, "auto", SourceOptions(split=split)).samples
        assert sample.captions == (split or "train",)
    with pytest.raises(UserError, match="split 'dev'"):
        list_dataset(tmp_path, "auto", SourceOptions(split="dev"))


def test_a_local_folder_of_files_is_read_as_the_library_reads_it(
    tmp_path: Path, make_video: Callable[..., Path]
) -> None:
    make_video(tmp_path / "train" / "a.mp4")
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "caption": "an apple"}))
    (sample,) = list_dataset(tmp_path, "hf").samples
    assert (sample.key, sample.path, sample.captions) == ("train/a", "train/a.mp4", ("an apple",))
