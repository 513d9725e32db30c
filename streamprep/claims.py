"""The next unit for me.

1. All ranks of a run count on one board (`streamprep.board`): the n-th call gets the n-th unit of the plan. What has a
   record, or is another process's, or has been somebody's end, is passed over.
2. When the count is through, each rank looks now and then for units without a record. It takes, one at a time and
   in random order, those that nobody is at: whose process has died, or was stopped. Where it cannot know, because the
   process is on another machine, it must have seen it at the unit for five minutes, or for three times its own slowest
   unit if that is longer. It looks who is at what from its start on, so that by then this time may be over.
3. It leaves when every unit has its record or is set aside.

So a rank may join, die, hang or come back at any time, and so may the board: if it is lost, rank by rank goes on with
the units that are left in random order. Commands started by hand on one output share its units in the same way; they
only lack the count.

Many ranks share one store, so each asks it for little: names rather than contents, and a few at a time
(`benchmarks/claims_simulation.py` counts).

Nothing here decides what is committed: see `streamprep.job`. Two processes at one unit waste work and change nothing.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from streamprep.attempts import Attempt, Attempts, Ended, what_happened
from streamprep.board import Board, BoardGone
from streamprep.ranklog import RankLog
from streamprep.storage import FileEntry

_ASK_EACH = 50  # fewer units than this are asked for one by one, more are listed
_ASK_OF_OTHERS = 5  # units that somebody is at, whether they are done: he may have died just before he said so
_READ_AT_ONCE = 20  # marks that were never read: if somebody has died, there are other ranks who look for it as well
_MISSES = 20  # one after the other, before all is listed


class Ledger(Protocol):
    """Which units are done."""

    def is_done(self, unit: str) -> bool:
        """Whether a unit has its record."""

    def not_done(self, units: Iterable[str]) -> list[str]:
        """Those of some units that have none, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a rank waits for others."""

    stale_seconds: float = 300.0
    """A unit of a process that may live is taken again after so long, or three times the slowest if that is more."""
    unmarked_seconds: float = 60.0
    """A unit that was counted, and that nobody says to be at."""
    poll_seconds: float = 30.0

    @classmethod
    def of(cls, stale_seconds: float, *, world_size: int = 1) -> Timing:
        """All of it, for units that are worth waiting for so long; the more ranks, the less often each one asks."""
        return cls(
            stale_seconds=stale_seconds,
            unmarked_seconds=min(60.0, stale_seconds / 5),
            poll_seconds=min(30.0, stale_seconds / 10, max(1.0, world_size / 10)),
        )


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can be taken now; ask again after so many seconds."""

    seconds: float


class Claims:
    """Hands out units until all are settled; a context manager, which lets go of what is not finished.

    Any thread may ask, and another one say what is finished.

    Args:
        units: All of the plan, in its order, the same for every rank.
        ledger: Which of them are done.
        attempts: Who is at which.
        board: Where all ranks count.
        name: Of the counter: one for each list of units.
        sizes: Of the units: clips.
        ahead: Most clips to hold beside those of the first unfinished unit; but a second unit may be taken anyhow.
        timing: How long to wait for others.
        log: Of this process.
        check: Called before each look at what others have left; raises if all are to stop.
        blame: Whether an error speaks against the unit at hand.
        clock: Seconds, from whenever.
        seed: Of the random order; by default another for each rank.
    """

    def __init__(
        self,
        units: Sequence[str],
        ledger: Ledger,
        attempts: Attempts,
        board: Board,
        *,
        name: str,
        sizes: Mapping[str, int] | None = None,
        ahead: int = 0,
        timing: Timing = Timing(),
        log: RankLog | None = None,
        check: Callable[[], None] = lambda: None,
        blame: bool = True,
        clock: Callable[[], float] = time.monotonic,
        seed: int | str | None = None,
    ) -> None:
        self._units, self._ledger, self._attempts, self._board = units, ledger, attempts, board
        self._name, self._timing, self._clock = name, timing, clock
        self._log, self._check, self._blame = log, check, blame
        self._sizes, self._ahead = sizes or {}, ahead
        self._random = random.Random(attempts.worker.token if seed is None else seed)
        self._changed = threading.Condition()
        self._open: dict[str, tuple[Attempt, float]] = {}
        self._stopping = False
        self._fault_known = False
        self._slowest = 0.0
        self._left: set[str] | None = None  # not known to be done
        self._place = 0
        self._uncounted: deque[str] | None = None  # what is left to go through without the board
        self._misses = 0
        self._elsewhere: set[str] = set()  # somebody was at it when all was listed
        self._swept = False
        self._seen_since: dict[str, float] = {}  # by the mark's path
        self._unmarked_since: dict[str, float] = {}
        self._look_at: float | None = None
        self.waited_seconds = 0.0
        """For a unit to become free, or for what was taken to be finished."""
        self.board_lost: BoardGone | None = None
        """Why counting ended early, if it did."""

    # --- taking

    def __iter__(self) -> Iterator[str]:
        """The units, as they are taken; waits where `poll` says so."""
        while True:
            answer = self.poll()
            if isinstance(answer, str):
                yield answer
            elif answer is None:
                return
            else:
                began = time.monotonic()
                with self._changed:
                    self._changed.wait(answer.seconds)
                self.waited_seconds += time.monotonic() - began

    def poll(self) -> str | Wait | None:
        """A unit that is now this process's, or how long to wait, or None: there is nothing left for it to do."""
        if self._left is None:
            self._left = set(self._ledger.not_done(self._units))
        while not self._stopping:
            if self._has_enough():
                return Wait(self._timing.poll_seconds)
            self._look_around()
            unit = self._next_in_order()
            if unit is None:
                return self._sweep()
            if unit not in self._left or unit in self._elsewhere:
                continue
            if self._take(unit, alone=False):
                self._misses = 0
                return unit
            self._missed()
        return None

    def _has_enough(self) -> bool:
        """Whether what is taken keeps this process busy: the more one rank holds, the longer others wait at the end."""
        later = self.open_units[1:]
        return bool(later) and sum(self._sizes.get(unit, 1) for unit in later) >= self._ahead

    def _next_in_order(self) -> str | None:
        """The next unit of the count; None when that is through."""
        if self._uncounted is None:
            try:
                self._place = self._board.add(f"{self._name}.claimed", 1) - 1
            except BoardGone as error:
                self.board_lost = error
                rest = list(self._units[self._place :])
                self._random.shuffle(rest)
                self._uncounted = deque(rest)
            else:
                return self._units[self._place] if self._place < len(self._units) else None
        return self._uncounted.popleft() if self._uncounted else None

    def _missed(self) -> None:
        """Without a common count most of what comes next may be done or another's: a listing says it of all at once."""
        self._misses += 1
        if self._misses == _MISSES:
            self._misses = 0
            self._left = set(self._ledger.not_done(sorted(self._left or ())))
            self._elsewhere = set(self._attempts.files())

    def _look_around(self) -> None:
        """See now and then who is at what."""
        if self._look_at is None or self._clock() >= self._look_at:
            self._see()

    def _see(self) -> dict[str, list[FileEntry]]:
        """List who is at what, and remember since when."""
        now, files = self._clock(), self._attempts.files()
        seen = itertools.chain.from_iterable(files.values())
        self._seen_since = {entry.path: self._seen_since.get(entry.path, now) for entry in seen}
        self._look_at = now + self._patience() / 2
        return files

    def _patience(self) -> float:
        return max(self._timing.stale_seconds, 3 * self._slowest)

    def _take(self, unit: str, *, alone: bool) -> bool:
        """Mark a unit as ours, unless it is done, set aside, another process's, or better left for later."""
        if self._ledger.is_done(unit):
            self._settled(unit)
            return False
        before = self._attempts.conclude(self._attempts.of(unit))
        if not alone and any(attempt.deters for attempt in before):
            return False
        if before and self._attempts.is_failed(unit):
            self._settled(unit)
            return False
        attempt = self._attempts.begin(unit, alone=alone)
        known = {other.by.token for other in before}
        # Two may begin at one moment. Whoever was there before, alone, has been waited for.
        for other in self._attempts.of(unit):
            if other.ended is None and other.by.token < attempt.by.token and other.by.token not in known:
                self._attempts.withdraw(attempt)
                return False
        with self._changed:
            if not self._stopping:  # else `__exit__` may be over: nobody would let go of it
                self._open[unit] = attempt, self._clock()
        if unit not in self._open:
            self._attempts.withdraw(attempt)
            return False
        if self._log is not None:
            self._log.event("claimed", unit=unit, alone=alone, others=[other.by.name for other in before])
        return True

    def _sweep(self) -> str | Wait | None:
        """When the count is through: what others have left."""
        assert self._left is not None
        with self._changed:
            if self._open:  # one at a time, so that it is known which one kills
                return Wait(self._timing.poll_seconds)
        self._check()
        files = self._see()
        self._look_which_are_done(files)
        for unit in self._worth_a_look(files):
            if self._stopping:
                return None
            if self._is_free(self._attempts.read(files.get(unit, [])), unit) and self._take(unit, alone=True):
                return unit
        return Wait(self._timing.poll_seconds) if self._left else None

    def _look_which_are_done(self, files: Mapping[str, Sequence[FileEntry]]) -> None:
        """Whoever is at a unit removes his mark when it is done: so most of the others are worth asking for."""
        assert self._left is not None
        marked = sorted(self._left & files.keys())
        asked = [*(self._left - files.keys()), *self._random.sample(marked, min(len(marked), _ASK_OF_OTHERS))]
        if self._swept and len(asked) < _ASK_EACH:
            self._left.difference_update([unit for unit in asked if self._ledger.is_done(unit)])
        else:
            self._left = set(self._ledger.not_done(self._left))
        self._swept = True
        if self._left:
            self._left -= self._attempts.failed_units()

    def _worth_a_look(self, files: Mapping[str, Sequence[FileEntry]]) -> Iterator[str]:
        """What is left, in random order; of what somebody has just begun only a little."""
        assert self._left is not None
        left, now = sorted(self._left), self._clock()
        self._random.shuffle(left)
        num_unread = 0
        for unit in left:
            marks = files.get(unit, ())
            if marks and not self._attempts.has_read(marks):
                num_unread += 1
                waited = now - max(self._seen_since[entry.path] for entry in marks) >= self._patience()
                if num_unread > _READ_AT_ONCE and not waited:
                    continue
            yield unit

    def _is_free(self, attempts: Sequence[Attempt], unit: str) -> bool:
        """Whether a unit may be taken though it was counted before."""
        now = self._clock()
        running = [attempt for attempt in self._attempts.conclude(attempts) if attempt.ended is None]
        if running:
            since = max(self._seen_since.get(self._attempts.path(one), now) for one in running)
            return now - since >= self._patience()
        if attempts or not self._board.shared:
            return True
        return now - self._unmarked_since.setdefault(unit, now) >= self._timing.unmarked_seconds

    # --- letting go

    def finished(self, unit: str) -> None:
        """A unit taken here has its record, whoever made it."""
        with self._changed:
            attempt, began = self._open.pop(unit)
            self._slowest = max(self._slowest, self._clock() - began)
            self._changed.notify_all()
        self._settled(unit)
        self._attempts.withdraw(attempt)
        self._tell_settled(attempt)

    def gave_up(self, unit: str, ended: Ended) -> None:
        """A unit taken here has ended otherwise: it is at fault for what this process leaves with, and no other."""
        with self._changed:
            attempt, _ = self._open.pop(unit)
            self._fault_known = True
            self._changed.notify_all()
        self._attempts.end(attempt, ended)

    def stop(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    @property
    def open_units(self) -> list[str]:
        """Those that are taken and not finished, the first one first."""
        with self._changed:
            return list(self._open)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """What is open is free again; if it was an error, that of the first one is noted, which is at fault."""
        self.stop()
        with self._changed:
            released, self._open = list(self._open.values()), {}
        for number, (attempt, _) in enumerate(released):
            if not self._blame:
                self._attempts.withdraw(attempt)
                continue
            blamed = number == 0 and not self._fault_known and error is not None and is_to_blame(error)
            try:
                self._attempts.end(attempt, what_happened(error) if blamed and error else Ended(how="stopped"))
                if blamed and self._attempts.is_failed(attempt.unit):
                    self._tell_settled(attempt)
            except OSError:  # a full disk, a bucket that is away: then our end is seen from our being gone
                break

    def _tell_settled(self, attempt: Attempt) -> None:
        """For the launcher, who gives a rank up that dies again and again without getting anywhere."""
        with suppress(BoardGone):
            self._board.add(f"settled.{attempt.by.rank}", 1)

    def _settled(self, unit: str) -> None:
        assert self._left is not None
        self._left.discard(unit)


def is_to_blame(error: BaseException) -> bool:
    """Whether a unit may be what is wrong, and not the settings, the disk, or somebody who wants it to stop."""
    from streamprep.errors import LatentMismatch, TooManyBadSamples, UserError

    innocent = (UserError, TooManyBadSamples, LatentMismatch, OSError)
    return isinstance(error, Exception) and not isinstance(error, innocent)
