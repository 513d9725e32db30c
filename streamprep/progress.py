"""What a person sees while a command runs: a bar on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """How far a command is, how fast, and how long it will take; a context manager.

    Args:
        total: How many in all.
        unit: What is counted, in the plural.
        verb: What is being done: ``packing``.
        quiet: Show nothing, as another process does it for all.
    """

    def __init__(self, *, total: int, unit: str, verb: str, quiet: bool = False) -> None:
        self.total = total
        self._quiet = quiet
        self._unit, self._verb = unit, verb
        self._done = 0
        self._done_before: int | None = None
        self._started = self._last_line = time.monotonic()
        self._bar = _bar(verb, unit, total) if sys.stderr.isatty() and not quiet else None

    def message(self, text: str) -> None:
        """Say something, above the bar if there is one."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def already_done(self, count: int) -> None:
        """Count what an earlier run did; it does not enter the rate."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)

    def advance(self, count: int = 1) -> None:
        """Count what was done just now."""
        if self._done_before is None:
            self._done_before = self._done
        self._done += count
        self._show("")

    def reached(self, done: int, remark: str) -> None:
        """Count what all processes have done; say something with it."""
        if done > self._done and self._done_before is None:
            self._done_before = self._done
        self._done = min(done, self.total)
        self._show(remark)

    def _show(self, remark: str) -> None:
        if self._bar is not None:
            rate = f"{self._rate():.2f}/s" + (f"; {remark}" if remark else "")
            self._bar.update(self._bar.task_ids[0], completed=self._done, rate=rate)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.message(self._line() + (f"; {remark}" if remark else ""))

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        self._started = self._last_line = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self) -> str:
        rate = self._rate()
        left = (self.total - self._done) / rate if rate else float("inf")
        return f"{self._verb} {self._done}/{self.total} {self._unit}, {rate:.2f}/s, {duration(left)} left"

    def _rate(self) -> float:
        """Of this run, per second."""
        return (self._done - (self._done_before or 0)) / max(1e-9, time.monotonic() - self._started)


def count(number: int, noun: str) -> str:
    """``1 shard``, ``2 shards``, ``2 processes``."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}".replace(",", " ")


def by_reason(reasons: Mapping[str, int]) -> str:
    """``2 decode_error, 1 truncated``."""
    return ", ".join(f"{number} {reason}" for reason, number in reasons.items())


def too_large(halved: Mapping[str, int]) -> str:
    """What `Record.halved` means, and what can be done."""
    parts = [
        count(number, "caption") if kind == "text" else f"{count(number, 'clip')} of {kind}"
        for kind, number in halved.items()
    ]
    return (
        f"too little for whole batches, {', '.join(parts)} at once fit; the output is good. On a GPU "
        "--offload-text-encoder makes room; in another job smaller batches (--preprocess-video-batch-size, "
        "--text-batch-size) save the vain attempts"
    )


def size(num_bytes: float) -> str:
    """``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """``1:02:03``, ``2:03``."""
    if seconds == float("inf"):
        return "?"
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"


def _bar(verb: str, unit: str, total: int) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True))
    bar.add_task(verb, total=total, rate="")
    return bar
