"""On Ray, whatever is killed: actors, ranks, the driver. The rows are those of one undisturbed process."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from streamprep.attempts import Attempts, Worker
from streamprep.cli import main
from streamprep.launch.actor import RankActor, rank_environment
from streamprep.storage import open_store

if TYPE_CHECKING:
    from forks import Process
    from jobs import EncodeJob

    NewJob = Callable[..., EncodeJob]
    Undisturbed = Callable[[Path], EncodeJob]
    StartOnRay = Callable[..., Process]

pytest.importorskip("ray")
pytest_plugins = ["jobs"]

ODD = "odd_exporter:open_shard"
STALE_SECONDS = 3


@pytest.fixture(scope="module")
def cluster(repo_root: Path) -> Iterator[Any]:
    """A Ray cluster of this machine alone."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{repo_root}{os.pathsep}{Path(__file__).parent}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # the machine may be busy with other things
        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def start_on_ray(cluster: Any) -> StartOnRay:
    """``start_on_ray(job, num_frames=9)``: with two ranks on the cluster, if nothing else is said."""

    def start(job: EncodeJob, **how: Any) -> Process:
        address = {} if "ray_address" in how else {"ray_address": cluster.address}
        flags = {"launcher": "ray", "nproc": 2, "num_workers": 1, "stale_seconds": STALE_SECONDS}
        return job.start(**flags | address | how)

    return start


@pytest.mark.slow
def test_ranks_in_actors_write_what_one_process_writes(
    new_job: NewJob, start_on_ray: StartOnRay, undisturbed: Undisturbed, shards: Path
) -> None:
    job = new_job()
    driver = start_on_ray(job)
    assert driver.wait() == 0, driver.output
    assert_done(job, undisturbed(shards))
    assert driver.output.count("8 rows, 5 files") == driver.output.count("; 2 ranks\n") == 1
    assert {log.name[:9] for log in (job.out / "_streamprep/logs").iterdir()} == {"rank-0000", "rank-0001"}


# --- killed


@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced_and_its_units_are_taken_again(
    new_job: NewJob, start_on_ray: StartOnRay, undisturbed: Undisturbed, slow_shards: Path
) -> None:
    job = new_job(slow_shards)
    driver = start_on_ray(job)
    rank = driver.wait_for(lambda: next((rank for rank in ranks(job) if is_at_a_unit(rank, job)), None))
    actor = rank.parent()
    assert actor is not None and "RankActor" in actor.name() + "".join(actor.cmdline())
    actor.kill()
    assert driver.wait() == 0, driver.output
    assert "has lost its Ray actor" in driver.output
    assert "it is started again in 1 s, 99 restarts left" in driver.output
    assert not is_alive(rank)
    assert_done(job, undisturbed(slow_shards))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_actors_ranks_and_decoding_processes_killed_at_random_change_nothing(
    new_job: NewJob, start_on_ray: StartOnRay, undisturbed: Undisturbed, slow_shards: Path, tmp_path: Path
) -> None:
    random, killed = Random(0), 0
    while killed < 20:
        job = new_job(slow_shards, out=tmp_path / f"out-{killed}")
        driver = start_on_ray(job)
        while driver.code is None and killed < 20:
            if (victim := choose_victim(job, random)) is not None:
                victim.kill()
                killed += 1
            time.sleep(random.uniform(0.0, 8.0))
        while driver.wait() != 0:  # a rank that dies five times without having ended a unit is not started again
            assert driver.code == 1 and "for the 5th time" in driver.output, driver.output
            driver = start_on_ray(job)
        assert_done(job, undisturbed(slow_shards))


def choose_victim(job: EncodeJob, random: Random) -> psutil.Process | None:
    alive = ranks(job)
    if not alive:
        return None
    rank = random.choice(alive)
    try:
        return random.choice([rank, rank.parent() or rank, *rank.children(recursive=True)])
    except psutil.NoSuchProcess:
        return None


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_no_process_and_the_same_command_goes_on(
    new_job: NewJob, start_on_ray: StartOnRay, undisturbed: Undisturbed, slow_shards: Path
) -> None:
    """On a cluster of its own, which ends with it."""
    job = new_job(slow_shards)
    driver = start_on_ray(job, ray_address="local")
    driver.wait_for(job.num_records)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    wait_until(lambda: not ranks(job))
    driver.wait_until_all_gone(seconds=60)
    again = start_on_ray(job, ray_address="local")
    assert again.wait() == 0, again.output
    again.wait_until_all_gone(seconds=60)
    assert_done(job, undisturbed(slow_shards))


@pytest.mark.slow
def test_a_driver_that_is_killed_takes_its_actors_from_the_cluster(
    new_job: NewJob, start_on_ray: StartOnRay, undisturbed: Undisturbed, slow_shards: Path
) -> None:
    job = new_job(slow_shards)
    driver = start_on_ray(job)
    driver.wait_for(job.num_records)
    driver.kill()
    wait_until(lambda: not ranks(job))
    assert start_on_ray(job).wait() == 0
    assert_done(job, undisturbed(slow_shards))


@pytest.mark.slow
def test_units_of_a_node_that_is_lost_are_taken_again_without_waiting(
    new_job: NewJob, start_on_ray: StartOnRay, cluster: Any, tmp_path: Path
) -> None:
    """No process on another machine can see that its rank is gone, and the job would wait for hours."""
    job = new_job()
    with node_of_its_own(cluster.address, tmp_path / "lost.log", ODD_UNITS="000000=sleep:600") as lost:
        driver = start_on_ray(job, exporter=ODD, gpus_per_worker=1, device="cpu", stale_seconds=36_000)
        driver.wait_for(lambda: any(is_at_a_unit(rank, job) for rank in ranks(job)))
        with node_of_its_own(cluster.address, tmp_path / "other.log"):
            driver.wait_for(lambda: len(list((job.out / "_streamprep/logs").iterdir())) == 2)
            lost.kill()
            assert driver.wait() == 0, driver.output
    assert "1 of 2 Ray actors wait for room" in driver.output
    assert "has lost its Ray actor" in driver.output
    assert job.problems() == []


@contextmanager
def node_of_its_own(address: str, log: Path, **environment: str) -> Iterator[psutil.Popen]:
    """A node with one GPU, as Ray believes. It sees none of our processes, nor we its own; all die with the first."""
    alone = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    may = subprocess.run([*alone, "true"], capture_output=True, text=True)
    if may.returncode:
        pytest.skip(f"no process can be started in a namespace of its own: {may.stderr.strip()}")
    command = "ray start --block --num-gpus=1 --object-store-memory=80000000 --disable-usage-stats --address"
    with open(log, "w") as file:
        node = psutil.Popen(
            [*alone, *command.split(), address],
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment,
            stdout=file,
            stderr=file,
        )
    try:
        wait_until(lambda: node.poll() is not None or "Ray runtime started" in log.read_text())
        assert node.poll() is None, log.read_text()
        yield node
    finally:
        node.kill()
        node.wait()


def test_a_lost_process_frees_what_it_was_at_and_nothing_else(tmp_path: Path) -> None:
    elsewhere = [dataclasses.replace(Worker.this(), token=token, machine="another") for token in ("lost", "alive")]
    for worker, unit in zip(elsewhere, ("000000", "000001"), strict=True):
        Attempts(open_store(tmp_path), "job", worker).begin(unit, alone=False)
    here = Attempts(open_store(tmp_path), "job", Worker.this())
    here.conclude_lost("lost")
    (lost,), (alive,) = here.of("000000"), here.of("000001")
    assert lost.ended is not None and lost.ended.how == "vanished"
    assert alive.ended is None


# --- asked to stop


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group"), [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_lets_ranks_finish_their_units_and_leaves_no_process(
    new_job: NewJob, start_on_ray: StartOnRay, number: signal.Signals, group: bool
) -> None:
    job = new_job()
    sleepy = {"ODD_UNITS": "000000=sleep:4,000001=sleep:4,000003=sleep:4"}
    driver = start_on_ray(job, ray_address="local", exporter=ODD, environment=sleepy)
    driver.wait_for(lambda: any(is_at_a_unit(rank, job) for rank in ranks(job)))
    before = job.num_records()
    driver.kill(number, group=group)
    assert driver.wait() == 4, driver.output
    assert f"streamprep: stopped by {number.name}; the same command goes on from here" in driver.output
    assert "Traceback" not in driver.output
    assert job.num_records() > before
    assert not ranks(job)
    driver.wait_until_all_gone(seconds=30)
    assert job.run(exporter=ODD, serial=True).code == 0
    assert job.problems() == []


# --- errors


def test_a_mistake_is_told_once(new_job: NewJob, start_on_ray: StartOnRay) -> None:
    refused = start_on_ray(new_job(), num_frames=6)
    assert refused.wait() == 2
    assert refused.output.count("streamprep: ") == 1
    assert "--num-frames 6" in refused.output or "num_frames" in refused.output


def test_a_cluster_without_a_gpu_has_no_processes_for_each(new_job: NewJob, start_on_ray: StartOnRay) -> None:
    refused = start_on_ray(new_job(), nproc="auto")
    assert refused.wait() == 2
    assert "--nproc auto" in refused.output and "say how many processes" in refused.output


def test_a_cluster_that_is_not_there_is_a_mistake(new_job: NewJob, start_on_ray: StartOnRay) -> None:
    refused = start_on_ray(new_job(), ray_address="127.0.0.1:1")
    assert refused.wait() == 2
    assert refused.output == "streamprep: --ray-address 127.0.0.1:1: [Errno 111] Connection refused\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda:1"], "--device cuda:1: every Ray worker sees its own GPU alone"),
        (["--ray-address", "ray://host:10001"], "give the command on a node of the cluster"),
    ],
)
def test_what_ray_cannot_do_is_said_before_anything_is_started(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", "shards", "out", "--model-path", "model", "--launcher", "ray", *flags]) == 2
    assert message in capsys.readouterr().err


def test_without_the_library_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["encode", "shards", "out", "--model-path", "model", "--launcher", "ray"]) == 2
    assert "--launcher ray needs the library ray" in (said := capsys.readouterr().err)
    assert said.endswith("pip install streamprep[ray]\n")


def test_an_actor_says_why_it_cannot_start_a_rank(tmp_path: Path) -> None:
    nobody_listens = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    actor = RankActor()
    assert "give the command in a folder that every node has" in (actor.start([], {}, f"{tmp_path}/no") or "")
    assert "cannot reach this command at 127.0.0.1:1: " in (actor.start([], nobody_listens, str(tmp_path)) or "")


# --- what a rank is told


@pytest.mark.parametrize(("ours", "theirs"), [(None, None), ("3", "3")])
def test_ray_does_not_say_how_many_threads_a_rank_has(
    ours: str | None, theirs: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in an actor
    assert rank_environment({"OMP_NUM_THREADS": ours}).get("OMP_NUM_THREADS") == theirs


def test_of_several_gpus_a_rank_has_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert rank_environment({})["CUDA_VISIBLE_DEVICES"] == "5"


# --- what these tests say in one word


def assert_done(job: EncodeJob, expected: EncodeJob) -> None:
    assert job.result() == expected.result()
    assert job.problems() == []
    assert main(["status", str(job.out)]) == 0


def ranks(job: EncodeJob) -> list[psutil.Process]:
    """Processes that encode; the driver, as it was forked, has the name of the server of forks."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if str(job.out) in command and "streamprep" in command and is_alive(process):
            found.append(process)
    return found


def is_at_a_unit(rank: psutil.Process, job: EncodeJob) -> bool:
    """Whether it has taken one that has no record yet."""
    marks = [mark.read_text() for mark in (job.out / "_streamprep/attempts").glob("0*.json")]
    return any(f'"pid": {rank_pid}' in mark for mark in marks for rank_pid in own_pids(rank))


def own_pids(process: psutil.Process) -> list[str]:
    """Its numbers, here and in its own namespace."""
    (line,) = [
        line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("NSpid")
    ]
    return line.split()[1:]


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
