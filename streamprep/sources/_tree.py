"""The files of a dataset, which sources read through a `Tree`: those of a local folder, or objects in a bucket.

Names are relative to the root, with ``/``. A dataset that is one file, such as a manifest, is the tree of its folder,
as what it lists lies there.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, TypeVar, cast

from streamprep.ahead import fetch_ahead
from streamprep.errors import UserError
from streamprep.sources import _hub
from streamprep.storage import FileEntry, FileReplaced, Store, is_remote, open_store
from streamprep.storage.ranged import RangedFile
from streamprep.tars import open_member

T = TypeVar("T")
R = TypeVar("R")

AHEAD_BYTES = 64 * 2**20
"""Of videos that a process holds from a bucket, all together; one that is larger is held alone, and on disk."""
_AT_ONCE = 16
"""Requests for as many videos, captions or tars: a bucket takes its time for each, and bears many."""
_PIECE_BYTES = 8 * 2**20
_PIECES_AT_ONCE = 4
_MOST_FOLDERS = 64
"""Where more folders are looked at than this, one listing of all is cheaper: it gives 1000 names a request."""


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What is known of a file without opening it."""

    size_bytes: int
    version: str
    """Changes when the bytes do."""


class Tree(Protocol):
    """The files below one root. It can be sent to other processes."""

    at_once: int
    """How many files are best read side by side."""

    @property
    def file(self) -> str | None:
        """The name of the one file that the user gave, if the dataset is no folder."""

    @property
    def store(self) -> Store | None:
        """The bucket, if it is one."""

    def local_path(self) -> Path | None:
        """The folder, if that is what it is."""

    def where(self, name: str = "") -> str:
        """The root or a file, as a user would write it."""

    def is_there(self) -> bool:
        """Whether the dataset is."""

    def is_file(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def exists(self, name: str) -> bool:
        """Whether there is anything of this name."""

    def status(self, name: str) -> FileStatus | None:
        """Of a file, None if it is missing.

        Raises:
            UserError: if it is not what may be packed: a pipe, a link out of the dataset, ...
        """

    def version_of(self, name: str) -> str:
        """Of a file, wherever its bytes are."""

    def walk(self, *, what: str) -> Iterator[str]:
        """The names of all files at any depth, but hidden ones.

        Args:
            what: Is looked for, for messages.

        Raises:
            UserError: if a folder is a link, which is not followed.
        """

    def read(self, name: str) -> bytes:
        """A whole file; `FileNotFoundError` if there is none."""

    def open(self, name: str, *, version: str | None = None) -> BinaryIO:
        """A seekable file of which some is read here and there.

        Args:
            name: Of the file.
            version: As it was listed; None is what is there now.
        """

    def open_video(self, name: str, *, size_bytes: int, version: str, offset: int | None = None) -> BinaryIO:
        """A seekable file that is read to its end more than once.

        Args:
            name: Of the file.
            size_bytes: Of what is wanted.
            version: As it was listed; where it can be told, `OSError` if it is another by now.
            offset: Where in the file it begins; None is all of it.
        """


def open_tree(dataset: str | Path, *, spool_dir: str | None = None) -> Tree:
    """The files of a dataset, which need not be there.

    Args:
        dataset: A folder or file, its URL in a bucket, or ``hf://datasets/...``, which is downloaded.
        spool_dir: Local folder for large videos from a bucket; by default that for temporary files.

    Raises:
        UserError: for a URL of another kind, or a bucket that is not there or not ours to see.
    """
    text = str(dataset)
    if text.startswith("hf://"):
        return LocalTree.of(*_hub.fetch_folder(text))
    if text.startswith(("https://", "http://")):
        raise UserError(
            f"{text}: a web server lists no files, so no dataset can be packed from there: download it, or copy it "
            "into a bucket"
        )
    if not is_remote(text):
        local = open_store(text).local_path() if "://" in text else Path(dataset)
        assert local is not None
        return LocalTree.of(local)
    folder, _, name = text.rpartition("/")
    if "." in name and not folder.endswith(":/"):  # perhaps a manifest or prompts
        parent = open_store(folder, spool_dir=spool_dir)
        if _holds(parent, name):
            return BucketTree(parent, file=name, spool_dir=spool_dir)
    return BucketTree(open_store(text, spool_dir=spool_dir), spool_dir=spool_dir)


def _holds(parent: Store, name: str) -> bool:
    try:
        return parent.exists(name)
    except UserError:  # we may see what is below NAME/ and not beside it; or nothing, as listing it will tell
        return False


def in_parallel(tree: Tree, work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """What a function that reads small files gives for each item, in their order."""
    if tree.at_once == 1:
        yield from map(work, items)
    else:
        done = fetch_ahead(items, work, size_bytes=lambda _: 0, max_bytes=0, num_threads=tree.at_once)
        with closing(done):
            yield from (result for _, result in done)


# --- a local folder


@dataclass(frozen=True, slots=True)
class LocalTree:
    """The files of a local folder. Links may not lead out of it, and no pipe or device is opened, which would block."""

    root: Path
    file: str | None = None
    links_into: Path | None = None
    """A folder beside the dataset that links may lead to, where the hub's cache has the contents."""

    at_once = 1

    @classmethod
    def of(cls, path: Path, links_into: Path | None = None) -> LocalTree:
        """The tree of a folder, or of the folder of a file."""
        if path.exists() and not path.is_dir():
            return cls(path.parent, path.name, links_into)
        return cls(path, None, links_into)

    @property
    def store(self) -> None:
        """None: it is no bucket."""
        return

    def local_path(self) -> Path:
        """The folder."""
        return self.root

    def where(self, name: str = "") -> str:
        """The root or a file, as a user would write it."""
        return str(self.root / name)

    def is_there(self) -> bool:
        """Whether the folder or file is."""
        return self.root.exists()

    def is_file(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.root / name).is_file()

    def exists(self, name: str) -> bool:
        """Whether there is anything of this name."""
        return (self.root / name).exists()

    def status(self, name: str) -> FileStatus | None:
        """Of a regular file, None if it is missing; links must stay inside the dataset.

        Raises:
            UserError: if it is a folder, pipe or device, or a link leads out.
        """
        full = self.root / name
        try:
            status = full.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
                raise
            raise UserError(f"{str(full)[:300]}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{full} is not a regular file")
        resolved = full.resolve()
        allowed = (folder.resolve() for folder in (self.root, self.links_into) if folder is not None)
        if not any(resolved.is_relative_to(folder) for folder in allowed):
            raise UserError(f"{full} is a link to {resolved}, outside the dataset: copy it in")
        # In the hub's cache a name is a link to what is called by its digest.
        is_blob = self.links_into is not None and full.is_symlink()
        return FileStatus(status.st_size, resolved.name if is_blob else str(status.st_mtime_ns))

    def version_of(self, name: str) -> str:
        """When it was changed."""
        return str((self.root / name).stat().st_mtime_ns)

    def walk(self, *, what: str) -> Iterator[str]:
        """The names of all files at any depth, but hidden ones; in each folder sorted."""
        for inside, subfolders, files in os.walk(self.root, onerror=_raise):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for path in (Path(inside, name) for name in subfolders):
                if path.is_symlink():
                    raise UserError(f"{path} is a link to a folder, which is not followed: move the {what} in")
            for name in sorted(name for name in files if not name.startswith(".")):
                yield Path(inside, name).relative_to(self.root).as_posix()

    def read(self, name: str) -> bytes:
        """A whole file; `FileNotFoundError` if there is none."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str, *, version: str | None = None) -> BinaryIO:
        """A file that is no pipe or device.

        Raises:
            UserError: if it is one.
        """
        path = self.root / name
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise UserError(f"{path} is not a regular file")
        return open(handle, "rb")

    def open_video(self, name: str, *, size_bytes: int, version: str, offset: int | None = None) -> BinaryIO:
        """The file itself, or a part of it."""
        file = self.open(name)
        return file if offset is None else open_member(file, offset, size_bytes)


def _raise(error: OSError) -> None:
    raise error  # os.walk passes over what it cannot read


# --- a bucket


class BucketTree:
    """The objects below a place in a bucket.

    Folders are listed once, and nothing is asked for each object but its bytes. Those of a video are fetched once, in
    the version that was listed, though packing goes over them three times: into memory, or, of a large one, into a file
    that has no name, so that nothing is left of it whatever happens.
    """

    at_once = _AT_ONCE

    def __init__(self, store: Store, *, file: str | None = None, spool_dir: str | None = None) -> None:
        self.store, self.file, self._spool_dir = store, file, spool_dir
        self._folders: dict[str, dict[str, FileEntry]] = {}
        self._all: dict[str, FileEntry] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "file": self.file, "spool_dir": self._spool_dir}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def local_path(self) -> None:
        """None: it is no folder."""
        return

    def where(self, name: str = "") -> str:
        """The URL of the root or a file."""
        return f"{self.store.url}/{name}" if name else self.store.url

    def is_there(self) -> bool:
        """Whether any object is."""
        return self.file is not None or next(self.store.walk(), None) is not None

    def is_file(self, name: str) -> bool:
        """Whether there is an object of this name."""
        return self._find(name) is not None

    def exists(self, name: str) -> bool:
        """The same: there are no folders."""
        return self.is_file(name)

    def status(self, name: str) -> FileStatus | None:
        """Of an object, None if it is missing."""
        entry = self._find(name)
        # ``NAME/``, which some programs create for an empty folder, is listed as ``NAME`` with no bytes.
        if entry is None or (not entry.size_bytes and not self.store.exists(entry.path)):
            return None
        return FileStatus(entry.size_bytes, entry.version)

    def version_of(self, name: str) -> str:
        """The entity tag."""
        return self._entry(name).version

    def walk(self, *, what: str) -> Iterator[str]:
        """The names of all objects at any depth, but hidden ones."""
        with self._lock:
            names = sorted(self._list_all())
        return (name for name in names if not any(part.startswith(".") for part in name.split("/")))

    def read(self, name: str) -> bytes:
        """A whole object; `FileNotFoundError` if there is none."""
        return self.store.read(name)

    def open(self, name: str, *, version: str | None = None) -> BinaryIO:
        """Read in ranges. A version needs no listing."""
        if version is None:
            entry = self._entry(name)
            size_bytes, version = entry.size_bytes, entry.version
        else:
            size_bytes = self.store.size_bytes(name)

        def fetch(offset: int, size: int) -> bytes:
            return self._fetch(name, offset, size, version)

        return cast(BinaryIO, RangedFile(size_bytes, fetch, name=self.where(name)))

    def open_video(self, name: str, *, size_bytes: int, version: str, offset: int | None = None) -> BinaryIO:
        """A copy, fetched in pieces side by side."""
        begin = offset or 0
        pieces = [
            (start, min(_PIECE_BYTES, begin + size_bytes - start))
            for start in range(begin, begin + size_bytes, _PIECE_BYTES)
        ]
        if len(pieces) <= 1:
            return io.BytesIO(self._fetch(name, begin, size_bytes, version))
        copy = io.BytesIO() if size_bytes <= AHEAD_BYTES else self._spool()
        try:
            fetched = fetch_ahead(
                pieces,
                lambda piece: self._fetch(name, *piece, version),
                size_bytes=lambda piece: piece[1],
                max_bytes=(_PIECES_AT_ONCE + 1) * _PIECE_BYTES,
                num_threads=_PIECES_AT_ONCE,
            )
            with closing(fetched):
                for _, data in fetched:
                    copy.write(data)
            copy.seek(0)
        except BaseException as error:
            copy.close()
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise self._no_room(error) from error
            raise
        return copy

    def _fetch(self, name: str, offset: int, size: int, version: str) -> bytes:
        try:
            return self.store.read_range(name, offset, size, version=version)
        except (FileReplaced, FileNotFoundError) as error:
            raise OSError(
                f"{self.where(name)} changed while it was packed; let it settle and pack into a new folder"
            ) from error

    def _spool(self) -> BinaryIO:
        """A file without a name."""
        folder = Path(self._spool_folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> OSError:
        problem = f"no copy of a video of {self.where()} can be kept in the spool (--spool-dir): {error.strerror}"
        return OSError(error.errno, problem, self._spool_folder)

    @property
    def _spool_folder(self) -> str:
        return self._spool_dir or tempfile.gettempdir()

    def _entry(self, name: str) -> FileEntry:
        entry = self._find(name)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", self.where(name))
        return entry

    def _find(self, name: str) -> FileEntry | None:
        path = PurePosixPath(name)
        with self._lock:
            return self._names_near(path).get(str(path))

    def _names_near(self, path: PurePosixPath) -> dict[str, FileEntry]:
        """The objects of one folder, or of all, by name."""
        folder = "" if path.parent == PurePosixPath() else str(path.parent)
        if self._all is None and folder not in self._folders:
            if len(self._folders) == _MOST_FOLDERS:
                return self._list_all()
            self._folders[folder] = {entry.path: entry for entry in self.store.list(folder)}
        return self._folders[folder] if self._all is None else self._all

    def _list_all(self) -> dict[str, FileEntry]:
        if self._all is None:
            self._all = {entry.path: entry for entry in self.store.walk()}
            self._folders.clear()
        return self._all
