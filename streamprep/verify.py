"""Is what is on disk what the records say, all of it, once, readable and finite?"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from streamprep import canonical, job, plugins
from streamprep.finalize import leftovers, totals
from streamprep.job import Job, Unit
from streamprep.manifest import load_index, load_manifest
from streamprep.progress import Progress
from streamprep.record import QuarantineFile, Record
from streamprep.shards import ShardIndex, check_shard
from streamprep.storage import LocalStore, Store, StoreError
from streamprep.tensor_members import decode_bytes, dtype_name, is_finite, same_bytes
from streamprep.types import TensorLocation, WrittenFile

_CHUNK_BYTES = 8 * 2**20
_MOST_UNREAD = 5
"""Each may have been asked for again for minutes."""


class Unread(str):
    """That something could not be read, and why; it may be as it should."""


@dataclass(kw_only=True)
class Verdict:
    """What was looked at, and what is wrong with it."""

    num_files: int = 0
    num_rows: int = 0
    size_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    """What the store did not give, and why."""
    gave_up: bool = False
    """Whether the rest was not looked at."""

    def note(self, findings: Iterator[str]) -> None:
        """Take what a check finds.

        Raises:
            _GivenUp: if the store has not given too many files.
        """
        try:
            for finding in findings:
                (self.unread if isinstance(finding, Unread) else self.problems).append(finding)
        except OSError as error:
            if not _says_nothing_of_the_file(error):
                raise
            self.unread.append(str(error))
        if len(self.unread) >= _MOST_UNREAD:
            raise _GivenUp


class _GivenUp(Exception):
    """Too much could not be read."""


def _says_nothing_of_the_file(error: Exception) -> bool:
    """Whether it is the store's, the network's or the disk's trouble; pyarrow's errors for damage have no number."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return False
    return isinstance(error, StoreError) or (isinstance(error, OSError) and error.errno is not None)


def verify_job(current: Job) -> Verdict:
    """Check an encode job's output against its plan and records.

    Every file is hashed and opened again by its format's own reader; every tensor must be finite, of the recorded
    shape, and at the recorded offset; every planned row must be there exactly once, as a bad sample, or as one dropped
    after decoding.
    """
    verdict = Verdict()
    try:
        _verify_job(current, verdict)
    except _GivenUp:
        verdict.gave_up = True
    return verdict


def _verify_job(current: Job, verdict: Verdict) -> None:
    records = list(current.records())
    exporter = plugins.load("streamprep.exporters", current.plan.config["exporter"])
    rounds = current.rounds()
    retries = [unit for one in rounds for unit in one.units]
    planned = {unit.id: unit for unit in (*current.plan.units, *retries)}
    progress = Progress(total=sum(len(record.files) for record in records), unit="files", verb="verifying")
    with progress:
        for record in records:
            unit = planned.get(record.unit)
            if unit is None:
                verdict.problems.append(f"record {record.unit}: the plan has no such unit")
                continue
            verdict.note(_check_keys(current, record, unit))
            for file in record.files:
                verdict.note(_check_file(current.store, file, exporter))
                verdict.num_files += 1
                verdict.num_rows += len(file.rows)
                verdict.size_bytes += file.size_bytes
                progress.advance()
    verdict.note(_check_retries(current, {record.unit: record for record in records}, retries))
    verdict.note(_check_whole(current, records))
    if current.plan.config.get("validation_split") is not None and current.store.exists(job.SUCCESS):
        verdict.note(_check_validation(current.store))
    for one in rounds:
        if units := current.without_record(one.units):
            verdict.problems.append(
                f"{len(units)} of {len(one.units)} units of retry {one.name} are not encoded yet: run `streamprep "
                "retry` again"
            )


def _check_validation(store: Store) -> Iterator[str]:
    try:
        images = json.loads(store.read(job.VALIDATION))["images"]
    except FileNotFoundError:
        yield f"{job.VALIDATION}: missing"
        return
    except (ValueError, KeyError, TypeError) as error:
        yield f"{job.VALIDATION}: cannot be read: {error}"
        return
    for image, sha256 in images.items():
        name = f"{job.VALIDATION_FOLDER}/{image}"
        try:
            if canonical.bytes_digest(store.read(name)) != sha256:
                yield f"{name}: its bytes differ from those that were written"
        except FileNotFoundError:
            yield f"{name}: missing"


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
    damage = list(_check_digest(current.store, record.quarantine)) if record.quarantine is not None else []
    if damage:
        yield from damage
        return
    bad = current.read_quarantine(record)
    keys = [row.key for file in record.files for row in file.rows]
    keys += [clip.key for clip in bad if clip.stage != "plan"]
    keys += [item.key for item in record.dropped_rows]
    yield from (f"unit {unit.id}: {key!r} is there {n} times" for key, n in Counter(keys).items() if n > 1)
    if job.keys_digest(keys) != unit.rows_sha256:
        yield f"unit {unit.id}: its {len(keys)} rows are not the {unit.num_rows} that were planned"
    if dict(record.bad) != Counter(clip.reason for clip in bad):
        yield f"unit {unit.id}: the record counts {dict(record.bad)} bad samples, its quarantine file lists others"


def _check_retries(current: Job, records: Mapping[str, Record], retries: Sequence[Unit]) -> Iterator[str]:
    """Each of their samples was bad when it was tried again, for the reason that it no longer counts for."""
    bad_of: dict[str, dict[str, str]] = {}
    for unit in retries:
        if unit.original not in bad_of:
            bad_of[unit.original] = _reasons(current, records.get(unit.original))
        record, bad, keys = records.get(unit.id), bad_of[unit.original], unit.keys or ()
        if record is None:
            continue
        was = dict(Counter(bad.pop(key, "not bad") for key in keys))
        if not was == unit.retried == record.retried:
            yield f"unit {unit.id}: retries samples as {dict(record.retried)}, before they were {was}"
        bad |= _reasons(current, record)


def _reasons(current: Job, record: Record | None) -> dict[str, str]:
    """Of a unit's bad samples; none if the file is damaged, which `_check_keys` has said."""
    if record is None or record.quarantine is None:
        return {}
    for damage in _check_digest(current.store, record.quarantine):
        if isinstance(damage, Unread):
            raise StoreError(current.store.url, damage)
        return {}
    return {clip.key: clip.reason for clip in current.read_quarantine(record)}


def _check_file(store: Store, file: WrittenFile, exporter: Any) -> Iterator[str]:
    """From a bucket by way of a temporary copy: what is read three times is asked for once."""
    if store.local_path() is not None:
        yield from _check_local_file(store, file, exporter)
        return
    with tempfile.TemporaryDirectory(prefix="streamprep-verify-") as folder:
        copy = Path(folder) / file.name
        copy.parent.mkdir(parents=True)
        try:
            with store.open(file.name) as opened, open(copy, "wb") as target:
                shutil.copyfileobj(opened, target, _CHUNK_BYTES)
        except OSError as error:
            yield _finding(file.name, error)
            return
        yield from _check_local_file(LocalStore(Path(folder)), file, exporter)


def _check_local_file(store: Store, file: WrittenFile, exporter: Any) -> Iterator[str]:
    damage = list(_check_digest(store, file))
    if damage:
        yield from damage
        return
    try:
        yield from _check_rows(store, file, exporter)
    except (OSError, ValueError) as error:
        yield _finding(file.name, error)


def _finding(name: str, error: OSError | ValueError) -> str:
    if _says_nothing_of_the_file(error):
        return Unread(error if isinstance(error, StoreError) else f"{name}: {error}")
    return f"{name}: cannot be read: {error}"


def _check_digest(store: Store, file: WrittenFile | QuarantineFile) -> Iterator[str]:
    try:
        with store.open(file.name) as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        yield _finding(file.name, error)
        return
    if found != file.sha256:
        yield f"{file.name}: its sha256 is {found}, the record says {file.sha256}"


def _check_rows(store: Store, file: WrittenFile, exporter: Any) -> Iterator[str]:
    num_rows = 0
    for row, (_, tensors) in zip(file.rows, exporter.read_file(store, file.name), strict=False):
        num_rows += 1
        for name, location in row.tensors.items():
            tensor = tensors.get(name)
            if tensor is None:
                yield f"{file.name}: {name} of {row.key!r} is missing"
            elif tuple(tensor.shape) != location.shape or dtype_name(tensor.dtype) != location.dtype:
                yield f"{file.name}: {name} of {row.key!r} is {tensor.dtype}{[*tensor.shape]}, the record says other"
            elif not is_finite(tensor):
                yield f"{file.name}: {name} of {row.key!r} holds NaN or infinity"
            elif not _is_at(store, file.name, location, tensor):
                yield f"{file.name}: {name} of {row.key!r} is not at the recorded offset"
    if num_rows != len(file.rows):
        yield f"{file.name}: {num_rows} rows, the record says {len(file.rows)}"


def _is_at(store: Store, name: str, location: TensorLocation, tensor: Tensor) -> bool:
    data = store.read_range(name, location.offset, location.size)
    try:
        found = decode_bytes(data, dtype=location.dtype, shape=location.shape, codec=location.codec)
    except ValueError:
        return False
    return same_bytes(found, tensor)


def _check_whole(current: Job, records: list[Record]) -> Iterator[str]:
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
        yield f"{job.SUCCESS} is missing: run `streamprep finalize`"
        return
    yield from (f"{path}: no record names it: run `streamprep finalize`" for path in leftovers(current, records))
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # In this thread: pyarrow's own may still hold Python's bytes when the process ends, which then aborts.
        index = pq.ParquetFile(pa.BufferReader(current.store.read(job.INDEX)), pre_buffer=False)
        indexed = index.read(columns=["key"], use_threads=False)["key"].to_pylist()
    except (OSError, ValueError) as error:
        finding = _finding(job.INDEX, error)
        yield finding if isinstance(finding, Unread) else f"{finding}: run `streamprep finalize`"
        return
    if Counter(indexed) != keys or totals(current).num_rows != len(indexed):
        yield f"{job.INDEX}: lists {len(indexed)} rows, the records {keys.total()}: run `streamprep finalize`"
