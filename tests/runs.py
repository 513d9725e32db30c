"""A launcher of the least kind, for tests of ranks: a board, and the variables that torchrun gives its ranks.

A test module says ``pytest_plugins = ["jobs", "runs"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from streamprep.ranks import Rank

if TYPE_CHECKING:
    from forks import Forks, Process
    from jobs import EncodeJob

    NewRun = Callable[[int], "Run"]

STALE_SECONDS = 3


class Run:
    """The launcher."""

    def __init__(self, forks: Forks, world_size: int) -> None:
        self.world_size = world_size
        self._server = forks.start(Path(__file__).with_name("board_server.py"))
        self._port = self._server.wait_for(lambda: self._server.output.endswith("\n") and self._server.output.strip())

    def environment(self, rank: int) -> dict[str, str]:
        number = self.world_size
        one = Rank(number=rank, world_size=number, local_number=rank, local_world_size=number)
        return one.environment("127.0.0.1", int(self._port))

    def start(self, job: EncodeJob, rank: int, **how: object) -> Process:
        how = {"serial": True, "stale_seconds": STALE_SECONDS} | how
        environment = self.environment(rank) | how.pop("environment", {})  # type: ignore[operator]
        return job.start(environment=environment, **how)

    def lose_board(self) -> None:
        self._server.kill()
        self._server.wait()


@pytest.fixture
def new_run(forks: Forks) -> Iterator[NewRun]:
    """``new_run(3)``: for three ranks."""
    runs: list[Run] = []

    def make(world_size: int) -> Run:
        runs.append(Run(forks, world_size))
        return runs[-1]

    yield make
    for run in runs:
        run.lose_board()
