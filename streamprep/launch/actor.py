"""What runs in a Ray actor: a process for the rank, as a launcher on that machine would start it.

Not the rank itself: in a process of its own it has its signals, its exit code, its last words when it crashes, a fresh
GPU when it is started again, and a number of threads that Ray does not choose.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from streamprep.ranks import LAUNCHER

_CONNECT_SECONDS = 10.0
_LOOK_SECONDS = 0.1


class RankActor:
    """A place on a machine, for one process after the other.

    Its methods run one at a time, in the main thread: the rank is to die with the thread that started it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._said: list[_Said] = []
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # Ray may ignore it, and then exit codes are lost

    def node(self) -> str:
        """Where it is, in Ray's words."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def start(self, arguments: Sequence[str], environment: Mapping[str, str | None], folder: str) -> str | None:
        """Start a rank.

        Args:
            arguments: Its command line, the verb first.
            environment: Variables to set, or to leave out.
            folder: Where paths of the command line begin.

        Returns:
            Why that cannot be, if it cannot.
        """
        if not Path(folder).is_dir():
            return f"there is no {folder} on {socket.gethostname()}: give the command in a folder that every node has"
        address = str(environment["MASTER_ADDR"]), int(environment["MASTER_PORT"] or 0)
        try:
            socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            return f"{socket.gethostname()} cannot reach this command at {address[0]}:{address[1]}: {error}"
        self._said = [_Said() for _ in ("stdout", "stderr")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "streamprep", *arguments],
            cwd=folder,
            env=rank_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._said[0].file,
            stderr=self._said[1].file,
            start_new_session=True,
        )
        return None

    def poll(self, seconds: float) -> tuple[bytes, bytes, int | None]:
        """What it has written to stdout and stderr since the last call, and its exit code if it has ended.

        Args:
            seconds: How long to wait for any of that.
        """
        assert self._process is not None
        deadline = time.monotonic() + seconds
        while True:
            code = self._process.poll()  # before reading: what is read then is all
            out, err = (said.new() for said in self._said)
            if out or err or code is not None or time.monotonic() > deadline:
                return out, err, code
            time.sleep(_LOOK_SECONDS)

    def stop(self) -> None:
        """Send it SIGTERM."""
        if self._process is not None:
            self._process.terminate()


class _Said:
    """What a process writes to a file."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as we do
        self._num_read = 0

    def new(self) -> bytes:
        size_bytes = os.fstat(self.file.fileno()).st_size
        text = os.pread(self.file.fileno(), size_bytes - self._num_read, self._num_read)
        self._num_read += len(text)
        return text


def rank_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's, as a rank is to have it: killed with us, and with one GPU in view.

    Args:
        changes: Variables to set, or to leave out.
    """
    new = {name: value for name, value in os.environ.items() if name not in changes}
    new |= {name: value for name, value in changes.items() if value is not None}
    new[LAUNCHER] = f"{os.getpid()} SIGKILL"  # Ray gives our GPU and memory to another at once
    if "CUDA_VISIBLE_DEVICES" in new:
        new["CUDA_VISIBLE_DEVICES"] = new["CUDA_VISIBLE_DEVICES"].partition(",")[0]
    return new
