"""How long a store is asked again: what is over within a minute must not end a job of days.

One request has one such time, however often and in whatever way it is made. It is short for a store that this process
has never heard of: then it is the request that is wrong, and who has made it wants to know.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time

from streamprep.signals import is_leaving

VARIABLE = "STREAMPREP_PATIENCE_SECONDS"
"""A test hook: another `PATIENCE_SECONDS`."""
PATIENCE_SECONDS = 90.0
FIRST_PATIENCE_SECONDS = 15.0
"""Of a store that has never answered this process, in whatever words."""
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.2, 5.0
_LOOK_SECONDS = 0.2
_SILENT_SECONDS = 10.0
"""Shorter trouble is not told, and of longer trouble no more often."""


class Patience:
    """That of one request; it begins now."""

    def __init__(self) -> None:
        self._began = _now()
        self._longest = _FIRST_WAIT_SECONDS

    def wait(self, trouble: object, seconds: float, *, at_least: float | None = None) -> bool:
        """Wait a little, longer each time, before the request is made again.

        Args:
            trouble: Of the last time, for people.
            seconds: All that there is for the request; the last time that it is made is not counted in.
            at_least: What to wait now, if the store has asked for that.

        Returns:
            False, at once or as soon as it is known, if it is not to be made again: that time is over, or this process
            is leaving.
        """
        wait = random.uniform(0.5, 1.0) * self._longest if at_least is None else at_least  # not all ranks at once
        self._longest = min(2 * self._longest, _LONGEST_WAIT_SECONDS)
        spent = _now() - self._began
        if spent + wait > seconds:
            return False
        if spent > _SILENT_SECONDS:
            _tell(f"{trouble}; it is asked again for {seconds - spent:.0f} s more")
        return _pause(wait)


def patience_seconds(*, heard: bool) -> float:
    """How long a request may take, but for its last try.

    Args:
        heard: Whether the store has ever answered this process.
    """
    seconds = float(os.environ.get(VARIABLE, PATIENCE_SECONDS))
    return seconds if heard else min(seconds, FIRST_PATIENCE_SECONDS)


def _now() -> float:
    return time.monotonic()


def _pause(seconds: float) -> bool:
    """False as soon as this process is leaving."""
    end = _now() + seconds
    while not is_leaving():
        if (left := end - _now()) <= 0:
            return True
        time.sleep(min(left, _LOOK_SECONDS))
    return False


_lock = threading.Lock()
_told_at: float | None = None


def _tell(text: str) -> None:
    """Put a line on stderr, one for all threads that wait."""
    global _told_at
    with _lock:
        now = _now()
        if _told_at is not None and now - _told_at < _SILENT_SECONDS:
            return
        _told_at = now
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
