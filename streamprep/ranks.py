"""Which of the processes of a run this one is, as torchrun, or our own launchers, say in the environment."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from streamprep.errors import UserError

LAUNCHER = "STREAMPREP_LAUNCHER"
"""Process id of our own launcher, if it has started this rank, and what the rank gets when it dies: ``123 SIGTERM``."""
TOKEN = "STREAMPREP_TOKEN"
"""Name of this process among all of the job, if its launcher must know it; else each draws its own."""
AGENTS_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Whether the launcher holds the store, ``True`` or not; else rank 0 does."""
SETTLED = 70
"""A rank's exit code for our own launcher, in the place of 1: starting it again is of no use."""
NO_ANSWER = 75
"""The same: a store did not answer for longer than a request has patience, which may pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One of ``world_size`` processes; alone, number 0 of 1."""

    number: int = 0
    world_size: int = 1
    local_number: int = 0
    """Among those of this machine: its GPU."""
    local_world_size: int = 1
    restarts: int = 0
    """How often the launcher has started its processes again."""
    launched: bool = False
    """Whether a launcher has said so: it hears of a failure, and may start the process again."""

    def environment(self, host: str, port: int) -> dict[str, str]:
        """The variables by which `this_rank` and `streamprep.board.open_board` know it, as torchrun sets them.

        Args:
            host: Where the launcher's store is.
            port: Of it.
        """
        return {
            "RANK": str(self.number),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_number),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            AGENTS_STORE: "True",
        }


def this_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """What torchrun's variables say: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``.

    Raises:
        UserError: if they are no numbers.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Rank()

    def number(name: str, default: int) -> int:
        value = environment.get(name, str(default))
        if not value.isdecimal():
            raise UserError(f"the environment says {name}={value}: a launcher gives a whole number")
        return int(value)

    return Rank(
        number=number("RANK", 0),
        world_size=max(1, number("WORLD_SIZE", 1)),
        local_number=number("LOCAL_RANK", 0),
        local_world_size=max(1, number("LOCAL_WORLD_SIZE", 1)),
        restarts=number("TORCHELASTIC_RESTART_COUNT", 0),
        launched=True,
    )


def end_with_the_launcher() -> None:
    """Get a signal when our own launcher dies, if this process is a rank of one."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    pid, name = launcher.split()
    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.Signals[name])
    if os.getppid() != int(pid):  # it has died before that
        os.kill(os.getpid(), signal.Signals[name])
