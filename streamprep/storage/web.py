"""A place on a web server, which can only be read: an `ObjectStore` that lists nothing and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from streamprep.errors import UserError
from streamprep.storage.interface import FileEntry
from streamprep.storage.objects import ObjectStore


class WebStore(ObjectStore):
    """Files below a URL of a web server: they can be read, not listed and not written."""

    def list(self, folder: str = "", *, prefix: str = "") -> Iterator[FileEntry]:
        """No web server lists its files in a way that all others do."""
        return self.walk(folder)

    def walk(self, folder: str = "") -> NoReturn:
        """Refused."""
        raise UserError(
            f"{self._url(folder)}: a web server lists no files and takes none, so it can only be what `encode` reads: "
            "write to a local folder or a bucket"
        )

    def new_file(self) -> NoReturn:
        """Refused."""
        self._refuse()

    def put(self, path: str, data: bytes, *, step: str) -> NoReturn:
        """Refused."""
        self._refuse()

    def put_if_absent(self, path: str, data: bytes, *, step: str) -> NoReturn:
        """Refused."""
        self._refuse()

    def delete(self, path: str, *, step: str) -> NoReturn:
        """Refused."""
        self._refuse()

    def check_create_only(self) -> NoReturn:
        """Refused."""
        self._refuse()

    def _check_bucket(self) -> None:
        return

    def _refuse(self) -> NoReturn:
        raise UserError(f"{self.url} can only be read: write to a local folder or a bucket")
