"""The whole trip from bucket to bucket through the command line; it must be what it is from folder to folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from forks import Forks, Process
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from object_stores import PROVIDERS, Faulty, NewBucket, on_azurite, on_fake_gs, on_moto, on_seaweedfs
from quick_cases import mostly_slow
from servers import Server
from servers.fake_hf import READ_TOKEN, TOKEN
from servers.fault_proxy import FaultProxy
from servers.faults import Answer, DropHeaders, LoseReply, StallReply
from servers.http_files import http_files
from servers.s3_buckets import s3_client, unfinished_uploads

from streamprep import job
from streamprep.crashpoints import VARIABLE
from streamprep.storage import Store, hub, open_store, patience

pytest_plugins = ["jobs", "object_stores"]

RunCli = Callable[..., "Ran"]

FLAGS = (
    *("--max-height", 32, "--max-width", 48, "--num-frames", 5, "--train-fps", 1, "--samples-per-file", 2),
    *("--encode-threads", 1, "--device", "cpu", "--serial"),
)
NUM_VIDEOS = 5


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    returncode: int
    output: str


@pytest.fixture(scope="module")
def run_cli(forks: Forks) -> RunCli:
    """``run_cli("pack", ..., crash_at=...)``: a command that knows the servers which this process was pointed at."""

    def run(*arguments: object, crash_at: str | None = None) -> Ran:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name.startswith((*PROVIDERS, "TMPDIR", "XDG_", patience.VARIABLE))
        }
        process = forks.run(*arguments, environment=environment | ({VARIABLE: crash_at} if crash_at else {}))
        return Ran(process.wait(), process.output)

    return run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    """Five videos, two of which fit in a shard."""
    root = tmp_path_factory.mktemp("dataset")
    rows = []
    for number in range(NUM_VIDEOS):
        make_video(root / "videos" / f"{number}.mp4", fps=1, seed=number, padding_bytes=400_000)
        rows.append({"path": f"{number}.mp4", "cap": f"Video {number}."})
    (root / "videos2caption.json").write_text(json.dumps(rows))
    return root


def done(result: Ran) -> Ran:
    assert result.returncode == 0, result.output
    return result


def pack(run_cli: RunCli, dataset: Path, shards: object, **how: object) -> Ran:
    return run_cli("pack", dataset, shards, "--shard-size-mb", 1, "--num-workers", 1, **how)


def encode(run_cli: RunCli, model: Path, shards: object, out: object, *flags: object, **how: object) -> Ran:
    return run_cli("encode", shards, out, "--model-path", model, *FLAGS, *flags, **how)


def contents(store: Store, *folders: str) -> dict[str, bytes]:
    return {entry.path: store.read(entry.path) for folder in folders for entry in store.list(folder)}


def files_of(store: Store) -> list[str]:
    root = store.local_path()
    assert root is not None
    return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]


def rows(out: Store) -> Counter[str]:
    return Counter(row.key for record in job.open_job(out).records() for file in record.files for row in file.rows)


@pytest.fixture(scope="module")
def local_job(
    tmp_path_factory: pytest.TempPathFactory, dataset: Path, tiny_model: Path, run_cli: RunCli
) -> tuple[Store, Store]:
    """(shards, output) in folders."""
    root = tmp_path_factory.mktemp("local")
    done(pack(run_cli, dataset, root / "shards"))
    done(encode(run_cli, tiny_model, root / "shards", root / "out"))
    return open_store(root / "shards"), open_store(root / "out")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands' temporary files go, the spool among them, and what is staged for the hub."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "caches"))
    return folder


@pytest.mark.parametrize(
    "server", [on_moto, on_seaweedfs, on_azurite, on_fake_gs, pytest.param("fake_hf_server", id="fake_hf")]
)
def test_from_bucket_to_bucket_comes_out_what_comes_out_from_folder_to_folder(
    request: pytest.FixtureRequest,
    server: str,
    new_bucket: NewBucket,
    local_job: tuple[Store, Store],
    dataset: Path,
    tiny_model: Path,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    bucket = new_bucket(request.getfixturevalue(server))
    shards, out = f"{bucket}/my shards", f"{bucket}/latents/job1"
    assert "5 videos, 3 shards" in done(pack(run_cli, dataset, shards)).output
    assert "3 done" in done(pack(run_cli, dataset, shards)).output
    assert ": 0 problems" in done(run_cli("verify", shards)).output
    encoded = done(encode(run_cli, tiny_model, shards, out))
    assert "5 rows, 3 files" in encoded.output and f" in {out}" in encoded.output
    assert "no logs are kept" in encoded.output
    assert f"{shards}: " in encoded.output and " get" in encoded.output
    assert "3 done" in done(encode(run_cli, tiny_model, shards, out)).output
    assert ": 0 problems" in done(run_cli("verify", out)).output
    assert "state    done" in done(run_cli("status", out)).output
    assert contents(open_store(shards), "") == contents(local_job[0], "")
    data = contents(open_store(out), "combined_parquet_dataset")
    assert data == contents(local_job[1], "combined_parquet_dataset")
    assert not list(open_store(out).list(".tmp"))
    assert not list(temporary.rglob("*.tmp"))


def test_a_dataset_in_a_bucket_is_run_into_a_bucket(
    moto_server: Server,
    new_bucket: NewBucket,
    local_job: tuple[Store, Store],
    dataset: Path,
    tiny_model: Path,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    bucket = new_bucket(moto_server)
    for path in dataset.rglob("*.*"):
        open_store(f"{bucket}/raw").put(path.relative_to(dataset).as_posix(), path.read_bytes(), step="data")
    out = f"{bucket}/out"
    command = ("run", f"{bucket}/raw", out, "--model-path", tiny_model, "--shard-size-mb", 1, *FLAGS)
    killed = run_cli(*command, crash_at="shard.after:2")
    assert killed.returncode in (1, 137), killed.output  # a packing process dies, or all, if it has one core
    ran = done(run_cli(*command))
    assert "5 rows, 3 files" in ran.output
    assert f"{bucket}/raw: " in ran.output and f"{out}/_streamprep/shards: " in ran.output
    shards = contents(open_store(f"{out}/_streamprep/shards"), "")
    assert {**shards, "pack.json": b""} == {**contents(local_job[0], ""), "pack.json": b""}  # it has the versions
    data = contents(open_store(out), "combined_parquet_dataset")
    assert data == contents(local_job[1], "combined_parquet_dataset")
    assert not list(temporary.rglob("*.tmp"))


def test_a_plan_of_a_bucket_goes_into_one(
    moto_server: Server, new_bucket: NewBucket, local_job: tuple[Store, Store], tiny_model: Path, run_cli: RunCli
) -> None:
    bucket = new_bucket(moto_server)
    shards = open_store(f"{bucket}/shards")
    for path, data in contents(local_job[0], "").items():
        shards.put(path, data, step="data")
    table = f"{bucket}/plans/all.parquet"
    planned = done(run_cli("plan", shards.url, "--model-path", tiny_model, "--out", table, *FLAGS)).output
    assert "5 clips" in planned
    with open_store(f"{bucket}/plans").open("all.parquet") as file:
        assert pq.read_table(file)["decision"].to_pylist() == ["encode"] * NUM_VIDEOS


@pytest.mark.parametrize(
    "point",
    mostly_slow(
        ["plan", "uncond.after", "attempt.after", "data.after", "record", "record.after"],
        quick=["data.after", "record"],
    ),
)
def test_a_killed_job_goes_on_in_a_bucket(
    point: str,
    moto_server: Server,
    new_bucket: NewBucket,
    local_job: tuple[Store, Store],
    tiny_model: Path,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    shards, out = local_job[0].url, f"{new_bucket(moto_server)}/out"
    assert encode(run_cli, tiny_model, shards, out, crash_at=point).returncode == 137
    done(encode(run_cli, tiny_model, shards, out))
    assert ": 0 problems" in done(run_cli("verify", out)).output
    data = contents(open_store(out), "combined_parquet_dataset")
    assert data == contents(local_job[1], "combined_parquet_dataset")
    assert not list(temporary.rglob("*.tmp"))


def test_a_job_gets_through_lost_replies_and_slow_downs(
    moto_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    dataset: Path,
    tiny_model: Path,
    run_cli: RunCli,
) -> None:
    bucket = new_bucket(moto_server)
    proxy: FaultProxy
    _, proxy = faulty(moto_server)
    lost = proxy.inject("^PUT .*records", LoseReply(), times=2)
    slow = proxy.inject("", Answer(503), probability=0.1)
    done(pack(run_cli, dataset, f"{bucket}/shards"))
    done(encode(run_cli, tiny_model, f"{bucket}/shards", f"{bucket}/out"))
    proxy.clear()
    assert lost.hits == 2 and slow.hits
    assert ": 0 problems" in done(run_cli("verify", f"{bucket}/out")).output
    assert rows(open_store(f"{bucket}/out")) == rows(local_job[1])


def test_a_store_that_fails_ends_the_rank_loudly_and_blames_no_sample(
    moto_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    dataset: Path,
    tiny_model: Path,
    run_cli: RunCli,
) -> None:
    bucket = new_bucket(moto_server)
    _, proxy = faulty(moto_server)
    done(pack(run_cli, dataset, f"{bucket}/shards"))
    proxy.inject("^GET .*000001.tar", Answer(403))
    failed = encode(run_cli, tiny_model, f"{bucket}/shards", f"{bucket}/out")
    assert failed.returncode == 1
    assert "000001.tar: it was refused (403 Forbidden, AccessDenied" in failed.output
    assert "Traceback" not in failed.output
    proxy.clear()
    done(encode(run_cli, tiny_model, f"{bucket}/shards", f"{bucket}/out"))
    assert rows(open_store(f"{bucket}/out")) == rows(local_job[1])


def test_what_a_store_does_not_give_is_not_called_damaged(
    moto_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    run_cli: RunCli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(patience.VARIABLE, "2")
    bucket = new_bucket(moto_server)
    for name, store in zip(("shards", "out"), local_job, strict=True):
        copy = open_store(f"{bucket}/{name}")
        for path in files_of(store):
            copy.put(path, store.read(path), step="data")
    _, proxy = faulty(moto_server)
    proxy.inject(r"^GET .*000001(\.tar|-00000)", Answer(403))
    proxy.inject(r"^GET .*index.parquet", Answer(503))
    for name, path in (("shards", "000001.tar"), ("out", "combined_parquet_dataset/000001-00000-")):
        looked = run_cli("verify", f"{bucket}/{name}")
        assert looked.returncode == 1
        assert f"UNREAD {bucket}/{name}/{path}" in looked.output
        assert "it was refused (403 Forbidden, AccessDenied" in looked.output
        assert "WRONG" not in looked.output and "delete its record" not in looked.output
    assert f"UNREAD {bucket}/out/_streamprep/index.parquet: it did not answer as it should" in looked.output
    assert ": 0 problems, 2 files could not be read" in looked.output
    proxy.clear()
    assert ": 0 problems" in done(run_cli("verify", f"{bucket}/out")).output


@pytest.mark.parametrize("verb", mostly_slow(["pack", "encode"], quick=("pack",)))
def test_credentials_that_expire_end_the_rank_and_the_same_command_goes_on_with_new_ones(
    verb: str,
    moto_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    dataset: Path,
    tiny_model: Path,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    """Whichever request is the first to be refused."""
    bucket = new_bucket(moto_server)
    _, proxy = faulty(moto_server)

    def run(to: str) -> Ran:
        if verb == "pack":
            return pack(run_cli, dataset, to)
        return encode(run_cli, tiny_model, local_job[0].url, to)

    done(run(f"{bucket}/undisturbed"))
    num_requests = len(proxy.requests)
    for skip in range(num_requests // 4, num_requests, num_requests // 4):
        expired = proxy.inject("", Answer(403, code="ExpiredToken"), skip=skip)
        failed = run(f"{bucket}/after-{skip}")
        proxy.clear()
        assert failed.returncode in (1, 2), failed.output
        assert "refused (403 Forbidden" in failed.output and "AWS_SESSION_TOKEN" in failed.output
        assert "Traceback" not in failed.output and expired.hits
        if verb == "encode":
            records = list(open_store(f"{bucket}/after-{skip}").list(f"{job.FOLDER}/records"))
            seen = set(contents(open_store(f"{bucket}/after-{skip}"), "combined_parquet_dataset"))
            assert seen <= set(contents(local_job[1], "combined_parquet_dataset"))
            assert len(records) <= 3
        done(run(f"{bucket}/after-{skip}"))
        folder = "" if verb == "pack" else "combined_parquet_dataset"
        expected = local_job[0 if verb == "pack" else 1]
        assert contents(open_store(f"{bucket}/after-{skip}"), folder) == contents(expected, folder)
        assert ": 0 problems" in done(run_cli("verify", f"{bucket}/after-{skip}")).output
    assert not list(temporary.rglob("*.tmp"))
    assert unfinished_uploads(moto_server.env, bucket) == []


@pytest.mark.parametrize("verb", mostly_slow(["pack", "encode"], quick=("encode",)))
def test_a_request_without_an_answer_does_not_hold_up_who_is_asked_to_stop(
    verb: str,
    moto_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    dataset: Path,
    tiny_model: Path,
    run_cli: RunCli,
    forks: Forks,
) -> None:
    """It took two minutes: the handler waited for the request to be given up, and sent again, and given up."""
    bucket = new_bucket(moto_server)
    _, proxy = faulty(moto_server)
    to = f"{bucket}/place"
    commands = {
        "pack": ("pack", dataset, to, "--shard-size-mb", 1, "--num-workers", 1),
        "encode": ("encode", local_job[0].url, to, "--model-path", tiny_model, *FLAGS, "--grace-seconds", 1),
    }
    stalled = proxy.inject("^PUT .*(tar|parquet)$", StallReply(300, at=0))
    environment = {name: value for name, value in os.environ.items() if name.startswith((*PROVIDERS, "TMPDIR"))}
    process = forks.start(*commands[verb], environment=environment)
    stalled.wait(seconds=60)
    began = time.monotonic()
    process.kill(signal.SIGTERM)
    assert process.wait() == 4, process.output
    assert time.monotonic() - began < 30
    assert "stopped by SIGTERM" in process.output and "the same command goes on" in process.output
    process.wait_until_all_gone(seconds=20)
    proxy.clear()
    done(run_cli(*commands[verb]))
    assert ": 0 problems" in done(run_cli("verify", to)).output


@pytest.mark.s3
@pytest.mark.slow
def test_wrong_keys_are_refused_before_anything_is_done(
    seaweedfs_server: Server,
    new_bucket: NewBucket,
    local_job: tuple[Store, Store],
    dataset: Path,
    tiny_model: Path,
    run_cli: RunCli,
    point_at: Callable[..., None],
) -> None:
    bucket = new_bucket(seaweedfs_server)
    point_at({**seaweedfs_server.env, "AWS_SECRET_ACCESS_KEY": "WRONG-SECRET"})
    for refused in (
        pack(run_cli, dataset, f"{bucket}/shards"),
        encode(run_cli, tiny_model, local_job[0].url, f"{bucket}/out"),
        encode(run_cli, tiny_model, f"{bucket}/shards", local_job[1].url),
        *(run_cli(verb, f"{bucket}/out") for verb in ("status", "verify", "retry", "finalize")),
    ):
        assert refused.returncode == 2, refused.output
        assert f"streamprep: {bucket}/" in refused.output and "refused" in refused.output
        assert "AWS_SECRET_ACCESS_KEY" in refused.output and "WRONG-SECRET" not in refused.output
    point_at(seaweedfs_server.env)
    assert not s3_client(seaweedfs_server.env).list_objects_v2(Bucket=bucket.removeprefix("s3://")).get("Contents")


def test_a_missing_bucket_is_said_before_anything_is_done(
    moto_server: Server,
    new_bucket: NewBucket,
    local_job: tuple[Store, Store],
    dataset: Path,
    tiny_model: Path,
    run_cli: RunCli,
) -> None:
    new_bucket(moto_server)
    nowhere = "s3://no-such-bucket-here"
    for refused in (
        pack(run_cli, dataset, f"{nowhere}/shards"),
        encode(run_cli, tiny_model, local_job[0].url, f"{nowhere}/out"),
        encode(run_cli, tiny_model, f"{nowhere}/shards", local_job[1].url),
        *(run_cli(verb, f"{nowhere}/out") for verb in ("status", "verify", "retry", "finalize")),
    ):
        assert refused.returncode == 2, refused.output
        assert f"streamprep: {nowhere}/" in refused.output and "there is no such bucket" in refused.output


@pytest.mark.slow
def test_conditions_that_are_no_longer_honoured_harm_no_rank_and_are_noticed_by_the_next(
    moto_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    tiny_model: Path,
    run_cli: RunCli,
) -> None:
    """Each process looks at its start, and cannot know what comes later. It asks who was first before it creates."""
    bucket = new_bucket(moto_server)
    _, proxy = faulty(moto_server)
    ignored = proxy.inject("^PUT .*records", DropHeaders())
    done(encode(run_cli, tiny_model, local_job[0].url, f"{bucket}/out", "--nproc", 2, "--stale-seconds", 10))
    proxy.clear()
    assert ignored.hits >= 3
    assert rows(open_store(f"{bucket}/out")) == rows(local_job[1])
    assert ": 0 problems" in done(run_cli("verify", f"{bucket}/out")).output
    proxy.inject("^PUT ", DropHeaders())
    refused = encode(run_cli, tiny_model, local_job[0].url, f"{bucket}/out")
    assert refused.returncode == 2 and "--only-writer" in refused.output


@pytest.mark.slow  # test_bucket_ranks.py does, and kills them
def test_several_ranks_share_a_job_in_a_bucket(
    moto_server: Server, new_bucket: NewBucket, local_job: tuple[Store, Store], tiny_model: Path, run_cli: RunCli
) -> None:
    out = f"{new_bucket(moto_server)}/out"
    done(encode(run_cli, tiny_model, local_job[0].url, out, "--nproc", 2, "--stale-seconds", 10))
    assert rows(open_store(out)) == rows(local_job[1])


def test_a_store_that_ignores_conditions_is_refused_before_anything_is_written(
    rclone_server: Server,
    new_bucket: NewBucket,
    local_job: tuple[Store, Store],
    dataset: Path,
    tiny_model: Path,
    run_cli: RunCli,
) -> None:
    bucket = new_bucket(rclone_server)
    for refused in (
        pack(run_cli, dataset, f"{bucket}/shards"),
        encode(run_cli, tiny_model, local_job[0].url, f"{bucket}/out"),
    ):
        assert refused.returncode == 2
        assert "--only-writer" in refused.output
    assert not list(open_store(f"{bucket}/out").list(job.FOLDER))
    done(encode(run_cli, tiny_model, local_job[0].url, f"{bucket}/out", "--only-writer"))
    assert rows(open_store(f"{bucket}/out")) == rows(local_job[1])


def test_shards_on_a_web_server_can_be_read_and_not_written(
    local_job: tuple[Store, Store], dataset: Path, tiny_model: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    shards = local_job[0].local_path()
    assert shards is not None
    with http_files(shards) as url:
        assert ": 0 problems" in done(run_cli("verify", url)).output
        done(encode(run_cli, tiny_model, url, tmp_path / "out"))
        for refused in (pack(run_cli, dataset, f"{url}/new"), encode(run_cli, tiny_model, shards, f"{url}/out")):
            assert refused.returncode == 2
            assert "write to a local folder or a bucket" in refused.output
    data = contents(open_store(tmp_path / "out"), "combined_parquet_dataset")
    assert data == contents(local_job[1], "combined_parquet_dataset")


def test_one_place_cannot_be_both_shards_and_output(
    moto_server: Server, new_bucket: NewBucket, dataset: Path, tiny_model: Path, run_cli: RunCli
) -> None:
    bucket = new_bucket(moto_server)
    done(pack(run_cli, dataset, f"{bucket}/shards"))
    refused = encode(run_cli, tiny_model, f"{bucket}/shards", f"{bucket}/shards/")
    assert refused.returncode == 2
    assert "is the folder of the shards" in refused.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("index", "s3://bucket/tars", "--to", "my_shards"), "both must be local folders"),
        (("pack", "https://127.0.0.1:9/dataset", "my_shards"), "a web server lists no files"),
        (("pack", "s3://bucket/raw", "s3://bucket/raw/"), "itself"),
        (
            ("pack", "{dataset}", "s3://bucket/x", "--spool-dir", "s3://bucket/spool"),
            "--spool-dir must be a local folder",
        ),
        (("status", "https://127.0.0.1:9/out"), "did not answer"),
        (("status", "hf://a/b"), "only repositories of datasets"),
    ],
)
def test_what_cannot_be_in_a_bucket_is_said_so(
    arguments: tuple[str, ...], said: str, dataset: Path, run_cli: RunCli
) -> None:
    refused = run_cli(*(argument.format(dataset=dataset) for argument in arguments))
    assert refused.returncode in (1, 2)
    assert said in refused.output
    assert "Traceback" not in refused.output


@pytest.mark.parametrize("verb", ["pack", "encode"])
def test_a_full_spool_says_where_it_is_and_the_same_command_goes_on_with_more_room(
    verb: str,
    moto_server: Server,
    new_bucket: NewBucket,
    local_job: tuple[Store, Store],
    dataset: Path,
    tiny_model: Path,
    run_cli: RunCli,
    tmp_path: Path,
    mount_small_disk: Callable[[int], Path],
) -> None:
    bucket, disk = new_bucket(moto_server), mount_small_disk(1)

    def run(*flags: object) -> Ran:
        if verb == "pack":
            return run_cli("pack", dataset, f"{bucket}/place", "--shard-size-mb", 1, "--num-workers", 1, *flags)
        return encode(run_cli, tiny_model, local_job[0].url, f"{bucket}/place", *flags)

    full = run("--spool-dir", disk)
    assert full.returncode == 1
    assert f"{disk}/streamprep-spool" in full.output
    assert "--spool-dir" in full.output
    assert "Traceback" not in full.output
    assert not list(open_store(f"{bucket}/place").list("combined_parquet_dataset"))
    done(run("--spool-dir", tmp_path))
    folder, expected = ("", local_job[0]) if verb == "pack" else ("combined_parquet_dataset", local_job[1])
    assert contents(open_store(f"{bucket}/place"), folder) == contents(expected, folder)


# --- the Hugging Face hub


@pytest.mark.parametrize(
    ("dataset", "shards", "said"),
    [
        ("{url}", "{url}", "is the dataset itself"),
        ("{url}/", "{url}@main", "is the dataset itself"),
        ("{url}/raw", "{url}/raw/", "is the dataset itself"),
        ("{url}", "{url}/shards", "is in the dataset"),
        ("{url}/raw", "{url}/raw/a/b", "is in the dataset"),
        ("{name}", "{url}", "is the dataset itself"),
        ("{name}", "{url}/shards", "is in the dataset"),
    ],
)
def test_a_dataset_of_the_hub_is_not_packed_into_itself(
    dataset: str,
    shards: str,
    said: str,
    fake_hf_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    url = new_bucket(fake_hf_server)
    _, proxy = faulty(fake_hf_server)
    names = {"url": url, "name": url.removeprefix("hf://datasets/")}
    layout = ("--dataset-type", "hf") if "name" in dataset else ()
    refused = run_cli("pack", dataset.format(**names), shards.format(**names), *layout)
    assert refused.returncode == 2
    assert said in refused.output
    assert not proxy.requests and not staged(temporary)


def test_a_dataset_of_the_hub_is_packed_into_a_folder_beside_it(
    fake_hf_server: Server,
    new_bucket: NewBucket,
    local_job: tuple[Store, Store],
    dataset: Path,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    url = new_bucket(fake_hf_server)
    raw = open_store(f"{url}/raw")
    for path in dataset.rglob("*.*"):
        raw.put(path.relative_to(dataset).as_posix(), path.read_bytes(), step="data")
    raw.publish_all()
    done(pack(run_cli, f"{url}/raw", f"{url}/raw-shards"))  # type: ignore[arg-type]
    packed = contents(open_store(f"{url}/raw-shards"), "")
    assert {**packed, "pack.json": b""} == {**contents(local_job[0], ""), "pack.json": b""}  # it has the versions


def staged(temporary: Path) -> list[str]:
    """What is left of what was to be published, locks aside."""
    folder = temporary / "caches/streamprep/staging"
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")] if folder.exists() else []


def published(url: str, folder: str = "") -> dict[str, bytes]:
    """What a machine sees that has never heard of it."""
    hub._pins.clear()
    store = open_store(url, spool_dir="/nothing/is/staged/here")
    return contents(store, folder)


def commits(proxy: FaultProxy) -> int:
    return sum(request.status == 200 for request in proxy.requests if "/commit/main" in request.target)


@pytest.mark.parametrize(
    "point",
    [
        "commit.after",
        *(
            pytest.param(point, marks=pytest.mark.slow)
            for point in (
                *("plan", "uncond.after", "attempt.after", "data.after", "record", "record.after"),
                *("index", "success", "success.after", "base", "base.after", "commit", "unstage", "unstage.after"),
            )
        ),
    ],
)
def test_a_killed_job_goes_on_and_is_published_once(
    point: str,
    fake_hf_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    tiny_model: Path,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    shards, out = local_job[0].url, f"{new_bucket(fake_hf_server)}/out"
    _, proxy = faulty(fake_hf_server)
    assert encode(run_cli, tiny_model, shards, out, crash_at=point).returncode == 137
    is_there = point in ("commit.after", "unstage", "unstage.after")
    assert bool(published(out, job.FOLDER)) == is_there
    status = run_cli("status", out)
    if point == "record.after":
        assert status.returncode == 4
        assert "1 of 3 done" in status.output and "what is new is not published yet" in status.output
    goes_on = done(encode(run_cli, tiny_model, shards, out)).output
    assert ("until all is done; then published as one commit" in goes_on) == (
        point not in ("index", "success", "success.after", "commit", "commit.after", "unstage", "unstage.after")
    )
    assert commits(proxy) == 1
    assert not staged(temporary)
    assert published(out, "combined_parquet_dataset") == contents(local_job[1], "combined_parquet_dataset")
    assert ": 0 problems" in done(run_cli("verify", out)).output
    assert "state    done" in done(run_cli("status", out)).output
    again = done(encode(run_cli, tiny_model, shards, out)).output
    assert "3 done" in again and "staged in" not in again
    assert commits(proxy) == 1 and not staged(temporary)
    assert sorted(path.rpartition("/")[2] for path in published(out, job.FOLDER)) == sorted(
        path.rpartition("/")[2] for path in contents(local_job[1], job.FOLDER)
    )
    refused = encode(run_cli, tiny_model, shards, out, "--num-frames", 9)
    assert refused.returncode == 2 and "belongs to a job with other settings" in refused.output


@pytest.mark.parametrize("point", ["pack.after", "shard_index:2", "manifest.after", "commit.after"])
@pytest.mark.slow
def test_killed_packing_goes_on_and_is_published_once(
    point: str,
    fake_hf_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    dataset: Path,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    shards = f"{new_bucket(fake_hf_server)}/my shards"
    _, proxy = faulty(fake_hf_server)
    assert pack(run_cli, dataset, shards, crash_at=point).returncode == 137
    assert bool(published(shards)) == (point == "commit.after")
    done(pack(run_cli, dataset, shards))
    assert commits(proxy) == 1 and not staged(temporary)
    assert published(shards) == contents(local_job[0], "")
    refused = run_cli("pack", dataset, shards, "--shard-size-mb", 2)
    assert refused.returncode == 2 and "with other options" in refused.output


def test_ranks_share_a_job_for_the_hub_and_publish_it_once(
    fake_hf_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    tiny_model: Path,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    out = f"{new_bucket(fake_hf_server)}/out"
    _, proxy = faulty(fake_hf_server)
    lost = proxy.inject("^POST .*/commit/main", LoseReply(), times=1)
    slow = proxy.inject("", Answer(503), probability=0.05)
    done(encode(run_cli, tiny_model, local_job[0].url, out, "--nproc", 2, "--stale-seconds", 10))
    assert lost.hits == 1
    proxy.clear()
    assert slow is not None and commits(proxy) == 1
    assert not staged(temporary)
    assert published(out, "combined_parquet_dataset") == contents(local_job[1], "combined_parquet_dataset")


@pytest.mark.slow
def test_a_job_that_cannot_be_published_says_so_and_the_same_command_publishes_it(
    fake_hf_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    tiny_model: Path,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    out = f"{new_bucket(fake_hf_server)}/out"
    _, proxy = faulty(fake_hf_server)
    proxy.inject("^POST .*/commit/main", Answer(403))
    failed = encode(run_cli, tiny_model, local_job[0].url, out, "--spool-dir", temporary / "spool")
    assert failed.returncode == 1
    assert "could not be published" in failed.output and f"all is in {temporary}/spool" in failed.output
    assert "Traceback" not in failed.output and TOKEN not in failed.output
    status = run_cli("status", out, "--spool-dir", temporary / "spool")
    assert status.returncode == 4 and "3 of 3 done" in status.output
    proxy.clear()
    for verb in ("verify", "finalize"):
        done(run_cli(verb, out, "--spool-dir", temporary / "spool"))
    assert commits(proxy) == 1
    assert "state    done" in done(run_cli("status", out)).output
    assert published(out, "combined_parquet_dataset") == contents(local_job[1], "combined_parquet_dataset")


def test_who_cannot_write_to_the_hub_is_told_before_anything_is_done(
    fake_hf_server: Server,
    new_bucket: NewBucket,
    local_job: tuple[Store, Store],
    dataset: Path,
    tiny_model: Path,
    run_cli: RunCli,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = new_bucket(fake_hf_server)
    shards = local_job[0].url
    missing = encode(run_cli, tiny_model, shards, "hf://datasets/fake/no-such/out")
    assert missing.returncode == 2 and "hf repos create fake/no-such" in missing.output
    missing = encode(run_cli, tiny_model, "hf://datasets/fake/no-such/shards", temporary / "out")
    assert missing.returncode == 2 and "no such repository" in missing.output
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    for refused in (
        encode(run_cli, tiny_model, shards, f"{url}/out"),
        pack(run_cli, dataset, f"{url}/shards"),
    ):
        assert refused.returncode == 2 and "It must be allowed to write to the repository" in refused.output
        assert READ_TOKEN not in refused.output
    assert not staged(temporary)


@pytest.mark.slow
def test_a_unit_whose_record_was_removed_on_the_hub_is_made_again(
    fake_hf_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    dataset: Path,
    local_job: tuple[Store, Store],
    tiny_model: Path,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    url = new_bucket(fake_hf_server)
    _, proxy = faulty(fake_hf_server)
    flags = [flag for flag in FLAGS if flag != "--serial"]
    done(run_cli("run", dataset, f"{url}/out", "--shard-size-mb", 1, "--model-path", tiny_model, *flags))
    assert commits(proxy) == 2  # the shards, then the rest
    assert published(f"{url}/out/_streamprep/shards") == contents(local_job[0], "")
    repository = url.removeprefix("hf://datasets/")
    stale = "out/combined_parquet_dataset/000001-00000-01234567.parquet"
    operations = [CommitOperationDelete("out/_streamprep/records/000001.json"), CommitOperationAdd(stale, b"stale")]
    HfApi().create_commit(repository, operations, commit_message="m", repo_type="dataset")
    again = done(encode(run_cli, tiny_model, f"{url}/out/_streamprep/shards", f"{url}/out"))
    assert "2 done" in again.output and "1 file removed" in again.output
    assert commits(proxy) == 4 and not staged(temporary)
    assert published(f"{url}/out", "combined_parquet_dataset") == contents(local_job[1], "combined_parquet_dataset")
    assert ": 0 problems" in done(run_cli("verify", f"{url}/out")).output


@pytest.mark.slow
def test_what_was_bad_is_encoded_again_and_published_on_top(
    fake_hf_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    tiny_model: Path,
    run_cli: RunCli,
    temporary: Path,
) -> None:
    out = f"{new_bucket(fake_hf_server)}/out"
    _, proxy = faulty(fake_hf_server)
    shards = shutil.copytree(local_job[0].url, temporary / "shards")
    whole = (shards / "000001.tar").read_bytes()
    (shards / "000001.tar").write_bytes(whole[:5000] + bytes(byte ^ 1 for byte in whole[5000:5010]) + whole[5010:])
    assert "bad 1: 1 digest_mismatch" in done(encode(run_cli, tiny_model, shards, out)).output
    first = published(out, "combined_parquet_dataset")
    (shards / "000001.tar").write_bytes(whole)
    killed = run_cli("retry", out, crash_at="record.after")
    assert killed.returncode == 137
    assert "r1: 1 sample again" in run_cli("status", out).output
    assert ": 0 problems" not in run_cli("verify", out).output  # it is not published yet; what is, is read too
    assert "1 encoded" in done(run_cli("retry", out)).output
    assert commits(proxy) == 2 and not staged(temporary)
    now = published(out, "combined_parquet_dataset")
    assert first.items() < now.items()
    assert rows(open_store(out)) == rows(local_job[1])
    assert ": 0 problems" in done(run_cli("verify", out)).output


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_commands_side_by_side_that_are_killed_at_any_moment_publish_once(
    seed: int,
    fake_hf_server: Server,
    new_bucket: NewBucket,
    faulty: Faulty,
    local_job: tuple[Store, Store],
    tiny_model: Path,
    forks: Forks,
    temporary: Path,
) -> None:
    out = f"{new_bucket(fake_hf_server)}/out"
    _, proxy = faulty(fake_hf_server)
    proxy.inject("", Answer(503), probability=0.03)
    proxy.inject("^POST .*/commit/main", LoseReply(), times=1)
    dice = random.Random(seed)
    environment = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "TMPDIR", "XDG_"))}

    def start() -> Process:
        arguments = ("encode", local_job[0].url, out, "--model-path", tiny_model, *FLAGS, "--stale-seconds", 5)
        return forks.start(*arguments, environment=environment)

    running = [start() for _ in range(3)]
    for _ in range(5):
        time.sleep(dice.uniform(1.0, 4.0))
        victim = dice.randrange(len(running))
        running[victim].kill()
        running[victim].wait()
        running[victim] = start()
    for process in running:
        assert process.wait() == 0, process.output
    proxy.clear()
    assert commits(proxy) == 1
    assert not staged(temporary)
    assert published(out, "combined_parquet_dataset") == contents(local_job[1], "combined_parquet_dataset")
    assert ": 0 problems" in done(Ran(*_ended(forks.run("verify", out, environment=environment)))).output


def _ended(process: Process) -> tuple[int, str]:
    return process.wait(), process.output
