"""One rank for each GPU of this machine, or as many as asked for.

The board is a store of torch in this process; ranks that lose it go on by the records.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from streamprep.errors import UserError
from streamprep.launch.supervise import describe_code, open_own_board, supervise
from streamprep.ranks import LAUNCHER, Rank
from streamprep.settings import RankSettings


def launch_locally(config: RankSettings, arguments: Sequence[str]) -> int:
    """Start the ranks, start those that die again, and wait for all.

    Args:
        config: How many, and how often again.
        arguments: Their command line, the verb first.

    Returns:
        0 if all is done, else what says most: 3 before 2, 1 and 4.

    Raises:
        UserError: if ``--nproc auto`` finds no GPU.
    """
    number, command = _num_ranks(config.nproc), [sys.executable, "-m", "streamprep", *arguments]
    board, port = open_own_board(number)

    def start(rank: int) -> _Process:
        return _Process(command, _environment(rank, number, port))

    return supervise(number, start, board, config)


class _Process:
    """A rank on this machine."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        # A session of its own: Ctrl-C is for this process, which then asks the ranks.
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)

    def poll(self) -> int | None:
        return self._process.poll()

    def describe_end(self) -> str:
        return describe_code(self._process.returncode)

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _num_ranks(nproc: str) -> int:
    if nproc != "auto":
        return int(nproc)
    import torch

    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        raise UserError(f"--nproc auto: torch {torch.__version__} finds no GPU; say how many processes")
    return num_gpus


def _environment(rank: int, number: int, port: int) -> dict[str, str]:
    one = Rank(number=rank, world_size=number, local_number=rank, local_world_size=number)
    return os.environ | one.environment("127.0.0.1", port) | {LAUNCHER: f"{os.getpid()} SIGTERM"}
