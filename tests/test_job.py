"""What a plan and a record say, who commits first, what `finalize` may delete, and what `verify` and `status` see."""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporters import fastvideo
from streamprep import canonical, job
from streamprep.cli import main
from streamprep.commit import Committer, EncodedBatch
from streamprep.errors import TooManyBadSamples, UserError
from streamprep.finalize import finalize, totals
from streamprep.job import Job, open_job, start_or_join
from streamprep.job_plan import JobPlan, Unit, installed_versions, keys_digest
from streamprep.plan import Excluded, UnitPlan
from streamprep.record import BadClip, QuarantineFile, Record
from streamprep.storage import open_store
from streamprep.tensor_members import CODECS
from streamprep.types import EncodedClip, EncodedSample, TensorLocation, WrittenFile, WrittenRow

if TYPE_CHECKING:
    from jobs import EncodeJob

    NewJob = Callable[..., EncodeJob]
    Undisturbed = Callable[[Path], EncodeJob]
    MakeShards = Callable[..., Path]
    WriteVideo = Callable[[Path], object]

pytest_plugins = ["jobs"]


# --- made by hand


def make_unit(number: int, *, num_clips: int = 1, num_bad: int = 0) -> Unit:
    return Unit(
        id=f"{number:06d}",
        shard=f"{number:06d}.tar",
        index_sha256="5e" * 32,
        num_clips=num_clips,
        num_dropped=0,
        num_bad=num_bad,
        size_bytes=0,
        limit=None,
        num_rows=num_clips,
        rows_sha256=keys_digest(f"{number}/{clip}" for clip in range(num_clips)),
    )


def make_plan(num_units: int = 1, **fields: Any) -> JobPlan:
    plan = JobPlan(
        shards="/data/shards",
        fingerprint={"video": {"vae_sha256": "0a", "vae_dtype": "float32"}, "sampling": {"num_frames": 5}},
        config={"exporter": "fastvideo", "workload_type": "t2v"},
        contract={"workload": "t2v", "family": "wan", "variant": "2.1-t2v", "model": "tiny"},
        data_folder=fastvideo.FOLDER,
        units=tuple(make_unit(number) for number in range(num_units)),
        versions=installed_versions(),
    )
    return dataclasses.replace(plan, **fields)


def make_job(out: Path, num_units: int = 1, **fields: Any) -> Job:
    return start_or_join(open_store(out), make_plan(num_units, **fields))


def make_sample(key: str, value: float = 0.0) -> EncodedSample:
    return EncodedSample(
        key=key,
        id=f"{key}.mp4",
        tensors={"vae_latent": torch.full((16, 2, 4, 6), value), "text_embedding": torch.zeros(3, 32)},
        file_name=f"{key}.mp4",
        caption="A caption.",
        clip=EncodedClip(width=48, height=32, num_frames=5, train_fps=1.0, source_fps=1.0),
    )


def make_bad(key: str, reason: str = "decode_error") -> BadClip:
    return BadClip(key=key, stage="decode", reason=reason, exception=f"what was wrong with {key}")


def make_batch(unit: Unit, samples: Sequence[EncodedSample], bad: Sequence[BadClip] = ()) -> EncodedBatch:
    """All of a unit."""
    plan = UnitPlan(id=unit.id, shard=unit.shard, clips=(), dropped=(), bad=())
    return EncodedBatch(unit=plan, samples=samples, bad=bad, num_samples=len(samples) + len(bad), last=True)


def make_committer(current: Job, *, max_bad_fraction: float = 0.05) -> Committer:
    open_writer = functools.partial(
        fastvideo.open_shard, current.store, workload="t2v", samples_per_file=2, contract=current.plan.contract
    )
    return Committer(current, open_writer=open_writer, max_bad_fraction=max_bad_fraction)


def encode_by_hand(current: Job, *, value: float = 0.0) -> None:
    """Commit all units, with a row and a bad sample each."""
    with make_committer(current) as committer:
        for unit in current.unfinished():
            committer.take(make_batch(unit, [make_sample(f"{unit.id}/0", value)], [make_bad(f"{unit.id}/1")]))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- plan and record

texts = st.text(max_size=20)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
counts = st.integers(0, 2**40)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts
)
settings_of_a_part = st.dictionaries(texts, scalars, max_size=4)

units = st.builds(
    Unit,
    id=texts,
    shard=texts,
    index_sha256=digests,
    num_clips=counts,
    num_dropped=counts,
    num_bad=counts,
    size_bytes=counts,
    limit=st.none() | counts,
    num_rows=counts,
    rows_sha256=digests,
)
plans = st.builds(
    JobPlan,
    shards=texts,
    fingerprint=st.dictionaries(texts, settings_of_a_part, max_size=3),
    config=settings_of_a_part,
    contract=settings_of_a_part,
    data_folder=texts,
    units=st.lists(units, max_size=3).map(tuple),
    versions=st.dictionaries(texts, texts, max_size=3),
    columns=st.dictionaries(texts, texts, max_size=3),
    converted=st.none() | settings_of_a_part,
)
locations = st.builds(
    TensorLocation,
    offset=counts,
    size=counts,
    dtype=texts,
    shape=st.lists(counts, max_size=4).map(tuple),
    codec=st.sampled_from(CODECS),
)
rows = st.builds(
    WrittenRow, key=texts, bucket=texts, row_group=counts, tensors=st.dictionaries(texts, locations, max_size=2)
)
written_files = st.builds(
    WrittenFile, name=texts, size_bytes=counts, sha256=digests, rows=st.lists(rows, max_size=3).map(tuple)
)
records = st.builds(
    Record,
    unit=texts,
    files=st.lists(written_files, max_size=2).map(tuple),
    bad=st.dictionaries(texts, counts, max_size=3),
    dropped=st.lists(st.builds(Excluded, key=texts, reason=texts, message=texts, stage=texts), max_size=2).map(tuple),
    quarantine=st.none() | st.builds(QuarantineFile, name=texts, size_bytes=counts, sha256=digests),
    seconds=st.dictionaries(texts, st.integers(0, 10**9).map(lambda thousandths: thousandths / 1000), max_size=2),
    halved=st.dictionaries(texts, counts, max_size=2),
)


@given(plans)
def test_a_plan_is_read_back_as_it_was_written(plan: JobPlan) -> None:
    assert JobPlan.from_json(plan.to_json()) == plan


@given(plans)
def test_columns_keep_their_order(plan: JobPlan) -> None:
    """It is that of the output's columns; JSON's keys are sorted, and resumed jobs wrote them so."""
    assert list(JobPlan.from_json(plan.to_json()).columns) == list(plan.columns)


def test_a_plan_of_the_time_when_columns_were_an_object_is_read(tmp_path: Path) -> None:
    plan = make_job(tmp_path).plan
    value = json.loads(plan.to_json()) | {"columns": {"a": "string", "b": "int64"}}
    assert JobPlan.from_json(json.dumps(value).encode()).columns == {"a": "string", "b": "int64"}


@given(records)
def test_a_record_is_read_back_as_it_was_written(record: Record) -> None:
    assert Record.from_json(record.to_json()) == record


@pytest.mark.parametrize("read", [JobPlan.from_json, Record.from_json])
def test_a_plan_or_record_of_another_format_is_refused(read: Callable[[bytes], object]) -> None:
    with pytest.raises(ValueError, match=r"not a (plan|record) of format streamprep-"):
        read(b'{"format": "streamprep-other/1"}')


def test_a_plan_that_cannot_be_read_is_the_users_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not the output of `streamprep encode`: it has no _streamprep/plan.json"):
        open_job(open_store(tmp_path))
    open_store(tmp_path).put(job.PLAN, b"{", step="plan")
    with pytest.raises(UserError, match=r"plan.json cannot be read"):
        open_job(open_store(tmp_path))


# --- one job for one output


def test_a_second_process_joins_the_job_and_its_plan_stays_the_first_ones(tmp_path: Path) -> None:
    make_job(tmp_path, shards="/data/shards")
    second = make_job(tmp_path, shards="/mnt/elsewhere/shards")
    assert second.plan.shards == open_job(open_store(tmp_path)).plan.shards == "/data/shards"


def test_a_job_of_another_fingerprint_is_refused_with_every_difference(tmp_path: Path) -> None:
    make_job(tmp_path)
    before = files_in(tmp_path)
    theirs = {"video": {"vae_sha256": "0b", "device": "cuda"}, "sampling": {"num_frames": 5}, "text": {"cleaned": True}}
    with pytest.raises(UserError, match="belongs to a job with other settings") as refused:
        make_job(tmp_path, fingerprint=theirs)
    assert str(refused.value).splitlines()[1:] == [
        "  text.cleaned: None there, True now",
        "  video.device: None there, cuda now",
        "  video.vae_dtype: float32 there, None now",
        "  video.vae_sha256: 0a there, 0b now",
    ]
    assert files_in(tmp_path) == before


def test_a_fingerprint_is_compared_as_json_keeps_it(tmp_path: Path) -> None:
    fingerprint = {"sampling": {"sizes": (480, 832)}}
    make_job(tmp_path, fingerprint=fingerprint)
    make_job(tmp_path, fingerprint=fingerprint)  # a tuple there is a list now


# --- one record for one unit


def test_of_two_records_for_a_unit_the_first_counts(tmp_path: Path) -> None:
    current = make_job(tmp_path)
    first = Record(unit="000000", files=(), bad={}, dropped=(), quarantine=None, seconds={"unit": 1.0})
    assert current.commit(first)
    assert not current.commit(dataclasses.replace(first, bad={"truncated": 1}))
    assert list(current.records()) == [first]
    assert current.unfinished() == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"offset": -8}, "-8 stands where a number should"),
        ({"size": 2.5}, "2.5 stands where a number should"),
        ({"shape": (3, -1)}, "-1 stands where a number should"),
        ({"dtype": None}, "None stands where a text should"),
        ({"offset": np.int64(8)}, "Object of type int64 is not JSON serializable"),
    ],
)
def test_a_record_that_could_not_be_read_back_is_refused_and_the_exporter_blamed(
    change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """It was committed, and then called damaged."""
    current, unit = make_job(tmp_path), make_unit(0)
    place = dataclasses.replace(TensorLocation(offset=8, size=16, dtype="float32", shape=(2, 2)), **change)
    row = WrittenRow(key="a", bucket="5x32x48", row_group=0, tensors={"vae_latent": place})
    files = (WrittenFile(name="f", size_bytes=24, sha256="0a" * 32, rows=(row,)),)
    record = Record(unit=unit.id, files=files, bad={}, dropped=(), quarantine=None, seconds={})
    with pytest.raises(UserError, match=f"the exporter fastvideo has a mistake: .* of unit 000000 .*{re.escape(why)}"):
        current.commit(record)
    assert current.record(unit.id) is None


class Wrong:
    """FastVideo's writer, but what it is given or says is changed on the way."""

    def __init__(self, inner: Any, mistake: str) -> None:
        self._inner, self._mistake, self._num_given = inner, mistake, 0

    def write(self, sample: EncodedSample) -> None:
        self._num_given += 1
        if self._mistake == "drops" and self._num_given == 2:
            return
        self._inner.write(dataclasses.replace(sample, key="z") if self._mistake == "renames" else sample)
        if self._mistake == "doubles":
            self._inner.write(sample)

    def close(self) -> list[WrittenFile]:
        if self._mistake == "swallows":
            raise OSError("no room")
        files: list[WrittenFile] = self._inner.close()
        return files[:-1] if self._mistake == "forgets a file" else iter(files)  # type: ignore[return-value]

    def __enter__(self) -> Wrong:
        return self

    def __exit__(self, *error: object) -> bool:
        self._inner.__exit__(*error)
        return self._mistake == "swallows"


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("drops", r"of the 3 rows of unit 000000 .* lacks 1 \(the first: b\), so the unit is not committed"),
        ("renames", r"lacks 3 \(the first: a\), and has too many 3 \(the first: z\)"),
        ("doubles", r"has too many 3 \(the first: a\)"),
        ("forgets a file", r"lacks 1 \(the first: c\)"),
        ("swallows", r"lacks 3 \(the first: a\)"),
    ],
)
def test_a_unit_is_committed_only_with_the_rows_that_the_exporter_was_given(
    mistake: str, words: str, tmp_path: Path
) -> None:
    """It ended well, and nothing but verify knew."""
    current = make_job(tmp_path)
    (unit,) = current.plan.units
    open_writer = functools.partial(
        fastvideo.open_shard, current.store, workload="t2v", samples_per_file=2, contract=current.plan.contract
    )
    with (
        Committer(current, open_writer=lambda name: Wrong(open_writer(name), mistake), max_bad_fraction=0.05) as wrong,
        pytest.raises(UserError, match=f"the exporter fastvideo has a mistake: .*{words}"),
    ):
        wrong.take(make_batch(unit, [make_sample(key) for key in "abc"]))
    assert current.record(unit.id) is None


def test_an_exporter_may_give_its_files_one_by_one(tmp_path: Path) -> None:
    current = make_job(tmp_path)
    (unit,) = current.plan.units
    open_writer = functools.partial(
        fastvideo.open_shard, current.store, workload="t2v", samples_per_file=2, contract=current.plan.contract
    )
    with Committer(current, open_writer=lambda name: Wrong(open_writer(name), ""), max_bad_fraction=0.05) as right:
        record = right.take(make_batch(unit, [make_sample(key) for key in "abc"]))
    assert record is not None and [row.key for file in record.files for row in file.rows] == ["a", "b", "c"]


def test_a_process_that_commits_second_takes_back_its_files(tmp_path: Path) -> None:
    current = make_job(tmp_path)
    (unit,) = current.plan.units
    with make_committer(current) as first, make_committer(current) as second:
        first.take(make_batch(unit, [make_sample("0/0", 1.0)], [make_bad("0/1")]))
        before = files_in(tmp_path)
        second.take(make_batch(unit, [make_sample("0/0", 2.0)], [make_bad("0/1", "truncated")]))
    assert files_in(tmp_path) == before


def test_a_process_that_commits_the_same_second_leaves_the_files_of_the_first(tmp_path: Path) -> None:
    current = make_job(tmp_path)
    (unit,) = current.plan.units
    batch = make_batch(unit, [make_sample("0/0")], [make_bad("0/1")])
    with make_committer(current) as first, make_committer(current) as second:
        first.take(batch)
        before = files_in(tmp_path)
        second.take(batch)
    assert files_in(tmp_path) == before


def test_a_unit_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    current = make_job(tmp_path)
    before = files_in(tmp_path)
    batch = make_batch(current.plan.units[0], [make_sample(f"0/{number}") for number in range(3)], [make_bad("0/3")])
    with make_committer(current) as committer:
        committer.take(dataclasses.replace(batch, last=False))
    assert files_in(tmp_path) == before


# --- the end


def test_finalize_deletes_what_a_record_does_not_name_and_nothing_else(tmp_path: Path) -> None:
    current = make_job(tmp_path)
    encode_by_hand(current)
    data, quarantine = tmp_path / fastvideo.FOLDER, tmp_path / job.QUARANTINE
    leftovers = [
        data / "000000-00000-0123abcd.parquet",
        data / "000000-00007-0123abcd.parquet",
        quarantine / "000000-0123abcd.jsonl.zst",
    ]
    others = [
        data / "000001-00000-0123abcd.parquet",  # of a unit without a record
        data / "000000-00000-0123ABCD.parquet",
        data / "000000-00000-0123abcd",
        data / "000000-notes.parquet",
        data / "x000000-00000-0123abcd.parquet",
        data / "README.md",
        data / "mine/000000-00000-0123abcd.parquet",
        data / "000000-00000-4567abcd.parquet/mine",
        tmp_path / "000000-00000-0123abcd.parquet",
        tmp_path / "_streamprep/000000-00000-0123abcd.parquet",
    ]
    named = files_in(tmp_path)
    for path in leftovers + others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"somebody's")
    finalize(current)
    left = files_in(tmp_path)
    assert left.keys() == named.keys() | {str(path.relative_to(tmp_path)) for path in others} | {job.INDEX, job.SUCCESS}
    assert named.items() <= left.items()


def test_finalize_is_refused_while_a_unit_is_missing_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    current = make_job(tmp_path, num_units=3)
    with make_committer(current) as committer:
        committer.take(make_batch(current.plan.units[1], [make_sample("1/0")]))
    before = files_in(tmp_path)
    assert main(["finalize", str(tmp_path)]) == 2
    assert "2 units of 3 not encoded yet (the first is 000000)" in capsys.readouterr().err
    assert files_in(tmp_path) == before


def test_the_index_finds_every_tensor_without_a_parquet_reader(undisturbed: Undisturbed, shards: Path) -> None:
    finished = undisturbed(shards)
    rows = pq.read_table(finished.out / job.INDEX).to_pylist()
    assert [row["key"] for row in rows] == ["a0", "a2", "a3", "b0", "b1", "b2", "d0", "d1"]
    for row in rows:
        tensors_by_id = dict(fastvideo.read_file(finished.job.store, row["file"]))
        for name, tensor in tensors_by_id[f"{row['key']}.mp4"].items():
            data = finished.job.store.read_range(row["file"], row[f"{name}_offset"], row[f"{name}_size"])
            array = np.frombuffer(data, row[f"{name}_dtype"]).reshape(row[f"{name}_shape"])
            assert np.array_equal(array, tensor)


def test_totals_are_those_of_the_records(undisturbed: Undisturbed, shards: Path) -> None:
    finished = undisturbed(shards)
    total = totals(finished.job)
    assert (total.num_rows, total.num_files) == (8, 5)
    assert total.bad == {"probe_failed": 2, "decode_error": 1}
    assert total.dropped == {"too_short": 1}
    assert total.size_bytes == sum(path.stat().st_size for path in (finished.out / fastvideo.FOLDER).iterdir())
    success = json.loads((finished.out / job.SUCCESS).read_bytes())
    assert success.items() >= dataclasses.asdict(total).items()


# --- status


def status_of(out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """The exit code, and the lines by their first word."""
    code = main(["status", str(out)])
    lines = capsys.readouterr().out.splitlines()
    return code, {line.split()[0]: line for line in lines}


def test_status_of_a_finished_job(undisturbed: Undisturbed, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = undisturbed(shards)
    code, lines = status_of(finished.out, capsys)
    assert code == 0
    assert lines[f"{finished.out}:"].endswith("t2v data of wan 2.1-t2v model tiny")
    assert lines["input"] == f"input    {shards}"
    assert lines["units"] == "units    4 of 4 done"
    assert lines["samples"] == "samples  9 of 9 done"
    assert lines["output"].startswith("output   8 rows, 5 files, ")
    assert lines["dropped"] == "dropped  1 too_short: a5 (4 frames at 1 fps, 5 are wanted (4 frames at 1 fps))"
    assert lines["state"] == "state    done"


def test_status_of_an_unfinished_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    current = make_job(tmp_path, num_units=2)
    with make_committer(current) as committer:
        committer.take(make_batch(current.plan.units[0], [make_sample("0/0")]))
    code, lines = status_of(tmp_path, capsys)
    assert code == 4
    assert lines["units"] == "units    1 of 2 done"
    assert lines["state"] == "state    unfinished: run the same command again to go on"


def test_status_of_a_job_all_of_whose_units_are_done_but_the_end_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_by_hand(make_job(tmp_path))
    code, lines = status_of(tmp_path, capsys)
    assert code == 4
    assert lines["state"] == "state    unfinished: run the same command again to go on"


# --- too many bad samples


@pytest.fixture(scope="session")
def mostly_undecodable(make_shards: MakeShards, good_video: WriteVideo, undecodable_video: WriteVideo) -> Path:
    """21 clips that cannot be decoded, then a good one."""
    return make_shards({**{f"a{number:02d}.mp4": undecodable_video for number in range(21)}, "b.mp4": good_video})


def write_no_video(path: Path) -> None:
    path.write_bytes(b"no video")


@pytest.fixture(scope="session")
def mostly_unreadable(make_shards: MakeShards, good_video: WriteVideo) -> Path:
    """21 files whose headers nobody can read, and a good one."""
    return make_shards({**{f"a{number:02d}.mp4": write_no_video for number in range(21)}, "b.mp4": good_video})


def test_too_many_bad_samples_stop_a_job_until_more_are_allowed(
    new_job: NewJob, mostly_undecodable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded = new_job(mostly_undecodable)
    stopped = encoded.run(serial=True)
    assert stopped.code == 3
    message = "21 of 22 samples are bad, more than max(20, 5%): the settings may be wrong"
    assert f"streamprep: {message}" in stopped.output
    assert "a00: decode_error: " in stopped.output
    code, lines = status_of(encoded.out, capsys)
    assert code == 3
    assert lines["stopped"].startswith(f"stopped  {message}")
    assert lines["state"] == "state    too many bad samples"

    before = encoded.files()
    again = encoded.run(serial=True)
    assert again.code == 3
    assert message in again.output
    assert encoded.files() == before

    assert encoded.run(serial=True, max_bad_fraction=1).code == 0
    assert status_of(encoded.out, capsys)[0] == 0
    assert encoded.run(serial=True).code == 0, "what is done is done"


def test_samples_with_bad_headers_count_towards_the_limit(new_job: NewJob, mostly_unreadable: Path) -> None:
    """They were counted, but never compared with it."""
    stopped = new_job(mostly_unreadable).run(serial=True)
    assert stopped.code == 3
    assert "21 of 22 samples are bad, more than max(20, 5%)" in stopped.output
    assert "(probe_failed 21)" in stopped.output


def test_a_job_without_a_single_good_sample_stops(
    new_job: NewJob, make_shards: MakeShards, undecodable_video: WriteVideo
) -> None:
    encoded = new_job(make_shards({"a.mp4": undecodable_video}))
    for _ in range(2):
        stopped = encoded.run(serial=True)
        assert stopped.code == 3
        assert "all 1 samples are bad: nothing was encoded (decode_error 1)\n  a: decode_error: " in stopped.output
    assert not encoded.job.store.exists(job.SUCCESS)


def test_rows_of_another_process_count_when_all_of_ones_own_samples_are_bad(tmp_path: Path) -> None:
    """A process that came too late for every unit with rows stopped the job for having none."""
    current = make_job(tmp_path, num_units=2)
    with make_committer(current) as slow, make_committer(current) as fast:
        fast.take(make_batch(current.plan.units[0], [make_sample("0/0")]))
        slow.take(make_batch(current.plan.units[1], [], [make_bad("1/0")]))
        slow.check_all()
    assert current.stop_reason() is None


def test_bad_samples_of_earlier_runs_count(tmp_path: Path) -> None:
    current = make_job(tmp_path, num_units=2)
    with make_committer(current) as committer:
        committer.take(make_batch(current.plan.units[0], [], [make_bad(f"0/{number}") for number in range(20)]))
    with make_committer(current) as committer, pytest.raises(TooManyBadSamples, match="21 of 21 samples are bad"):
        committer.take(make_batch(current.plan.units[1], [], [make_bad("1/0")]))
    assert [record.unit for record in current.records()] == ["000000"]


def test_bad_samples_are_counted_and_listed_with_their_reasons(
    undisturbed: Undisturbed, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = undisturbed(shards)
    records = {record.unit: record for record in finished.job.records()}
    assert records["000000"].bad == {"decode_error": 1, "probe_failed": 1}
    assert records["000002"].bad == {"probe_failed": 1}
    listed = [clip for record in records.values() for clip in finished.job.read_quarantine(record)]
    assert [(clip.key, clip.stage, clip.reason) for clip in listed] == [
        ("a1", "decode", "decode_error"),
        ("a4", "plan", "probe_failed"),
        ("c0", "plan", "probe_failed"),
    ]
    assert main(["status", str(finished.out)]) == 0
    output = capsys.readouterr().out
    assert "bad      2 probe_failed: a4 (not a video: it begins with b'<html>404</html>'); c0 (" in output
    assert "bad      1 decode_error: a1 (" in output


# --- verify


@pytest.fixture
def copied(undisturbed: Undisturbed, shards: Path, tmp_path: Path) -> Job:
    """A finished job, for damaging."""
    shutil.copytree(undisturbed(shards).out, tmp_path / "out")
    return open_job(open_store(tmp_path / "out"))


def a_record(current: Job) -> Record:
    record = current.record("000001")
    assert record is not None
    return record


def a_file(current: Job) -> Path:
    return current.store.root / a_record(current).files[0].name


def rewrite_record(current: Job, **fields: Any) -> None:
    record = dataclasses.replace(a_record(current), **fields)
    current.store.put(f"{job.RECORDS}/{record.unit}.json", record.to_json(), step="record")


def rewrite_first_row(current: Job, change: Callable[[WrittenRow], Sequence[WrittenRow]]) -> None:
    first, *others = a_record(current).files
    row, *rows = first.rows
    rewrite_record(current, files=(dataclasses.replace(first, rows=(*change(row), *rows)), *others))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def put_a_nan(current: Job) -> None:
    """With a digest that fits, as if it had been written so."""
    first, *others = a_record(current).files
    path = a_file(current)
    data = bytearray(path.read_bytes())
    offset = first.rows[1].tensors["vae_latent"].offset
    data[offset : offset + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    rewrite_record(current, files=(dataclasses.replace(first, sha256=canonical.bytes_digest(data)), *others))


def move_a_tensor(row: WrittenRow) -> list[WrittenRow]:
    where = row.tensors["text_embedding"]
    moved = dataclasses.replace(where, offset=where.offset + 4)
    return [dataclasses.replace(row, tensors={**row.tensors, "text_embedding": moved})]


def add_a_record_of_an_unknown_unit(current: Job) -> None:
    record = dataclasses.replace(a_record(current), unit="000009")
    assert current.commit(record)


def cut_the_index(current: Job) -> None:
    path = current.store.root / job.INDEX
    pq.write_table(pq.read_table(path).slice(1), path)


def remove(current: Job, path: str) -> None:
    (current.store.root / path).unlink()


DAMAGES: dict[str, tuple[Callable[[Job], object], str]] = {
    "a flipped byte in a data file": (
        lambda current: flip_a_byte(a_file(current)),
        "WRONG combined_parquet_dataset/000001-00000-*.parquet: its sha256 is *, the record says *",
    ),
    "a deleted data file": (
        lambda current: a_file(current).unlink(),
        "WRONG combined_parquet_dataset/000001-00000-*.parquet: cannot be read: *No such file*",
    ),
    "a data file cut short": (
        lambda current: a_file(current).write_bytes(a_file(current).read_bytes()[:-9]),
        "WRONG combined_parquet_dataset/000001-00000-*.parquet: its sha256 is *, the record says *",
    ),
    "a flipped byte in a quarantine file": (
        lambda current: flip_a_byte(next((current.store.root / job.QUARANTINE).glob("000000-*"))),
        "WRONG _streamprep/quarantine/000000-*.jsonl.zst: its sha256 is *, the record says *",
    ),
    "a deleted quarantine file": (
        lambda current: next((current.store.root / job.QUARANTINE).glob("000002-*")).unlink(),
        "WRONG _streamprep/quarantine/000002-*.jsonl.zst: cannot be read: *No such file*",
    ),
    "a key missing in a record": (
        lambda current: rewrite_first_row(current, lambda row: []),
        "WRONG unit 000001: its 2 rows are not the 3 that were planned",
    ),
    "a key twice in a record": (
        lambda current: rewrite_first_row(current, lambda row: [row, row]),
        "WRONG unit 000001: 'b0' is there 2 times",
    ),
    "bad samples that no quarantine file lists": (
        lambda current: rewrite_record(current, bad={"truncated": 1}),
        "WRONG unit 000001: the record counts {'truncated': 1} bad samples, its quarantine file lists others",
    ),
    "a tensor elsewhere than recorded": (
        lambda current: rewrite_first_row(current, move_a_tensor),
        "WRONG combined_parquet_dataset/000001-00000-*.parquet: text_embedding of 'b0' is not at the recorded offset",
    ),
    "NaN in a tensor": (
        put_a_nan,
        "WRONG combined_parquet_dataset/000001-00000-*.parquet: vae_latent of 'b1' holds NaN or infinity",
    ),
    "a file that no record names": (
        lambda current: a_file(current).with_name("000001-00000-0123abcd.parquet").write_bytes(b""),
        "WRONG combined_parquet_dataset/000001-00000-0123abcd.parquet: no record names it: run `streamprep finalize`",
    ),
    "a record of a unit that was not planned": (
        add_a_record_of_an_unknown_unit,
        "WRONG record 000009: the plan has no such unit",
    ),
    "a missing record": (
        lambda current: remove(current, f"{job.RECORDS}/000001.json"),
        "WRONG 1 of 4 units are not encoded yet: run `streamprep encode` again",
    ),
    "a missing index": (
        lambda current: remove(current, job.INDEX),
        "WRONG _streamprep/index.parquet: cannot be read: *: run `streamprep finalize`",
    ),
    "an index that lacks a row": (
        cut_the_index,
        "WRONG _streamprep/index.parquet: lists 7 rows, the records 8: run `streamprep finalize`",
    ),
    "a missing end": (
        lambda current: remove(current, job.SUCCESS),
        "WRONG _streamprep/SUCCESS.json is missing: run `streamprep finalize`",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds(damage: str, copied: Job, capsys: pytest.CaptureFixture[str]) -> None:
    inflict, message = DAMAGES[damage]
    out = str(copied.store.root)
    assert main(["verify", out]) == 0
    assert capsys.readouterr().out.endswith(": 0 problems\n")
    inflict(copied)
    assert main(["verify", out]) == 1
    output = capsys.readouterr().out
    assert any(fnmatchcase(line, message) for line in output.splitlines()), output
    assert not output.endswith(" 0 problems\n")


@pytest.mark.parametrize(
    "damage", ["a file that no record names", "a missing index", "an index that lacks a row", "a missing end"]
)
def test_finalize_repairs(damage: str, copied: Job, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_in(copied.store.root)
    inflict, _ = DAMAGES[damage]
    inflict(copied)
    assert main(["finalize", str(copied.store.root)]) == 0
    assert capsys.readouterr().out.startswith("8 rows, 5 files, ")
    assert files_in(copied.store.root) == before


def test_verify_lets_no_other_thread_hold_a_file(copied: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow's did: if one let go of it while the process ended, the process aborted, after "0 problems"."""
    threads = set()

    class Watched(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            threads.add(threading.current_thread())
            return super().read(-1 if size is None else size)

        def readinto(self, buffer: Any) -> int:
            threads.add(threading.current_thread())
            return super().readinto(buffer)

    monkeypatch.setattr(type(copied.store), "open", lambda store, path: Watched(store.root / path))
    assert main(["verify", str(copied.store.root)]) == 0
    assert threads == {threading.main_thread()}


def test_what_verify_cannot_read_is_not_called_wrong(
    copied: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = type(copied.store).open

    def fails(store: Any, path: str) -> Any:
        if path.endswith((".parquet", ".zst")):
            raise OSError(errno.EIO, "Input/output error", path)
        return opened(store, path)

    monkeypatch.setattr(type(copied.store), "open", fails)
    assert main(["verify", str(copied.store.root)]) == 1
    output = capsys.readouterr().out
    assert "WRONG" not in output and "delete its record" not in output
    assert output.count("UNREAD ") == 5
    assert "Input/output error" in output
    assert "0 problems, 5 files could not be read\nthe rest was not looked at" in output


@pytest.mark.parametrize("name", ["mine.parquet", "worker_0/data_chunk_0.parquet", "000000-00000-deadbeef.parquet"])
def test_a_folder_with_somebody_elses_data_is_refused_and_left_as_it_is(
    name: str, new_job: NewJob, shards: Path
) -> None:
    encoded = new_job()
    theirs = encoded.out / "combined_parquet_dataset" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    refused = encoded.run(serial=True)
    assert refused.code == 2
    assert f"has a file combined_parquet_dataset/{name} but no _streamprep/plan.json" in refused.output
    assert [path for path in encoded.out.rglob("*") if path.is_file()] == [theirs]


def test_a_hidden_file_among_the_data_is_nobodys(new_job: NewJob) -> None:
    encoded = new_job()
    (encoded.out / "combined_parquet_dataset").mkdir(parents=True)
    (encoded.out / "combined_parquet_dataset/.DS_Store").touch()
    assert encoded.run(serial=True).code == 0
