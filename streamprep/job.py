"""A job: one output folder, its plan, and the records that say which units are done.

``_streamprep/plan.json`` says what the job is: settings, model, inputs, units. It is created once; another command on
the same output must have the same fingerprint.

``_streamprep/records/UNIT.json`` is the commit of a unit, created only if absent after all its files are visible. What
no record names does not exist. So a process may die anywhere: work is done at least once, rows are there exactly once.

``_streamprep/retry/r1.json`` plans units ``000012.r1``: the bad samples of unit 000012, tried again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

import zstandard

from streamprep import canonical, job_plan
from streamprep.ahead import fetch_ahead
from streamprep.errors import UserError, first_line
from streamprep.job_plan import Fingerprint, JobPlan, Round, Unit
from streamprep.record import BadClip, QuarantineFile, Record
from streamprep.storage import FileEntry, Store, how_to_delete

FOLDER = job_plan.FOLDER
PLAN = f"{FOLDER}/plan.json"
RECORDS = f"{FOLDER}/records"
QUARANTINE = f"{FOLDER}/quarantine"
RETRIES = f"{FOLDER}/retry"
STOP = f"{FOLDER}/stop.json"
INDEX = f"{FOLDER}/index.parquet"
SUCCESS = f"{FOLDER}/SUCCESS.json"
VALIDATION_FOLDER = "validation"
VALIDATION = f"{VALIDATION_FOLDER}/validation.json"
"""Of what ``--validation-split`` holds out; there, it is whole, and so are its images."""
NO_RESULT = (f"{FOLDER}/attempts", f"{FOLDER}/failed", f"{FOLDER}/logs")
"""Folders of who was at what, which mean nothing once all is done."""

UNIT_FILE = re.compile(r"(?P<unit>\d{6}(\.r\d+)?)-(\d{5}-)?[0-9a-f]{8}\.[a-z.]+")
"""The only names `finalize` may delete: a unit's data file or quarantine file, which carry their content's digest."""

_RECORD_FILE = re.compile(rf"{RECORDS}/\d{{6}}(\.r\d+)?\.json")
_READ_AT_ONCE = 16
_READ_AHEAD_BYTES = 64 * 2**20
_RETRY_FILE = re.compile(rf"{RETRIES}/r\d+\.json")

NOT_AS_WRITTEN = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, zstandard.ZstdError)
"""What reading something else as one of our files raises."""

T = TypeVar("T")


class DamagedFile(UserError):
    """A file of a job is not what was written there.

    Args:
        url: Of the job.
        path: Of the file.
        what: Is wrong with it.
        delete: The file whose absence makes it be made again: itself, or the record that names it.
        command: That then makes it.
    """

    def __init__(self, url: str, path: str, what: str, delete: str, command: str) -> None:
        super().__init__(
            f"{url}/{path}: {what}; delete {how_to_delete(url, delete)}, then run the same `{command}` again"
        )
        self.url, self.path, self.what, self.delete, self.command = url, path, what, delete, command

    def __reduce__(self) -> tuple[type[DamagedFile], tuple[str, str, str, str, str]]:
        return type(self), (self.url, self.path, self.what, self.delete, self.command)


class Job:
    """An output folder with a plan."""

    def __init__(self, store: Store, plan: JobPlan) -> None:
        self.store, self.plan = store, plan

    def record(self, unit: str) -> Record | None:
        """The record of a unit, None while there is none.

        Raises:
            DamagedFile: if it is not one.
        """
        path = record_path(unit)
        try:
            return self._read_record(path, self.store.read(path))
        except FileNotFoundError:
            return None

    def is_done(self, unit: str) -> bool:
        """Whether a unit has a record."""
        return self.store.exists(record_path(unit))

    def not_done(self, units: Iterable[str]) -> list[str]:
        """Those of some units that have no record, in their order; one listing for all."""
        finished = {entry.path for entry in self.store.list(RECORDS)}
        return [unit for unit in units if record_path(unit) not in finished]

    def records(self, damaged: Callable[[DamagedFile], None] | None = None) -> Iterator[Record]:
        """All records there are.

        Args:
            damaged: Is given those that are none; by default the first is raised.
        """
        listed = self.store.list(RECORDS)
        entries = [entry for entry in listed if _RECORD_FILE.fullmatch(entry.path)]  # .nfs0000..., .DS_Store
        reads = [functools.partial(self._read_record, entry.path) for entry in entries]
        yield from _those_that_are_whole(zip(reads, _read_all(self.store, entries), strict=True), damaged)

    def unfinished(self) -> list[Unit]:
        """The units of the plan without a record, in its order."""
        return self.without_record(self.plan.units)

    def without_record(self, units: Iterable[Unit]) -> list[Unit]:
        """Those of some units that have none."""
        units = list(units)
        left = set(self.not_done(unit.id for unit in units))
        return [unit for unit in units if unit.id in left]

    def rounds(self, damaged: Callable[[DamagedFile], None] | None = None) -> list[Round]:
        """The retries there are, finished or not, the first one first.

        Args:
            damaged: Is given those that are none; by default the first is raised.
        """
        paths = [entry.path for entry in self.store.list(RETRIES) if _RETRY_FILE.fullmatch(entry.path)]
        reads = ((functools.partial(self._read_round, path), self.store.read(path)) for path in paths)
        return sorted(_those_that_are_whole(reads, damaged), key=lambda one: one.number)

    def add_round(self, wanted: Round) -> Round:
        """Create a retry; the one of that number that another process has created first, if one has."""
        path = round_path(wanted.name)
        if self.store.put_if_absent(path, wanted.to_json(), step="retry"):
            return wanted
        return self._read_round(path, self.store.read(path))

    def lacks_validation(self) -> bool:
        """Whether what is held out for validation is not written yet."""
        return self.plan.config.get("validation_split") is not None and not self.store.exists(VALIDATION)

    def lacks_unconditional(self) -> bool:
        """Whether the embeddings of the empty and the negative prompt are gone, which come before any unit's."""
        path = self.plan.unconditional
        return path is not None and any(unit.num_clips for unit in self.plan.units) and not self.store.exists(path)

    def bad_clips(self) -> dict[tuple[str, str], BadClip]:
        """What is bad now, by (unit of the plan, key): without what a retry has encoded, for the latest reason."""
        records = {record.unit: record for record in self.records()}
        bad: dict[tuple[str, str], BadClip] = {}
        for unit in itertools.chain(self.plan.units, *(one.units for one in self.rounds())):
            record = records.get(unit.id)
            if record is not None:
                for key in unit.keys or ():
                    bad.pop((unit.original, key), None)
                bad |= {(unit.original, clip.key): clip for clip in self.read_quarantine(record)}
        return bad

    def commit(self, record: Record) -> bool:
        """Create a unit's record; False if another process was first, whose record then counts.

        Raises:
            UserError: if nobody could read it back: then the exporter says of its files what cannot be.
        """
        return self.store.put_if_absent(record_path(record.unit), self._readable(record), step="record")

    def _readable(self, record: Record) -> bytes:
        try:
            data = record.to_json()
            Record.from_json(data)
        except NOT_AS_WRITTEN as error:
            raise UserError(
                f"the exporter {self.plan.config['exporter']} has a mistake: what it says of the files of unit "
                f"{record.unit} could not be read back from its record ({first_line(error)}), so the unit is not "
                "committed; `streamprep.testing.ExporterContract` finds such mistakes"
            ) from error
        return data

    def write_quarantine(self, unit: str, bad: Sequence[BadClip]) -> QuarantineFile | None:
        """Note a unit's bad samples; the record must name the file."""
        if not bad:
            return None
        lines = b"".join(canonical.to_json(dataclasses.asdict(clip)) + b"\n" for clip in bad)
        data = zstandard.ZstdCompressor().compress(lines)
        sha256 = canonical.bytes_digest(data)
        name = f"{QUARANTINE}/{unit}-{sha256[:8]}.jsonl.zst"
        self.store.put(name, data, step="quarantine")
        return QuarantineFile(name=name, size_bytes=len(data), sha256=sha256)

    def read_quarantine(self, record: Record) -> list[BadClip]:
        """The bad samples a record names.

        Raises:
            DamagedFile: if the file is not the one that was written.
        """
        file = record.quarantine
        if file is None:
            return []

        try:
            data = self.store.read(file.name)
            if (found := canonical.bytes_digest(data)) != file.sha256:
                raise _OtherBytes(f"its sha256 is {found}, the record says {file.sha256}")
            lines = zstandard.ZstdDecompressor().decompress(data).splitlines()
            return [BadClip(**canonical.from_json(line)) for line in lines]
        except (FileNotFoundError, *NOT_AS_WRITTEN) as error:
            raise self._damaged(
                file.name, _what(error), delete=record_path(record.unit), command=self.command_for(record.unit)
            ) from error

    def stop_reason(self) -> Mapping[str, Any] | None:
        """Why the job stopped itself, if it did.

        Raises:
            DamagedFile: if it did, and what it wrote then is damaged.
        """
        try:
            data = self.store.read(STOP)
        except FileNotFoundError:
            return None
        try:
            stop = canonical.from_json(data)
            return {**stop, "message": str(stop["message"]), "max_bad_fraction": stop["max_bad_fraction"]}
        except NOT_AS_WRITTEN as error:
            raise self._damaged(STOP, _what(error)) from error

    def command_for(self, unit: str) -> str:
        """What makes a unit."""
        return self.command_of_retries if "." in unit else self.plan.command

    @property
    def command_of_retries(self) -> str:
        """What makes their plans and units."""
        return "streamprep retry" if self.plan.converted is None else self.plan.command

    def _read_record(self, path: str, data: bytes) -> Record:
        unit = PurePosixPath(path).stem
        try:
            record = Record.from_json(data)
            if record.unit != unit:
                raise ValueError(f"it is the record of another unit, {record.unit!r:.50}")
        except NOT_AS_WRITTEN as error:
            raise self._damaged(path, _what(error), command=self.command_for(unit)) from error
        return record

    def _read_round(self, path: str, data: bytes) -> Round:
        try:
            found = Round.from_json(data)
            if round_path(found.name) != path:
                raise ValueError(f"it is another retry, {found.name}")
        except NOT_AS_WRITTEN as error:
            raise self._damaged(path, _what(error), command=self.command_of_retries) from error
        return found

    def _damaged(self, path: str, what: str, *, delete: str | None = None, command: str | None = None) -> DamagedFile:
        """That a file is; what makes it again once it is deleted, or the record that names it."""
        return DamagedFile(self.store.url, path, what, delete or path, command or self.plan.command)


def open_job(store: Store) -> Job:
    """The job of an output folder.

    Raises:
        UserError: if there is none, or it is of another format.
    """
    try:
        data = store.read(PLAN)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{store.url} is not the output of `streamprep encode`: it has no {PLAN}") from None
    try:
        return Job(store, JobPlan.from_json(data))
    except NOT_AS_WRITTEN as error:
        raise UserError(f"{store.url}/{PLAN} cannot be read: {error}") from error


def find_job(store: Store, fingerprint: Fingerprint, *, data_folder: str) -> Job | None:
    """The job of an output folder, None if there is none yet.

    Args:
        store: The output.
        fingerprint: Of the job that is wanted.
        data_folder: Where its data will be.

    Raises:
        UserError: naming every setting that differs, if the job there is another; if its plan is lost; or if somebody
            else's files are where trainers will look for the data, of whatever name.
    """
    if not store.exists(PLAN):
        if next(store.list(RECORDS), None) is not None:
            raise UserError(f"{store.url} has records of a job whose {PLAN} is lost: use a new output folder")
        theirs = next((entry.path for entry in store.walk(data_folder) if not _is_hidden(entry.path)), None)
        if not store.exists(PLAN):  # else another rank has begun just now, and the file may be its
            if theirs is not None:
                raise UserError(
                    f"{store.url} has a file {theirs} but no {PLAN}, so it is not of this job, and trainers would read "
                    "it: use a new output folder"
                )
            return None
    job = open_job(store)
    check_same(store, job.plan.fingerprint, fingerprint)
    return job


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))  # .nfs0000..., .DS_Store


def start_or_join(store: Store, plan: JobPlan) -> Job:
    """Create the job, or join the one that another process has just created if it is the same.

    Raises:
        UserError: naming every setting that differs.
    """
    if store.put_if_absent(PLAN, plan.to_json(), step="plan"):
        return Job(store, plan)
    job = find_job(store, plan.fingerprint, data_folder=plan.data_folder)
    assert job is not None
    return job


def check_same(store: Store, theirs: Fingerprint, ours: Fingerprint) -> None:
    """Refuse to mix two kinds of output in one folder.

    Raises:
        UserError: naming every setting that differs.
    """
    ours = json.loads(canonical.to_json(ours))
    differing = [
        f"{part}.{name}: {theirs.get(part, {}).get(name)} there, {ours.get(part, {}).get(name)} now"
        for part in sorted({*theirs, *ours})
        for name in sorted({*theirs.get(part, {}), *ours.get(part, {})})
        if theirs.get(part, {}).get(name) != ours.get(part, {}).get(name)
    ]
    if differing:
        raise UserError(
            f"{store.url} belongs to a job with other settings; use a new output folder, or these:\n  "
            + "\n  ".join(differing)
        )


def record_path(unit: str) -> str:
    """Where a unit's record is."""
    return f"{RECORDS}/{unit}.json"


def round_path(name: str) -> str:
    """Where a retry's plan is."""
    return f"{RETRIES}/{name}.json"


class _OtherBytes(ValueError):
    """A file's bytes are not those of its digest."""


def _those_that_are_whole(
    reads: Iterable[tuple[Callable[[bytes], T], bytes]], damaged: Callable[[DamagedFile], None] | None
) -> Iterator[T]:
    for read, data in reads:
        try:
            found = read(data)
        except DamagedFile as error:
            if damaged is None:
                raise
            damaged(error)
        else:
            yield found


def _what(error: Exception) -> str:
    """Why a file is not what was written."""
    if isinstance(error, _OtherBytes):
        return str(error)
    return (
        f"cannot be read: it lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {first_line(error)}"
    )


def _read_all(store: Store, entries: Sequence[FileEntry]) -> Iterator[bytes]:
    """The contents of files, in their order; from a bucket several come at once."""
    if store.local_path() is not None:
        return (store.read(entry.path) for entry in entries)
    fetched = fetch_ahead(
        entries,
        lambda entry: store.read(entry.path),
        size_bytes=lambda entry: entry.size_bytes,
        max_bytes=_READ_AHEAD_BYTES,
        num_threads=_READ_AT_ONCE,
    )
    return (data for _, data in fetched)


def bad_now(records: Iterable[Record]) -> dict[str, int]:
    """How many samples are bad for each reason: what was tried again counts as it ended."""
    counter: Counter[str] = Counter()
    for record in records:
        counter.update(record.bad)
        counter.subtract(record.retried)
    return {reason: number for reason, number in counter.most_common() if number > 0}


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts by reason, of all records, the most frequent first."""
    counter: Counter[str] = Counter()
    for count in counts:
        counter.update(count)
    return dict(counter.most_common())
