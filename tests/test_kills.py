"""Whatever is killed, whenever: the same command again ends, and its output is that of a run that nothing disturbed."""

from __future__ import annotations

import itertools
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from quick_cases import mostly_slow

from streamprep.cli import main
from streamprep.crashpoints import JOB_STEPS, POINTS

if TYPE_CHECKING:
    from forks import Process
    from jobs import EncodeJob

    NewJob = Callable[..., EncodeJob]
    Undisturbed = Callable[[Path], EncodeJob]

pytest_plugins = ["jobs"]

CRASHED = 137
GONE_SECONDS, GONE_FROM_START_SECONDS = 3.0, 60.0
"""How soon after a rank's death no process of the job may be left: its fork server ends its imports first."""

BUSY_CPU_SECONDS = 0.1
"""A decoding process that has taken so much is at the slow clip: that takes 0.6 s, all others together 0.03 s."""

PASSES = {"data": (1, 2, 5), "quarantine": (1, 2), "record": (1, 2, 4)}
"""Several files or records are written; the last number is the last of them."""
KILLS = [
    f"{step}{moment}:{number}" for step in JOB_STEPS for moment in ("", ".after") for number in PASSES.get(step, (1,))
]
KILLS_OF_A_STOP = [kill for kill in KILLS if kill.startswith("stop")]
KILLS_OF_A_RUN = [kill for kill in KILLS if not kill.startswith(("stop", "failed"))]
"""Setting a unit aside has its own tests: test_ranks.py."""
QUICK_KILLS = [
    "plan:1",
    "attempt:1",
    "data:2",
    "quarantine:1",
    "record:2",
    "record.after:1",
    "index:1",
    "success.after:1",
]


# --- at a durable step


@pytest.mark.parametrize("point", mostly_slow(KILLS_OF_A_RUN, quick=QUICK_KILLS))
def test_a_job_killed_at_a_durable_step_ends_as_if_it_had_not_been(
    new_job: NewJob, undisturbed: Undisturbed, shards: Path, point: str
) -> None:
    job = new_job()
    if not point.startswith("plan"):
        job.begin_with_an_orphan()
    assert job.run(serial=True, crash_at=point).code == CRASHED
    assert_ends_like(undisturbed(shards), job, serial=True)


@pytest.mark.parametrize(
    "point",
    [
        "record:2",
        *(pytest.param(point, marks=pytest.mark.slow) for point in ("data:2", "uncond.after:1", "success:1")),
    ],
)
def test_a_job_of_many_processes_killed_at_a_durable_step_ends_as_if_it_had_not_been(
    new_job: NewJob, undisturbed: Undisturbed, shards: Path, point: str
) -> None:
    job = new_job()
    crashed = job.run(crash_at=point)
    assert crashed.code == CRASHED
    crashed.wait_until_all_gone(seconds=GONE_FROM_START_SECONDS)
    assert_ends_like(undisturbed(shards), job)


@pytest.fixture(scope="session")
def only_undecodable(make_shards: Callable[..., Path], undecodable_video: Callable[[Path], Path]) -> Path:
    return make_shards({"a.mp4": undecodable_video})


@pytest.mark.parametrize("point", KILLS_OF_A_STOP)
def test_a_job_killed_while_it_stops_for_bad_samples_stops_again(
    new_job: NewJob, only_undecodable: Path, tmp_path: Path, point: str
) -> None:
    job, twin = new_job(only_undecodable), new_job(only_undecodable, out=tmp_path / "twin")
    assert job.run(serial=True, crash_at=point).code == CRASHED
    assert job.run(serial=True).code == twin.run(serial=True).code == 3
    left = {name: digest for name, digest in job.result().items() if not name.startswith("_streamprep/attempts")}
    assert left == twin.result()


def test_there_is_a_kill_at_every_durable_step_of_a_job() -> None:
    points = {point for point in POINTS if point.removesuffix(".after") in JOB_STEPS}
    assert {kill.partition(":")[0] for kill in KILLS} == points


# --- at any moment


@pytest.mark.slow  # test_ranks.py kills at random too
@pytest.mark.parametrize("num_kills", [3, 20])
def test_a_job_killed_at_random_moments_ends_as_if_it_had_not_been(
    new_job: NewJob, undisturbed: Undisturbed, slow_shards: Path, tmp_path: Path, num_kills: int
) -> None:
    random, outs, killed = Random(num_kills), itertools.count(), 0
    while killed < num_kills:
        job = new_job(slow_shards, out=tmp_path / f"out-{next(outs)}")
        while killed < num_kills and run_and_kill(job, random) == -signal.SIGKILL:
            killed += 1
        assert_ends_like(undisturbed(slow_shards), job, num_workers=2)


def run_and_kill(job: EncodeJob, random: Random) -> int:
    process = job.start(num_workers=2)
    if random.random() < 0.7:  # else while it starts
        process.wait_for(lambda: process.decode_children() or process.code is not None)
    time.sleep(random.uniform(0.0, 1.2))
    process.kill(group=random.random() < 0.5)
    code = process.wait()
    process.wait_until_all_gone(seconds=GONE_FROM_START_SECONDS)
    return code


@pytest.mark.parametrize(
    "group", [pytest.param(False, id="rank", marks=pytest.mark.slow), pytest.param(True, id="group")]
)
def test_a_rank_killed_while_a_clip_is_decoded_leaves_no_process(
    new_job: NewJob, slow_shards: Path, group: bool
) -> None:
    process = new_job(slow_shards).start(num_workers=2)
    process.wait_for(lambda: busy_child(process))
    process.kill(group=group)
    assert process.wait() == -signal.SIGKILL
    process.wait_until_all_gone(seconds=GONE_SECONDS)


@pytest.mark.parametrize(
    ("number", "group", "serial"),
    [
        pytest.param(signal.SIGTERM, False, False, id="SIGTERM"),
        pytest.param(signal.SIGINT, True, False, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, True, id="SIGTERM-serial", marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_a_job_at_once_and_the_same_command_goes_on(
    new_job: NewJob,
    undisturbed: Undisturbed,
    slow_shards: Path,
    number: signal.Signals,
    group: bool,
    serial: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It waited for a clip that hangs, for up to twice --decode-timeout."""
    job = new_job(slow_shards)
    process = job.start(serial=serial, grace_seconds=2)
    if not serial:
        process.wait_for(lambda: busy_child(process)).suspend()
    process.wait_for(job.num_records)
    began = time.monotonic()
    process.kill(number, group=group)
    assert process.wait() == 4
    assert time.monotonic() - began < 15
    assert f"streamprep: stopped by {number.name}; the same command goes on from here" in process.output
    assert "Traceback" not in process.output
    process.wait_until_all_gone(seconds=GONE_SECONDS)
    assert not [name for name in job.files() if name.startswith(".tmp")]
    assert main(["status", str(job.out)]) == 4
    assert "unfinished: run the same command again to go on" in capsys.readouterr().out
    assert_ends_like(undisturbed(slow_shards), job, serial=serial)


# --- decoding processes


@pytest.mark.parametrize("num_workers", mostly_slow([1, 2, 4], quick=(2,)))
def test_the_bytes_do_not_depend_on_the_number_of_decoding_processes(
    new_job: NewJob, undisturbed: Undisturbed, shards: Path, num_workers: int
) -> None:
    assert_ends_like(undisturbed(shards), new_job(), num_workers=num_workers)


def starting_child(process: Process) -> psutil.Process | None:
    """One that has just been forked."""
    return next(iter(process.decode_children()), None)


def busy_child(process: Process) -> psutil.Process | None:
    """One that is decoding the slow clip."""
    return next((child for child in process.decode_children() if cpu_seconds(child) > BUSY_CPU_SECONDS), None)


def idle_child(process: Process) -> psutil.Process | None:
    """One that has nothing to do because another decodes the slow clip."""
    if (busy := busy_child(process)) is None:
        return None
    return next((child for child in process.decode_children() if child != busy), None)


def answering_child(process: Process) -> psutil.Process | None:
    """One that has decoded the slow clip this very moment."""
    child = busy_child(process)
    return child if child is not None and child.status() == psutil.STATUS_SLEEPING else None


@pytest.mark.parametrize(
    ("find_child", "number"),
    [
        pytest.param(starting_child, signal.SIGKILL, marks=pytest.mark.slow),
        (idle_child, signal.SIGKILL),
        (busy_child, signal.SIGKILL),
        pytest.param(answering_child, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(idle_child, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(busy_child, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(answering_child, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_decoding_process_that_is_killed_or_stands_still_costs_no_sample(
    new_job: NewJob,
    undisturbed: Undisturbed,
    slow_shards: Path,
    find_child: Callable[[Process], psutil.Process | None],
    number: signal.Signals,
) -> None:
    job = new_job(slow_shards)
    process = job.start(num_workers=2 if find_child is idle_child else 1, decode_timeout=5)
    process.wait_for(lambda: find_child(process)).send_signal(number)
    assert process.wait() == 0, process.output
    process.wait_until_all_gone(seconds=GONE_SECONDS)
    assert job.result() == undisturbed(slow_shards).result()
    assert job.problems() == []


# --- several commands on one output


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        ({"num_frames": 9}, ["sampling.num_frames: 5 there, 9 now"]),
        ({"clean_captions": False}, ["text.captions_cleaned: True there, False now"]),
        ({"samples_per_file": 3}, ["export.samples_per_file: 2 there, 3 now"]),
        ({"model_path": "another"}, ["text.sha256: ", "video.sha256: "]),
        ({"shards": "others"}, ["inputs.num_shards: 4 there, 7 now", "inputs.shards_sha256: "]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_on_the_same_output_are_refused_by_name(
    new_job: NewJob,
    make_model: Callable[[int], Path],
    slow_shards: Path,
    setting: dict[str, Any],
    fields: list[str],
) -> None:
    others = {"another": lambda: make_model(1), "others": lambda: slow_shards}
    setting = {name: others[value]() if value in others else value for name, value in setting.items()}
    job = new_job()
    assert job.run(serial=True, crash_at="record.after").code == CRASHED
    before = job.files()
    refused = job.run(serial=True, **setting)
    assert refused.code == 2
    assert "belongs to a job with other settings" in refused.output
    named = [line.strip() for line in refused.output.splitlines() if line.startswith("  ")]
    assert len(named) == len(fields)
    assert all(line.startswith(field) for line, field in zip(named, fields, strict=True)), named
    assert job.files() == before


def test_a_finished_job_run_again_changes_nothing(new_job: NewJob) -> None:
    job = new_job()
    assert job.run(serial=True).code == 0
    before = job.files()
    again = job.run(serial=True)
    assert again.code == 0
    assert "4 shards, 4 done" in again.output
    assert "8 rows, 5 files" in again.output
    assert job.files() == before


def test_two_processes_on_one_output_write_each_row_once(
    new_job: NewJob, undisturbed: Undisturbed, shards: Path
) -> None:
    job = new_job()
    first, second = job.start(serial=True), job.start(serial=True)
    assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
    assert job.result() == undisturbed(shards).result()
    assert job.problems() == []


def test_a_process_that_stood_still_while_another_did_its_work_changes_nothing(
    new_job: NewJob, undisturbed: Undisturbed, shards: Path
) -> None:
    job = new_job()
    sleeper = job.start(serial=True)
    sleeper.wait_for(lambda: list((job.out / "combined_parquet_dataset").glob("*")))
    sleeper.kill(signal.SIGSTOP)
    assert job.run(serial=True, stale_seconds=1).code == 0
    sleeper.kill(signal.SIGCONT)
    assert sleeper.wait() == 0, sleeper.output
    assert job.result() == undisturbed(shards).result()
    assert job.problems() == []


# --- disk full


@pytest.fixture
def small_disk(mount_small_disk: Callable[[int], Path]) -> Path:
    """A file system of 1 MB."""
    return mount_small_disk(1)


def fill_disk(filler: Path, *, free_kb: int) -> None:
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - 1024 * free_kb)


@pytest.mark.parametrize("free_kb", mostly_slow([0, 8, 24, 40, 60], quick=[0, 24]))
def test_a_full_disk_is_an_error_that_more_room_repairs(
    new_job: NewJob, undisturbed: Undisturbed, shards: Path, small_disk: Path, free_kb: int
) -> None:
    job = new_job(out=small_disk / "out")
    assert job.run(serial=True, crash_at="record.after:1").code == CRASHED
    filler = small_disk / "filler"
    fill_disk(filler, free_kb=free_kb)
    before = job.result()
    failed = job.run(serial=True)
    assert failed.code == 1
    assert "No space left on device" in failed.output
    assert "with more room, the same command goes on from here" in failed.output
    after = job.result()
    assert not [name for name in after if name.startswith(".tmp")]
    assert all(after[name] == digest for name, digest in before.items() if not name.startswith(".tmp"))
    assert all(digest[:8] in name for name, digest in after.items() if name.startswith("combined_parquet_dataset"))
    filler.unlink()
    assert_ends_like(undisturbed(shards), job, serial=True)


def test_a_disk_that_may_not_be_written_is_an_error_in_one_line(
    new_job: NewJob, undisturbed: Undisturbed, shards: Path, small_disk: Path
) -> None:
    job = new_job(out=small_disk / "out")
    assert job.run(serial=True, crash_at="record.after:1").code == CRASHED
    before = job.files()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    failed = job.run(serial=True)
    assert failed.code == 1
    assert "Read-only file system" in failed.output
    assert "Traceback" not in failed.output
    assert job.files() == before
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert_ends_like(undisturbed(shards), job, serial=True)


def test_a_full_disk_is_reported_in_one_line(new_job: NewJob, small_disk: Path) -> None:
    job = new_job(out=small_disk / "out")
    assert job.run(serial=True, crash_at="record.after:1").code == CRASHED
    fill_disk(small_disk / "filler", free_kb=24)
    assert "Traceback" not in job.run(serial=True).output


# --- what these tests say in one word


def assert_ends_like(expected: EncodeJob, job: EncodeJob, **flags: object) -> None:
    ended = job.run(**flags)
    assert ended.code == 0, ended.output
    assert job.result() == expected.result()
    assert job.problems() == []


def cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
        return float(times.user + times.system)
    except psutil.NoSuchProcess:
        return 0.0
