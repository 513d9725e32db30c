"""The files of one unit: built where nobody sees them, named by their content, published together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from streamprep import canonical
from streamprep.storage import PendingFile, Store
from streamprep.types import WrittenFile, WrittenRow


class UnitFiles:
    """What an exporter writes of one unit; a context manager, which drops what was not published.

    Args:
        store: The output.
        folder: In it.
        unit: Files are ``FOLDER/UNIT-NNNNN-SHA256.EXTENSION``.
        extension: Without the dot.
    """

    def __init__(self, store: Store, *, folder: str, unit: str, extension: str) -> None:
        self._store, self._stem, self._extension = store, f"{folder}/{unit}", extension
        self._pending = ExitStack()
        self._finished: list[tuple[PendingFile, WrittenFile]] = []

    def new(self) -> PendingFile:
        """A file to write to."""
        return self._pending.enter_context(self._store.new_file())

    def finish(self, file: PendingFile, rows: Sequence[WrittenRow]) -> None:
        """A file has all its bytes."""
        sha256 = canonical.file_digest(file.path)
        name = f"{self._stem}-{len(self._finished):05d}-{sha256[:8]}.{self._extension}"
        written = WrittenFile(name=name, size_bytes=file.path.stat().st_size, sha256=sha256, rows=tuple(rows))
        self._finished.append((file, written))

    def publish(self) -> list[WrittenFile]:
        """Make all of them visible, in their order."""
        for pending, written in self._finished:
            pending.publish(written.name, step="data")
        self._pending.close()
        return [written for _, written in self._finished]

    def __enter__(self) -> UnitFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._pending.close()
