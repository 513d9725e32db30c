"""Is what is on disk what the records say, all of it, once, readable and finite?"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from streamprep import canonical, job, plugins
from streamprep.finalize import index_of, leftovers, success_of
from streamprep.job import DamagedFile, Job, record_path
from streamprep.job_plan import Unit, keys_digest
from streamprep.manifest import load_index, load_manifest
from streamprep.progress import Progress, count
from streamprep.record import Record
from streamprep.sealed import Damaged, check_unconditional, check_validation
from streamprep.shards import ShardIndex, check_shard
from streamprep.storage import NotWhole, SpoolError, Store, StoreError, how_to_delete, open_spool, whole_file
from streamprep.tensor_members import decode_bytes, dtype_name, is_finite, same_bytes
from streamprep.types import TensorLocation, WrittenFile

_MOST_UNREAD = 5
"""Each may have been asked for again for minutes."""
_OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_FINALIZE = "streamprep finalize"


class Unread(str):
    """That something could not be read, and why; it may be as it should."""


class Missing(str):
    """That a file is not there, and that nothing need be deleted for it to be written again."""


class Uncompared(str):
    """That something may be as it was written or not: it is of a time when nothing said so."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What to do about what a check finds."""

    command: str
    """That makes again what is not there."""
    delete: tuple[str, ...] = ()
    """What must not be there then."""


@dataclass(kw_only=True)
class Verdict:
    """What was looked at, and what is wrong with it."""

    num_files: int = 0
    num_rows: int = 0
    size_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    """What the store did not give, and why."""
    uncompared: list[str] = field(default_factory=list)
    """What is too old to say whether it is what was written."""
    remedies: list[Remedy] = field(default_factory=list)
    """For those problems that do not say themselves what to do."""
    gave_up: bool = False
    """Whether the rest was not looked at."""

    def note(self, findings: Iterator[str], remedy: Remedy | None = None) -> None:
        """Take what a check finds.

        Args:
            findings: Those.
            remedy: For any problem among them.

        Raises:
            _GivenUp: if the store has not given too many files.
        """
        kinds = {Unread: self.unread, Uncompared: self.uncompared}
        try:
            for finding in findings:
                kinds.get(type(finding), self.problems).append(finding)
                if remedy is not None and type(finding) not in kinds:
                    self.remedies.append(replace(remedy, delete=()) if isinstance(finding, Missing) else remedy)
        except OSError as error:
            if not _says_nothing_of_the_file(error):
                raise
            self.unread.append(str(error))
        if len(self.unread) >= _MOST_UNREAD:
            raise _GivenUp


class _GivenUp(Exception):
    """Too much could not be read."""


def _is_of_this_machine(error: Exception) -> bool:
    """Whether it is neither the file's nor the store's trouble, but that of who looks at them."""
    return isinstance(error, SpoolError) or (isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE)


def _says_nothing_of_the_file(error: Exception) -> bool:
    """Whether it is the store's, the network's or the disk's trouble; pyarrow's errors for damage have no number."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)) or _is_of_this_machine(error):
        return False
    return isinstance(error, StoreError) or (isinstance(error, OSError) and error.errno is not None)


def verify_job(current: Job, *, spool: Store | None = None) -> Verdict:
    """Check an encode job's output against its plan and records.

    Every file is hashed and opened again by its format's own reader; every tensor must be finite, of the recorded
    shape, and at the recorded offset; every planned row must be there exactly once, as a bad sample, or as one dropped
    after decoding.

    Args:
        current: The job.
        spool: Where a copy of one file at a time may lie; by default in the folder for temporary files.

    Raises:
        OSError: for trouble of this machine, such as no room for that copy.
    """
    verdict = Verdict()
    try:
        _verify_job(current, spool or open_spool(), verdict)
    except _GivenUp:
        verdict.gave_up = True
    return verdict


def describe_remedies(verdict: Verdict, store: Store) -> Iterator[str]:
    """What to do, each once; but for what problems say themselves."""
    for command in dict.fromkeys(remedy.command for remedy in verdict.remedies):
        these = [remedy for remedy in verdict.remedies if remedy.command == command]
        run = f"run `{command}`" if command == _FINALIZE else f"run the same `{command}` again"
        paths = dict.fromkeys(path for remedy in these for path in remedy.delete)
        if paths:
            yield f"to mend what is wrong, delete what follows, then {run}:"
            yield from (f"  {how_to_delete(store.url, path)}" for path in paths)
        else:
            yield f"{run}: it writes what is missing"


def _verify_job(current: Job, spool: Store, verdict: Verdict) -> None:
    damaged: list[DamagedFile] = []
    records, rounds = list(current.records(damaged.append)), current.rounds(damaged.append)
    exporter = plugins.load("streamprep.exporters", current.plan.config["exporter"])
    retries = [unit for one in rounds for unit in one.units]
    planned = {unit.id: unit for unit in (*current.plan.units, *retries)}
    verdict.note(_check_stop(current), Remedy(command=current.plan.command, delete=(job.STOP,)))
    for one in damaged:
        verdict.note(_describe_damaged(one, planned), Remedy(command=one.command, delete=(one.delete,)))
    progress = Progress(total=sum(len(record.files) for record in records), unit="files", verb="verifying")
    with progress:
        for record in records:
            path, planned_unit = record_path(record.unit), planned.get(record.unit)
            remedy = Remedy(command=current.command_for(record.unit), delete=(path,))
            if planned_unit is not None:
                verdict.note(_check_keys(current, record, planned_unit), remedy)
            elif not _is_of_damaged_round(record, damaged):
                unknown = f"record {record.unit}: the plan has no such unit"
                verdict.note(iter([unknown]), Remedy(command=_FINALIZE, delete=(path,)))
                continue
            for file in record.files:
                verdict.note(_check_file(current.store, file, exporter, spool), remedy)
                verdict.num_files += 1
                verdict.num_rows += len(file.rows)
                verdict.size_bytes += file.size_bytes
                progress.advance()
    by_unit, bad_of = {record.unit: record for record in records}, dict[str, dict[str, str] | None]()
    unclear = {PurePosixPath(one.path).stem.partition(".")[0] for one in damaged}
    for unit in retries:
        if unit.original not in unclear:
            remedy = Remedy(command=current.command_of_retries, delete=(record_path(unit.id),))
            verdict.note(_check_retry(current, by_unit, unit, bad_of), remedy)
    verdict.note(_check_unconditional(current, records), Remedy(command=current.plan.command, delete=_prompts(current)))
    verdict.note(_check_whole(current, records, damaged))
    if current.plan.config.get("validation_split") is not None and current.store.exists(job.SUCCESS):
        _check_validation(current, verdict)
    for one_round in rounds:
        if units := current.without_record(one_round.units):
            verdict.problems.append(
                f"{len(units)} of {len(one_round.units)} units of retry {one_round.name} are not encoded yet: run "
                f"`{current.command_of_retries}` again"
            )


def _check_stop(current: Job) -> Iterator[str]:
    try:
        current.stop_reason()
    except DamagedFile as error:
        yield f"{error.path}: {error.what}"


def _prompts(current: Job) -> tuple[str, ...]:
    return (current.plan.unconditional,) if current.plan.unconditional else ()


def _describe_damaged(error: DamagedFile, planned: Mapping[str, Unit]) -> Iterator[str]:
    unit = planned.get(PurePosixPath(error.path).stem)
    missing = f": the {count(unit.num_rows, 'row')} of its unit are missing" if unit and unit.num_rows else ""
    yield f"{error.path}: {error.what}{missing}"


def _is_of_damaged_round(record: Record, damaged: Sequence[DamagedFile]) -> bool:
    return any(error.path == job.round_path(record.unit.partition(".")[2]) for error in damaged)


def _check_unconditional(current: Job, records: Sequence[Record]) -> Iterator[str]:
    """It is there before any unit that has clips is committed."""
    path, committed = current.plan.unconditional, {record.unit for record in records}
    if path is None or not any(unit.num_clips and unit.id in committed for unit in current.plan.units):
        return
    try:
        is_known = check_unconditional(current.store.read(path), current.plan)
    except FileNotFoundError:
        yield Missing(f"{path}: missing")
    except Damaged as error:
        yield f"{path}: {error}"
    else:
        if not is_known:
            yield _too_old(path)


def _check_validation(current: Job, verdict: Verdict) -> None:
    images: dict[str, str] = {}
    again = Remedy(command=current.plan.command, delete=(job.VALIDATION,))
    verdict.note(_check_validation_json(current.store, images), again)
    for image, sha256 in images.items():
        name = f"{job.VALIDATION_FOLDER}/{image}"
        there = (name,) if current.store.exists(name) else ()
        verdict.note(_check_image(current.store, name, sha256), replace(again, delete=(*there, job.VALIDATION)))


def _check_validation_json(store: Store, images: dict[str, str]) -> Iterator[str]:
    """Puts what it names into `images`."""
    try:
        found, is_known = check_validation(store.read(job.VALIDATION))
    except FileNotFoundError:
        yield Missing(f"{job.VALIDATION}: missing")
    except Damaged as error:
        yield f"{job.VALIDATION}: {error}"
    else:
        images.update(found)
        if not is_known:
            yield _too_old(job.VALIDATION)


def _check_image(store: Store, name: str, sha256: str) -> Iterator[str]:
    try:
        if canonical.bytes_digest(store.read(name)) != sha256:
            yield f"{name}: its bytes differ from those that were written"
    except FileNotFoundError:
        yield f"{name}: missing"


def _too_old(path: str) -> Uncompared:
    return Uncompared(f"{path}: of a version that wrote no digest of it, so it can be read, but not compared")


def verify_shards(store: Store) -> Verdict:
    """Check packed shards against their manifest: every byte of every tar and index."""
    verdict = Verdict()
    try:
        _verify_shards(store, verdict)
    except _GivenUp:
        verdict.gave_up = True
    return verdict


def _verify_shards(store: Store, verdict: Verdict) -> None:
    manifest = load_manifest(store)
    keys: Counter[str] = Counter()
    with Progress(total=manifest.num_samples, unit="videos", verb="verifying") as progress:
        for info in manifest.shards:
            try:
                index = load_index(store, info)
            except ValueError as error:
                verdict.problems.append(f"{info.name}: {error}")
                continue
            except OSError as error:
                verdict.note(iter([_finding(info.name, error)]))
                continue
            verdict.note(_check_tar(store, index))
            keys.update(sample.key for sample in index.samples)
            verdict.num_files += 1
            verdict.num_rows += len(index.samples)
            verdict.size_bytes += info.size_bytes
            progress.advance(len(index.samples))
    verdict.problems += [f"key {key!r} is there {number} times" for key, number in keys.items() if number > 1]


def _check_tar(store: Store, index: ShardIndex) -> Iterator[str]:
    try:
        with store.open(index.name) as file:
            yield from check_shard(file, index)
    except OSError as error:
        yield _finding(index.name, error)


def _check_keys(current: Job, record: Record, unit: Unit) -> Iterator[str]:
    """Each planned row exactly once."""
    try:
        bad = current.read_quarantine(record)
    except DamagedFile as error:
        yield f"{error.path}: {error.what}"
        return
    keys = [row.key for file in record.files for row in file.rows]
    keys += [clip.key for clip in bad if clip.stage != "plan"]
    keys += [item.key for item in record.dropped_rows]
    yield from (f"unit {unit.id}: {key!r} is there {n} times" for key, n in Counter(keys).items() if n > 1)
    if keys_digest(keys) != unit.rows_sha256:
        yield f"unit {unit.id}: its {len(keys)} rows are not the {unit.num_rows} that were planned"
    if dict(record.bad) != Counter(clip.reason for clip in bad):
        yield f"unit {unit.id}: the record counts {dict(record.bad)} bad samples, its quarantine file lists others"


def _check_retry(
    current: Job, records: Mapping[str, Record], unit: Unit, bad_of: dict[str, dict[str, str] | None]
) -> Iterator[str]:
    """Each of its samples was bad when it was tried again, for the reason that it no longer counts for.

    Args:
        current: The job.
        records: All, by unit.
        unit: Of the retry.
        bad_of: What is bad, of units of the plan, and why, after earlier retries; None if that cannot be known.
    """
    if unit.original not in bad_of:
        bad_of[unit.original] = _reasons(current, records.get(unit.original))
    record, bad = records.get(unit.id), bad_of[unit.original]
    if record is None or bad is None:
        return
    was = dict(Counter(bad.pop(key, "not bad") for key in unit.keys or ()))
    if not was == unit.retried == record.retried:
        yield f"unit {unit.id}: retries samples as {dict(record.retried)}, before they were {was}"
    now = _reasons(current, record)
    bad_of[unit.original] = None if now is None else bad | now


def _reasons(current: Job, record: Record | None) -> dict[str, str] | None:
    """Of a unit's bad samples; None if the file is damaged, which `_check_keys` has said."""
    if record is None:
        return {}
    try:
        return {clip.key: clip.reason for clip in current.read_quarantine(record)}
    except DamagedFile:
        return None


def _check_file(store: Store, file: WrittenFile, exporter: Any, spool: Store) -> Iterator[str]:
    """From a bucket by way of a copy: what is read three times is asked for once."""
    try:
        with whole_file(store, file, scratch=spool) as (here, name):
            for problem in _check_rows(here, replace(file, name=name), exporter):
                yield f"{file.name}: {problem}"
    except NotWhole as error:
        yield f"{file.name}: {error.what}"
    except (OSError, ValueError) as error:
        yield _finding(file.name, error)


def _finding(name: str, error: OSError | ValueError) -> str:
    if _is_of_this_machine(error):
        raise error
    if _says_nothing_of_the_file(error):
        return Unread(error if isinstance(error, StoreError) else f"{name}: {error}")
    return f"{name}: cannot be read: {error}"


def _check_rows(store: Store, file: WrittenFile, exporter: Any) -> Iterator[str]:
    num_rows, size_bytes = 0, store.size_bytes(file.name)
    if size_bytes != file.size_bytes:
        yield f"{size_bytes} bytes, the record says {file.size_bytes}"
    for row, (_, tensors) in zip(file.rows, exporter.read_file(store, file.name), strict=False):
        num_rows += 1
        for name, location in row.tensors.items():
            tensor = tensors.get(name)
            if tensor is None:
                yield f"{name} of {row.key!r} is missing"
            elif tuple(tensor.shape) != location.shape or dtype_name(tensor.dtype) != location.dtype:
                yield f"{name} of {row.key!r} is {tensor.dtype}{[*tensor.shape]}, the record says other"
            elif not is_finite(tensor):
                yield f"{name} of {row.key!r} holds NaN or infinity"
            elif location.offset + location.size > size_bytes or not _is_at(store, file.name, location, tensor):
                yield f"{name} of {row.key!r} is not at the recorded offset"
    if num_rows != len(file.rows):
        yield f"{num_rows} rows, the record says {len(file.rows)}"


def _is_at(store: Store, name: str, location: TensorLocation, tensor: Tensor) -> bool:
    data = store.read_range(name, location.offset, location.size)
    try:
        found = decode_bytes(data, dtype=location.dtype, shape=location.shape, codec=location.codec)
    except ValueError:
        return False
    return same_bytes(found, tensor)


def _check_whole(current: Job, records: list[Record], damaged: Sequence[DamagedFile]) -> Iterator[str]:
    keys = Counter(row.key for record in records for file in record.files for row in file.rows)
    yield from (f"key {key!r} is in {number} units" for key, number in keys.items() if number > 1)
    unfinished = current.unfinished()
    if unfinished:
        yield (
            f"{len(unfinished)} of {len(current.plan.units)} units are not encoded yet: run "
            f"`{current.plan.command}` again"
        )
        return
    if not current.store.exists(job.SUCCESS):
        yield f"{job.SUCCESS} is missing: run `{_FINALIZE}`"
        return
    yield from (f"{path}: no record names it: run `{_FINALIZE}`" for path in leftovers(current, records))
    if any(one.path.startswith(job.RECORDS) for one in damaged):
        return  # what follows from all records cannot be told from some
    if current.store.read(job.SUCCESS) != success_of(records):
        yield f"{job.SUCCESS}: does not say what the records do: run `{_FINALIZE}`"
    yield from _check_index(current, records)


def _check_index(current: Job, records: list[Record]) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # In this thread: pyarrow's own may still hold Python's bytes when the process ends, which then aborts.
        file = pq.ParquetFile(pa.BufferReader(current.store.read(job.INDEX)), pre_buffer=False)
        index = file.read(use_threads=False)
    except (OSError, ValueError) as error:
        finding = _finding(job.INDEX, error)
        yield finding if isinstance(finding, Unread) else f"{finding}: run `{_FINALIZE}`"
        return
    wanted = index_of(records)
    if index.num_rows != wanted.num_rows:
        yield f"{job.INDEX}: lists {index.num_rows} rows, the records {wanted.num_rows}: run `{_FINALIZE}`"
    elif not index.equals(wanted):
        yield f"{job.INDEX}: does not say what the records do: run `{_FINALIZE}`"
