"""Many ranks on one output: whichever die, hang, leave or come late, the rows are those of one undisturbed process."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest

from streamprep.cli import main
from streamprep.crashpoints import JOB_STEPS

if TYPE_CHECKING:
    from forks import Forks
    from jobs import EncodeJob
    from runs import Run

    NewJob = Callable[..., EncodeJob]
    Undisturbed = Callable[..., EncodeJob]
    NewRun = Callable[[int], Run]

pytest_plugins = ["jobs", "runs"]

CRASHED = 137
ODD = "odd_exporter:open_shard"
STALE_SECONDS = 3


def assert_done(job: EncodeJob, expected: EncodeJob) -> None:
    assert job.result() == expected.result()
    assert job.problems() == []
    assert main(["status", str(job.out)]) == 0


def events(job: EncodeJob, name: str) -> list[dict[str, object]]:
    """What the ranks' logs say, of one kind."""
    lines = [line for log in sorted((job.out / "_streamprep/logs").iterdir()) for line in log.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["event"] == name]


# --- nothing happens


def test_ranks_share_the_units_and_write_what_one_process_writes(
    new_job: NewJob, new_run: NewRun, undisturbed: Undisturbed, slow_shards: Path
) -> None:
    job, run = new_job(slow_shards), new_run(3)
    ranks = [run.start(job, rank) for rank in range(3)]
    assert [rank.wait() for rank in ranks] == [0, 0, 0], [rank.output for rank in ranks]
    assert_done(job, undisturbed(slow_shards))
    claimed = [event["unit"] for event in events(job, "claimed") if event["unit"] != "finalize"]
    assert sorted(claimed) == [f"{number:06d}" for number in range(7)]
    assert len(events(job, "finalized")) == 1
    assert "9 rows" in ranks[0].output
    assert ranks[1].output == ranks[2].output == ""


@pytest.mark.slow
def test_more_ranks_than_units_end_too(
    new_job: NewJob, new_run: NewRun, undisturbed: Undisturbed, shards: Path
) -> None:
    job, run = new_job(), new_run(6)
    ranks = [run.start(job, rank) for rank in range(6)]
    assert [rank.wait() for rank in ranks] == [0] * 6
    assert_done(job, undisturbed(shards))


# --- ranks die


@pytest.mark.parametrize(
    "point",
    [
        point
        if point in ("attempt", "data.after", "record", "success")
        else pytest.param(point, marks=pytest.mark.slow)
        for step in JOB_STEPS
        if step not in ("stop", "failed")  # those have their own
        for point in (step, f"{step}.after")
    ],
)
def test_a_rank_that_dies_at_a_durable_step_is_no_loss_to_the_others(
    new_job: NewJob, new_run: NewRun, undisturbed: Undisturbed, shards: Path, point: str
) -> None:
    """Which of the two comes to that point first is a matter of chance; the other one then ends the job."""
    job, run = new_job(), new_run(2)
    if not point.startswith("plan"):
        job.begin_with_an_orphan()
    ranks = [run.start(job, rank, crash_at=point) for rank in range(2)]
    codes = sorted(rank.wait() for rank in ranks)
    assert CRASHED in codes
    last = run.start(job, 0)
    assert last.wait() == 0, last.output
    assert_done(job, undisturbed(shards))


@pytest.mark.parametrize("num_kills", [5, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_ranks_and_their_children_killed_at_random_change_nothing(
    new_job: NewJob, new_run: NewRun, undisturbed: Undisturbed, slow_shards: Path, tmp_path: Path, num_kills: int
) -> None:
    """A rank or a decoding process dies, stands still for a while, or is asked to stop; ranks come back at once."""
    random, killed, round_number = Random(num_kills), 0, 0
    while killed < num_kills:
        job, run = new_job(slow_shards, out=tmp_path / f"out-{round_number}"), new_run(3)
        round_number += 1
        ranks = [run.start(job, rank, serial=False, num_workers=1) for rank in range(3)]
        for _ in range(min(num_kills - killed, 10)):
            time.sleep(random.uniform(0.0, 1.5))
            number = random.randrange(3)
            victim = ranks[number]
            children = victim.decode_children()
            if children and random.random() < 0.3:
                random.choice(children).kill()
            else:
                victim.kill(random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)))
            killed += 1
            if random.random() < 0.7:
                ranks.append(run.start(job, number, serial=False, num_workers=1))
        last = run.start(job, 0, serial=False, num_workers=1)
        assert last.wait() == 0, last.output
        for rank in ranks:
            rank.kill(signal.SIGCONT)
        for rank in ranks:
            assert rank.wait() in (0, 4, -signal.SIGKILL), rank.output
        assert job.run(serial=True).code == 0
        assert_done(job, undisturbed(slow_shards))


def test_a_rank_that_stood_still_until_all_was_done_changes_nothing(
    new_job: NewJob, new_run: NewRun, undisturbed: Undisturbed, slow_shards: Path
) -> None:
    job, run = new_job(slow_shards), new_run(2)
    sleeper = run.start(job, 1)
    sleeper.wait_for(lambda: list((job.out / "_streamprep/attempts").glob("*")))
    sleeper.kill(signal.SIGSTOP)
    assert run.start(job, 0).wait() == 0
    before = job.result()
    sleeper.kill(signal.SIGCONT)
    assert sleeper.wait() == 0, sleeper.output
    assert job.result() == before
    assert_done(job, undisturbed(slow_shards))


def test_ranks_that_lose_their_board_go_on(
    new_job: NewJob, new_run: NewRun, undisturbed: Undisturbed, slow_shards: Path
) -> None:
    job, run = new_job(slow_shards), new_run(2)
    ranks = [run.start(job, rank) for rank in range(2)]
    ranks[0].wait_for(job.num_records)
    run.lose_board()
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.output for rank in ranks]
    assert "board is gone" in ranks[0].output
    assert_done(job, undisturbed(slow_shards))


def test_a_rank_may_join_late_and_one_that_finds_all_done_leaves(
    new_job: NewJob, new_run: NewRun, undisturbed: Undisturbed, slow_shards: Path
) -> None:
    job, run = new_job(slow_shards), new_run(3)
    first = run.start(job, 0)
    first.wait_for(job.num_records)
    second = run.start(job, 1)
    assert (first.wait(), second.wait()) == (0, 0)
    assert run.start(job, 2).wait() == 0
    assert_done(job, undisturbed(slow_shards))


def test_a_rank_that_leaves_while_another_one_finalizes_anew_knows_the_totals(
    new_job: NewJob, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It read them from SUCCESS.json, which the other had just deleted, and failed."""
    job = new_job()
    assert job.run(serial=True).code == 0
    deletes = "streamprep.session.tidy"
    monkeypatch.setattr(deletes, lambda current, _: current.store.delete("_streamprep/SUCCESS.json", step="delete"))
    _, _, *arguments = map(str, job.command(serial=True))
    assert main(arguments) == 0
    assert "8 rows, 5 files" in capsys.readouterr().out


@pytest.mark.slow
def test_finalize_by_hand_while_ranks_run_is_refused_or_right(
    new_job: NewJob, new_run: NewRun, undisturbed: Undisturbed, slow_shards: Path, forks: Forks
) -> None:
    job, run = new_job(slow_shards), new_run(2)
    ranks = [run.start(job, rank) for rank in range(2)]
    ranks[0].wait_for(lambda: (job.out / "_streamprep/plan.json").exists())
    codes = set()
    while any(rank.code is None for rank in ranks):
        codes.add(forks.run("finalize", job.out).code)
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.output for rank in ranks]
    assert codes <= {0, 2}
    assert_done(job, undisturbed(slow_shards))


# --- signals


def test_sigterm_finishes_the_unit_at_hand_and_takes_no_other(
    new_job: NewJob, new_run: NewRun, undisturbed: Undisturbed, shards: Path
) -> None:
    job = new_job()
    process = job.start(exporter=ODD, num_workers=1, environment={"ODD_UNITS": "000000=sleep:2"})
    process.wait_for(lambda: list((job.out / "_streamprep/attempts").glob("000000-*")))
    time.sleep(1)
    before = job.num_records()
    for pid in process.alive():  # as Slurm does
        os.kill(pid, signal.SIGTERM)
    process.kill(signal.SIGTERM)  # as torchrun's agent does besides
    assert process.wait() == 4, process.output
    assert job.num_records() == before + 1
    assert "decoder_crash" not in process.output
    assert "stopped by SIGTERM; the same command goes on from here" in process.output
    assert job.run(exporter=ODD, serial=True).code == 0
    assert job.problems() == []


@pytest.mark.parametrize("grace_seconds", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_drops_a_unit_that_takes_longer_than_the_grace(
    new_job: NewJob, shards: Path, grace_seconds: float
) -> None:
    job = new_job()
    process = job.start(
        exporter=ODD, serial=True, grace_seconds=grace_seconds, environment={"ODD_UNITS": "000000=sleep:60"}
    )
    process.wait_for(lambda: list((job.out / "_streamprep/attempts").glob("000000-*")))
    began = time.monotonic()
    process.kill(signal.SIGTERM)
    assert process.wait() == 4
    assert time.monotonic() - began < 20
    assert job.run(exporter=ODD, serial=True).code == 0
    assert job.problems() == []


# --- units that kill


@pytest.mark.parametrize("deed", ["raise", "segv"])
def test_a_unit_that_kills_its_process_twice_is_set_aside_and_the_rest_is_done(
    new_job: NewJob, shards: Path, deed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = new_job()
    poison = {"ODD_UNITS": f"000001={deed}"}
    first, second = (job.run(exporter=ODD, serial=True, environment=poison) for _ in range(2))
    assert (first.code, second.code) == {"raise": (1, 1), "segv": (-signal.SIGSEGV, -signal.SIGSEGV)}[deed]
    assert job.num_records() == 2  # of three that have clips
    third = job.run(exporter=ODD, serial=True, environment=poison)
    assert third.code == 1
    assert "1 unit set aside" in third.output
    assert {"raise": "ArithmeticError", "segv": "Segmentation fault"}[deed] in third.output
    assert "Traceback" not in third.output

    assert main(["status", str(job.out)]) == 1
    assert "failed: all is done but what was set aside" in capsys.readouterr().out
    evidence = (job.out / "_streamprep/failed/000001.json").read_text()
    assert {"raise": "odd_exporter.py", "segv": "odd_exporter.py"}[deed] in evidence

    retried = job.retry(failed=True, serial=True)
    assert retried.code == 0, retried.output
    assert job.problems() == []
    assert main(["status", str(job.out)]) == 0
    assert not list((job.out / "_streamprep").glob("failed/*"))


@pytest.mark.slow
def test_a_unit_set_aside_again_is_an_error_again(new_job: NewJob, shards: Path) -> None:
    job = new_job()
    poison = {"ODD_UNITS": "000001=raise"}
    for _ in range(2):
        job.run(exporter=ODD, serial=True, environment=poison)
    for _ in range(2):
        assert job.retry(failed=True, serial=True, environment=poison).code == 1
        assert job.num_records() == 2
    assert job.retry(failed=True, serial=True).code == 0
    assert job.problems() == []


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["raise", "out_of_memory"])
def test_ranks_that_get_nowhere_are_given_up_in_a_retry_too(new_job: NewJob, shards: Path, deed: str) -> None:
    """Each restarted rank forgot what the last one had died of, and so on for ever."""
    job = new_job()
    for _ in range(2):
        job.run(exporter=ODD, serial=True, environment={"ODD_UNITS": "000001=raise"})
    poison = {"ODD_UNITS": f"000001={deed}"}
    failed = job.start_retry(failed=True, nproc=2, stale_seconds=STALE_SECONDS, environment=poison)
    assert failed.wait(seconds=300) == 1, failed.output  # ten ranks, each of which loads its model, and waits between
    assert failed.output.count("it is started again") <= 12
    assert job.retry(failed=True, serial=True).code == 0
    assert job.problems() == []


def test_a_record_counts_for_more_than_having_been_set_aside(
    new_job: NewJob, undisturbed: Undisturbed, shards: Path
) -> None:
    """A process that stood still while others died at its unit may still end it."""
    job = new_job()
    assert job.run(serial=True).code == 0
    mark = job.out / "_streamprep/failed/000001.json"
    mark.parent.mkdir()
    mark.write_text("[]")
    assert main(["status", str(job.out)]) == 0
    assert job.run(serial=True).code == 0
    mark.unlink(missing_ok=True)
    assert_done(job, undisturbed(shards))


@pytest.mark.parametrize("point", ["failed", pytest.param("failed.after", marks=pytest.mark.slow)])
def test_a_process_that_dies_while_it_sets_a_unit_aside_leaves_that_to_the_next(
    new_job: NewJob, shards: Path, point: str
) -> None:
    job = new_job()
    poison = {"ODD_UNITS": "000001=raise"}
    job.run(exporter=ODD, serial=True, environment=poison)
    assert job.run(exporter=ODD, serial=True, environment=poison, crash_at=point).code == CRASHED
    codes = [job.run(exporter=ODD, serial=True, environment=poison).code for _ in range(2)]
    assert codes == [1, 1]
    assert (job.out / "_streamprep/failed/000001.json").exists()


def test_trouble_of_the_machine_is_not_held_against_a_unit(new_job: NewJob, shards: Path) -> None:
    job = new_job()
    for _ in range(3):
        failed = job.run(exporter=ODD, serial=True, environment={"ODD_UNITS": "000001=out_of_memory"})
        assert failed.code == 1
        assert "out of memory" in failed.output
    assert job.run(exporter=ODD, serial=True).code == 0
    assert job.problems() == []


# --- bad samples


def test_the_limit_of_bad_samples_is_one_for_all_ranks(
    new_job: NewJob, new_run: NewRun, make_shards: Callable[..., Path], undecodable_video: Callable[[Path], Path]
) -> None:
    """Each of the two meets half of them, which alone would be no more than the 20 that are always allowed."""
    from jobs import THIRD_OF_A_SHARD

    def write(path: Path) -> None:
        undecodable_video(path)
        with open(path, "ab") as file:
            file.write(THIRD_OF_A_SHARD.to_bytes(4, "big") + b"free" + bytes(THIRD_OF_A_SHARD - 8))

    job, run = new_job(make_shards({f"{number:02d}.mp4": write for number in range(30)})), new_run(2)
    ranks = [run.start(job, rank) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [3, 3], [rank.output for rank in ranks]
    assert main(["status", str(job.out)]) == 3
    assert run.start(job, 1).wait() == 3


# --- our launcher


def test_nproc_starts_ranks_and_starts_those_that_die_again(
    new_job: NewJob, undisturbed: Undisturbed, slow_shards: Path
) -> None:
    job = new_job(slow_shards)
    launcher = job.start(nproc=2, num_workers=1, stale_seconds=STALE_SECONDS)
    launcher.wait_for(job.num_records)
    victim = Random(0).choice(rank_pids(job))
    os.kill(victim, signal.SIGKILL)
    assert launcher.wait() == 0, launcher.output
    assert "was killed by SIGKILL; it is started again in 1 s, 99 restarts left" in launcher.output
    assert_done(job, undisturbed(slow_shards))
    launcher.wait_until_all_gone(seconds=10)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_stopped_or_killed_leaves_no_rank(
    new_job: NewJob, undisturbed: Undisturbed, slow_shards: Path, number: signal.Signals
) -> None:
    job = new_job(slow_shards)
    launcher = job.start(nproc=2, num_workers=1, stale_seconds=STALE_SECONDS)
    launcher.wait_for(job.num_records)
    pids = rank_pids(job)
    launcher.kill(number)
    assert launcher.wait() == {signal.SIGTERM: 4, signal.SIGKILL: -signal.SIGKILL}[number]
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert job.run(serial=True).code == 0
    assert_done(job, undisturbed(slow_shards))


def test_a_mistake_is_told_once(new_job: NewJob) -> None:
    refused = new_job().run(nproc=3, num_frames=6)
    assert refused.code == 2
    assert refused.output.count("streamprep: ") == 1
    assert "num_frames" in refused.output or "--num-frames" in refused.output


def test_a_rank_that_cannot_even_begin_is_not_started_for_ever(new_job: NewJob) -> None:
    failed = new_job().run(nproc=1, launcher="local", exporter=ODD, environment={"RANK": "x", "WORLD_SIZE": "1"})
    assert failed.code == 2
    assert "RANK=x" in failed.output


def rank_pids(job: EncodeJob) -> list[int]:
    """Of the processes whose logs are in the output."""
    names = [path.name for path in (job.out / "_streamprep/logs").iterdir()]
    found = [re.search(r"-(\d+)-[0-9a-f]{12}\.jsonl$", name) for name in names]
    return [int(match[1]) for match in found if match]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
