"""Datasets in buckets: what is packed from there is what is packed from the same folder, and trouble is said."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from conftest import write_dataset
from object_stores import Faulty, NewBucket, on_azurite, on_fake_gs, on_seaweedfs
from quick_cases import mostly_slow
from servers import Server
from servers.fault_proxy import FaultProxy
from servers.faults import Answer, CutReply, Reset, StallReply
from servers.s3_buckets import s3_client

from streamprep import pack_shard
from streamprep.config import IndexConfig, PackConfig
from streamprep.errors import UserError
from streamprep.index import index
from streamprep.pack import pack
from streamprep.pack_shard import read_videos
from streamprep.progress import size
from streamprep.sources import _tree, list_dataset
from streamprep.sources._files import Listing, OpenVideo, Skipped
from streamprep.storage import Store, open_store, places
from streamprep.types import RawSample

pytest_plugins = ["object_stores"]

VIDEO_BYTES = 400 * 2**10  # so that two fit in a shard of 1 MiB
TABLES = ("jsonl", "json", "csv", "tsv", "parquet")
DATASETS = ("merged", "raw", "folder", "webdataset", "bytes", "prompts", *TABLES)
SOME = ("merged", "folder", "webdataset", "bytes")


@pytest.fixture(scope="module")
def datasets(
    tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]
) -> Callable[[str], tuple[Path, str]]:
    """``datasets(name)``: (a folder with six real videos in a layout, what below it is the dataset)."""
    made: dict[str, tuple[Path, str]] = {}

    def make(name: str) -> tuple[Path, str]:
        if name not in made:
            made[name] = _write(name, tmp_path_factory.mktemp(name), make_video)
        return made[name]

    return make


def _write(name: str, root: Path, make_video: Callable[..., Path]) -> tuple[Path, str]:
    captions = {f"{'a sub/' if number % 2 else ''}{number}%20é.mp4": f"caption {number}" for number in range(6)}
    seeds = iter(range(6))

    def video(path: Path) -> Path:
        return make_video(path, seed=next(seeds), padding_bytes=VIDEO_BYTES)

    if name == "prompts":
        (root / "prompts.txt").write_text("one\n\nthree\n")
        return root, "prompts.txt"
    if name in ("merged", "raw", "folder", "webdataset"):
        write_dataset(name, root, captions, video=video)
        return root, ""
    for path in captions:
        video(root / path)
    return root, write_table(root, name, captions)


def write_table(root: Path, kind: str, captions: dict[str, str]) -> str:
    """Write a manifest of videos; its name."""
    rows: list[dict[str, Any]] = [{"video": path, "caption": caption} for path, caption in captions.items()]
    file = root / f"metadata.{'parquet' if kind == 'bytes' else kind}"
    if kind == "bytes":
        rows = [{**row, "video": (root / row["video"]).read_bytes()} for row in rows]
    if kind == "jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind == "json":
        file.write_text(json.dumps(rows))
    elif kind in ("csv", "tsv"):
        options = pyarrow.csv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), file, options)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
    return file.name


def upload(folder: Path, url: str) -> str:
    store = open_store(url)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes(), step="data")
    return url


@pytest.fixture
def bucket(new_bucket: NewBucket, moto_server: Server) -> str:
    return new_bucket(moto_server)


def pack_into(shards: object, dataset: object, **options: Any) -> None:
    options = {"shard_size_mb": 1, "num_workers": 1, **options}
    pack(PackConfig(dataset=str(dataset), shards=str(shards), **options))


def contents(store: Store) -> dict[str, bytes]:
    """All but pack.json, which has the digest of the listing, versions included."""
    return {entry.path: store.read(entry.path) for entry in store.walk() if entry.path != "pack.json"}


@pytest.fixture(scope="module")
def packed(
    datasets: Callable[[str], tuple[Path, str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, bytes]]:
    """``packed(name)``: what comes of that dataset as a folder."""
    made: dict[str, dict[str, bytes]] = {}

    def make(name: str) -> dict[str, bytes]:
        if name not in made:
            root, file = datasets(name)
            shards = tmp_path_factory.mktemp(f"packed-{name}")
            pack_into(shards, root / file)
            made[name] = contents(open_store(shards))
        return made[name]

    return make


def check_no_threads() -> None:
    """Those that fetch ahead end within moments."""
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("fetch-ahead") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No threads, and no files where copies of videos are kept."""
    spool = tmp_path / "temporary"
    spool.mkdir()
    monkeypatch.setenv("TMPDIR", str(spool))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    check_no_threads()
    assert [path for path in spool.rglob("*") if path.is_file()] == []


# --- the same as from a folder


@pytest.mark.parametrize("name", DATASETS)
def test_shards_from_a_bucket_are_those_from_a_folder(
    name: str,
    bucket: str,
    datasets: Callable[[str], tuple[Path, str]],
    packed: Callable[[str], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    root, file = datasets(name)
    url = f"{upload(root, f'{bucket}/my data')}/{file}".rstrip("/")
    pack_into(tmp_path / "shards", url)
    assert contents(open_store(tmp_path / "shards")) == packed(name)
    before = (tmp_path / "shards/pack.json").read_bytes()
    pack_into(tmp_path / "shards", url)  # the listing has the same digest
    assert (tmp_path / "shards/pack.json").read_bytes() == before


@pytest.mark.parametrize("server", [on_seaweedfs, on_azurite, on_fake_gs])
@pytest.mark.parametrize("name", SOME)
def test_so_they_are_from_every_store(
    request: pytest.FixtureRequest,
    server: str,
    name: str,
    new_bucket: NewBucket,
    datasets: Callable[[str], tuple[Path, str]],
    packed: Callable[[str], dict[str, bytes]],
) -> None:
    bucket = new_bucket(request.getfixturevalue(server))
    dataset = upload(datasets(name)[0], f"{bucket}/raw")
    pack_into(f"{bucket}/shards", dataset, num_workers=2)
    assert contents(open_store(f"{bucket}/shards")) == packed(name)


@pytest.mark.parametrize("name", DATASETS)
def test_the_listing_is_the_folders_but_for_versions(
    name: str, bucket: str, datasets: Callable[[str], tuple[Path, str]]
) -> None:
    root, file = datasets(name)
    local = list_dataset(root / file, "auto")
    remote = list_dataset(f"{upload(root, bucket)}/{file}".rstrip("/"), "auto")
    assert [replace(one, version="") for one in remote.samples] == [replace(one, version="") for one in local.samples]
    assert remote.skipped == local.skipped
    assert remote.in_order == local.in_order


@pytest.mark.parametrize("name", SOME)
def test_a_listing_is_sent_to_other_processes_without_what_it_has_looked_up(
    name: str, bucket: str, datasets: Callable[[str], tuple[Path, str]]
) -> None:
    listing = list_dataset(upload(datasets(name)[0], bucket), "auto")
    sent: OpenVideo = pickle.loads(pickle.dumps(listing.open_video))
    for sample in listing.samples:
        with sent(sample) as theirs, listing.open_video(sample) as ours:
            assert theirs.read() == ours.read()


def test_a_file_url_is_the_folder(
    datasets: Callable[[str], tuple[Path, str]], packed: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    pack_into(tmp_path / "shards", f"file://{datasets('merged')[0]}")
    assert contents(open_store(tmp_path / "shards")) == packed("merged")


@pytest.mark.parametrize(
    "crash_at", mostly_slow(["pack.after", "shard:2", "shard.after:2", "shard_index", "manifest"], quick=("shard:2",))
)
@pytest.mark.parametrize("name", ["merged", "webdataset", "bytes"])
def test_packing_goes_on_from_a_kill(
    name: str,
    crash_at: str,
    bucket: str,
    datasets: Callable[[str], tuple[Path, str]],
    packed: Callable[[str], dict[str, bytes]],
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    dataset, shards = upload(datasets(name)[0], f"{bucket}/raw"), f"{bucket}/shards"
    command = ("pack", dataset, shards, "--shard-size-mb", 1, "--num-workers", 1)
    killed = run_cli(*command, crash_at=crash_at)
    assert killed.returncode == 137, killed.stderr
    pack_into(shards, dataset)
    open_store(shards).remove_unpublished()
    assert contents(open_store(shards)) == packed(name)


# --- what is asked


def test_folders_are_listed_and_videos_fetched_once_and_counted(
    moto_server: Server, bucket: str, faulty: Faulty, datasets: Callable[[str], tuple[Path, str]], tmp_path: Path,
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:  # fmt: skip
    dataset = upload(datasets("merged")[0], f"{bucket}/raw")
    proxy: FaultProxy
    _, proxy = faulty(moto_server)
    ran = run_cli("pack", dataset, tmp_path / "shards", "--shard-size-mb", 1, "--num-workers", 2)
    assert ran.returncode == 0, ran.stderr
    assert proxy.kinds() == {"list": 4, "get": 1, "get range": 6}  # is it there; its root, videos/, videos/a sub/
    size_bytes = sum(
        request.received_bytes
        for request in proxy.requests
        if request.method == "GET" and "list-type" not in request.target
    )
    told = re.search(rf"{dataset}: 11 requests \(7 get, 4 list\), (.*) read, 0 B written", ran.stderr)
    assert told is not None, ran.stderr
    assert told[1] == size(size_bytes)


def test_where_many_folders_are_looked_at_all_is_listed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tree, "_MOST_FOLDERS", 4)
    captions = {f"{number:02d}/v.mp4": "a caption" for number in range(12)}
    dataset = upload(write_dataset("merged", tmp_path / "d", captions), bucket)
    listing = list_dataset(dataset, "merged")
    assert len(listing.samples) == 12
    assert listing.tree.store is not None
    assert listing.tree.store.stats.requests == {"list": 1 + 4 + 1, "get": 1}


def test_captions_beside_videos_are_each_fetched_once(
    moto_server: Server, bucket: str, faulty: Faulty, datasets: Callable[[str], tuple[Path, str]]
) -> None:
    dataset = upload(datasets("folder")[0], bucket)
    _, proxy = faulty(moto_server)
    list_dataset(dataset, "folder")
    assert proxy.kinds() == {"list": 2, "get": 6}


# --- how much is held


class Held:
    """Opens as another does, and remembers how many bytes of files that are not closed there were."""

    at_once = 16

    def __init__(self, open_video: OpenVideo) -> None:
        self.open_video, self.lock = open_video, threading.Lock()
        self.bytes = self.most = self.files = self.most_files = 0

    def __call__(self, sample: RawSample) -> BinaryIO:
        self.change(sample.size_bytes, 1)
        file = self.open_video(sample)
        close = file.close

        def close_and_count() -> None:
            if not file.closed:
                self.change(-sample.size_bytes, -1)
            close()

        file.close = close_and_count  # type: ignore[method-assign]
        return file

    def change(self, size_bytes: int, files: int) -> None:
        with self.lock:
            self.bytes += size_bytes
            self.files += files
            self.most, self.most_files = max(self.most, self.bytes), max(self.most_files, self.files)


@pytest.mark.parametrize(("limit", "most_files"), [(2**30, 12), (1_300_000, 3), (100_000, 1)])
def test_no_more_is_held_than_allowed_but_one_video(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, most_files: int
) -> None:
    monkeypatch.setattr(pack_shard, "AHEAD_BYTES", limit)
    captions = {f"{number:02d}.mp4": "a caption" for number in range(12)}
    dataset = write_dataset("folder", tmp_path / "d", captions, video=lambda path: path.write_bytes(bytes(400_000)))
    listing = list_dataset(upload(dataset, bucket), "folder")
    held = Held(Reopened(listing.open_video))
    with closing(read_videos(held, listing.samples)) as videos:
        for _, file, _ in videos:
            assert file is not None
            file.close()
    assert held.most <= max(limit, 400_000)
    assert 1 <= held.most_files <= most_files
    assert held.files == 0


@dataclass
class Reopened:
    """A file whose ``close`` can be replaced, which that of BytesIO cannot."""

    open_video: OpenVideo

    def __call__(self, sample: RawSample) -> BinaryIO:
        copy = tempfile.SpooledTemporaryFile(2**30)  # noqa: SIM115
        with self.open_video(sample) as file:
            copy.write(file.read())
        copy.seek(0)
        return copy  # type: ignore[return-value]


def test_a_large_video_is_kept_on_disk_without_a_name(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tree, "AHEAD_BYTES", 20 * 2**20)
    large = bytes(range(256)) * (100 * 2**10) + b"end"  # of several pieces
    small = large[: 9 * 2**20]
    dataset = tmp_path / "d"
    dataset.mkdir()
    (dataset / "a.mp4").write_bytes(large)
    (dataset / "b.mp4").write_bytes(small)
    listing = list_dataset(upload(dataset, bucket), "folder", spool_dir=str(tmp_path / "spool"))
    with listing.open_video(listing.samples[0]) as file:
        assert Path(f"/proc/self/fd/{file.fileno()}").readlink().is_relative_to(tmp_path / "spool")
        assert list((tmp_path / "spool").iterdir()) == []
        assert file.read() == large
    with listing.open_video(listing.samples[1]) as file:
        assert file.read() == small
        with pytest.raises(OSError):
            file.fileno()


def test_a_full_spool_says_where_it_is(
    bucket: str, mount_small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount_small_disk(4)
    monkeypatch.setattr(_tree, "AHEAD_BYTES", 2**20)
    open_store(bucket).put("a.mp4", bytes(20 * 2**20), step="data")
    listing = list_dataset(bucket, "folder", spool_dir=str(disk))
    with pytest.raises(OSError, match=rf"can be kept in the spool \(--spool-dir\).*{disk}"):
        listing.open_video(listing.samples[0])


# --- trouble


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    "fault",
    mostly_slow(
        [Answer(503), CutReply(), CutReply(reset=False), Reset(), StallReply(30)], quick=(Answer(503), CutReply())
    ),
    ids=lambda fault: str(fault),
)
def test_packing_gets_through_faults(
    name: str,
    fault: Any,
    moto_server: Server,
    bucket: str,
    faulty: Faulty,
    datasets: Callable[[str], tuple[Path, str]],
    packed: Callable[[str], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "REQUEST_SECONDS", 1.0)
    dataset = upload(datasets(name)[0], f"{bucket}/raw")
    _, proxy = faulty(moto_server)
    rule = proxy.inject("^GET ", fault, probability=0.3, times=4)
    pack_into(tmp_path / "shards", dataset)
    assert rule.hits
    assert contents(open_store(tmp_path / "shards")) == packed(name)


def test_the_pieces_of_a_large_video_come_through_faults(
    moto_server: Server, bucket: str, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tree, "AHEAD_BYTES", 2**20)
    large = bytes(range(256)) * (130 * 2**10) + b"end"
    open_store(bucket).put("a.mp4", large, step="data")
    _, proxy = faulty(moto_server)
    listing = list_dataset(bucket, "folder")
    rules = [proxy.inject("^GET ", fault, times=2) for fault in (CutReply(), Answer(503), Reset())]
    with listing.open_video(listing.samples[0]) as file:
        assert file.read() == large
    assert [rule.hits for rule in rules] == [2, 2, 2]
    proxy.inject("^GET ", Answer(403), skip=2)
    with pytest.raises(OSError, match=r"a\.mp4: it was refused"):
        listing.open_video(listing.samples[0])


def test_what_goes_on_failing_fails_loudly_and_goes_on_later(
    moto_server: Server,
    bucket: str,
    faulty: Faulty,
    datasets: Callable[[str], tuple[Path, str]],
    packed: Callable[[str], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    dataset = upload(datasets("merged")[0], f"{bucket}/raw")
    _, proxy = faulty(moto_server)
    proxy.inject("^GET .*raw/videos/.*3%", Answer(403))
    with pytest.raises(OSError, match=r"raw/videos/.*mp4: it was refused \(403 Forbidden, AccessDenied"):
        pack_into(tmp_path / "shards", dataset)
    check_no_threads()
    proxy.clear()
    pack_into(tmp_path / "shards", dataset)
    assert contents(open_store(tmp_path / "shards")) == packed("merged")


def listed(bucket: str, tmp_path: Path, layout: str = "folder", *, num_videos: int = 3) -> Listing:
    captions = {f"{number}.mp4": f"number {number}" for number in range(num_videos)}
    return list_dataset(upload(write_dataset(layout, tmp_path / "d", captions), bucket), layout)


@pytest.mark.parametrize("layout", ["folder", "webdataset"])
@pytest.mark.parametrize("what", ["replaced", "deleted"])
def test_a_video_that_changes_after_it_was_listed_stops_the_packing(
    layout: str, what: str, bucket: str, tmp_path: Path
) -> None:
    tmp_path.joinpath("d").mkdir()
    listing = listed(bucket, tmp_path, layout)
    sample, store = listing.samples[1], open_store(bucket)
    data = store.read(sample.path)
    store.delete(sample.path, step="delete")
    if what == "replaced":
        store.put(sample.path, data[:-1] + b"!", step="data")
    message = rf"{sample.path} changed while it was packed; let it settle and pack into a new folder"
    with pytest.raises(OSError, match=message):
        listing.open_video(sample)
    with pytest.raises(OSError, match=message):
        list(read_videos(listing.open_video, listing.samples))


def test_a_table_of_bytes_that_changes_after_it_was_listed_stops_the_packing(
    bucket: str, datasets: Callable[[str], tuple[Path, str]]
) -> None:
    listing = list_dataset(upload(datasets("bytes")[0], bucket), "manifest")
    store = open_store(bucket)
    store.put("metadata.parquet", store.read("metadata.parquet") + b" ", step="data")
    with pytest.raises(OSError, match=r"metadata\.parquet changed while it was packed"):
        listing.open_video(listing.samples[0])


def test_a_few_missing_videos_are_skipped_and_many_refused(bucket: str, tmp_path: Path) -> None:
    dataset = write_dataset("merged", tmp_path / "d", {f"{number}.mp4": "a caption" for number in range(50)})
    (dataset / "videos/7.mp4").unlink()
    upload(dataset, bucket)
    assert list_dataset(bucket, "merged").skipped == [Skipped(file_name="7.mp4", reason="missing")]
    pack_into(tmp_path / "shards", bucket)
    assert json.loads((tmp_path / "shards/skipped.jsonl").read_text()) == {"file_name": "7.mp4", "reason": "missing"}
    for number in range(10, 40):
        open_store(bucket).delete(f"videos/{number}.mp4", step="delete")
    with pytest.raises(UserError, match=rf"{bucket}: 31 of 50 listed entries are missing, the first is '7.mp4'"):
        list_dataset(bucket, "merged")


def test_an_empty_object_is_a_video_and_the_mark_of_a_folder_is_none(
    moto_server: Server, bucket: str, tmp_path: Path
) -> None:
    upload(write_dataset("folder", tmp_path / "d", {"a/0.mp4": "a caption"}), bucket)
    client, name = s3_client(moto_server.env), bucket.removeprefix("s3://")
    for key in ("a/", "b/", "b/c.mp4/", "b/empty.mp4"):
        client.put_object(Bucket=name, Key=key, Body=b"")
    listing = list_dataset(bucket, "folder")
    assert [sample.file_name for sample in listing.samples] == ["a/0.mp4", "b/empty.mp4"]
    assert listing.skipped == [Skipped(file_name="b/c.mp4", reason="missing")]
    with listing.open_video(listing.samples[1]) as file:
        assert file.read() == b""


@pytest.mark.parametrize("key", ["videos//a.mp4", "videos/../a.mp4", "videos/./a.mp4", "videos/a\x01.mp4"])
@pytest.mark.parametrize("layout", ["merged", "folder"])
def test_a_name_that_cannot_be_a_path_is_refused(
    moto_server: Server, bucket: str, tmp_path: Path, key: str, layout: str
) -> None:
    upload(write_dataset(layout, tmp_path / "d", {"a.mp4": "a caption"}), bucket)
    s3_client(moto_server.env).put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"x")
    with pytest.raises(UserError, match=rf"{bucket}.*: an object there has a name that cannot be a path.*rename it"):
        list_dataset(bucket, layout)


@pytest.mark.parametrize("path", ["./a.mp4", ".//a.mp4", "b//c.mp4"])
def test_a_manifest_may_write_a_path_as_for_a_folder(bucket: str, tmp_path: Path, path: str) -> None:
    dataset = write_dataset("manifest", tmp_path / "d", {"a.mp4": "", "b/c.mp4": ""})
    (dataset / "metadata.jsonl").write_text(json.dumps({"video": path, "caption": "a caption"}))
    for where in (dataset, upload(dataset, bucket)):
        listing = list_dataset(where, "manifest")
        (sample,) = listing.samples
        with listing.open_video(sample) as file:
            assert file.read().decode().endswith(path[-5:])


@pytest.mark.parametrize("path", ["../a.mp4", "/a.mp4", "s3://bucket/a.mp4", "a\udcff.mp4", "a\ud800.mp4"])
def test_a_path_that_leaves_the_dataset_or_cannot_be_there(bucket: str, tmp_path: Path, path: str) -> None:
    dataset = write_dataset("manifest", tmp_path / "d", {"a.mp4": ""})
    (dataset / "metadata.jsonl").write_text(json.dumps({"video": path, "caption": "a caption"}))
    with pytest.raises(UserError, match=r"is not a relative path inside the dataset|are missing"):
        list_dataset(upload(dataset, bucket), "manifest")


# --- wrong requests


def test_where_nothing_is_is_said_so(bucket: str, run_cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for url, message in (
        (f"{bucket}/no-such-folder", f"{bucket}/no-such-folder is not a folder or file"),
        (f"{bucket}/no-such-file.jsonl", f"{bucket}/no-such-file.jsonl is not a folder or file"),
        ("s3://no-such-bucket/data", "there is no such bucket"),
        ("s3://no-such-bucket/data.csv", "there is no such bucket"),
    ):
        refused = run_cli("pack", url, f"{bucket}/shards")
        assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
    assert not list(open_store(bucket).walk())


def test_refused_credentials_are_said_before_anything_is_written(
    moto_server: Server, bucket: str, faulty: Faulty, run_cli: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:  # fmt: skip
    _, proxy = faulty(moto_server)
    proxy.inject("", Answer(403))
    for url in (f"{bucket}/data", f"{bucket}/data.csv"):
        refused = run_cli("pack", url, tmp_path / "shards")
        assert refused.returncode == 2, refused.stderr
        assert "it was refused (403 Forbidden" in refused.stderr
        assert "Check AWS_ACCESS_KEY_ID" in refused.stderr
        assert "testsecret" not in refused.stderr
    assert not (tmp_path / "shards").exists()


def test_a_folder_with_a_dot_may_be_all_that_we_may_see(
    moto_server: Server, bucket: str, faulty: Faulty, tmp_path: Path
) -> None:
    dataset = upload(write_dataset("folder", tmp_path / "d", {"a.mp4": "a caption"}), f"{bucket}/data.v2")
    _, proxy = faulty(moto_server)
    proxy.inject("^HEAD .*/data.v2$", Answer(403))
    assert [sample.file_name for sample in list_dataset(dataset, "auto").samples] == ["a.mp4"]


@pytest.mark.s3
@pytest.mark.slow
def test_so_are_wrong_keys_by_a_store_that_looks_at_them(
    seaweedfs_server: Server,
    new_bucket: NewBucket,
    monkeypatch: pytest.MonkeyPatch,
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    bucket = new_bucket(seaweedfs_server)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    refused = run_cli("pack", f"{bucket}/data", tmp_path / "shards")
    assert refused.returncode == 2
    assert "it was refused" in refused.stderr
    assert "wrong-secret" not in refused.stderr


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("https://127.0.0.1:9/data", "a web server lists no files, so no dataset can be packed from there"),
        ("s3://user:password@bucket/data", "no names or passwords in URLs"),
        ("ftp://bucket/data", "no store is known by such a URL"),
    ],
)
def test_other_urls_are_refused(dataset: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        pack_into(tmp_path / "shards", dataset)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("slash", ["", "/"])
def test_one_place_cannot_be_both_dataset_and_shards(bucket: str, slash: str) -> None:
    with pytest.raises(UserError, match="is the dataset itself: pack into another folder"):
        pack_into(f"{bucket}/data{slash}", f"{bucket}/data")


def test_a_folder_of_the_library_datasets_is_not_read_from_a_bucket(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    upload(write_dataset("hf", tmp_path / "d", {"a.mp4": "a caption"}), bucket)
    for layout in ("auto", "hf"):
        with pytest.raises(UserError, match=rf"{bucket}: the library datasets reads folders and the hub, no buckets"):
            list_dataset(bucket, layout)


def test_a_place_of_no_layout_is_refused(bucket: str) -> None:
    open_store(bucket).put("readme.md", b"nothing", step="data")
    with pytest.raises(UserError, match=rf"{bucket} has none of the layouts prompts, merged, .* no tars, no video"):
        list_dataset(bucket, "auto")
    with pytest.raises(UserError, match=rf"{bucket}/readme.md is neither a folder, nor a manifest"):
        list_dataset(f"{bucket}/readme.md", "auto")


# --- tars of others


def test_tars_are_indexed_where_they_are(
    bucket: str, datasets: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    root, _ = datasets("webdataset")
    local = tmp_path / "local"
    index(IndexConfig(shards=str(root), to=str(local), num_workers=1))
    upload(root, f"{bucket}/tars")
    for to in (None, f"{bucket}/tars/"):
        index(IndexConfig(shards=f"{bucket}/tars", to=to, num_workers=2))
        there, here = contents(open_store(f"{bucket}/tars")), contents(open_store(local))
        assert there == here


def test_an_index_elsewhere_needs_local_tars(bucket: str, tmp_path: Path) -> None:
    for tars, to in ((f"{bucket}/tars", str(tmp_path)), (str(tmp_path), f"{bucket}/x"), (f"{bucket}/a", f"{bucket}/b")):
        with pytest.raises(UserError, match="has links to the tars, so both must be local folders"):
            index(IndexConfig(shards=tars, to=to))


def test_files_of_others_beside_tars_are_left_alone(bucket: str, datasets: Callable[[str], tuple[Path, str]]) -> None:
    store = open_store(upload(datasets("webdataset")[0], bucket))
    store.put("00001.json", b"theirs", step="data")
    with pytest.raises(UserError, match=r"has a file 00001\.json but no pack\.json"):
        index(IndexConfig(shards=bucket))
    assert store.read("00001.json") == b"theirs"


def test_a_tar_cut_off_is_named_with_its_url(bucket: str, datasets: Callable[[str], tuple[Path, str]]) -> None:
    store = open_store(upload(datasets("webdataset")[0], bucket))
    store.put("00001.tar", store.read("00001.tar")[:5000], step="data")
    with pytest.raises(UserError, match=rf"1 of the tars cannot be used.*\n  {bucket}/00001.tar: "):
        list_dataset(bucket, "webdataset")
