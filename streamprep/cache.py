"""Videos kept on a local disk, so that what comes from a bucket comes once: for several jobs, passes, or ranks.

A file is called by its content's sha256, which a shard's index knows: it cannot be another's, whatever bucket or shard
it comes from, and one that is damaged is fetched again. What was used longest ago goes first. Any number of processes
of a machine may share a folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

from streamprep.errors import UserError
from streamprep.progress import count, size

_FOLDER = "streamprep-cache"
_ROOM_AFTER = 0.9
"""Of the limit: what is left when room was made."""
_LOOK_AFTER = 0.02
"""Of the limit: after having added so much, a process looks again how much there is, for it is not alone."""
_SHORTEST = 4096
"""Smaller videos are not worth a file."""


def open_cache(folder: str | None, gb: float) -> Cache | None:
    """A cache, if a folder is given, in which there is room for it.

    Args:
        folder: Local.
        gb: Most to keep, in GB (10^9 bytes).

    Raises:
        UserError: if nothing can be written there, or the disk has less. Of a cache that is in use that is not asked: a
            rank that is started again must not fail because the disk is fuller by now.
    """
    if folder is None:
        return None
    cache = Cache(folder, max_bytes=int(gb * 1e9))
    free = shutil.disk_usage(folder).free
    if free < cache.max_bytes and not cache.size_bytes():
        raise UserError(f"--cache-dir {folder} has {size(free)} free, --cache-gb is {gb:g}: lower it")
    return cache


def describe_cache(cache: Cache) -> Iterator[str]:
    """A line for the end of a run."""
    yield (f"cache: {count(cache.hits, 'video')} ({size(cache.hit_bytes)}) found, {count(cache.misses, 'video')} not")


class Cache:
    """Files by their sha256.

    Args:
        folder: Made if need be; the files go into a folder of ours in it.
        max_bytes: What all files may take together. For a moment it may be a little more, as processes do not wait for
            each other.

    Raises:
        UserError: if nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be above 0, got {max_bytes}")
        self._folder, self.max_bytes = Path(folder), max_bytes
        self._root = self._folder / _FOLDER
        self._lock = threading.Lock()
        self._added_bytes = max_bytes  # so that the first one looks how much there is
        self._coming_bytes = 0
        """Of files that this process has room for and has not written yet."""
        self.hits = 0
        """Videos that were here."""
        self.hit_bytes = 0
        self.misses = 0
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._root):
                pass
        except OSError as error:
            raise UserError(f"--cache-dir {folder}: nothing can be written there: {error.strerror}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self._folder, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], max_bytes=state["max_bytes"])  # type: ignore[misc]

    def get(self, sha256: str) -> bytes | None:
        """What has this digest, if it is here and whole."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
            os.utime(path)  # now it was used last
        except OSError:
            data = None
        if data is not None and hashlib.sha256(data).hexdigest() != sha256:
            path.unlink(missing_ok=True)
            data = None
        with self._lock:
            self.hits += data is not None
            self.hit_bytes += len(data or b"")
            self.misses += data is None
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Keep a file, if there is room: a disk that is full is no reason to stop, as it is only a copy."""
        if not _SHORTEST <= len(data) <= self.max_bytes * _ROOM_AFTER:
            return
        if hashlib.sha256(data).hexdigest() != sha256:
            return  # a damaged shard: whoever decodes it says so
        path = self._path(sha256)
        with suppress(OSError), self._room(len(data)):
            path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    Path(file.name).replace(path)
                except BaseException:
                    Path(file.name).unlink()
                    raise

    @contextmanager
    def _room(self, size_bytes: int) -> Iterator[None]:
        """Room for a file, which nobody else gets while it is written."""
        with self._lock:
            self._coming_bytes += size_bytes
        try:
            self._make_room(size_bytes)
            yield
        finally:
            with self._lock:
                self._coming_bytes -= size_bytes

    def _make_room(self, size_bytes: int) -> None:
        with self._lock:
            self._added_bytes += size_bytes
            if self._added_bytes < self.max_bytes * _LOOK_AFTER:
                return
            self._added_bytes = size_bytes
            files = sorted(self._files())
            total = sum(file_bytes for _, file_bytes, _ in files) + self._coming_bytes
            if total + self.max_bytes * _LOOK_AFTER <= self.max_bytes:
                return
            for _, file_bytes, path in files:
                if total <= self.max_bytes * _ROOM_AFTER:
                    break
                path.unlink(missing_ok=True)
                total -= file_bytes

    def size_bytes(self) -> int:
        """Of all that is kept."""
        return sum(file_bytes for _, file_bytes, _ in self._files())

    def _files(self) -> list[tuple[int, int, Path]]:
        """(when it was used last, in ns, size in bytes, path) of each file, half written ones included."""
        found = []
        for folder in self._root.iterdir():
            if folder.is_dir():
                for path in folder.iterdir():
                    with suppress(OSError):
                        status = path.stat()
                        if S_ISREG(status.st_mode):
                            found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _path(self, sha256: str) -> Path:
        return self._root / sha256[:2] / sha256
