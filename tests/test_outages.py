"""A store that is away for a while: ranks wait for it, those that come meanwhile too, and the job is done."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from jobs import EncodeJob
from object_stores import PROVIDERS, Faulty, NewBucket
from servers.s3_buckets import unfinished_uploads
from servers.seaweedfs import MortalSeaweedFS

from streamprep.job import FOLDER, open_job
from streamprep.storage import Store, open_store
from streamprep.storage.patience import VARIABLE
from streamprep.verify import verify_job, verify_shards

if TYPE_CHECKING:
    from forks import Forks, Process
    from servers import Server
    from servers.fault_proxy import FaultProxy

    Undisturbed = Callable[..., EncodeJob]

pytest_plugins = ["jobs", "object_stores"]

AWAY_SECONDS = 40.0
BRIEFLY_AWAY_SECONDS = 7.0
"""obstore as it comes gives up after six, where nobody listens."""


@pytest.fixture
def mortal_store(tmp_path: Path, point_at: Callable[[Mapping[str, str]], None]) -> Iterator[MortalSeaweedFS]:
    """A store that can be killed and comes back; the environment is set to it."""
    folder = tmp_path / "seaweedfs"
    folder.mkdir()
    with MortalSeaweedFS(folder) as store:
        point_at(store.server.env)
        yield store


def upload(folder: Path, url: str) -> None:
    store = open_store(url)
    for path in sorted(folder.iterdir()):
        store.put(path.name, path.read_bytes(), step="data")


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith((*PROVIDERS, "TMPDIR"))} | more


def records(out: Store) -> list[str]:
    return [entry.path for entry in out.list(f"{FOLDER}/records")]


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def rank_processes(launcher: Process) -> dict[str, psutil.Process]:
    return {rank: child for child in psutil.Process(launcher.pid).children() if (rank := rank_of(child))}


def assert_done(out: str, expected: dict[str, str]) -> None:
    job = open_job(open_store(out))
    assert verify_job(job).problems == []
    folder = job.plan.data_folder
    written = {entry.path for entry in job.store.list(folder)}
    assert written == {name for name in expected if name.startswith(f"{folder}/")}  # named by their digests
    keys = [row.key for record in job.records() for file in record.files for row in file.rows]
    assert len(keys) == len(set(keys)) == sum(unit.num_clips for unit in job.plan.units)


@pytest.fixture
def bucket(
    moto_server: Server, new_bucket: NewBucket, faulty: Faulty, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[str, FaultProxy]:
    """An empty one of the quick server, and what stands before it."""
    url = new_bucket(moto_server)
    _, proxy = faulty(moto_server)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return url, proxy


def test_a_rank_waits_for_a_store_that_is_away(
    bucket: tuple[str, FaultProxy], forks: Forks, model: Path, slow_shards: Path, undisturbed: Undisturbed
) -> None:
    url, proxy = bucket
    expected = undisturbed(slow_shards).result()
    job = EncodeJob(forks, slow_shards, model, f"{url}/out")  # type: ignore[arg-type]
    rank = job.start(serial=True, environment=environment())
    rank.wait_for(lambda: proxy.count("^PUT .*/records/"))
    with proxy.refusing():
        time.sleep(BRIEFLY_AWAY_SECONDS)
        assert rank.code is None, rank.output
    assert rank.wait() == 0, rank.output
    assert_done(f"{url}/out", expected)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "grace_seconds"), [(signal.SIGTERM, 1), (signal.SIGINT, 20)])
def test_a_rank_that_waits_for_a_store_leaves_tidily(
    bucket: tuple[str, FaultProxy],
    forks: Forks,
    model: Path,
    slow_shards: Path,
    tmp_path: Path,
    number: signal.Signals,
    grace_seconds: int,
) -> None:
    url, proxy = bucket
    job = EncodeJob(forks, slow_shards, model, f"{url}/out")  # type: ignore[arg-type]
    rank = job.start(num_workers=1, grace_seconds=grace_seconds, environment=environment())
    rank.wait_for(lambda: proxy.count("^PUT .*/records/"))
    with proxy.refusing():
        time.sleep(2)
        rank.kill(number)
        assert rank.wait() == 4, rank.output
    assert f"stopped by {number.name}; the same command goes on from here" in rank.output
    assert "waiting no longer" not in rank.output
    assert "Traceback" not in rank.output
    rank.wait_until_all_gone(seconds=10)
    assert not list((tmp_path / "tmp").rglob("*.tmp"))


def test_a_store_that_was_never_there_ends_the_command_soon(
    point_at: Callable[[Mapping[str, str]], None], moto_server: Server, forks: Forks, model: Path, shards: Path
) -> None:
    point_at({**moto_server.env, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    job = EncodeJob(forks, shards, model, "s3://bucket/out")  # type: ignore[arg-type]
    failed = job.run(nproc=2, environment=environment(**{VARIABLE: "1"}))
    assert failed.code == 1
    assert "s3://bucket/out/_streamprep/plan.json: it did not answer" in failed.output
    assert "Connection refused" in failed.output
    assert "rank 0 has had no answer from a store, before anything was begun: it is not started again" in failed.output
    assert "rank 1" not in failed.output


@pytest.mark.s3
@pytest.mark.slow
def test_ranks_wait_for_a_store_that_is_away_and_so_do_those_that_start_meanwhile(
    mortal_store: MortalSeaweedFS, forks: Forks, model: Path, slow_shards: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed(slow_shards).result()
    bucket = mortal_store.server.new_bucket()
    upload(slow_shards, f"{bucket}/shards")
    out = open_store(f"{bucket}/out")
    job = EncodeJob(forks, f"{bucket}/shards", model, out.url)  # type: ignore[arg-type]
    launcher = job.start(nproc=2, num_workers=1, environment=environment())
    launcher.wait_for(lambda: records(out) and len(rank_processes(launcher)) == 2)
    mortal_store.kill()
    rank_processes(launcher)["1"].kill()
    time.sleep(AWAY_SECONDS)
    assert launcher.code is None, launcher.output
    mortal_store.start()
    assert launcher.wait(seconds=300) == 0, launcher.output
    assert "rank 1 was killed by SIGKILL; it is started again in 1 s" in launcher.output
    assert "rank 1 has had no answer from a store; it is started again in 2 s" in launcher.output
    assert "rank 0 has" not in launcher.output and "rank 0 failed" not in launcher.output
    assert_done(out.url, expected)


@pytest.mark.s3
@pytest.mark.slow
def test_packing_waits_for_a_store_that_is_away(
    mortal_store: MortalSeaweedFS, forks: Forks, make_video: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    for number in range(12):
        make_video(dataset / f"{number}.mp4", seed=number, padding_bytes=40 * 2**20)
    bucket = mortal_store.server.new_bucket()
    shards = open_store(f"{bucket}/shards")
    packing = forks.start(
        "pack", dataset, shards.url, "--shard-size-mb", 1, "--num-workers", 2, environment=environment()
    )
    packing.wait_for(lambda: any(entry.path.endswith(".json") for entry in shards.list(prefix="0")))
    mortal_store.kill()
    time.sleep(AWAY_SECONDS)
    mortal_store.start()
    assert packing.wait(seconds=300) == 0, packing.output
    verdict = verify_shards(shards)
    assert (verdict.problems, verdict.num_rows) == ([], 12)
    assert unfinished_uploads(mortal_store.server.env, bucket) == []
