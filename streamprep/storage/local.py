"""A local folder, or one that all nodes see, by our own POSIX calls.

A file is built under a temporary name in ``ROOT/.tmp``, flushed to the disk, then published
under its final name, and the folder is flushed too: a file that can be seen can be trusted, after a power cut as well.
A process holds a lock on its temporary files, so that those of dead processes can be told and removed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from streamprep.crashpoints import crash_point
from streamprep.storage.interface import FileEntry, FileReplaced, Store, StoreStats, parts_of

_TEMPORARY_FOLDER = ".tmp"
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV}


class LocalStore:
    """Files below one local folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - Path.absolute keeps '..'
        self.stats = StoreStats()

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"])  # type: ignore[misc]

    @property
    def url(self) -> str:
        """Its path."""
        return str(self.root)

    def local_path(self) -> Path | None:
        """The folder."""
        return self.root

    def same_place(self, other: Store) -> bool:
        """Whether both are the same folder, by its path."""
        return self.root == other.local_path()

    # --- reading

    def read(self, path: str) -> bytes:
        """The whole file; `FileNotFoundError` if there is none."""
        return self._resolve(path).read_bytes()

    def read_range(self, path: str, offset: int, size: int, *, version: str | None = None) -> bytes:
        """Exactly ``size`` bytes from ``offset``; `EOFError` if the file is shorter."""
        with open(self._resolve(path), "rb", buffering=0) as file:
            if version is not None and str(os.fstat(file.fileno()).st_mtime_ns) != version:
                raise FileReplaced(str(self.root / path), "it was replaced while it was read")
            data = os.pread(file.fileno(), size, offset)
            while len(data) < size:  # a single read returns at most 2 GiB
                more = os.pread(file.fileno(), size - len(data), offset + len(data))
                if not more:
                    found = os.fstat(file.fileno()).st_size
                    raise EOFError(f"{path} has {found} bytes, {offset + size} were expected")
                data += more
        return data

    def open(self, path: str) -> BinaryIO:
        """A seekable file to read from."""
        return open(self._resolve(path), "rb")

    def exists(self, path: str) -> bool:
        """Whether the file is there."""
        return self._resolve(path).is_file()

    def size_bytes(self, path: str) -> int:
        """Of a file; `FileNotFoundError` if there is none."""
        return self._resolve(path).stat().st_size

    def list(self, folder: str = "", *, prefix: str = "") -> Iterator[FileEntry]:
        """The files directly in a folder whose names begin so, sorted; nothing if there is no such folder."""
        try:
            with os.scandir(self._resolve(folder) if folder else self.root) as scan:
                found = (entry for entry in scan if entry.name.startswith(prefix) and entry.is_file())
                entries = sorted(found, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process has removed it
                continue
            yield FileEntry(str(PurePosixPath(folder, entry.name)), status.st_size, str(status.st_mtime_ns))

    def walk(self, folder: str = "") -> Iterator[FileEntry]:
        """All files below a folder, but those that are not published; links to folders are not followed."""
        for inside, subfolders, _ in os.walk(
            self._resolve(folder) if folder else self.root, onerror=_raise_unless_gone
        ):
            relative = Path(inside).relative_to(self.root)
            subfolders[:] = sorted(name for name in subfolders if relative / name != Path(_TEMPORARY_FOLDER))
            yield from self.list("" if relative == Path() else str(relative))

    def free_bytes(self) -> int:
        """What can still be written."""
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    # --- writing

    def new_file(self) -> LocalFile:
        """A file that nobody sees until it is published; a context manager."""
        return LocalFile(self)

    def put(self, path: str, data: bytes, *, step: str) -> None:
        """Write a whole file, replacing what was there."""
        with self.new_file() as file:
            file.path.write_bytes(data)
            file.publish(path, step=step)

    def put_if_absent(self, path: str, data: bytes, *, step: str) -> bool:
        """Write a whole file unless one is there; of several writers exactly one gets True."""
        if self.exists(path):
            return False
        with self.new_file() as file:
            file.path.write_bytes(data)
            return file.publish(path, step=step, replace=False)

    def check_create_only(self) -> bool:
        """Local folders can, or say that they cannot when the first file is published."""
        return True

    def link(self, path: str, target: Path, *, step: str) -> None:
        """Make a symbolic link; it is no error if it is there already."""
        link = self._resolve(path)
        crash_point(step)
        _make_folder(link.parent)
        try:
            link.symlink_to(target)
        except FileExistsError:
            if not link.is_symlink() or link.readlink() != target:
                raise
        _flush_folder(link.parent)
        crash_point(f"{step}.after")

    def delete(self, path: str, *, step: str) -> None:
        """Remove a file; it is no error if it is gone."""
        crash_point(step)
        self._resolve(path).unlink(missing_ok=True)
        crash_point(f"{step}.after")

    def remove_unpublished(self) -> None:
        """Remove what processes that died left half written; files of living ones stay."""
        folder = self.root / _TEMPORARY_FOLDER
        try:
            paths = list(folder.iterdir())
        except FileNotFoundError:
            return
        for path in paths:
            try:
                with open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)
            except (BlockingIOError, FileNotFoundError):
                continue
        self.remove_if_empty(_TEMPORARY_FOLDER)

    def remove_if_empty(self, folder: str) -> None:
        """Remove a folder, unless something is in it; it is no error if it is gone."""
        try:
            self._resolve(folder).rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise

    def staged_in(self) -> Path | None:
        """None: a file is seen as soon as it is written."""
        return None

    def is_all_published(self) -> bool:
        """Yes."""
        return True

    def publish_all(self, *, summary: str | None = None, leave_out: Sequence[str] = ()) -> None:
        """Nothing."""

    def _resolve(self, path: str) -> Path:
        return self.root / parts_of(path, below=self.url)


class LocalFile:
    """A file under a temporary name; `publish` gives it its final one, leaving the block without that removes it."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.path: Path
        """Where to write."""

    def __enter__(self) -> LocalFile:
        folder = self._store.root / _TEMPORARY_FOLDER
        while True:
            _make_folder(folder)
            self.path = folder / f"{uuid.uuid4().hex}.tmp"
            try:
                self._lock = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # the folder was tidied away just now
                continue
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if os.fstat(self._lock).st_nlink == 1:  # else remove_unpublished came between open and flock
                return self
            os.close(self._lock)

    def publish(self, path: str, *, step: str, replace: bool = True) -> bool:
        """Flush the file to the disk, then give it its name; False if another has it and does not give way."""
        target = self._store._resolve(path)
        os.fsync(self._lock)
        crash_point(step)
        _make_folder(target.parent)
        if replace:
            self.path.replace(target)
        elif not _publish_if_absent(self.path, target):
            return False
        _flush_folder(target.parent)
        crash_point(f"{step}.after")
        return True

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._lock)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error  # os.walk passes over what it cannot read


def _publish_if_absent(source: Path, target: Path) -> bool:
    """Atomic on local file systems and NFS by link(2); where there are no links, by renameat2(RENAME_NOREPLACE)."""
    try:
        os.link(source, target)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    return _rename_if_absent(source, target)


def _rename_if_absent(source: Path, target: Path) -> bool:
    at_working_folder, no_replace = -100, 1
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.renameat2(
        at_working_folder, os.fsencode(source), at_working_folder, os.fsencode(target), ctypes.c_uint(no_replace)
    )
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    raise OSError(
        code, f"this file system cannot create a file only if it is absent ({os.strerror(code)})", str(target)
    )


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "a file stands where a folder is needed", str(folder)) from None
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
