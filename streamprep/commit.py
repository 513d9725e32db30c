"""Writing what was encoded, unit by unit, and committing each; and knowing when too many samples are bad."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from streamprep import canonical, exporting, job
from streamprep.board import Board, LocalBoard
from streamprep.errors import TooManyBadSamples
from streamprep.job import Job
from streamprep.plan import Excluded, UnitPlan
from streamprep.record import BadClip, Record, named_files
from streamprep.tally import Counts, Tally, count_records
from streamprep.types import EncodedSample, ShardWriter, WrittenFile

_ALWAYS_ALLOWED_BAD = 20
_EXAMPLES = 5
_NEXT_STEP = (
    "When the cause is gone (more --decode-timeout or --decode-memory-mb, a repaired shard), `streamprep retry OUT` "
    "tries them again and lets the job go on"
)
_NEXT_STEP_CONVERTED = "What is converted was not changed; another --contract, or repaired files, need another NEW"


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """What became of one planned batch."""

    unit: UnitPlan
    samples: Sequence[EncodedSample]
    """A row for each caption."""
    bad: Sequence[BadClip]
    num_samples: int
    """Planned, whatever became of them."""
    last: bool
    """Whether it is the unit's last."""
    dropped: Sequence[Excluded] = ()
    """Rows that filters leave out for their frames."""
    decoders: Mapping[str, int] = field(default_factory=dict)
    """How many of its clips each decoder gave."""
    halved: Mapping[str, int] = field(default_factory=dict)
    """What was too large for the memory, and how many of it were encoded at once instead; see `Record`."""


class Committer:
    """Takes encoded batches in order; a context manager, which drops the unit that is not finished.

    Args:
        current: The job.
        open_writer: Unit -> the exporter's writer. None writes nothing, to know the limit only.
        max_bad_fraction: Of the samples that all ranks have attempted; 20 are always allowed. None knows no limit.
        board: Of all ranks.
    """

    def __init__(
        self,
        current: Job,
        *,
        open_writer: Callable[[str], ShardWriter] | None,
        max_bad_fraction: float | None,
        board: Board | None = None,
    ) -> None:
        self.job = current
        self._open_writer = open_writer
        self._max_bad_fraction = max_bad_fraction
        self._unit_bad: list[BadClip] = []
        self._unit_dropped: list[Excluded] = []
        self._unit_decoders: Counter[str] = Counter()
        self._unit_keys: list[str] = []
        """Of the rows that the exporter was given."""
        self._unit_halved: dict[str, int] = {}
        self._writer: ShardWriter | None = None
        self._unit_began = time.monotonic()
        self._tally = Tally(current, board or LocalBoard())

    def take(self, batch: EncodedBatch) -> Record | None:
        """Write a batch; with the last of a unit, commit the unit.

        Returns:
            The unit's record if this was the last, be it another process's that was first.

        Raises:
            TooManyBadSamples: if this one was too many.
        """
        if self._writer is None:
            assert self._open_writer is not None
            self._writer = self._open_writer(batch.unit.id)
        for sample in batch.samples:
            self._writer.write(sample)
        self._unit_keys += [sample.key for sample in batch.samples]
        self._unit_dropped += batch.dropped
        self._unit_decoders.update(batch.decoders)
        self._unit_halved.update(batch.halved)
        self._unit_bad += batch.bad
        if batch.bad:
            self.check_bad_limit()
        return self.commit(batch.unit) if batch.last else None

    def commit(self, unit: UnitPlan) -> Record:
        """Publish a unit's files, then create its record; if another process was first, return that one's.

        Raises:
            TooManyBadSamples: if those that the plan knew to be bad were too many.
        """
        self._unit_bad += [
            BadClip(key=item.key, stage="plan", reason=item.reason, exception=item.message) for item in unit.bad
        ]
        self.check_bad_limit()
        files: list[WrittenFile] = []
        if self._writer is not None:
            with self._writer:
                files = list(self._writer.close())
            self._writer = None
        exporting.check_rows(self.job.plan.config["exporter"], unit.id, self._unit_keys, files)
        record = Record(
            unit=unit.id,
            files=tuple(files),
            bad=dict(sorted(Counter(clip.reason for clip in self._unit_bad).items())),
            dropped=(*unit.dropped, *self._unit_dropped),
            quarantine=self.job.write_quarantine(unit.id, self._unit_bad),
            seconds={"unit": time.monotonic() - self._unit_began},
            retried=unit.retried,
            decoders=dict(sorted(self._unit_decoders.items())),
            halved=dict(sorted(self._unit_halved.items())),
        )
        record = self.commit_record(record)
        self._unit_bad, self._unit_dropped, self._unit_decoders, self._unit_keys = [], [], Counter(), []
        self._unit_halved = {}
        self._unit_began = time.monotonic()
        return record

    def commit_record(self, ours: Record) -> Record:
        """Create the record of a unit whose files are published; if another process was first, return that one's."""
        if self.job.commit(ours):
            self._tally.add(ours)
            return ours
        theirs = self.job.record(ours.unit)
        assert theirs is not None
        kept = named_files(theirs)
        for name in named_files(ours) - kept:
            self.job.store.delete(name, step="delete")
        return theirs

    def check_bad_limit(self) -> None:
        """Stop the job if more samples are bad than allowed.

        Raises:
            TooManyBadSamples: and leaves ``stop.json`` with the reasons.
        """
        if self._max_bad_fraction is None or not self._too_many(self._with_open_unit(self._tally.counts())):
            return
        counts = self._with_open_unit(count_records(self.job))  # the tally may be wrong
        if self._too_many(counts):
            self._stop_for(counts)

    def check_all(self) -> None:
        """Stop the job if, of all samples, whatever process attempted them, too many are bad, or every one.

        Raises:
            TooManyBadSamples: and leaves ``stop.json`` with the reasons.
        """
        counts = count_records(self.job)
        if self._max_bad_fraction is not None and self._too_many(counts):
            self._stop_for(counts)
        if counts.num_bad and not counts.num_rows and not counts.num_dropped:
            self._stop(f"all {counts.num_bad} samples are bad: nothing was encoded", counts)

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            with self._writer:
                pass

    def _with_open_unit(self, counts: Counts) -> Counts:
        return Counts(
            num_rows=counts.num_rows + len(self._unit_keys),
            num_bad=counts.num_bad + len(self._unit_bad),
            num_dropped=counts.num_dropped + len(self._unit_dropped),
        )

    def _too_many(self, counts: Counts) -> bool:
        assert self._max_bad_fraction is not None
        return counts.num_bad > max(_ALWAYS_ALLOWED_BAD, self._max_bad_fraction * counts.num_attempted)

    def _stop_for(self, counts: Counts) -> NoReturn:
        self._stop(
            f"{counts.num_bad} of {counts.num_attempted} samples are bad, more than max({_ALWAYS_ALLOWED_BAD}, "
            f"{self._max_bad_fraction:.0%}): the settings may be wrong; if the data is, raise --max-bad-fraction",
            counts,
        )

    def _stop(self, message: str, counts: Counts) -> NoReturn:
        by_reason = Counter(job.bad_now(self.job.records()))
        by_reason.update(clip.reason for clip in self._unit_bad)
        bad = {reason: number for reason, number in by_reason.most_common() if number}
        reasons = ", ".join(f"{reason} {number}" for reason, number in bad.items())
        clips = [*self._unit_bad, *self.job.bad_clips().values()][:_EXAMPLES]
        next_step = _NEXT_STEP if self.job.plan.converted is None else _NEXT_STEP_CONVERTED
        examples = "".join(f"\n  {clip.key}: {clip.reason}: {clip.exception}" for clip in clips)
        stop: dict[str, Any] = {
            "message": f"{message} ({reasons}){examples}\n{next_step}",
            "max_bad_fraction": self._max_bad_fraction,
            "bad": bad,
            "num_rows": counts.num_rows,
            "examples": [asdict(clip) for clip in clips],
        }
        self.job.store.put(job.STOP, canonical.to_pretty_json(stop), step="stop")
        raise TooManyBadSamples(stop["message"])


def obey_earlier_stop(current: Job, max_bad_fraction: float) -> None:
    """Stop again if the job was stopped for bad samples and is not allowed more of them now.

    Raises:
        TooManyBadSamples: with what was found then.
    """
    stopped = current.stop_reason()
    if stopped is None:
        return
    if max_bad_fraction <= stopped["max_bad_fraction"]:
        raise TooManyBadSamples(stopped["message"])
    current.store.delete(job.STOP, step="delete")
