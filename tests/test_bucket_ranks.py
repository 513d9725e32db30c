"""Many ranks on one bucket, killed and stopped while the store fails: what comes out is what one process makes on disk.

The store is seen through a proxy, which does to a part of all requests whatever networks and services do.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from jobs import EncodeJob, without_what_differs
from object_stores import PROVIDERS, Faulty, NewBucket
from servers.faults import Answer, CutReply, Delay, Fault, LoseReply, Reset, StallReply
from servers.s3_buckets import s3_client, unfinished_uploads

from streamprep.job import open_job
from streamprep.storage import open_store
from streamprep.verify import verify_job, verify_shards

if TYPE_CHECKING:
    from forks import Forks, Process
    from runs import Run
    from servers import Server
    from servers.fault_proxy import FaultProxy

    StartRank = Callable[[int], Process]
    NewRun = Callable[[int], Run]
    Undisturbed = Callable[..., EncodeJob]

pytest_plugins = ["jobs", "runs", "object_stores"]

STORE_FAILED = ("it did not answer as it should", "other writers kept it busy")
"""What a rank may leave with, whose requests failed once too often."""
TOTALS = re.compile(r"(?m)^\d+ (video|row)s?, .* in \S+://")
"""What the first rank says last."""
LARGE_BYTES = 17 * 2**20
NOT_THE_START_OF_AN_UPLOAD = r"^(?!POST \S*[?&]uploads)"
"""If the reply to that is lost, nobody knows the upload's number, so nobody can abort it: lifecycle rules can."""


@dataclass(frozen=True)
class Bucket:
    """An empty bucket behind a proxy, in whose environment commands are started."""

    url: str
    server: Server
    proxy: FaultProxy
    spool: Path

    @property
    def environment(self) -> dict[str, str]:
        """For commands."""
        return {name: value for name, value in os.environ.items() if name.startswith((*PROVIDERS, "TMPDIR"))}

    def digests(self, url: str) -> dict[str, str]:
        """Every object below a URL, at any depth, by its name there; not what is tried at the start."""
        client, name = s3_client(self.server.env), self.url.removeprefix("s3://")
        folder = url.removeprefix(f"{self.url}/")
        found = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=f"{folder}/"):
            for entry in page.get("Contents", []):
                data = client.get_object(Bucket=name, Key=entry["Key"])["Body"].read()
                found[entry["Key"].removeprefix(f"{folder}/")] = hashlib.sha256(data).hexdigest()
        return {name: digest for name, digest in found.items() if not name.startswith(".tmp/probe-")}

    def unfinished_uploads(self) -> list[str]:
        """Of the whole bucket."""
        return unfinished_uploads(self.server.env, self.url)

    def spooled(self) -> list[Path]:
        """What is left of files that were built to be uploaded."""
        return [path for path in self.spool.rglob("*.tmp") if path.is_file()]


@pytest.fixture
def open_bucket(
    request: pytest.FixtureRequest,
    new_bucket: NewBucket,
    faulty: Faulty,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Bucket]:
    """``open_bucket("moto_server")``: in an environment that leads there through the proxy."""

    def make(fixture: str) -> Bucket:
        server: Server = request.getfixturevalue(fixture)
        url = new_bucket(server)
        _, proxy = faulty(server)
        spool = tmp_path / "tmp"
        spool.mkdir()
        monkeypatch.setenv("TMPDIR", str(spool))
        return Bucket(url, server, proxy, spool)

    return make


@pytest.fixture
def bucket(request: pytest.FixtureRequest, open_bucket: Callable[[str], Bucket]) -> Bucket:
    """Of the server that a test names."""
    return open_bucket(request.param)


@pytest.fixture
def moto_bucket(open_bucket: Callable[[str], Bucket]) -> Bucket:
    """Of the quick one."""
    return open_bucket("moto_server")


@pytest.fixture(scope="module")
def large_dataset(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    """Six shards of a video each; three are so large that they are uploaded in parts."""
    root = tmp_path_factory.mktemp("dataset")
    for number in range(6):
        make_video(root / f"{number}.mp4", seed=number, padding_bytes=LARGE_BYTES if number < 3 else 2**20)
        (root / f"{number}.txt").write_text(f"number {number}")
    return root


@pytest.fixture(scope="module")
def packed(forks: Forks, large_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of its shards, packed undisturbed into a folder."""
    shards = tmp_path_factory.mktemp("packed")
    assert forks.run("pack", large_dataset, shards, "--shard-size-mb", 1, "--num-workers", 1).code == 0
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.iterdir()}


@dataclass
class Trouble:
    """Faults of every kind, for a part of all requests."""

    proxy: FaultProxy
    met: Counter[str] = field(default_factory=Counter)

    def begin(self) -> None:
        """Something is wrong with about one request in seven."""
        faults: list[tuple[str, Fault, float]] = [
            (r"^PUT \S*/(records/|plan|pack|failed/)", LoseReply(), 0.15),
            (r"^PUT \S*/(records/|plan|pack|failed/)", CutReply(), 0.1),
            (r"^POST \S*uploadId=", LoseReply(), 0.2),
            (r"^PUT \S*uploadId=", LoseReply(), 0.1),
            (NOT_THE_START_OF_AN_UPLOAD, LoseReply(), 0.01),
            ("", Answer(500), 0.02),
            ("", Answer(503), 0.03),
            ("", Answer(429, retry_after=1), 0.01),
            ("", Reset(), 0.02),
            ("^GET ", CutReply(), 0.02),
            ("^GET ", CutReply(reset=False), 0.02),
            ("^HEAD ", CutReply(at=0), 0.01),
            ("", StallReply(1.0), 0.01),
            ("", Delay(1.5), 0.01),
        ]
        self.rules = [self.proxy.inject(pattern, fault, probability=share) for pattern, fault, share in faults]

    def end(self) -> None:
        """No more of it; count what there was."""
        for rule in self.rules:
            status = getattr(rule.fault, "status", "")
            self.met[f"{type(rule.fault).__name__}{status}"] += rule.hits
        self.proxy.clear()


@dataclass
class Ranks:
    """Ranks of one run that come back when they are gone."""

    start: Callable[[int], Process]
    random: Random
    number: int = 3
    all: list[Process] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)
    asleep: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.all += [self.start(rank) for rank in range(self.number)]
        self._newest = list(self.all)

    def any_left(self) -> bool:
        """Whether one of them still works."""
        return any(rank.code is None for rank in self._newest)

    def harm(self) -> None:
        """Kill one or a decoding process of it, make it stand still, ask it to stop, or wake up one that slept."""
        number = self.random.randrange(self.number)
        victim = self._newest[number]
        if self.asleep and self.random.random() < 0.3:
            self.asleep.pop(self.random.randrange(len(self.asleep))).kill(signal.SIGCONT)
            return
        children = victim.decode_children()
        if children and self.random.random() < 0.2:
            self.random.choice(children).kill()
            self.killed["decoder"] += 1
        elif victim.code is None:
            how = self.random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP))
            victim.kill(how)
            self.killed[how.name] += 1
            if how == signal.SIGSTOP:
                self.asleep.append(victim)
            if self.random.random() < 0.8:
                self._newest[number] = self.start(number)
                self.all.append(self._newest[number])

    def wake_up(self) -> None:
        """All who stand still."""
        for rank in self.all:
            rank.kill(signal.SIGCONT)

    def settle(self) -> None:
        """Wake up who sleeps, and wait for all."""
        self.wake_up()
        for rank in self.all:
            code = rank.wait()
            # SIGTERM itself ends one that has not set its handlers yet, or has taken them down, behind its totals.
            without_handlers = not rank.output or TOTALS.search(rank.output)
            killed = code == -signal.SIGKILL or (code == -signal.SIGTERM and without_handlers)
            assert code in (0, 4) or killed or failed_loudly(rank), f"{code}: {rank.output}"


class Chaos:
    """Kills and faults together, in one run after another, until there were enough kills."""

    def __init__(self, bucket: Bucket, num_kills: int) -> None:
        self.killed: Counter[str] = Counter()
        self._bucket, self._num_kills = bucket, num_kills
        self._trouble, self._random = Trouble(bucket.proxy), Random(num_kills)
        self._num_runs = self._num_started = 0
        self._began = time.monotonic()

    def places(self, name: str) -> Iterator[str]:
        """A new URL for each run."""
        while self.killed.total() < self._num_kills:
            yield f"{self._bucket.url}/{name}-{self._num_runs}"

    def harm(self, start: StartRank, *, sleep_until_the_end: bool) -> None:
        """One run: it is harmed up to ten times, and then ends well.

        Args:
            start: Starts one of its ranks.
            sleep_until_the_end: Whether those that stand still do so until all is done, which others must not wait for.
        """
        self._trouble.begin()
        ranks = Ranks(start, self._random)
        while ranks.any_left() and ranks.killed.total() < min(self._num_kills - self.killed.total(), 10):
            time.sleep(self._random.uniform(0.0, 1.2))
            ranks.harm()
        if not sleep_until_the_end:
            ranks.wake_up()
        self._finish(start)
        ranks.settle()
        self._trouble.end()
        self._finish(start)  # what those left that woke up last
        self.killed += ranks.killed
        self._num_runs, self._num_started = self._num_runs + 1, self._num_started + len(ranks.all)

    def _finish(self, start: StartRank) -> None:
        """The same command again, until it has done what is left; that the store fails is a reason to try once more."""
        for _ in range(5):
            last = start(0)
            if last.wait() == 0:
                return
            assert failed_loudly(last), f"{last.code}: {last.output}"
        raise AssertionError(last.output)

    def report(self) -> None:
        """What there was of it."""
        print(
            f"{self._bucket.server.name}: {self._num_runs} runs, {self._num_started} ranks, "
            f"harmed {dict(self.killed)}, {len(self._bucket.proxy.requests)} requests, "
            f"faults {dict(self._trouble.met)}, {time.monotonic() - self._began:.0f} s"
        )


def failed_loudly(rank: Process) -> bool:
    """Whether its requests failed once too often, and it said so."""
    return rank.code == 1 and any(said in rank.output for said in STORE_FAILED) and "Traceback" not in rank.output


def kills(quick: int, thorough: int) -> list[Any]:
    """(server, number of kills)."""
    marks = [pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(1800)]
    return [
        pytest.param("moto_server", quick, id="moto"),
        pytest.param("seaweedfs_server", thorough, id="seaweedfs", marks=marks),
    ]


def upload(folder: Path, url: str) -> None:
    store = open_store(url)
    for path in sorted(folder.iterdir()):
        store.put(path.name, path.read_bytes(), step="data")


# --- killed, stopped, and the store fails


@pytest.mark.parametrize(("bucket", "num_kills"), kills(3, 60), indirect=["bucket"])
def test_ranks_that_encode_from_bucket_to_bucket_are_killed_while_the_store_fails(
    bucket: Bucket,
    num_kills: int,
    forks: Forks,
    model: Path,
    new_run: NewRun,
    undisturbed: Undisturbed,
    request: pytest.FixtureRequest,
) -> None:
    is_quick = bucket.server.name == "moto"
    shards: Path = request.getfixturevalue("shards" if is_quick else "slow_shards")
    expected = undisturbed(shards).result()
    upload(shards, f"{bucket.url}/shards")
    chaos = Chaos(bucket, num_kills)
    for out in chaos.places("out"):
        job = EncodeJob(forks, f"{bucket.url}/shards", model, out)  # type: ignore[arg-type]
        run = new_run(3)
        chaos.harm(
            lambda rank, job=job, run=run: run.start(
                job, rank, environment=bucket.environment, serial=is_quick, num_workers=1
            ),
            sleep_until_the_end=True,
        )
        current = open_job(open_store(out))
        assert verify_job(current).problems == []
        assert without_what_differs(bucket.digests(out), current) == expected
        keys = [row.key for record in current.records() for file in record.files for row in file.rows]
        assert (
            len(keys) == len(set(keys)) == sum(unit.num_clips for unit in current.plan.units) - is_quick
        )  # one is bad
        assert bucket.spooled() == []
    assert bucket.unfinished_uploads() == []
    chaos.report()


@pytest.mark.parametrize(("bucket", "num_kills"), kills(3, 40), indirect=["bucket"])
def test_ranks_that_pack_into_a_bucket_are_killed_while_the_store_fails(
    bucket: Bucket, num_kills: int, forks: Forks, new_run: NewRun, large_dataset: Path, packed: dict[str, str]
) -> None:
    chaos = Chaos(bucket, num_kills)
    for shards in chaos.places("shards"):
        command, run = ("pack", large_dataset, shards, "--shard-size-mb", 1, "--num-workers", 1), new_run(3)
        chaos.harm(
            lambda rank, command=command, run=run: forks.start(
                *command, environment=run.environment(rank) | bucket.environment
            ),
            sleep_until_the_end=False,  # `pack` waits five minutes for who may live
        )
        assert bucket.digests(shards) == packed
        assert verify_shards(open_store(shards)).problems == []
        assert bucket.spooled() == []
    assert len(bucket.unfinished_uploads()) <= chaos.killed["SIGKILL"]  # what a killed process was at nobody knows of
    chaos.report()


def test_ranks_that_nobody_kills_leave_no_unfinished_upload(
    moto_bucket: Bucket, forks: Forks, new_run: NewRun, large_dataset: Path, packed: dict[str, str]
) -> None:
    """Whatever becomes of its requests, an upload is completed or aborted."""
    bucket, run = moto_bucket, new_run(2)
    shards = f"{bucket.url}/shards"
    rules = [
        bucket.proxy.inject(r"^POST \S*uploadId=", LoseReply(), times=1),
        bucket.proxy.inject(r"^PUT \S*partNumber=2", Answer(403), skip=2, times=1),
        bucket.proxy.inject(r"^PUT \S*partNumber=1", Reset(), times=3),
    ]
    command = ("pack", large_dataset, shards, "--shard-size-mb", 1, "--num-workers", 1)
    ranks = [forks.start(*command, environment=run.environment(rank) | bucket.environment) for rank in range(2)]
    assert sorted(rank.wait() for rank in ranks) == [0, 1], [rank.output for rank in ranks]
    assert [rule.hits for rule in rules] == [1, 1, 3]
    assert forks.run(*command, environment=bucket.environment).code == 0
    assert bucket.digests(shards) == packed
    assert bucket.unfinished_uploads() == []
    assert bucket.spooled() == []
