"""What a store is: one root, files below it, whose names are relative to it, with ``/``."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, Protocol


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as a listing shows it."""

    path: str
    """Relative to the store's root."""
    size_bytes: int
    version: str
    """Changes when the bytes do: the modification time in ns, or the store's entity tag."""


@dataclass
class StoreStats:
    """What this process has asked of a bucket; of a local folder nothing is counted. Safe to use from several threads.

    Requests that the client sends again by itself are not counted again.
    """

    requests: Counter[str] = field(default_factory=Counter)
    """By kind: ``get``, ``head``, ``list``, ``put``, ``delete``; every part of an upload is a ``put``."""
    bytes_read: int = 0
    bytes_written: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def count(self, kind: str, *, number: int = 1, bytes_read: int = 0, bytes_written: int = 0) -> None:
        """Add requests, and what went over the wire."""
        with self._lock:
            self.requests[kind] += number
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written

    def add(self, other: StoreStats) -> None:
        """Add what another process has asked."""
        with self._lock:
            self.requests += other.requests
            self.bytes_read += other.bytes_read
            self.bytes_written += other.bytes_written

    def __getstate__(self) -> tuple[Counter[str], int, int]:
        return self.requests, self.bytes_read, self.bytes_written

    def __setstate__(self, state: tuple[Counter[str], int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]


class StoreError(OSError):
    """A store did not do what it was asked for: trouble of the network, the service, or of its permissions.

    Args:
        url: Of what.
        what: It said, and what to check.
        passing: Whether it may go away by itself.
    """

    def __init__(self, url: str, what: str, passing: bool = False) -> None:
        super().__init__(f"{url}: {what}")
        self.url, self.what, self.passing = url, what, passing

    def __reduce__(self) -> tuple[type[StoreError], tuple[str, str, bool]]:
        return type(self), (self.url, self.what, self.passing)


class FileReplaced(StoreError):
    """A file is not of the version any more that was asked for."""


class PendingFile(Protocol):
    """A file that nobody sees; `publish` makes it visible, leaving the block without that removes it."""

    path: Path
    """Where to write, on this machine."""

    def publish(self, path: str, *, step: str, replace: bool = True) -> bool:
        """Make the file durable, then visible.

        Args:
            path: The final name, relative to the store's root.
            step: Name of the durable step, for `crash_point`.
            replace: Whether a file of that name gives way.

        Returns:
            False if there was one and it did not give way.
        """

    def __enter__(self) -> PendingFile: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Store(Protocol):
    """Files below one root. What can be seen is whole."""

    stats: StoreStats

    @property
    def url(self) -> str:
        """Where this is, as a user would write it."""

    def local_path(self) -> Path | None:
        """The folder, if that is what it is."""

    def same_place(self, other: Store) -> bool:
        """Whether both have the same root."""

    # --- reading

    def read(self, path: str) -> bytes:
        """The whole file; `FileNotFoundError` if there is none."""

    def read_range(self, path: str, offset: int, size: int, *, version: str | None = None) -> bytes:
        """Exactly ``size`` bytes from ``offset``; `EOFError` if the file is shorter.

        Args:
            path: Of the file.
            offset: Of the first byte.
            size: Number of bytes.
            version: As `list` had it; `FileReplaced` if it is another by now. None takes any.
        """

    def open(self, path: str) -> BinaryIO:
        """A seekable file to read from; `FileNotFoundError` if there is none."""

    def exists(self, path: str) -> bool:
        """Whether the file is there."""

    def size_bytes(self, path: str) -> int:
        """Of a file; `FileNotFoundError` if there is none."""

    def list(self, folder: str = "", *, prefix: str = "") -> Iterator[FileEntry]:
        """The files directly in a folder whose names begin so, sorted; nothing if there is no such folder."""

    def walk(self, folder: str = "") -> Iterator[FileEntry]:
        """All files below a folder, at any depth, in no order that all stores share; nothing if there is none."""

    def free_bytes(self) -> int | None:
        """What can still be written, None if there is no end to it."""

    # --- writing

    def new_file(self) -> PendingFile:
        """A file that nobody sees until it is published; a context manager."""

    def put(self, path: str, data: bytes, *, step: str) -> None:
        """Write a whole file, replacing what was there.

        Args:
            path: Where.
            data: All of it.
            step: Name of the durable step, for `crash_point`.
        """

    def put_if_absent(self, path: str, data: bytes, *, step: str) -> bool:
        """Write a whole file unless one is there; of several writers of different bytes exactly one gets True."""

    def check_create_only(self) -> bool:
        """Try whether the store keeps the promise of `put_if_absent`.

        Raises:
            UserError: if nothing can be written here at all.
        """

    def link(self, path: str, target: Path, *, step: str) -> None:
        """Make a name here stand for a local file elsewhere; it is no error if it does already.

        Args:
            path: The name.
            target: Absolute.
            step: Name of the durable step, for `crash_point`.

        Raises:
            FileExistsError: if something else has the name.
            UserError: if this is no local folder.
        """

    def delete(self, path: str, *, step: str) -> None:
        """Remove a file; it is no error if it is gone."""

    def remove_if_empty(self, folder: str) -> None:
        """Remove a folder, unless something is in it; it is no error if it is gone."""

    def remove_unpublished(self) -> None:
        """Remove what processes of this machine that died left half written; files of living ones stay."""

    # --- a store that is seen by others only when all is done

    def staged_in(self) -> Path | None:
        """The local folder where files lie until `publish_all`; None if each is seen as soon as it is written."""

    def is_all_published(self) -> bool:
        """Whether others see all that was written."""

    def publish_all(self, *, summary: str | None = None, leave_out: Sequence[str] = ()) -> None:
        """Make others see all that was written, at once; nothing if they do. Several processes may call it.

        Args:
            summary: A file that names all others by their digests: where others see the same, it has been done.
            leave_out: Folders that do not belong to the result.
        """


def parts_of(path: str, *, below: str) -> PurePosixPath:
    """A path, unless it leads out of a store; `ValueError` then."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not path:
        raise ValueError(f"{path!r} is not a path below {below}")
    return parts
