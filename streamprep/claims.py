"""The next unit for me."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streamprep.job import Job, Unit


def claim(job: Job, units: Iterable[Unit]) -> Iterator[Unit]:
    """The units, one by one, that have no record at the moment they are asked for.

    Another process may be at the same unit: then both encode it, one commits it, and the rows are there once.
    """
    return (unit for unit in units if not job.is_committed(unit.id))
