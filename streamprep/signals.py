"""What SIGTERM and Ctrl-C do to a command: leave it tidily, at once or, for SIGTERM, after what is at hand."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from streamprep.errors import Stopped

_SAME_SECONDS = 1.0
_TIDYING_SECONDS = 10.0
"""To let go of what is open, after the grace; torchrun's agent kills its ranks after 30 seconds in all."""

_asked: StopRequest | None = None
_leaving = False


@dataclass
class StopRequest:
    """SIGTERM, while `sigterm_asks` lasts."""

    ask: Callable[[], None]
    seconds: float
    message: str | None = None
    """What came, if it came."""

    def obey(self) -> None:
        """Raise `Stopped` if it came."""
        if self.message is not None:
            raise Stopped(self.message)


@contextmanager
def ends_in_time(*, code: int, then: str) -> Iterator[None]:
    """End the process where a signal asked it to, and it has not come to that.

    Handlers run between two steps of Python's, and a request that gets no answer is one step of two minutes. A thread
    learns of the signal at once. What is cut off is as after a SIGKILL.

    Args:
        code: To leave with.
        then: What can be done afterwards, for the message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(reading, over, code, then), name="streamprep-signals", daemon=True)
    watch.start()
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        writing.close()
        watch.join()
        reading.close()


def _watch(signals: socket.socket, over: threading.Event, code: int, then: str) -> None:
    while numbers := signals.recv(1):
        number = numbers[0]
        if number in (signal.SIGTERM, signal.SIGINT):
            grace = _asked.seconds if _asked is not None and number == signal.SIGTERM else 0.0
            if not over.wait(grace + _TIDYING_SECONDS):
                name = signal.Signals(number).name
                sys.stderr.write(f"streamprep: stopped by {name}, waiting no longer for what is at hand; {then}\n")
                sys.stderr.flush()
                os._exit(code)
            return


@contextmanager
def signals_raise_stopped(*, then: str) -> Iterator[None]:
    """SIGTERM and Ctrl-C leave a command between any two steps, tidily; a second one does not wait for that.

    But one that comes with the first is the same: Slurm signals every process, and torchrun's agent its ranks again.

    Args:
        then: What can be done afterwards, for the message.
    """
    global _leaving
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    stopped_at: float | None = None
    _leaving = False

    def leave(message: str) -> NoReturn:
        global _leaving
        _leaving = True
        raise Stopped(message)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_at
        if stopped_at is not None:
            if time.monotonic() - stopped_at > _SAME_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        stopped_at = time.monotonic()
        message = f"stopped by {signal.Signals(number).name}; {then}"
        if number != signal.SIGTERM or _asked is None:
            leave(message)

        def too_late(number: int, frame: FrameType | None) -> None:
            leave(message)

        signal.signal(signal.SIGALRM, too_late)
        signal.setitimer(signal.ITIMER_REAL, _asked.seconds)
        _asked.message = message
        _asked.ask()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    alarm = signal.getsignal(signal.SIGALRM)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in {**before, signal.SIGALRM: alarm}.items():
            signal.signal(number, handler)


def is_leaving() -> bool:
    """Whether a signal has made this process leave what it does: then none of its threads waits for what may not come.

    A flag without a lock, as a handler sets it: the thread that it interrupts may hold one.
    """
    return _leaving


@contextmanager
def sigterm_asks(ask: Callable[[], None], *, seconds: float) -> Iterator[StopRequest]:
    """While it lasts, SIGTERM calls a function, and raises `Stopped` only if the block still runs after a while.

    Args:
        ask: Called in the main thread, between any two steps of it.
        seconds: How long the block may then go on; 0 raises `Stopped` at once, without asking.
    """
    global _asked
    request = StopRequest(ask, seconds)
    _asked = request if seconds else None
    try:
        yield request
    finally:
        _asked = None
        signal.setitimer(signal.ITIMER_REAL, 0)
