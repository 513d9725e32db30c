"""Server processes: free ports, a start that waits until the server answers, and a certain end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path

DIE_WITH_PARENT = Path(__file__).with_name("die_with_parent.py")
ATTEMPTS = 3


class NotStartedError(RuntimeError):
    """A server that ended, or was silent too long; the message ends with its log."""


def program(name: str) -> str:
    """The path of a program that a package installed beside this Python, or on ``PATH``."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"no program {name!r} beside {sys.executable} or on PATH: pip install -e .[dev]")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at.

    They are below those that Linux gives to outgoing connections (32768 and up), one of which could otherwise take
    a port before the server does.
    """
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            bound = held.enter_context(socket.socket())
            try:
                bound.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 32_768)))
            except OSError:
                continue
            ports.append(bound.getsockname()[1])
        return ports


@contextmanager
def running(
    command: Callable[[Sequence[int]], list[str]],
    *,
    num_ports: int,
    log: Path,
    is_ready: Callable[[Sequence[int]], bool],
    env: Mapping[str, str] | None = None,
    seconds: float = 60,
    ports: Sequence[int] = (),
) -> Iterator[list[int]]:
    """Run a server while the context is open, and give its ports.

    The thread that enters must outlive the server: the kernel's signal comes when that thread ends.

    Args:
        command: The arguments for a choice of ports.
        num_ports: How many it needs.
        log: Gets what the server prints.
        is_ready: Whether it answers; asked until it does.
        env: Added to the environment.
        seconds: How long it may take to start.
        ports: Those that it had before, and that its clients know; by default free ones.
    """
    for attempt in range(1, ATTEMPTS + 1):  # another program may have taken a port in between
        chosen = list(ports) or free_ports(num_ports)
        process = _start(command(chosen), log, env or {})
        try:
            if _becomes_ready(process, lambda chosen=chosen: is_ready(chosen), seconds):  # type: ignore[misc]
                yield chosen
                return
        finally:
            _kill(process)
        if process.returncode == -signal.SIGKILL or attempt == ATTEMPTS:
            raise NotStartedError(f"{command(chosen)[0]} is not there after {seconds} s:\n{_tail(log)}")


def answers(port: int, path: str = "/") -> bool:
    """Whether an HTTP server there has an answer that is none of its own trouble."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status < 500
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _start(command: list[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(DIE_WITH_PARENT), str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,  # out of reach of Ctrl-C, by which the tests end before the server does
        )


def _becomes_ready(process: subprocess.Popen[bytes], is_ready: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if is_ready():
            return True
        time.sleep(0.05)
    return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]
