"""One rank for each GPU of this machine, or as many as asked for.

Ranks need nothing of each other but the board, so one that dies is started again alone: torch's elastic agent would end
and restart all of them, and each would load its models anew. The board is a store of torch in this process; ranks that
lose it go on by the records.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from streamprep.board import StoreBoard
from streamprep.config import LaunchSettings
from streamprep.errors import Stopped, UserError
from streamprep.progress import count
from streamprep.ranks import LAUNCHER, SETTLED

_POLL_SECONDS = 0.1
_KILL_SECONDS = 10.0  # beyond the grace
_IDLE_DEATHS = 3


def launch_locally(config: LaunchSettings, arguments: Sequence[str]) -> int:
    """Start the ranks, start those that die again, and wait for all.

    Args:
        config: How many, and how often again.
        arguments: Their command line, the verb first.

    Returns:
        0 if all is done, else what says most: 3 before 2, 1 and 4.

    Raises:
        UserError: if ``--nproc auto`` finds no GPU.
    """
    ranks = _Ranks(_num_ranks(config.nproc), [sys.executable, "-m", "streamprep", *arguments], config.max_restarts)
    try:
        ranks.run()
    except Stopped:
        ranks.stop(config.grace_seconds)
        raise
    finally:
        ranks.kill()
    return overall(rank.code for rank in ranks.all)


def overall(codes: Iterable[int | None]) -> int:
    """One exit code for all ranks: one that ends with 0 has seen that everything is done, whoever else has died."""
    found = set(codes)
    return next((code for code in (3, 2, 0, 1, 4) if code in found), 1)


@dataclass
class _Rank:
    """One process, and those that take its place."""

    number: int
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    code: int | None = None
    """Of the last one, once there will be no other."""
    num_taken: int = 0
    """Units, when it was started."""
    idle_deaths: int = 0
    """In a row, without having taken a unit."""


class _Ranks:
    """All of them."""

    def __init__(self, number: int, command: Sequence[str], max_restarts: int) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._command, self._restarts_left = command, max_restarts
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._board = StoreBoard(self._store, number)
        self.all = [_Rank(rank, _environment(rank, number, self._store.port)) for rank in range(number)]

    def run(self) -> None:
        """Until none is left. The first one looks whether the command can be run at all; then the others start."""
        first, *others = self.all
        self._start(first)
        while any(rank.process for rank in self.all):
            time.sleep(_POLL_SECONDS)
            if others and self._board.add("checked", 0):
                for rank in others:
                    self._start(rank)
                others = []
            for rank in self.all:
                if rank.process is not None and rank.process.poll() is not None:
                    self._ended(rank, rank.process.returncode)

    def stop(self, grace_seconds: float) -> None:
        """Ask all to stop, and wait until they have."""
        deadline = time.monotonic() + grace_seconds + _KILL_SECONDS
        for rank in self.all:
            if rank.process is not None:
                rank.process.send_signal(signal.SIGTERM)
        while any(rank.process is not None and rank.process.poll() is None for rank in self.all):
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """Leave none."""
        for rank in self.all:
            if rank.process is not None:
                rank.process.kill()
                rank.process.wait()

    def _start(self, rank: _Rank) -> None:
        rank.num_taken = self._num_taken(rank)
        # A session of its own: Ctrl-C is for this process, which then asks the ranks.
        rank.process = subprocess.Popen(self._command, env=rank.environment, start_new_session=True)

    def _ended(self, rank: _Rank, code: int) -> None:
        rank.process = None
        if code in (0, 4):
            rank.code = code
            return
        if code in (2, 3, SETTLED):  # the others would say the same
            rank.code = 1 if code == SETTLED else code
            self.stop(0)
            return
        rank.idle_deaths = 0 if self._num_taken(rank) > rank.num_taken else rank.idle_deaths + 1
        how = f"rank {rank.number} {describe_code(code)}"
        if rank.idle_deaths == _IDLE_DEATHS:
            _say(f"{how}, for the {_IDLE_DEATHS}rd time without having taken a unit: it is not started again")
        elif not self._restarts_left:
            _say(f"{how}; no restarts are left")
        else:
            self._restarts_left -= 1
            _say(f"{how}; it is started again, {count(self._restarts_left, 'restart')} left")
            self._start(rank)
            return
        rank.code = 1

    def _num_taken(self, rank: _Rank) -> int:
        return self._board.add(f"taken.{rank.number}", 0)


def describe_code(code: int) -> str:
    """What an exit code says."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"failed with exit code {code}"


def _num_ranks(nproc: str) -> int:
    if nproc != "auto":
        return int(nproc)
    import torch

    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        raise UserError(f"--nproc auto: torch {torch.__version__} finds no GPU; say how many processes")
    return num_gpus


def _environment(rank: int, number: int, port: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER: str(os.getpid()),
    }


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
