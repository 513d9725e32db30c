"""Stores that behave as buckets do, or fail as they do, on this machine."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from streamprep.errors import UserError
from streamprep.storage import LocalStore, PendingFile, StoreError


class BucketLikeStore:
    """Files below a folder, of which nobody is told that it is one: they can only be written by way of the store.

    A new file is built elsewhere and copied when it is published, as into a bucket.

    Args:
        root: Where they are.
        spool: Where they are built.
        failing_publish: The number of the publication that fails, from 1 on; 0 for none.
    """

    def __init__(self, root: Path, *, spool: Path, failing_publish: int = 0) -> None:
        self._objects, self._spool = LocalStore(root), LocalStore(spool)
        self._failing_publish = failing_publish
        self._num_published = 0

    @property
    def url(self) -> str:
        """Of no kind that can be opened."""
        return f"test://{self._objects.root.name}"

    def local_path(self) -> Path | None:
        """None."""
        return None

    def link(self, path: str, target: Path, *, step: str) -> None:
        """Refused."""
        raise UserError(f"{self.url} is no local folder: there are no links in it")

    def new_file(self) -> SpooledFile:
        """A file that nobody sees until it is published; a context manager."""
        return SpooledFile(self, self._spool.new_file())

    def upload(self, source: Path, path: str, *, step: str, replace: bool) -> bool:
        """Copy a file here.

        Raises:
            StoreError: if it is the one that is to fail.
        """
        self._num_published += 1
        if self._num_published == self._failing_publish:
            raise StoreError(f"{self.url}/{path}", "the service is unavailable (503)")
        with self._objects.new_file() as copy:
            copy.path.write_bytes(source.read_bytes())
            return copy.publish(path, step=step, replace=replace)

    def __getattr__(self, name: str) -> Any:
        """All else is as a folder has it."""
        return getattr(self._objects, name)


class SpooledFile:
    """A file that is built in the spool."""

    def __init__(self, store: BucketLikeStore, pending: PendingFile) -> None:
        self._store, self._pending = store, pending
        self.path: Path

    def publish(self, path: str, *, step: str, replace: bool = True) -> bool:
        """Copy it into the store."""
        return self._store.upload(self.path, path, step=step, replace=replace)

    def __enter__(self) -> SpooledFile:
        self.path = self._pending.__enter__().path
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pending.__exit__(kind, error, trace)
