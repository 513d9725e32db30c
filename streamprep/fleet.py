"""What every rank of a run is doing: each says so on the board, and rank 0 shows it for all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from streamprep import canonical
from streamprep.attempts import Worker
from streamprep.board import Board, BoardGone
from streamprep.progress import Progress, count
from streamprep.ranklog import RankLog
from streamprep.ranks import Rank
from streamprep.record import Record

_SECONDS_BETWEEN_NOTES = 2.0
_SECONDS_BETWEEN_LOGGED = 60.0
_SILENT_SECONDS = 60.0
_SLOW = 0.5  # of the median rate
_WAITS_MUCH = 0.2  # of the time


@dataclass
class Work:
    """What this process has done; written by one thread, read by another."""

    clips: int = 0
    """In all, so far."""
    open_clips: int = 0
    """Of these, those of the unit that is not committed yet."""
    waits: Callable[[], Mapping[str, float]] | None = None
    """Seconds the encoder waited: for ``decode``, for ``write``; and that it was busy: ``encode``."""


@dataclass
class _Seen:
    """A rank's notes, as rank 0 sees them."""

    note: dict[str, Any]
    changed: float
    """When the last new one came, by our clock."""
    rate: float = 0.0


@dataclass
class Fleet:
    """Tells and shows; a context manager, in a thread of its own.

    Args:
        board: Of all ranks.
        rank: This one; number 0 shows.
        worker: This process.
        log: Gets a line each minute.
        progress: Where to show.
        open_units: What this process is at.
    """

    board: Board
    rank: Rank
    worker: Worker
    log: RankLog
    progress: Progress
    open_units: Callable[[], list[str]]
    work: Work = field(default_factory=Work)

    def __post_init__(self) -> None:
        self._began = self._logged = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streamprep-fleet", daemon=True)
        self._seen: dict[int, _Seen] = {}
        self._board_gone = False

    def begin(self, done_before: int) -> None:
        """Count the clips that earlier runs have done, unless another rank has."""
        self.progress.already_done(done_before)
        self._guarded(lambda: self.board.add("clips", done_before if self.board.add("clips.begun", 1) == 1 else 0))

    def encoded(self, num_clips: int) -> None:
        """So many more are encoded."""
        self.work.clips += num_clips
        self.work.open_clips += num_clips
        if not self.board.shared or self._board_gone:
            self.progress.advance(num_clips)

    def committed(self, num_clips: int, record: Record) -> None:
        """A unit of so many clips has its record; another process's perhaps, and then it is counted twice."""
        self.work.open_clips = 0
        self._guarded(lambda: self.board.add("clips", num_clips))
        self.log.event(
            "committed",
            unit=record.unit,
            num_rows=record.num_rows,
            bad=dict(record.bad),
            num_dropped=len(record.dropped),
            seconds=dict(record.seconds),
        )

    def __enter__(self) -> Fleet:
        self.progress.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.progress.__exit__(kind, error, trace)

    def _run(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_NOTES):
            self._tell_and_show()
        self._tell_and_show()

    def _tell_and_show(self) -> None:
        note = self._note()
        self._guarded(lambda: self.board.tell(self.rank.number, canonical.to_json(note)))
        now = time.monotonic()
        if now - self._logged > _SECONDS_BETWEEN_LOGGED:
            self._logged = now
            self.log.event("progress", **note)
        if self.rank.number == 0 and self.board.shared:
            self._guarded(self._show)

    def _note(self) -> dict[str, Any]:
        waits = self.work.waits() if self.work.waits is not None else {}
        return {
            "process": self.worker.token,
            "host": self.worker.host,
            "units": self.open_units(),
            "clips": self.work.clips,
            "open_clips": self.work.open_clips,
            "seconds": round(time.monotonic() - self._began, 1),
            "waits": {name: round(seconds, 2) for name, seconds in waits.items()},
        }

    def _show(self) -> None:
        now = time.monotonic()
        for number, data in self.board.told().items():
            note = json.loads(data)
            if number not in self._seen or self._seen[number].note != note:
                self._seen[number] = _Seen(note, now, note["clips"] / max(1.0, note["seconds"]))
        done = self.board.add("clips", 0) + sum(seen.note["open_clips"] for seen in self._seen.values())
        self.progress.reached(done, "; ".join(describe_ranks(self._seen, now, self.rank.world_size)))

    def _guarded(self, call: Callable[[], object]) -> None:
        if self._board_gone:
            return
        try:
            call()
        except BoardGone as error:
            self._board_gone = True
            message = (
                f"the ranks' board is gone ({error}): every rank goes on by the records, and shows its own progress"
            )
            self.log.event("board_gone", message=str(error))
            if self.rank.number == 0:
                self.progress.message(message)


def describe_ranks(seen: Mapping[int, _Seen], now: float, world_size: int) -> list[str]:
    """How the ranks fare: how many there are, who is slow or silent, and what they wait for."""
    words = [f"{len(seen)} of {count(world_size, 'rank')}"]
    working = {number: one for number, one in seen.items() if one.note["units"]}
    silent = [number for number, one in working.items() if now - one.changed > _SILENT_SECONDS]
    rates = sorted(one.rate for number, one in working.items() if number not in silent)
    median = rates[len(rates) // 2] if rates else 0.0
    slow = [n for n, one in working.items() if n not in silent and one.note["clips"] and one.rate < _SLOW * median]
    for name, numbers in (("silent", silent), ("slow", slow)):
        if numbers:
            words.append(f"{name}: {_named(numbers, seen)}")
    bottleneck = find_bottleneck([one.note["waits"] for one in seen.values()])
    return words + ([f"bottleneck: {bottleneck}"] if bottleneck else [])


def _named(numbers: list[int], seen: Mapping[int, _Seen]) -> str:
    return ", ".join(f"{number} ({seen[number].note['host']})" for number in sorted(numbers)[:5])


def find_bottleneck(waits: list[Mapping[str, float]]) -> str | None:
    """The stage that the others wait for, from the seconds that the encoders were busy or waited for another stage."""
    total: dict[str, float] = {}
    for one in waits:
        for name, seconds in one.items():
            total[name] = total.get(name, 0.0) + seconds
    whole = sum(total.values())
    if not whole:
        return None
    waited = {name: seconds for name, seconds in total.items() if name != "encode" and seconds > _WAITS_MUCH * whole}
    return max(waited, key=lambda name: waited[name]) if waited else "encode"
