"""A log of what one process did, as JSON lines, for people and machines that look into a run of many."""

from __future__ import annotations

import io
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamprep import canonical
from streamprep.attempts import Worker


class RankLog:
    """``FOLDER/rank-0003-HOST-PID-TOKEN.jsonl``, a line for each event, written at once; a context manager.

    Every line has ``time`` (UTC), ``rank``, ``event``, and what belongs to that event. There is no file before `begin`,
    so that a command which finds nothing to do leaves none.

    Args:
        folder: Made if need be; None for no file at all.
        worker: This process.
    """

    def __init__(self, folder: Path | None, worker: Worker) -> None:
        name = f"rank-{worker.rank:04d}-{worker.host}-{worker.pid}-{worker.token}.jsonl"
        self._path = folder / name if folder is not None else None
        self._rank = worker.rank
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._file: io.FileIO | None = None
        self._ended = folder is None

    def begin(self) -> None:
        """Write what was said, and from now on at once."""
        if self._path is None:
            return
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(self._path, "a")
            self._write(b"".join(self._lines))
            self._lines.clear()

    def event(self, name: str, **fields: Any) -> None:
        """Say something."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = canonical.to_json({"time": now, "rank": self._rank, "event": name, **fields}) + b"\n"
        with self._lock:
            if self._file is not None:
                self._write(line)
            elif not self._ended:
                self._lines.append(line)

    def __enter__(self) -> RankLog:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._end()

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(data)
        except OSError as error:  # the job is not to end for its log
            sys.stderr.write(f"{self._path} ends here: {error}\n")
            self._end()

    def _end(self) -> None:
        self._ended = True
        if self._file is not None:
            self._file.close()
        self._file = None
