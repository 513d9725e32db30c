"""Ranks, wherever they run: starts those that die again, and knows when that is of no use.

Ranks need nothing of each other but the board, so one that dies is started again alone: torch's elastic agent would end
and restart all of them, and each would load its models anew.
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
from streamprep.ranks import SETTLED
from streamprep.settings import RankSettings

_POLL_SECONDS = 0.1
_KILL_SECONDS = 10.0  # beyond the grace
_IDLE_DEATHS = 5


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
    num_settled: int = 0
    """Units, when it was started."""
    idle_deaths: int = 0
    """In a row, without having settled a unit: ended it, or set it aside."""


class _Ranks:
    """All of them."""

    def __init__(self, number: int, start: Callable[[int], Started], board: Board, max_restarts: int) -> None:
        self._start_rank, self._board, self._restarts_left = start, board, max_restarts
        self._stopping = False
        self.all = [_Rank(rank) for rank in range(number)]

    def run(self) -> None:
        """Until none is left. The first one looks whether the command can be run at all; then the others start."""
        first, *others = self.all
        self._start(first)
        while any(rank.started for rank in self.all):
            time.sleep(_POLL_SECONDS)
            if others and not self._stopping and self._is_checked():
                for rank in others:
                    self._start(rank)
                others = []
            for rank in self.all:
                if rank.started is not None and (code := rank.started.poll()) is not None:
                    self._ended(rank, rank.started, code)

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
        rank.idle_deaths = 0 if self._num_settled(rank) > rank.num_settled else rank.idle_deaths + 1
        how = f"rank {rank.number} {started.describe_end()}"
        if rank.idle_deaths == _IDLE_DEATHS:
            say(f"{how}, for the {_IDLE_DEATHS}th time without having ended a unit: it is not started again")
        elif not self._restarts_left:
            say(f"{how}; no restarts are left")
        else:
            self._restarts_left -= 1
            say(f"{how}; it is started again, {count(self._restarts_left, 'restart')} left")
            self._start(rank)
            return
        rank.code = 1

    def _is_checked(self) -> bool:
        return self._board.add("checked", 0) > 0

    def _num_settled(self, rank: _Rank) -> int:
        return self._board.add(f"settled.{rank.number}", 0)


def describe_code(code: int) -> str:
    """What an exit code says."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"failed with exit code {code}"


def say(text: str) -> None:
    """Put a line on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
