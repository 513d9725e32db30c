"""The end of a job: delete what no record names, write the index of all tensors, say that it is done.

Everything here follows from the plan and the records alone, so it may run at any time, again, and by anybody.
"""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from streamprep import canonical, job
from streamprep.errors import TooManyBadSamples, UserError
from streamprep.job import Job
from streamprep.progress import count
from streamprep.record import Record, named_files
from streamprep.storage import Store


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a job made."""

    num_rows: int
    num_files: int
    size_bytes: int
    bad: Mapping[str, int]
    """How many samples for each reason, after all retries."""
    dropped: Mapping[str, int]
    """How many samples for each reason."""


def finalize(current: Job) -> Totals:
    """Finish a job all of whose units are committed.

    Raises:
        UserError: if some are not, or what belongs to no unit is not there.
        TooManyBadSamples: if it was stopped for that.
    """
    stopped = current.stop_reason()
    if stopped is not None:
        raise TooManyBadSamples(stopped["message"])
    unfinished = current.unfinished()
    if unfinished:
        raise UserError(
            f"{current.store.url}: {count(len(unfinished), 'unit')} of {len(current.plan.units)} not encoded yet "
            f"(the first is {unfinished[0].id}): run the same `{current.plan.command}` again"
        )
    if current.lacks_unconditional() or current.lacks_validation():
        lost = current.plan.unconditional if current.lacks_unconditional() else job.VALIDATION
        raise UserError(f"{current.store.url} lacks {lost}: run the same `{current.plan.command}` again")
    records = list(current.records())
    for path in leftovers(current, records):
        current.store.delete(path, step="delete")
    current.store.remove_unpublished()
    current.store.put(job.INDEX, _parquet(index_of(records)), step="index")
    result = _total(records)
    current.store.put(job.SUCCESS, success_of(records), step="success")
    current.store.publish_all(summary=job.SUCCESS, leave_out=job.NO_RESULT)
    return result


def open_finished(store: Store) -> Job:
    """The job of an output, all of which is there.

    Raises:
        UserError: if something is still to be done.
    """
    current = job.open_job(store)
    for one in current.rounds():
        if current.without_record(one.units):
            raise UserError(f"{store.url}: retry {one.name} is not finished: run `streamprep retry` again first")
    if not is_finalized(current):
        raise UserError(
            f"{store.url} is not finished: `streamprep status` says how far it is; run the same "
            f"`{current.plan.command}`, or `streamprep finalize`, first"
        )
    return current


def is_finalized(current: Job) -> bool:
    """Whether a job has ended, and no unit has been committed since, and all of it is published."""
    return current.store.is_all_published() and has_true_success(current)


def has_true_success(current: Job) -> bool:
    """Whether ``SUCCESS.json`` is there, and says what it should."""
    if current.unfinished() or not current.store.exists(job.INDEX) or not current.store.exists(job.SUCCESS):
        return False
    if current.lacks_validation() or current.lacks_unconditional():
        return False
    return current.store.read(job.SUCCESS) == success_of(list(current.records()))


def totals(current: Job) -> Totals:
    """What the committed units made."""
    return _total(list(current.records()))


def read_totals(store: Store) -> Totals:
    """What ``SUCCESS.json`` says; an error of `NOT_AS_WRITTEN` if it is something else."""
    value = canonical.from_json(store.read(job.SUCCESS))
    for name in ("bad", "dropped"):
        value[name] = dict(Counter(value[name]).most_common())
    return Totals(**{field.name: value[field.name] for field in dataclasses.fields(Totals)})


def leftovers(current: Job, records: Iterable[Record] | None = None) -> list[str]:
    """Files of units that have a record which does not name them: a killed process's, or the loser's of a race."""
    records = list(current.records() if records is None else records)
    committed = {record.unit for record in records}
    named = {name for record in records for name in named_files(record)}
    found = []
    for folder in (current.plan.data_folder, job.QUARANTINE):
        for entry in current.store.list(folder):
            match = job.UNIT_FILE.fullmatch(PurePosixPath(entry.path).name)
            if match and match["unit"] in committed and entry.path not in named:
                found.append(entry.path)
    return found


def _total(records: Sequence[Record]) -> Totals:
    return Totals(
        num_rows=sum(record.num_rows for record in records),
        num_files=sum(len(record.files) for record in records),
        size_bytes=sum(file.size_bytes for record in records for file in record.files),
        bad=job.bad_now(records),
        dropped=job.total(Counter(item.reason for item in record.dropped) for record in records),
    )


def success_of(records: Sequence[Record]) -> bytes:
    """``SUCCESS.json``, which follows from the records."""
    value = {
        "format": "streamprep-success/1",
        **dataclasses.asdict(_total(records)),
        "num_units": len(records),
        "files": [
            {"name": file.name, "sha256": file.sha256, "num_rows": len(file.rows)}
            for record in records
            for file in record.files
        ],
    }
    return canonical.to_pretty_json(value)


def index_of(records: Sequence[Record]) -> pa.Table:
    """``index.parquet``: for every row its key, file (and size), row group and bucket, and where its tensors lie.

    And where its id and caption do, if the exporter says that of all rows.
    """
    written = [(file, row) for record in records for file in record.files for row in file.rows]
    if not written:
        return pa.table({"key": pa.array([], pa.string())})
    columns: dict[str, pa.Array] = {
        "key": pa.array([row.key for _, row in written]),
        "file": pa.array([file.name for file, _ in written]),
        "file_size": pa.array([file.size_bytes for file, _ in written]),
        "row_group": pa.array([row.row_group for _, row in written]),
        "bucket": pa.array([row.bucket for _, row in written]),
    }
    with_codec = any(tensor.codec != "raw" for _, row in written for tensor in row.tensors.values())
    for name in dict.fromkeys(name for _, row in written for name in row.tensors):
        tensors = [row.tensors.get(name) for _, row in written]  # one that a row lacks is null there
        columns |= {
            f"{name}_offset": pa.array([tensor and tensor.offset for tensor in tensors], pa.int64()),
            f"{name}_size": pa.array([tensor and tensor.size for tensor in tensors], pa.int64()),
            f"{name}_dtype": pa.array([tensor and tensor.dtype for tensor in tensors], pa.string()),
            f"{name}_shape": pa.array([tensor and tensor.shape for tensor in tensors], pa.list_(pa.int64())),
        }
        if with_codec:
            columns[f"{name}_codec"] = pa.array([tensor and tensor.codec for tensor in tensors], pa.string())
    if all(row.texts for _, row in written):
        for name in written[0][1].texts:
            texts = [row.texts[name] for _, row in written]
            columns |= {
                f"{name}_text_at": pa.array([text.offset for text in texts]),
                f"{name}_text_size": pa.array([text.size for text in texts]),
                f"{name}_text_form": pa.array([text.form for text in texts]),
            }
    return pa.table(columns)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
