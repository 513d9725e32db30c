"""Many ranks pack one dataset: whichever die, hang or come late, the shards are those of one undisturbed process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from streamprep.board import LocalBoard
from streamprep.config import IndexConfig, PackConfig
from streamprep.crashpoints import VARIABLE
from streamprep.errors import UnitsSetAside, UserError
from streamprep.index import index
from streamprep.job import open_job
from streamprep.pack import pack
from streamprep.pack_shard import open_and_probe
from streamprep.storage import open_store
from streamprep.types import RawSample
from streamprep.verify import verify_job, verify_shards

if TYPE_CHECKING:
    from forks import Forks, Process
    from runs import Run

    from streamprep.sources._files import OpenVideo

    NewRun = Callable[[int], Run]
    StartPack = Callable[..., Process]

pytest_plugins = ["jobs", "runs"]

CRASHED = 137
NUM_SHARDS, LARGE_BYTES = 6, 8 * 2**20
FLAGS = ("--shard-size-mb", 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    """Six shards of a video each; some tenths of a second are spent on each of the first three."""
    root = tmp_path_factory.mktemp("dataset")
    for number in range(NUM_SHARDS):
        size_bytes = LARGE_BYTES if number < 3 else 2**20
        make_video(root / f"{number}.mp4", seed=number, padding_bytes=size_bytes)
        (root / f"{number}.txt").write_text(f"number {number}")
    return root


@pytest.fixture(scope="module")
def packed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its shards, made undisturbed by one process."""
    shards = tmp_path_factory.mktemp("packed")
    pack(config(dataset, shards))
    return shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def start_pack(forks: Forks, dataset: Path, shards: Path) -> StartPack:
    """``start_pack(run, 0)``: rank 0 of a run; ``start_pack()``: a command by hand."""

    def start(
        run: Run | None = None,
        rank: int = 0,
        *,
        num_workers: int = 1,
        to: Path = shards,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Process:
        ranks = run.environment(rank) if run else {}
        command = ("pack", dataset, to, *FLAGS, "--num-workers", num_workers)
        return forks.start(*command, environment={**ranks, **environment})

    return start


def config(dataset: Path, shards: Path, **options: Any) -> PackConfig:
    return PackConfig(dataset=str(dataset), shards=str(shards), **{"shard_size_mb": 1, "num_workers": 1} | options)


def assert_like(shards: Path, packed: Path) -> None:
    """The same files with the same bytes, no folder beside them, and nothing wrong with them."""
    assert [path.name for path in sorted(shards.iterdir())] == [path.name for path in sorted(packed.iterdir())]
    assert all((shards / path.name).read_bytes() == path.read_bytes() for path in packed.iterdir())
    assert verify_shards(open_store(shards)).problems == []


def marks_of(process: Process, shards: Path) -> list[str]:
    """The shards that a process says to be at."""
    found = []
    for path in (shards / "_streamprep/attempts").glob("0*.json"):
        try:
            mark = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        if mark["by"]["pid"] == process.pid:
            found.append(mark["unit"])
    return found


def suspend_at_a_shard(process: Process, shards: Path) -> None:
    """Stop a process while it is at a shard that is not there yet."""

    def stood_still() -> bool:
        if not marks_of(process, shards):
            return False
        process.kill(signal.SIGSTOP)
        at = [unit for unit in marks_of(process, shards) if not (shards / f"{unit}.json").exists()]
        if not at:
            process.kill(signal.SIGCONT)
        return bool(at)

    process.wait_for(stood_still)


def indexes(shards: Path) -> list[Path]:
    return list(shards.glob("0*.json"))


# --- nothing happens


def test_ranks_share_the_shards_and_write_what_one_process_writes(
    start_pack: StartPack, new_run: NewRun, packed: Path, shards: Path
) -> None:
    run = new_run(3)
    ranks = [start_pack(run, 0)]
    ranks[0].wait_for(lambda: "in 6 shards, 0 done; 3 ranks" in ranks[0].output)
    ranks += [start_pack(run, rank) for rank in (1, 2)]
    assert [rank.wait() for rank in ranks] == [0, 0, 0], [rank.output for rank in ranks]
    assert_like(shards, packed)
    assert ranks[0].output.splitlines()[-1].startswith("6 videos, 6 shards, ")
    assert ranks[1].output == ranks[2].output == ""


def test_each_rank_may_use_several_processes(
    start_pack: StartPack, new_run: NewRun, packed: Path, shards: Path
) -> None:
    run = new_run(2)
    ranks = [start_pack(run, rank, num_workers=2) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.output for rank in ranks]
    assert_like(shards, packed)


def test_commands_started_by_hand_share_the_shards(start_pack: StartPack, packed: Path, shards: Path) -> None:
    """Each would begin with the first shard; the one that comes second goes on to those that are free."""
    first = start_pack()
    suspend_at_a_shard(first, shards)
    second = start_pack()
    second.wait_for(lambda: len(indexes(shards)) == NUM_SHARDS - 1)
    first.kill(signal.SIGCONT)
    assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
    assert_like(shards, packed)


@pytest.mark.slow
def test_torchrun_packs(dataset: Path, packed: Path, shards: Path, repo_root: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*launcher, "-m", "streamprep", "pack", dataset, shards, *FLAGS)
    ended = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("6 videos, 6 shards, ")
    assert len(ended.stdout.splitlines()) == 1
    assert_like(shards, packed)


def test_ranks_that_run_pack_then_encode(
    forks: Forks, new_run: NewRun, model: Path, dataset: Path, packed: Path, tmp_path: Path
) -> None:
    run, out = new_run(2), tmp_path / "out"
    geometry = ("--height", 32, "--width", 48, "--num-frames", 5, "--encode-threads", 1)
    command = ("run", dataset, out, "--model-path", model, *FLAGS, *geometry, "--serial", "--stale-seconds", 3)
    ranks = [forks.start(*command, environment=run.environment(rank)) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.output for rank in ranks]
    assert_like(out / "_streamprep/shards", packed)
    job = verify_job(open_job(open_store(out)))
    assert (job.num_rows, job.problems) == (NUM_SHARDS, [])
    assert ranks[1].output == ""


# --- ranks die, stand still, come late


@pytest.mark.parametrize(
    "step",
    [
        "shard",
        "shard_index",
        *(pytest.param(f"{step}.after", marks=pytest.mark.slow) for step in ("shard", "withdraw")),
    ],
)
def test_a_rank_that_dies_at_a_shard_is_no_loss_to_the_others(
    start_pack: StartPack, new_run: NewRun, packed: Path, shards: Path, step: str
) -> None:
    run = new_run(2)
    dying = start_pack(run, 1, environment={VARIABLE: f"{step}:2"})
    dying.wait_for(lambda: marks_of(dying, shards))
    other = start_pack(run, 0)
    assert dying.wait() == CRASHED
    assert other.wait() == 0, other.output
    assert_like(shards, packed)


@pytest.mark.parametrize(
    "step", ["manifest", *(pytest.param(step, marks=pytest.mark.slow) for step in ("manifest.after", "attempt.after"))]
)
def test_ranks_that_all_die_are_no_loss_to_those_that_are_started_again(
    start_pack: StartPack, new_run: NewRun, packed: Path, shards: Path, step: str
) -> None:
    """Which of the two comes to that point first is a matter of chance."""
    run = new_run(2)
    ranks = [start_pack(run, rank, environment={VARIABLE: step}) for rank in range(2)]
    assert CRASHED in [rank.wait() for rank in ranks]
    again = start_pack(run, 0)
    assert again.wait() == 0, again.output
    assert_like(shards, packed)


def test_a_shard_whose_rank_is_killed_is_packed_by_another_one(
    start_pack: StartPack, new_run: NewRun, packed: Path, shards: Path
) -> None:
    run = new_run(2)
    ranks = [start_pack(run, 0)]
    suspend_at_a_shard(ranks[0], shards)  # the other one may be done before it on a busy machine
    ranks.append(start_pack(run, 1))
    ranks[1].wait_for(lambda: len(indexes(shards)) == NUM_SHARDS - 1)
    assert ranks[1].code is None
    assert not (shards / "manifest.json").exists()
    ranks[0].kill()
    assert ranks[1].wait() == 0, ranks[1].output
    assert_like(shards, packed)


def test_a_rank_that_stood_still_while_another_did_its_work_changes_nothing(
    start_pack: StartPack, new_run: NewRun, dataset: Path, packed: Path, shards: Path
) -> None:
    sleeper = start_pack(new_run(2), 1)
    suspend_at_a_shard(sleeper, shards)
    pack(config(dataset, shards), stale_seconds=1)
    sleeper.kill(signal.SIGCONT)
    assert sleeper.wait() == 0, sleeper.output
    assert_like(shards, packed)


def test_ranks_that_lose_their_board_end_all_the_same(
    start_pack: StartPack, new_run: NewRun, packed: Path, shards: Path
) -> None:
    run = new_run(2)
    ranks = [start_pack(run, 0)]
    suspend_at_a_shard(ranks[0], shards)  # the other one may be done before it on a busy machine
    ranks.append(start_pack(run, 1))
    ranks[1].wait_for(lambda: len(indexes(shards)) == NUM_SHARDS - 1)
    run.lose_board()
    ranks[0].kill(signal.SIGCONT)
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.output for rank in ranks]
    assert_like(shards, packed)


def test_a_rank_that_comes_when_all_is_done_changes_nothing(
    start_pack: StartPack, new_run: NewRun, packed: Path, shards: Path
) -> None:
    run = new_run(2)
    assert start_pack(run, 0).wait() == 0
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert start_pack(run, 1).wait() == 0
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before
    assert_like(shards, packed)


@pytest.mark.parametrize("num_kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_ranks_killed_at_random_moments_change_nothing(
    start_pack: StartPack, new_run: NewRun, packed: Path, tmp_path: Path, num_kills: int
) -> None:
    random, killed = Random(num_kills), 0
    while killed < num_kills:
        run, shards = new_run(2), tmp_path / f"shards-{killed}"
        ranks = [start_pack(run, rank, num_workers=rank + 1, to=shards) for rank in range(2)]
        for _ in range(3):
            number = random.randrange(2)
            time.sleep(random.uniform(0.0, 0.3))
            with suppress(ProcessLookupError):  # it has no group yet
                ranks[number].kill(group=random.random() < 0.5)
            killed += ranks[number].wait() == -signal.SIGKILL
            ranks[number] = start_pack(run, number, num_workers=number + 1, to=shards)
        assert [rank.wait() for rank in ranks] == [0, 0], [rank.output for rank in ranks]
        assert_like(shards, packed)


# --- shards that cannot be packed


def test_a_shard_that_fails_in_every_rank_is_set_aside_and_tried_again_by_the_next_run(
    dataset: Path, packed: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(open_video: OpenVideo, sample: RawSample) -> object:
        if sample.file_name == "1.mp4":
            raise RuntimeError("a bug")
        return open_and_probe(open_video, sample)

    board = LocalBoard()  # of one run, in which ranks are started again
    with monkeypatch.context() as patch:
        patch.setattr("streamprep.pack_shard.open_and_probe", fails)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="a bug"):
                pack(config(dataset, shards), board=board)
        with pytest.raises(UnitsSetAside, match=r"(?s)1 shard set aside: .*000001.tar: 2 times; .*a bug"):
            pack(config(dataset, shards), board=board)
    assert len(indexes(shards)) == NUM_SHARDS - 1
    assert not (shards / "manifest.json").exists()
    pack(config(dataset, shards))
    assert_like(shards, packed)


def test_a_manifest_is_not_left_there_while_a_shard_is_packed_again(
    start_pack: StartPack, dataset: Path, packed: Path, shards: Path
) -> None:
    pack(config(dataset, shards))
    (shards / "000001.tar").unlink()
    assert start_pack(environment={VARIABLE: "shard"}).wait() == CRASHED
    assert not (shards / "manifest.json").exists()
    pack(config(dataset, shards))
    assert_like(shards, packed)


def test_a_manifest_that_is_wrong_is_made_right(dataset: Path, packed: Path, shards: Path) -> None:
    pack(config(dataset, shards))
    (shards / "manifest.json").write_bytes(b"{}")
    pack(config(dataset, shards))
    assert_like(shards, packed)


def test_index_is_refused_in_several_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process with --num-workers, not 2 ranks"):
        index(IndexConfig(shards=str(tmp_path)))
