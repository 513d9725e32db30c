"""The files of one unit as tars, for exporters that write samples as members; and those members again."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from streamprep.shards import TarWriter
from streamprep.storage import PendingFile, Store, open_spool, whole_file
from streamprep.types import WrittenFile, WrittenRow
from streamprep.unit_files import UnitFiles

MAX_FILE_BYTES = 512 * 10**6
"""A tar that has so much ends, however few rows it has."""
_WRITE_BUFFER_BYTES = 2**18


class UnitTars:
    """What an exporter writes of one unit; a context manager, which drops what was not published.

    Args:
        store: The output.
        folder: In it.
        unit: Files are ``FOLDER/UNIT-NNNNN-SHA256.tar``.
        samples_per_file: Most rows in one, unless more have to go together.
        begin_with: Members that every tar begins with, by name.
    """

    def __init__(
        self,
        store: Store,
        *,
        folder: str,
        unit: str,
        samples_per_file: int,
        begin_with: Mapping[str, bytes] | None = None,
    ) -> None:
        self._files = UnitFiles(store, folder=folder, unit=unit, extension="tar")
        self._samples_per_file, self._begin_with = samples_per_file, begin_with or {}
        self._open: UnitTar | None = None

    def tar_for(self, num_rows: int) -> UnitTar:
        """Where the members of the next rows go, which must lie in one file."""
        if self._open is not None and len(self._open.rows) + num_rows > self._samples_per_file:
            self._end_tar()
        if self._open is None:
            self._open = UnitTar(self._files.new())
            for name, content in self._begin_with.items():
                self._open.append(name, (content,), size=len(content))
        return self._open

    def wrote(self, rows: Iterable[WrittenRow]) -> None:
        """The members of these rows are in the tar that `tar_for` gave."""
        assert self._open is not None
        self._open.rows.extend(rows)
        if len(self._open.rows) >= self._samples_per_file or self._open.size_bytes >= MAX_FILE_BYTES:
            self._end_tar()

    def publish(self) -> list[WrittenFile]:
        """Make all files visible, in their order."""
        self._end_tar()
        return self._files.publish()

    def __enter__(self) -> UnitTars:
        return self

    def __exit__(self, *_: object) -> None:
        with self._files:
            if self._open is not None:
                self._open.abandon()

    def _end_tar(self) -> None:
        if self._open is not None:
            self._open.finish()
            self._files.finish(self._open.file, self._open.rows)
            self._open = None


class UnitTar:
    """One of them, while it is written."""

    def __init__(self, file: PendingFile) -> None:
        self.file = file
        self.rows: list[WrittenRow] = []
        """That it has so far."""
        self._target = open(file.path, "r+b", buffering=_WRITE_BUFFER_BYTES)  # noqa: SIM115 - closed by `finish`
        self._tar = TarWriter(self._target)

    @property
    def size_bytes(self) -> int:
        """So far."""
        return self._tar.size_bytes

    def append(self, name: str, chunks: Sequence[bytes | memoryview], *, size: int | None = None) -> int:
        """Add a member.

        Args:
            name: A path that fits a ustar header: see `streamprep.shards.fits_ustar`.
            chunks: Its content.
            size: Bytes of all chunks, if the caller knows.

        Returns:
            Where its first byte is in the file.
        """
        return self._tar.append(name, chunks, size=sum(map(len, chunks)) if size is None else size)

    def finish(self) -> None:
        """End it."""
        self._tar.finish()
        self._target.close()

    def abandon(self) -> None:
        """Let go of a file that nobody will see; on a full disk not even its buffer can be written."""
        with suppress(OSError):
            self._target.close()


def read_members(store: Store, name: str) -> Iterator[tuple[str, bytes]]:
    """The members of a tar as Python's own reader sees them: (name, content).

    Raises:
        ValueError: if it is no tar.
    """
    try:
        with store.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                content = tar.extractfile(info)
                if content is not None:
                    yield info.name, content.read()
    except tarfile.TarError as error:
        raise ValueError(f"not a tar: {error}") from error


def checked_members(store: Store, file: WrittenFile) -> Iterator[tuple[str, bytes]]:
    """The same of a finished job's file, which is compared with its sha256 before its first member comes.

    Raises:
        NotWhole: if it is another file.
        OSError: if the store does not give it, or the spool has no room for a copy.
    """
    with whole_file(store, file, scratch=open_spool()) as (here, name):
        yield from read_members(here, name)
