"""What all ranks have committed so far, in numbers, without reading every record each time somebody wants to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from streamprep import job
from streamprep.board import Board, BoardGone, LocalBoard
from streamprep.job import Job
from streamprep.record import Record


class Counts(NamedTuple):
    """Of rows, and of samples that gave none."""

    num_rows: int
    num_bad: int
    """After all retries."""
    num_dropped: int
    """Rows that were planned and then dropped for their frames."""

    @property
    def num_attempted(self) -> int:
        """All of them."""
        return sum(self)


def count_records(current: Job) -> Counts:
    """The truth, from every record."""
    records = list(current.records())
    return Counts(
        num_rows=sum(record.num_rows for record in records),
        num_bad=sum(job.bad_now(records).values()),
        num_dropped=sum(len(record.dropped_rows) for record in records),
    )


@dataclass
class Tally:
    """The same on the ranks' board; the first rank puts there what earlier runs have committed.

    It may lag behind, or count a unit twice that two ranks have made: who decides by it looks at the records first.
    """

    current: Job
    board: Board

    def __post_init__(self) -> None:
        try:
            if self.board.add("tally.begun", 1) == 1:
                self._add(count_records(self.current))
        except BoardGone:
            self._count_alone()

    def add(self, record: Record) -> Counts:
        """Count what was just committed, and say what all have."""
        counts = Counts(
            num_rows=record.num_rows,
            num_bad=record.num_bad - sum(record.retried.values()),
            num_dropped=len(record.dropped_rows),
        )
        return self._add_or_recount(counts)

    def counts(self) -> Counts:
        """What all have committed."""
        return self._add_or_recount(Counts(0, 0, 0))

    def _add_or_recount(self, counts: Counts) -> Counts:
        try:
            return self._add(counts)
        except BoardGone:
            return self._count_alone()

    def _add(self, counts: Counts) -> Counts:
        return Counts(*(self.board.add(f"tally.{name}", number) for name, number in counts._asdict().items()))

    def _count_alone(self) -> Counts:
        self.board = LocalBoard()
        return self._add(count_records(self.current))
