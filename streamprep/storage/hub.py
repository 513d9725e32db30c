"""A folder of a dataset's repository on the Hugging Face hub: one commit to read from, one commit to write.

Reading is by ranges of the files of one commit, the one that the revision meant when this process first asked, so a
repository that moves is never mixed; what is sent to another process keeps to the commit. A process that writes adds to
the head as it is then.

Commits are counted by the hour and slow, but one can hold any number of files, and is seen as a whole or not at all. So
what is written lies in a local folder, which all that is read goes through (`streamprep.storage.staging`), until
`publish_all` uploads it as one commit (`streamprep.storage.hub_commit`) and removes the local copy: that is the moment
when a job on the hub is done. The folder is named by the URL, so the same command finds it again. Ranks must share it:
those of one machine do, those of several by ``--spool-dir``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import ENOENT
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from huggingface_hub import constants

from streamprep.errors import UserError
from streamprep.storage.hub_commit import Publication
from streamprep.storage.hub_requests import ERRORS, HubFile, HubPlace, HubRequests
from streamprep.storage.interface import FileEntry, FileReplaced, Store, StoreError, StoreStats, parts_of
from streamprep.storage.local import LocalFile
from streamprep.storage.ranged import RangedFile
from streamprep.storage.staging import Staging, staging_folder

_PIECE_BYTES = 16 * 2**20
_PIECES_AT_ONCE = 4

T = TypeVar("T")

_pins: dict[HubPlace, str] = {}
"""The commit that each place has in this process."""


@dataclass(frozen=True, slots=True)
class _View:
    """What is seen at a moment: files of a commit, and what is staged on top of it."""

    commit: str
    is_staged: bool


class HubStore:
    """Files below one folder of a dataset's repository.

    Args:
        place: Which.
        spool_dir: Where files lie until they are published; by default in the user's folder of caches.
    """

    def __init__(self, place: HubPlace, *, spool_dir: str | None = None) -> None:
        self.place = place
        self.stats = StoreStats()
        self._spool_dir = spool_dir
        self._hub = HubRequests(place, self.stats)
        name = place.repository + (f"/{place.folder}" if place.folder else "")
        self._staging = Staging(staging_folder(f"{constants.ENDPOINT} {place.url}", name, spool_dir))
        self._lock = threading.Lock()
        self._was_staged = False
        self._folders: dict[tuple[str, str], Mapping[str, HubFile]] = {}
        self._readers: tuple[int, ThreadPoolExecutor] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {
            "place": self.place,
            "spool_dir": self._spool_dir,
            "pin": _pins.get(self.place),
            "answered": self._hub.answered,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["place"], spool_dir=state["spool_dir"])  # type: ignore[misc]
        self._hub = HubRequests(self.place, self.stats, answered=state["answered"])
        if state["pin"] is not None:
            _pins.setdefault(self.place, state["pin"])

    @property
    def url(self) -> str:
        """``hf://datasets/ORG/NAME[@REVISION]/FOLDER``."""
        return self.place.url

    def local_path(self) -> Path | None:
        """None: it is no folder, even while its files are staged."""
        return None

    def same_place(self, other: Store) -> bool:
        """Whether both are the same folder of the same repository."""
        return isinstance(other, HubStore) and self.place == other.place

    # --- reading

    def read(self, path: str) -> bytes:
        """The whole file; `FileNotFoundError` if there is none."""
        path = self._name(path)

        def ask(view: _View) -> bytes:
            if view.is_staged:
                if self._staging.files.exists(path):
                    return self._staging.files.read(path)
                self._published(view, path)  # a look at a listing that is kept, not a request for what is not there
            return self._hub.read(path, view.commit)

        return self._look(ask)

    def read_range(self, path: str, offset: int, size: int, *, version: str | None = None) -> bytes:
        """Exactly ``size`` bytes from ``offset``; `EOFError` if the file is shorter."""
        path = self._name(path)
        if version is not None and version not in {entry.version for entry in self.list(_parent(path))}:
            raise FileReplaced(f"{self.url}/{path}", "it was replaced while it was read")

        def ask(view: _View) -> bytes:
            if view.is_staged and self._staging.files.exists(path):
                return self._staging.files.read_range(path, offset, size)
            if not size:
                self._published(view, path)
                return b""
            return self._read_range(view, path, offset, size)

        return self._look(ask)

    def _read_range(self, view: _View, path: str, offset: int, size: int) -> bytes:
        starts = range(offset, offset + size, _PIECE_BYTES)
        pieces = [(start, min(_PIECE_BYTES, offset + size - start)) for start in starts]
        if len(pieces) == 1:
            data = self._hub.read(path, view.commit, start=offset, size=size)
        else:
            read = self._reading().map(
                lambda piece: self._hub.read(path, view.commit, start=piece[0], size=piece[1]), pieces
            )
            data = b"".join(read)
        if len(data) < size:
            found = self._published(view, path).size_bytes
            if found < offset + size:
                raise EOFError(f"{path} has {found} bytes, {offset + size} were expected")
            raise StoreError(f"{self.url}/{path}", f"{size} bytes were asked for, {len(data)} came", passing=True)
        return data

    def open(self, path: str) -> BinaryIO:
        """A seekable file, read in ranges, more of them ahead the longer it is read in order."""
        path = self._name(path)

        def ask(view: _View) -> BinaryIO:
            if view.is_staged and self._staging.files.exists(path):
                return self._staging.files.open(path)
            found = self._published(view, path)
            return cast(
                BinaryIO,
                RangedFile(
                    found.size_bytes,
                    lambda offset, size: self._hub.read(path, view.commit, start=offset, size=size),
                    name=path,
                ),
            )

        return self._look(ask)

    def exists(self, path: str) -> bool:
        """Whether the file is there."""
        try:
            self.size_bytes(path)
        except FileNotFoundError:
            return False
        return True

    def size_bytes(self, path: str) -> int:
        """Of a file; `FileNotFoundError` if there is none."""
        path = self._name(path)

        def ask(view: _View) -> int:
            if view.is_staged and self._staging.files.exists(path):
                return self._staging.files.size_bytes(path)
            return self._published(view, path).size_bytes

        return self._look(ask)

    def list(self, folder: str = "", *, prefix: str = "") -> Iterator[FileEntry]:
        """The files directly in a folder whose names begin so, sorted; nothing if there is no such folder."""
        folder = self._name(folder) if folder else ""

        def ask(view: _View) -> Mapping[str, FileEntry]:
            found = {file.path: file.as_entry() for file in self._folder(view.commit, folder).values()}
            if view.is_staged:
                found = {path: entry for path, entry in found.items() if not self._staging.is_deleted(path)}
                found |= {entry.path: entry for entry in self._staging.files.list(folder)}
            return found

        start = f"{folder}/{prefix}" if folder else prefix
        entries = self._look(ask)
        yield from (entries[path] for path in sorted(entries) if path.startswith(start))

    def walk(self, folder: str = "") -> Iterator[FileEntry]:
        """All files below a folder, at any depth, sorted."""
        folder = self._name(folder) if folder else ""

        def ask(view: _View) -> Mapping[str, FileEntry]:
            found = {file.path: file.as_entry() for file in self._hub.tree(folder, view.commit, recursive=True)}
            if view.is_staged:
                found = {path: entry for path, entry in found.items() if not self._staging.is_deleted(path)}
                found |= {entry.path: entry for entry in self._staging.all_files(folder)}
            return found

        entries = self._look(ask)
        yield from (entries[path] for path in sorted(entries))

    def free_bytes(self) -> int | None:
        """What can still be staged."""
        return self._staging.files.free_bytes()

    # --- writing

    def new_file(self) -> LocalFile:
        """A file that nobody sees until it is published: in the local folder, for now."""
        self._begin()
        return _StagedFile(self, self._staging)

    def put(self, path: str, data: bytes, *, step: str) -> None:
        """Write a whole file, replacing what was there."""
        self._begin()
        self._staging.files.put(self._name(path), data, step=step)

    def put_if_absent(self, path: str, data: bytes, *, step: str) -> bool:
        """Write a whole file unless one is there; of several writers exactly one gets True."""
        self._catch_up()
        if self.exists(path):
            return False
        self._begin()
        return not self.exists(path) and self._staging.files.put_if_absent(self._name(path), data, step=step)

    def check_create_only(self) -> bool:
        """Local folders can. What is asked for here is whether the result may be published, before any work."""
        if self.place.revision is not None and not self._hub.is_branch(self.place.revision):
            raise UserError(
                f"{self.url}: {self.place.revision!r} is no branch of the repository, so nothing can be added"
            )
        self._view()
        self._hub.check_may_write()
        self._staging.sweep()
        return True

    def link(self, path: str, target: Path, *, step: str) -> None:
        """A repository has no links."""
        raise UserError(f"{self.url}: a repository cannot hold links to local files; choose a local folder")

    def delete(self, path: str, *, step: str) -> None:
        """Remove a file; it is no error if it is gone."""
        path = self._name(path)
        self._catch_up()
        view = self._view()
        if path in self._folder(view.commit, _parent(path)):
            self._begin()
            self._staging.delete(path, step=step)
        if self._staging.base() is not None:
            self._staging.files.delete(path, step=step)

    def remove_if_empty(self, folder: str) -> None:
        """Remove a folder, unless something is in it; it is no error if it is gone."""
        self._staging.files.remove_if_empty(self._name(folder))

    def remove_unpublished(self) -> None:
        """Remove what processes of this machine that died left half written; files of living ones stay."""
        self._staging.files.remove_unpublished()

    # --- publishing

    def staged_in(self) -> Path | None:
        """The local folder where files lie until `publish_all`."""
        return self._staging.folder

    def is_all_published(self) -> bool:
        """Whether nothing is staged."""
        return self._staging.base() is None

    def publish_all(self, *, summary: str | None = None, leave_out: Sequence[str] = ()) -> None:
        """Make one commit of what is staged, then remove the local copy; nothing if nothing is staged.

        Args:
            summary: A file that names all others by their digests: if somebody else has published the same since, who
                has staged elsewhere, it has been done.
            leave_out: Folders that do not belong to the result.

        Raises:
            UserError: if the hub has other files of these names by now.
            StoreError: if it is not reached, or refuses. Nothing is lost: the same command goes on here.
        """
        base = self._staging.base()
        if base is None:
            return
        try:
            publication = Publication(self._hub, self._staging, base=base, stats=self.stats, leave_out=leave_out)
            commit = publication.publish(summary)
        except ERRORS:
            if self._staging.base() == base:
                raise
            return  # another process has published it meanwhile, and removed the folder under us
        self._staging.remove(base=base)
        self._was_staged, _pins[self.place] = False, commit

    # --- what is seen

    def _view(self) -> _View:
        base = self._staging.base()
        if base is not None:
            self._was_staged = True
            return _View(base, is_staged=True)
        with self._lock:
            if self._was_staged:  # it is published by now, in a commit after the one we knew
                self._was_staged = False
                _pins.pop(self.place, None)
            if self.place not in _pins:
                _pins[self.place] = self._hub.commit_of(self.place.revision)
            return _View(_pins[self.place], is_staged=False)

    def _look(self, ask: Callable[[_View], T]) -> T:
        """What is seen; anew, if just then all was published and the local folder removed."""
        while True:
            view = self._view()
            try:
                answer = ask(view)
            except FileNotFoundError:
                if self._view() == view:
                    raise
                continue
            if not view.is_staged or self._staging.base() == view.commit:
                return answer

    def _published(self, view: _View, path: str) -> HubFile:
        """A file of the commit, unless it is to go."""
        file = self._folder(view.commit, _parent(path)).get(path)
        if file is None or (view.is_staged and self._staging.is_deleted(path)):
            raise FileNotFoundError(ENOENT, "there is no such file", f"{self.url}/{path}")
        return file

    def _folder(self, commit: str, folder: str) -> Mapping[str, HubFile]:
        """The files of a folder in a commit, which never changes."""
        found = self._folders.get((commit, folder))
        if found is None:
            found = {file.path: file for file in self._hub.tree(folder, commit)}
            self._folders[commit, folder] = found
        return found

    def _catch_up(self) -> None:
        """Look at the head anew, if nothing is staged: other ranks may have done all of the job and published it."""
        if self._staging.base() is None:
            commit = self._hub.commit_of(self.place.revision)
            with self._lock:
                self._was_staged, _pins[self.place] = False, commit

    def _begin(self) -> None:
        """What is written from now on is staged."""
        if self._staging.base() is None:
            self._staging.begin(lambda: self._hub.commit_of(self.place.revision), url=self.url)

    def _name(self, path: str) -> str:
        return str(parts_of(path, below=self.url))

    def _reading(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._readers is None or self._readers[0] != os.getpid():  # threads do not survive a fork
                self._readers = os.getpid(), ThreadPoolExecutor(_PIECES_AT_ONCE, thread_name_prefix="streamprep-read")
            return self._readers[1]


class _StagedFile(LocalFile):
    """A file in the local folder; one that the hub has already does not give way either."""

    def __init__(self, store: HubStore, staging: Staging) -> None:
        super().__init__(staging.files)
        self._hub_store = store

    def publish(self, path: str, *, step: str, replace: bool = True) -> bool:
        if not replace and self._hub_store.exists(path):
            return False
        return super().publish(path, step=step, replace=replace)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
