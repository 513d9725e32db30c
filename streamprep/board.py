"""A board that all ranks of a run write on: counters, and what each says of itself.

It saves work and shows progress, and decides nothing: who has lost it finds the truth in the records. So it may be
anything that counts: torchrun's own store, the store of our launcher, a Ray actor, or a dictionary for one process.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from streamprep.ranks import AGENTS_STORE, Rank

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store as TorchStore


class BoardGone(Exception):
    """Whoever holds the board has left, or does not answer."""


class Board(Protocol):
    """Counters and notes; any call may raise `BoardGone`, and then all later ones do."""

    shared: bool
    """Whether other processes may write on it."""

    def add(self, name: str, amount: int) -> int:
        """Add to a counter, which begins at 0, and say what it is then."""

    def tell(self, rank: int, note: bytes) -> None:
        """Put a rank's note in the place of its last one."""

    def told(self) -> Mapping[int, bytes]:
        """The last note of each rank that has told something."""


class LocalBoard:
    """Of one process."""

    shared = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, int] = {}
        self._notes: dict[int, bytes] = {}

    def add(self, name: str, amount: int) -> int:
        """Add to a counter, which begins at 0, and say what it is then."""
        with self._lock:
            self._counters[name] = self._counters.get(name, 0) + amount
            return self._counters[name]

    def tell(self, rank: int, note: bytes) -> None:
        """Put a rank's note in the place of its last one."""
        with self._lock:
            self._notes[rank] = note

    def told(self) -> Mapping[int, bytes]:
        """The last note of each rank that has told something."""
        with self._lock:
            return dict(self._notes)


class StoreBoard:
    """On a store of torch: the one through which torchrun's agents, or our launcher, find each other.

    Its counters stay when ranks are started again. torchrun's own prefix for each attempt is left out: its restart
    count differs from node to node, as only the node whose rank has died counts one.

    Args:
        store: A client of it.
        world_size: How many ranks there may be.
    """

    shared = True

    def __init__(self, store: TorchStore, world_size: int) -> None:
        self._store, self._world_size = store, world_size
        self._gone: BoardGone | None = None

    def add(self, name: str, amount: int) -> int:
        """Add to a counter, which begins at 0, and say what it is then."""
        with self._noticing():
            return int(self._store.add(f"streamprep/{name}", amount))

    def tell(self, rank: int, note: bytes) -> None:
        """Put a rank's note in the place of its last one."""
        with self._noticing():
            self._store.set(f"streamprep/note/{rank}", note.decode())

    def told(self) -> Mapping[int, bytes]:
        """The last note of each rank that has told something."""
        with self._noticing():
            keys = {rank: f"streamprep/note/{rank}" for rank in range(self._world_size)}
            ranks = [rank for rank, key in keys.items() if self._store.check([key])]
            return dict(zip(ranks, self._store.multi_get([keys[rank] for rank in ranks]), strict=True)) if ranks else {}

    def _noticing(self) -> _Noticing:
        return _Noticing(self)


class LostBoard:
    """In the place of one that could not be reached."""

    shared = True

    def __init__(self, why: BoardGone) -> None:
        self._why = why

    def add(self, name: str, amount: int) -> int:
        """Raises `BoardGone`."""
        raise self._why

    def tell(self, rank: int, note: bytes) -> None:
        """Raises `BoardGone`."""
        raise self._why

    def told(self) -> Mapping[int, bytes]:
        """Raises `BoardGone`."""
        raise self._why


class _Noticing:
    """Turns what torch's stores raise into `BoardGone`, for good."""

    def __init__(self, board: StoreBoard) -> None:
        self._board = board

    def __enter__(self) -> None:
        if self._board._gone is not None:
            raise self._board._gone

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):  # DistStoreError, DistNetworkError are
            self._board._gone = BoardGone(str(error).partition("\n")[0])
            raise self._board._gone from error


def open_board(rank: Rank, *, timeout_seconds: float = 60.0) -> Board:
    """The board of this run: the launcher's store, or one of our own if there is no launcher.

    Args:
        rank: This one.
        timeout_seconds: Of connecting, and of one request; a store that takes longer is as good as gone.
    """
    if not rank.launched or "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return LocalBoard()
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    is_master = os.environ.get(AGENTS_STORE) != str(True) and rank.number == 0  # as torch itself has it
    try:
        if not is_master:
            _wait_for(host, int(port), timeout_seconds)
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(
            host,
            int(port),
            is_master=is_master,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except (RuntimeError, ValueError, OSError) as error:
        return LostBoard(BoardGone(str(error).partition("\n")[0]))
    return StoreBoard(store, rank.world_size)


def _wait_for(host: str, port: int, seconds: float) -> None:
    """Until somebody listens there: torch would try for twice as long, and say much."""
    deadline, said = time.monotonic() + seconds, False
    while True:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        if not said:
            sys.stderr.write(f"waiting for the ranks' board at {host}:{port}\n")
            said = True
        time.sleep(0.5)
