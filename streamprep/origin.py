"""What `streamprep convert` starts from: a finished output, or what `streamprep.foreign` makes look like one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from streamprep import canonical, exporting, job
from streamprep.errors import UserError
from streamprep.finalize import open_finished
from streamprep.job import Job
from streamprep.job_plan import JobPlan, Round
from streamprep.record import BadClip, Record
from streamprep.storage import Store, whole_file
from streamprep.types import EncodedSample


class Origin(Protocol):
    """What is converted, as a finished output."""

    @property
    def store(self) -> Store:
        """Has its files."""

    @property
    def plan(self) -> JobPlan:
        """From which the new one is derived."""

    @property
    def records(self) -> Mapping[str, Record]:
        """By unit."""

    @property
    def dtypes(self) -> Sequence[str]:
        """Of all tensors there are, sorted."""

    @property
    def digests(self) -> Mapping[str, str]:
        """Which tell it from any other."""

    @property
    def lines(self) -> Sequence[str]:
        """What is to be said of it."""

    def rounds(self) -> list[Round]:
        """Its retries."""

    def read(self, record: Record, scratch: Store) -> Iterator[EncodedSample | BadClip]:
        """A unit's rows, and those of them that turn out bad only now."""


@dataclass(frozen=True, kw_only=True)
class FinishedOutput:
    """What `streamprep encode` or `convert` has made."""

    job: Job
    records: Mapping[str, Record]
    reader: Any
    """The exporter that wrote it."""

    lines = ()

    @property
    def store(self) -> Store:
        """Has its files."""
        return self.job.store

    @property
    def plan(self) -> JobPlan:
        """Its own."""
        return self.job.plan

    @property
    def dtypes(self) -> Sequence[str]:
        """Of all tensors there are."""
        return _dtypes(self.records.values())

    @property
    def digests(self) -> Mapping[str, str]:
        """Of its plan, and of what names all its files."""
        files = (("plan", job.PLAN), ("success", job.SUCCESS))
        return {f"{what}_sha256": canonical.bytes_digest(self.store.read(path)) for what, path in files}

    def rounds(self) -> list[Round]:
        """Its retries."""
        return self.job.rounds()

    def read(self, record: Record, scratch: Store) -> Iterator[EncodedSample]:
        """A unit's rows, of files that are what their record says."""
        read = functools.partial(
            self.reader.read_samples,
            workload=self.plan.contract["workload"],
            train_fps=self.plan.config["train_fps"],
            columns=self.plan.columns,
        )
        for file in record.files:
            with whole_file(self.store, file, scratch=scratch) as (store, name):
                yield from read(store, dataclasses.replace(file, name=name))


def open_finished_output(store: Store) -> FinishedOutput:
    """What is there of our own.

    Raises:
        UserError: if it is not, or not finished, or its exporter cannot read it back.
    """
    if not store.exists(job.PLAN):
        raise UserError(
            f"{store.url} is not the output of `streamprep encode`: it has no {job.PLAN}; if FastVideo's scripts wrote "
            "it, say what it is: --contract FILE"
        )
    source = open_finished(store)
    name = source.plan.config["exporter"]
    reader = exporting.open_exporter(name)
    if not hasattr(reader, "read_samples"):
        raise UserError(
            f"{store.url} was written by the exporter {name}, which cannot read its rows back: it has no read_samples "
            "(see CONTRIBUTING.md, Adding an output format)"
        )
    return FinishedOutput(job=source, records={record.unit: record for record in source.records()}, reader=reader)


def _dtypes(records: Iterable[Record]) -> list[str]:
    """Of all tensors there are."""
    return sorted(
        {
            where.dtype
            for record in records
            for file in record.files
            for row in file.rows
            for where in row.tensors.values()
        }
    )
