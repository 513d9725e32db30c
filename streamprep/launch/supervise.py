"""Ranks, wherever they run: starts those that die again, and knows when that is of no use.

Ranks need nothing of each other but the board, so one that dies is started again alone: torch's elastic agent would end
and restart all of them, and each would load its models anew. What it died of may take a while to pass, so it is started
later each time, until it gets somewhere.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from streamprep.board import Board, StoreBoard
from streamprep.errors import Stopped
from streamprep.progress import count
from streamprep.ranks import NO_ANSWER, SETTLED
from streamprep.settings import RankSettings

_POLL_SECONDS = 0.1
_KILL_SECONDS = 10.0  # beyond the grace
_IDLE_DEATHS = 5
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 60.0
"""Before a rank is started again."""
_NO_ANSWER_SECONDS = 20 * 60.0
"""So long a store may keep all ranks from settling anything."""


class Started(Protocol):
    """A rank that was started."""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def describe_end(self) -> str:
        """How it ended, after `poll` has said that it has: ``was killed by SIGKILL``."""

    def stop(self) -> None:
        """Send it SIGTERM."""

    def kill(self) -> None:
        """See that it is gone."""


def supervise(number: int, start: Callable[[int], Started], board: Board, config: RankSettings) -> int:
    """Start the ranks, start those that die again, and wait for all.

    Args:
        number: How many.
        start: Starts the n-th.
        board: Where they count.
        config: How often to start them again, and how long they may take to stop.

    Returns:
        0 if all is done, else what says most: 3 before 2, 1 and 4.
    """
    ranks = _Ranks(number, start, board, config.max_restarts)
    try:
        ranks.run()
    except Stopped:
        ranks.stop(config.grace_seconds)
        raise
    finally:
        ranks.kill()
    return overall(rank.code for rank in ranks.all)


def open_own_board(world_size: int) -> tuple[StoreBoard, int]:
    """A board in this process, and the port on which other processes find it."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    return StoreBoard(store, world_size), store.port


def overall(codes: Iterable[int | None]) -> int:
    """One exit code for all ranks: one that ends with 0 has seen that everything is done, whoever else has died."""
    found = set(codes)
    return next((code for code in (3, 2, 0, 1, 4) if code in found), 1)


@dataclass
class _Rank:
    """One rank, and those that take its place."""

    number: int
    started: Started | None = None
    code: int | None = None
    """Of the last one, once there will be no other."""
    start_at: float | None = None
    """When the next one is to be started, by `time.monotonic`."""
    num_settled: int = 0
    """Units, when it was started."""
    idle_deaths: int = 0
    """In a row, without having settled a unit: ended it, or set it aside. What a store is to blame for is not one."""
    unanswered_deaths: int = 0
    """The others."""

    @property
    def wait_seconds(self) -> float:
        """Before it is started again."""
        deaths = self.idle_deaths + self.unanswered_deaths
        return float(min(_FIRST_WAIT_SECONDS * 2 ** max(0, deaths - 1), _LONGEST_WAIT_SECONDS))


class _Ranks:
    """All of them."""

    def __init__(self, number: int, start: Callable[[int], Started], board: Board, max_restarts: int) -> None:
        self._start_rank, self._board, self._restarts_left = start, board, max_restarts
        self._stopping = False
        self._unanswered_since: float | None = None
        self._settled_then = 0
        self.all = [_Rank(rank) for rank in range(number)]

    def run(self) -> None:
        """Until none is left. The first one looks whether the command can be run at all; then the others start."""
        first, *others = self.all
        self._start(first)
        while any(rank.started is not None or rank.start_at is not None for rank in self.all):
            time.sleep(_POLL_SECONDS)
            if others and not self._stopping and self._is_checked():
                for rank in others:
                    self._start(rank)
                others = []
            for rank in self.all:
                if rank.started is not None and (code := rank.started.poll()) is not None:
                    self._ended(rank, rank.started, code)
                elif rank.start_at is not None:
                    self._start_again(rank, rank.start_at)

    def stop(self, grace_seconds: float) -> None:
        """Ask all to stop, and wait until they have."""
        self._stopping = True
        deadline = time.monotonic() + grace_seconds + _KILL_SECONDS
        for rank in self.all:
            if rank.started is not None:
                rank.started.stop()
        while any(rank.started is not None and rank.started.poll() is None for rank in self.all):
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """Leave none."""
        for rank in self.all:
            if rank.started is not None:
                rank.started.kill()

    def _start(self, rank: _Rank) -> None:
        rank.num_settled = self._num_settled(rank)
        rank.started = self._start_rank(rank.number)

    def _start_again(self, rank: _Rank, at: float) -> None:
        """Once it is time, if there is anything left to do."""
        all_done = any(other.code == 0 for other in self.all)
        if self._stopping or all_done:
            rank.start_at, rank.code = None, 0 if all_done else 4
        elif time.monotonic() >= at:
            rank.start_at = None
            self._start(rank)

    def _ended(self, rank: _Rank, started: Started, code: int) -> None:
        rank.started = None
        if code in (0, 4):
            rank.code = code
            return
        if code in (2, 3, SETTLED):  # the others would say the same
            rank.code = 1 if code == SETTLED else code
            self.stop(0)
            return
        if self._stopping:
            rank.code = 4
            return
        if self._num_settled(rank) > rank.num_settled:
            rank.idle_deaths = rank.unanswered_deaths = 0
        elif code == NO_ANSWER:
            rank.unanswered_deaths += 1
        else:
            rank.idle_deaths += 1
        problem = self._why_not_again(rank, code)
        how = f"rank {rank.number} {started.describe_end()}"
        if problem is not None:
            say(f"{how}{problem}")
            rank.code = 1
            return
        if code != NO_ANSWER:  # an outage is no reason to have none left for the days after it
            self._restarts_left -= 1
        rank.start_at = time.monotonic() + rank.wait_seconds
        say(f"{how}; it is started again in {rank.wait_seconds:g} s, {count(self._restarts_left, 'restart')} left")

    def _why_not_again(self, rank: _Rank, code: int) -> str | None:
        """What speaks against starting a rank again."""
        if not self._restarts_left:
            return "; no restarts are left"
        if code != NO_ANSWER:
            if rank.idle_deaths == _IDLE_DEATHS:
                return f", for the {_IDLE_DEATHS}th time without having ended a unit: it is not started again"
            return None
        if not self._is_checked():
            return ", before anything was begun: it is not started again"
        now, settled = time.monotonic(), sum(map(self._num_settled, self.all))
        if self._unanswered_since is None or settled > self._settled_then:
            self._unanswered_since, self._settled_then = now, settled
        if rank.unanswered_deaths >= _IDLE_DEATHS and now - self._unanswered_since > _NO_ANSWER_SECONDS:
            minutes = (now - self._unanswered_since) / 60
            return f", and no rank has ended a unit for {minutes:.0f} minutes: it is not started again"
        return None

    def _is_checked(self) -> bool:
        return self._board.add("checked", 0) > 0

    def _num_settled(self, rank: _Rank) -> int:
        return self._board.add(f"settled.{rank.number}", 0)


def describe_code(code: int) -> str:
    """What an exit code says."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code == NO_ANSWER:
        return "has had no answer from a store"
    return f"failed with exit code {code}"


def say(text: str) -> None:
    """Put a line on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
