"""The spool: a folder of this machine for files that nobody else need see, and copies of what a bucket holds."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from streamprep.errors import UserError
from streamprep.progress import size
from streamprep.storage.interface import Store
from streamprep.storage.local import LocalStore

_CHUNK_BYTES = 8 * 2**20


class Named(Protocol):
    """A file as its record has it."""

    @property
    def name(self) -> str:
        """Relative to the store's root."""

    @property
    def sha256(self) -> str:
        """Of all its bytes."""


@dataclass(frozen=True, slots=True)
class NamedFile:
    """The least that there is to such a file."""

    name: str
    sha256: str


class NotWhole(OSError):
    """A file is not what its record says.

    Args:
        url: Of the file.
        what: Differs.
    """

    def __init__(self, url: str, what: str) -> None:
        super().__init__(f"{url} is damaged: {what}; `streamprep verify` says what to do")
        self.url, self.what = url, what

    def __reduce__(self) -> tuple[type[NotWhole], tuple[str, str]]:
        return type(self), (self.url, self.what)


class SpoolError(OSError):
    """A copy cannot be kept on this machine, which says nothing of the store that has the file."""


def open_spool(spool_dir: str | None = None) -> LocalStore:
    """The folder, which need not exist yet.

    Args:
        spool_dir: In which it is; by default that for temporary files.
    """
    return LocalStore(Path(spool_dir or tempfile.gettempdir()) / f"streamprep-spool-{os.getuid()}")


def check_spool_dir(folder: str | None) -> None:
    """Refuse a folder for the spool in which no file can be made: it would show when the first one is.

    Args:
        folder: The user's, which need not exist if the one that it is in does; None is none of his.

    Raises:
        UserError: saying why.
    """
    if folder is None:
        return
    path = Path(folder)
    is_there = os.path.lexists(path)
    there = path if is_there else path.absolute().parent
    if not there.is_dir():
        what = "is no folder" if is_there else f"cannot be made: there is no folder {there}"
        raise UserError(f"--spool-dir {folder} {what}; name one of this machine's")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        if error.errno != errno.ENOSPC:  # of which more is said when more is known
            raise UserError(f"--spool-dir {folder}: no file can be made in {there}: {error.strerror}") from error


@contextmanager
def whole_file(store: Store, file: Named, *, scratch: Store) -> Iterator[tuple[Store, str]]:
    """A file that is what its record says, on this machine, where it may be read many times: (store, name).

    A folder's is there already. Of others a copy is made, hashed as it comes, and removed when the block is left.

    Args:
        store: Has the file.
        file: Which, and its digest.
        scratch: Where a copy may lie, unpublished.

    Raises:
        NotWhole: if it is something else.
        SpoolError: if this machine has no room for it.
        OSError: if the store does not give it.
    """
    if store.local_path() is not None:
        with store.open(file.name) as opened:
            _check(store, file, hashlib.file_digest(opened, "sha256").hexdigest())  # type: ignore[arg-type]
        yield store, file.name
        return
    with _copied(store, file, scratch) as copy:
        yield LocalStore(copy.parent), copy.name


@contextmanager
def _copied(store: Store, file: Named, scratch: Store) -> Iterator[Path]:
    url, digest = f"{store.url}/{file.name}", hashlib.sha256()
    with ExitStack() as stack:
        opened = stack.enter_context(store.open(file.name))
        size_bytes = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        with _own_trouble(url):
            _check_room(scratch, size_bytes)
            copy = stack.enter_context(scratch.new_file()).path
            target = stack.enter_context(open(copy, "wb", buffering=0))
        while data := opened.read(_CHUNK_BYTES):
            digest.update(data)
            with _own_trouble(url):
                _write(target.fileno(), data)
        _check(store, file, digest.hexdigest())
        yield copy


def _check(store: Store, file: Named, found: str) -> None:
    if found != file.sha256:
        raise NotWhole(f"{store.url}/{file.name}", f"its sha256 is {found}, the record says {file.sha256}")


def _check_room(scratch: Store, size_bytes: int) -> None:
    free = scratch.free_bytes()  # None: then `new_file` looks at the room of its spool
    if free is not None and free < size_bytes:
        raise OSError(errno.ENOSPC, f"only {size(free)} are free, it has {size(size_bytes)}", scratch.url)


@contextmanager
def _own_trouble(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SpoolError(error.errno, f"no copy of {url} can be kept here: {reason}", error.filename) from error


def _write(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]
