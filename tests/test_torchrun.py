"""torchrun starts the ranks, and restarts them; its agents die, leave early, and take the ranks' board with them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import psutil
import pytest

from streamprep.cli import main

if TYPE_CHECKING:
    from jobs import EncodeJob

    NewJob = Callable[..., EncodeJob]
    Undisturbed = Callable[..., EncodeJob]

pytest_plugins = ["jobs"]

ODD = "odd_exporter:open_shard"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1")


class Launcher:
    """torchrun, or one of its agents, and all processes below it."""

    def __init__(self, log: Path, arguments: list[str], environment: Mapping[str, str]) -> None:
        self._log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], stdout=out, stderr=out, env=environment, start_new_session=True
            )

    def ranks(self) -> list[psutil.Process]:
        """The ranks that run."""
        try:
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if "streamprep" in child.cmdline()]
        except psutil.NoSuchProcess:
            return []

    def wait(self, *, seconds: float = 300) -> int:
        return self.process.wait(timeout=seconds)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def kill_all(self) -> None:
        """The launcher, and its ranks, which it does not take along."""
        for process in (*self.ranks(), psutil.Process(self.process.pid)):
            process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path, repo_root: Path) -> Iterator[Callable[..., Launcher]]:
    """``start(*arguments, environment={})``: a Python process, whose ranks are gone after the test."""
    started: list[Launcher] = []

    def make(*arguments: object, environment: Mapping[str, str] | None = None) -> Launcher:
        path = os.pathsep.join((str(repo_root), str(repo_root / "tests")))
        whole = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})}
        log = tmp_path / f"launcher-{len(started)}.log"
        started.append(Launcher(log, [str(argument) for argument in arguments], whole))
        return started[-1]

    yield make
    for one in started:
        if one.process.poll() is None:
            one.kill_all()


def wait_for(condition: Callable[[], object], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_done(job: EncodeJob, expected: EncodeJob) -> None:
    assert job.result() == expected.result()
    assert job.problems() == []
    assert main(["status", str(job.out)]) == 0


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torchrun_starts_ranks_and_restarts_those_that_are_killed(
    new_job: NewJob, undisturbed: Undisturbed, slow_shards: Path, start: Callable[..., Launcher], killed: bool
) -> None:
    job = new_job(slow_shards)
    torchrun = start(
        *TORCHRUN, "--nproc-per-node", 2, "--max-restarts", 5, *job.command(num_workers=1, stale_seconds=3)
    )
    wait_for(job.num_records)
    if killed:
        torchrun.ranks()[0].kill()
    assert torchrun.wait() == 0, torchrun.output
    assert_done(job, undisturbed(slow_shards))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_rank_killed_every_few_seconds_for_ten_minutes_is_no_loss(
    new_job: NewJob, undisturbed: Undisturbed, slow_shards: Path, start: Callable[..., Launcher]
) -> None:
    """Each kill restarts both ranks, which takes them several seconds: most die before they have done anything."""
    job, random = new_job(slow_shards), Random(0)
    torchrun = start(
        *(*TORCHRUN, "--nproc-per-node", 2, "--max-restarts", 1000),
        *job.command(num_workers=1, stale_seconds=3, grace_seconds=1, exporter=ODD),
        environment={"ODD_UNITS": ",".join(f"{number:06d}=sleep:4" for number in range(7))},
    )
    ends = time.monotonic() + 600
    num_kills = 0
    while time.monotonic() < ends and torchrun.process.poll() is None:
        time.sleep(random.uniform(2, 12))
        ranks = torchrun.ranks()
        if ranks:
            random.choice(ranks).kill()
            num_kills += 1
    print(f"{num_kills} kills, {job.num_records()} units done before they ended")
    assert torchrun.wait() == 0, torchrun.output
    assert num_kills > 20
    assert_done(job, undisturbed(slow_shards))


@pytest.mark.slow
def test_a_job_stopped_for_its_bad_samples_does_not_begin_again_with_each_restart(
    new_job: NewJob,
    make_shards: Callable[..., Path],
    undecodable_video: Callable[[Path], Path],
    start: Callable[..., Launcher],
) -> None:
    job = new_job(make_shards({f"{number:02d}.mp4": undecodable_video for number in range(25)}))
    torchrun = start(*TORCHRUN, "--nproc-per-node", 2, "--max-restarts", 2, *job.command(num_workers=1))
    assert torchrun.wait() != 0
    assert main(["status", str(job.out)]) == 3
    assert torchrun.output.count("the settings may be wrong") >= 1
    assert job.num_records() == 0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.mark.slow
def test_a_unit_that_takes_longer_than_the_agents_wait_at_their_exit_is_no_loss(
    new_job: NewJob, undisturbed: Undisturbed, shards: Path, repo_root: Path, start: Callable[..., Launcher]
) -> None:
    """One of the nodes has nothing left to do while the other one is at its unit for longer than the exit barrier."""
    job, port = new_job(), free_port()
    command = (repo_root / "tests/elastic_agent.py", port, 1, *job.command(serial=True, exporter=ODD)[2:])
    environment = {"ODD_UNITS": "000003=sleep:8"}
    first, second = (start(*command, environment=environment) for _ in range(2))
    assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
    assert_done(job, undisturbed(shards))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_an_agent_killed_with_its_ranks_is_no_loss(
    new_job: NewJob,
    undisturbed: Undisturbed,
    slow_shards: Path,
    repo_root: Path,
    start: Callable[..., Launcher],
    seed: int,
) -> None:
    """The one with the store, or the other one: what is left goes on, or ends and is started again by hand."""
    job, port, random = new_job(slow_shards), free_port(), Random(seed)
    flags = {"num_workers": 1, "stale_seconds": 3, "grace_seconds": 2}
    command = (repo_root / "tests/elastic_agent.py", port, 1, *job.command(**flags)[2:])
    agents = [start(*command) for _ in range(2)]
    wait_for(job.num_records)
    time.sleep(random.uniform(0, 3))
    victim = agents[seed % 2]
    victim.kill_all() if seed < 2 else victim.process.send_signal(signal.SIGKILL)
    (other,) = (agent for agent in agents if agent is not victim)
    other.wait()
    assert job.run(serial=True, stale_seconds=3).code == 0
    assert_done(job, undisturbed(slow_shards))
