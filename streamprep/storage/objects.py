"""A place in a bucket (S3 and what speaks like it, Google Cloud Storage, Azure), by obstore.

An object is whole when it can be seen, so nothing need be renamed: a file is built in the spool, a local folder, and
uploaded under its final name, in parts if it is large. An upload that fails is aborted; what a killed process leaves of
one is never seen, and the bucket's lifecycle rule for incomplete uploads removes it.

Writing only if absent is a conditional put. If its reply is lost, what is there says who was first, before it is sent
again.

Trouble that may pass is asked away: every kind of request is made again until the time of `streamprep.storage.patience`
is over, which is one for all that belongs to it.

A client starts threads, so it does not survive a fork: each process makes its own when it first needs one.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from errno import ENOENT, ENOSPC
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeVar, cast

import obstore
import obstore.exceptions

from streamprep.crashpoints import crash_point
from streamprep.errors import UserError, first_line
from streamprep.signals import is_leaving
from streamprep.storage.interface import FileEntry, FileReplaced, Store, StoreError, StoreStats, parts_of
from streamprep.storage.local import LocalFile
from streamprep.storage.patience import Patience, patience_seconds
from streamprep.storage.places import Place, check_not_forked, connect, without_secrets
from streamprep.storage.ranged import RangedFile
from streamprep.storage.spool import open_spool
from streamprep.storage.troubles import ERRORS, understand

if TYPE_CHECKING:
    from streamprep.storage.places import Client

T = TypeVar("T")

_PIECE_BYTES = 16 * 2**20
"""Larger reads are several requests side by side: each is soon done, within the time that one may take."""
_PIECES_AT_ONCE = 4
_MULTIPART_ABOVE = 16 * 2**20
_PART_BYTES = 8 * 2**20
_MOST_PARTS = 9000  # S3 takes 10 000
_PARTS_AT_ONCE = 4
_UPLOADS = 2
"""Of an object in parts, at least: it may take longer than the time for a request, and fail at the last."""
_LIST_PAGE = 1000
_PROBES = ".tmp"
_LONGEST_PROBE = timedelta(hours=1)
"""It takes seconds; a clock may be wrong, and a probe that is removed too early tells lies."""
_SPOOL_RESERVE_BYTES = 64 * 2**20

_heard: set[tuple[str, str]] = set()
"""Scheme and bucket of those that have answered this process, in whatever words, since a request last gave one up."""


class ObjectStore:
    """Objects below one prefix of a bucket.

    Args:
        place: Which.
        spool_dir: Where files are built; by default where temporary files go.
    """

    def __init__(self, place: Place, *, spool_dir: str | None = None) -> None:
        self.place = place
        self.stats = StoreStats()
        self.spool = open_spool(spool_dir)
        self._lock = threading.Lock()
        self._clients: dict[bool, Client] = {}
        self._readers: ThreadPoolExecutor | None = None
        self._answered = False
        self._bucket_seen = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "spool_dir": str(self.spool.root.parent), "answered": self._answered}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["place"], spool_dir=state["spool_dir"])  # type: ignore[misc]
        if state["answered"]:
            self._has_answered()

    @property
    def url(self) -> str:
        """``s3://BUCKET/PREFIX``."""
        return self.place.url

    def local_path(self) -> Path | None:
        """None: it is no folder."""
        return None

    def same_place(self, other: Store) -> bool:
        """Whether both are the same prefix of the same bucket."""
        return isinstance(other, ObjectStore) and self.place == other.place

    # --- reading

    def read(self, path: str) -> bytes:
        """The whole object; `FileNotFoundError` if there is none."""
        return self._read(path, Patience())

    def _read(self, path: str, patience: Patience) -> bytes:
        key = self._key(path)
        data = self._ask("get", path, lambda client: bytes(obstore.get(client, key).bytes()), patience)
        self.stats.count("get", number=0, bytes_read=len(data))
        return data

    def read_range(self, path: str, offset: int, size: int, *, version: str | None = None) -> bytes:
        """Exactly ``size`` bytes from ``offset``; `EOFError` if the object is shorter."""
        if not size:
            found = self._head(path)  # FileNotFoundError
            if version is not None and _entity_tag(found["e_tag"]) != _entity_tag(version):
                raise _replaced(self._url(path))
            return b""
        starts = range(offset, offset + size, _PIECE_BYTES)
        pieces = [(start, min(_PIECE_BYTES, offset + size - start)) for start in starts]
        if len(pieces) == 1:
            data = self._piece(path, offset, size, version)
        else:
            data = b"".join(self._reading().map(lambda piece: self._piece(path, piece[0], piece[1], version), pieces))
        if len(data) < size:
            raise EOFError(f"{path} has {self.size_bytes(path)} bytes, {offset + size} were expected")
        return data

    def _piece(
        self, path: str, offset: int, size: int, version: str | None = None, patience: Patience | None = None
    ) -> bytes:
        """At most ``size`` bytes of an object that must still be of this version, if one is given."""
        key = self._key(path)
        wanted: Any = {"range": (offset, offset + size), **({"if_match": _entity_tag(version)} if version else {})}
        try:
            data = self._ask(
                "get", path, lambda client: bytes(obstore.get(client, key, options=wanted).bytes()), patience
            )
        except _TooShort:
            return b""
        self.stats.count("get", number=0, bytes_read=len(data))
        return data

    def open(self, path: str) -> BinaryIO:
        """A seekable file, read in ranges, more of them ahead the longer it is read in order."""
        return self._open(path)

    def _open(self, path: str, patience: Patience | None = None) -> BinaryIO:
        found = self._head(path, patience)
        version = found["e_tag"]

        def fetch(offset: int, size: int) -> bytes:
            return self._piece(path, offset, size, version, patience)

        return cast(BinaryIO, RangedFile(found["size"], fetch, name=path))

    def exists(self, path: str) -> bool:
        """Whether the object is there."""
        try:
            self._head(path)
        except FileNotFoundError:
            return False
        return True

    def size_bytes(self, path: str) -> int:
        """Of an object; `FileNotFoundError` if there is none."""
        return int(self._head(path)["size"])

    def list(self, folder: str = "", *, prefix: str = "") -> Iterator[FileEntry]:
        """The objects directly below a prefix whose names begin so, sorted."""
        key = self._key(folder) if folder else None
        found = self._ask("list", folder, lambda client: obstore.list_with_delimiter(client, key))["objects"]
        self.stats.count("list", number=len(found) // _LIST_PAGE)
        self._bucket_seen = True
        start = f"{folder}/{prefix}" if folder else prefix
        entries = [_entry(one) for one in found if str(one["path"]).startswith(start)]
        yield from sorted(entries, key=lambda entry: entry.path)

    def walk(self, folder: str = "") -> Iterator[FileEntry]:
        """All objects below a prefix, as they are listed."""
        start = f"{self._key(folder)}/" if folder else ""
        seen = set[str]()
        pages, patience = self._pages(start), Patience()
        while True:
            try:
                page = next(pages, None)
            except StoreError as error:
                if not self._is_worth_another(error, patience):
                    raise
                pages = self._pages(start)  # not from the last name on: not all stores list by name
                continue
            if page is None:
                return
            new = [_entry(one) for one in page if str(one["path"]) not in seen]
            seen.update(entry.path for entry in new)
            yield from (entry for entry in new if entry.path and entry.path.startswith(start))
            if new:
                patience = Patience()

    def _pages(self, start: str) -> Iterator[Any]:
        pages = obstore.list(self._connected(), start or None, chunk_size=_LIST_PAGE)  # asks nothing yet
        while True:
            with self._request(start.rstrip("/")):
                page: Any = next(pages, ())
            self.stats.count("list")
            self._bucket_seen = True
            yield page
            if len(page) < _LIST_PAGE:
                return

    def free_bytes(self) -> int | None:
        """None: a bucket is never full."""
        return None

    # --- writing

    def new_file(self) -> PendingObject:
        """A file in the spool."""
        return PendingObject(self)

    def put(self, path: str, data: bytes, *, step: str) -> None:
        """Write a whole object, replacing what was there."""
        self._key(path)
        crash_point(step)
        with suppress(
            FileNotFoundError
        ):  # it is written, and another process has removed it since, as it may with marks
            self._upload(path, data)
        crash_point(f"{step}.after")

    def put_if_absent(self, path: str, data: bytes, *, step: str) -> bool:
        """Write a whole object unless one is there; see `_create`."""
        self._key(path)
        crash_point(step)
        if not self._create(path, data):
            return False
        crash_point(f"{step}.after")
        return True

    def check_create_only(self) -> bool:
        """Create one object twice: where that works, the store takes no notice of conditions."""
        path = f"{_PROBES}/probe-{uuid.uuid4().hex}"
        try:
            honoured = self._create_until_refused(path)
            self._delete(path)
        except _Unsupported:
            return False
        except _Refused as error:
            raise UserError(f"{error}. Writing and deleting must be allowed there") from None
        return honoured

    def _create_until_refused(self, path: str) -> bool:
        """Whether an object cannot be created a second time; a try whose reply is lost tells nothing."""
        times_created, tries, patience = 0, 0, Patience()
        while times_created < 2:
            tries += 1
            try:
                with self._request(path, writes=True) as client:
                    obstore.put(client, path, b"%d" % tries, mode="create")
                times_created += 1
            except obstore.exceptions.AlreadyExistsError:
                return True
            except StoreError as error:
                if not self._is_worth_another(error, patience):
                    raise
            finally:
                self._count_put(1)
        return False

    def link(self, path: str, target: Path, *, step: str) -> None:
        """A bucket has no links."""
        raise UserError(f"{self.url}: a bucket cannot hold links to local files; choose a local folder")

    def delete(self, path: str, *, step: str) -> None:
        """Remove an object; it is no error if it is gone."""
        self._key(path)
        crash_point(step)
        self._delete(path)
        crash_point(f"{step}.after")

    def remove_if_empty(self, folder: str) -> None:
        """Nothing: there are no folders, only names that begin alike."""

    def remove_unpublished(self) -> None:
        """Remove what died with a process: files in the spool of this machine, and old probes in the bucket."""
        self.spool.remove_unpublished()
        long_ago = datetime.now(UTC) - _LONGEST_PROBE
        for one in self._ask("list", _PROBES, lambda client: obstore.list_with_delimiter(client, _PROBES))["objects"]:
            if str(one["path"]).startswith(f"{_PROBES}/probe-") and one["last_modified"] < long_ago:
                self._delete(str(one["path"]))

    def staged_in(self) -> Path | None:
        """None: an object is seen as soon as it is written."""
        return None

    def is_all_published(self) -> bool:
        """Yes."""
        return True

    def publish_all(self, *, summary: str | None = None, leave_out: Sequence[str] = ()) -> None:
        """Nothing."""

    # --- requests

    def _upload(self, path: str, source: bytes | Path) -> None:
        """Write an object, in parts if it is large; a whole upload that failed is done again."""
        key, size = self._key(path), _size(source)
        part = max(_PART_BYTES, -(-size // _MOST_PARTS))
        in_parts = size > _MULTIPART_ABOVE
        tries, patience = 0, Patience()
        while True:
            tries += 1
            try:
                with self._request(path, writes=True, in_parts=in_parts) as client:
                    obstore.put(
                        client,
                        key,
                        source,
                        use_multipart=in_parts,
                        chunk_size=part,
                        max_concurrency=_PARTS_AT_ONCE,
                    )
                break
            except StoreError as error:
                again = self._is_worth_another(error, patience) or (in_parts and error.passing and tries < _UPLOADS)
                if not again or is_leaving():
                    raise
        self._count_put(size, part)
        if (found := self.size_bytes(path)) != size:
            raise StoreError(self._url(path), f"{size} bytes were written, {found} are there")

    def _create(self, path: str, source: bytes | Path) -> bool:
        """Write an object unless there is one, and say whether it was this call that did.

        A conditional put whose reply is lost may have succeeded, and so may one that is answered by 500 and sent
        again, to which the store then says that the object exists. A conflict (409) says that another writer is at it
        just now, not that it will succeed. So unless the store says yes, what is there decides: our bytes were written
        by us (or by somebody who wrote the same: it makes no difference then), other bytes by another, and if there is
        nothing it is tried again. In one request, of which S3 takes 5 GB.
        """
        key, patience = self._key(path), Patience()
        while True:
            problem = StoreError(self._url(path), "other writers kept it busy", passing=True)
            try:
                with self._request(path, writes=True) as client:
                    obstore.put(client, key, source, mode="create", use_multipart=False)
                return True
            except obstore.exceptions.AlreadyExistsError:
                pass
            except StoreError as error:
                if not error.passing:
                    raise
                problem = error
            finally:
                self._count_put(_size(source))
            there = self._is_there(path, source, patience)
            if there is not None:
                return there
            if not self._is_worth_another(problem, patience):
                raise problem

    def _is_there(self, path: str, source: bytes | Path, patience: Patience) -> bool | None:
        """Whether an object is this one; None if there is no object."""
        try:
            if isinstance(source, bytes):
                return self._read(path, patience) == source
            if int(self._head(path, patience)["size"]) != _size(source):
                return False
            with self._open(path, patience) as theirs, open(source, "rb") as ours:
                while data := ours.read(_PIECE_BYTES):
                    if theirs.read(len(data)) != data:
                        return False
            return True
        except FileNotFoundError:
            return None

    def _head(self, path: str, patience: Patience | None = None) -> Any:
        key = self._key(path)
        return self._ask("head", path, lambda client: obstore.head(client, key), patience)

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._ask("delete", path, lambda client: obstore.delete(client, path))

    def _ask(self, kind: str, path: str, ask: Callable[[Client], T], patience: Patience | None = None) -> T:
        """Make a request that does no harm when it is made twice, until it is answered or it has been long enough.

        Args:
            kind: For the counts.
            path: Of what.
            ask: Makes it once, or as often as the client does by itself.
            patience: Of what it belongs to; by default it is by itself.
        """
        patience = patience or Patience()
        while True:
            try:
                with self._request(path) as client:
                    return ask(client)
            except StoreError as error:
                if not self._is_worth_another(error, patience):
                    raise
            finally:
                self.stats.count(kind)

    def _is_worth_another(self, error: StoreError, patience: Patience) -> bool:
        """Whether a request that has failed so is to be made again, after a moment."""
        if not error.passing:
            return False
        if patience.wait(error, patience_seconds(heard=self._bucket in _heard)):
            return True
        _heard.discard(self._bucket)  # what this process does at its end must not wait as long again, each time
        return False

    def _count_put(self, size: int, part: int | None = None) -> None:
        number = 1 if part is None or size <= _MULTIPART_ABOVE else 2 + -(-size // part)
        self.stats.count("put", number=number, bytes_written=size)

    @contextmanager
    def _request(self, path: str, *, writes: bool = False, in_parts: bool = False) -> Iterator[Client]:
        """Make one, in which obstore's errors become ours."""
        client = self._connected(in_parts=in_parts)
        try:
            yield client
        except obstore.exceptions.AlreadyExistsError:
            self._has_answered()
            raise
        except ERRORS as error:
            self._raise(error, path, writes=writes)
        self._has_answered()

    def _has_answered(self) -> None:
        self._answered = True
        _heard.add(self._bucket)

    @property
    def _bucket(self) -> tuple[str, str]:
        return self.place.scheme, self.place.bucket

    def _raise(self, error: Exception, path: str, *, writes: bool) -> NoReturn:
        url = self._url(path)
        if isinstance(error, obstore.exceptions.PreconditionError):
            raise _replaced(url) from None
        if isinstance(error, obstore.exceptions.InvalidPathError):
            raise UserError(
                f"{url}: an object there has a name that cannot be a path, with an empty part ('a//b'), '.', '..' or a "
                f"control character: rename it ({without_secrets(first_line(error))!r})"
            ) from None
        trouble = understand(error, self.place)
        if trouble.answered:
            _heard.add(self._bucket)
        if trouble.kind == "missing" and not writes:  # perhaps deleted between two halves of a reply that broke off
            self._check_bucket()
            raise FileNotFoundError(ENOENT, "there is no such object", url) from None
        if trouble.kind == "too short":
            raise _TooShort from None
        if trouble.kind == "unsupported":
            raise _Unsupported(url, trouble.what) from None
        if trouble.kind in ("refused", "region", "no bucket"):
            # Before the first answer the request is wrong, and nothing has been done; later, the machine fails.
            if not self._answered:
                raise UserError(f"{url}: {trouble.what}") from None
            raise _Refused(url, trouble.what) from None
        raise StoreError(url, trouble.what, passing=trouble.kind != "other") from None

    def _check_bucket(self) -> None:
        """Of an object that is not there: is the bucket? A request for one object does not always say."""
        if self._bucket_seen:
            return
        client = self._connected()
        try:
            obstore.list_with_delimiter(client, ".tmp/no-such-folder")
        except ERRORS as error:
            trouble = understand(error, self.place)
            if trouble.kind == "no bucket":
                raise UserError(f"{self.url}: {trouble.what}") from None
            if trouble.kind == "passing":
                raise StoreError(self.url, trouble.what, passing=True) from None
        self.stats.count("list")
        self._bucket_seen = True  # or it may not be listed, but was there to say so

    def _connected(self, *, in_parts: bool = False) -> Client:
        """A client; for an upload in parts one that has all the patience: nobody else can send one part again."""
        check_not_forked()
        with self._lock:
            if in_parts not in self._clients:
                self._clients[in_parts] = connect(
                    self.place, retry_seconds=patience_seconds(heard=True) if in_parts else None
                )
            return self._clients[in_parts]

    def _reading(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(_PIECES_AT_ONCE, thread_name_prefix="streamprep-read")
            return self._readers

    def _key(self, path: str) -> str:
        return str(parts_of(path, below=self.url))

    def _url(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url


class PendingObject:
    """A file of the spool, which `publish` uploads."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._file: LocalFile
        self.path: Path
        """Where to write."""

    def __enter__(self) -> PendingObject:
        spool = self._store.spool
        try:
            if (free := spool.free_bytes()) < _SPOOL_RESERVE_BYTES:
                raise OSError(ENOSPC, f"only {free} bytes are free", str(spool.root))
            self._file = spool.new_file().__enter__()
        except OSError as error:
            raise OSError(
                error.errno, f"no file for {self._store.url} can be built in the spool (--spool-dir): {error.strerror}",
                str(spool.root),
            ) from error  # fmt: skip
        self.path = self._file.path
        return self

    def publish(self, path: str, *, step: str, replace: bool = True) -> bool:
        """Upload the file; False if there is one of that name and it does not give way."""
        self._store._key(path)
        crash_point(step)
        if replace:
            self._store._upload(path, self.path)
        elif not self._store._create(path, self.path):
            return False
        crash_point(f"{step}.after")
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)


class _TooShort(Exception):
    """The range begins behind the end."""


class _Refused(StoreError):
    """The store did not let us, though it did before."""


class _Unsupported(StoreError):
    """The store does not know such a request."""


def _entry(found: Any) -> FileEntry:
    return FileEntry(str(found["path"]), int(found["size"]), str(found["e_tag"] or found["last_modified"]))


def _entity_tag(version: str) -> str:
    """As requests have it; Azure's listings leave out the quotes."""
    return version if version.endswith('"') else f'"{version}"'


def _replaced(url: str) -> FileReplaced:
    return FileReplaced(url, "it was replaced while it was read")


def _size(source: bytes | Path) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size
