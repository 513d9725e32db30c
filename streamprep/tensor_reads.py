"""The stored bytes of rows, into the memory of a batch.

From a folder: straight into the batch's memory, without a copy in between, while the system gets the next batch from
the disk. From a bucket: many rows at once, ahead of the batch that is being made, in requests that hold all tensors of
a row that lie close together (`streamprep.ahead`).
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from streamprep.ahead import fetch_ahead
from streamprep.row_index import RowIndex, TensorColumns, TextColumns
from streamprep.storage import Store

READ_AHEAD_BYTES = 256 * 2**20
"""Most that is under way from a bucket or waits for its batch."""
_REQUESTS_AT_ONCE = 12
_GAP_BYTES = 256 * 2**10
_OPEN_FILES = 16
_MOST_ROWS_AHEAD = 256


class DamagedFile(OSError):
    """A data file is not the one that the index describes: missing, cut off, or another."""


@dataclass(frozen=True, slots=True)
class Place:
    """Some bytes."""

    path: str
    offset: int
    size: int


def open_reader(index: RowIndex, store: Store) -> LocalReader | FetchingReader:
    """What suits the store."""
    folder = store.local_path()
    return FetchingReader(index, store) if folder is None else LocalReader(index, folder)


def places_of(index: RowIndex, row: int) -> dict[str, Place]:
    """Where a row's tensors are, and its texts if they are read."""
    path = index.files[index.file[row]]
    columns: dict[str, TensorColumns | TextColumns] = {**index.tensors, **index.texts}
    return {name: Place(path, int(where.offset[row]), int(where.size[row])) for name, where in columns.items()}


class LocalReader:
    """Rows of a folder."""

    def __init__(self, index: RowIndex, folder: Path) -> None:
        self._index, self._files = index, _OpenFiles(index, folder)

    def row(self, row: int) -> LocalRow:
        """One row; nothing is read yet."""
        return LocalRow(self._files, places_of(self._index, row))

    def expect(self, row: int) -> None:
        """Ask the system to read it ahead."""
        for place in places_of(self._index, row).values():
            self._files.advise(place)

    def fetched_bytes(self, row: int) -> int:
        """None: what is read goes to where it is wanted."""
        return 0


@dataclass(frozen=True, slots=True)
class LocalRow:
    """One row of a folder."""

    files: _OpenFiles
    places: Mapping[str, Place]

    def read_into(self, name: str, target: memoryview) -> None:
        """Fill memory with the first bytes of a tensor."""
        place = self.places[name]
        self.files.read_into(place, target[: place.size])

    def read(self, name: str) -> bytearray:
        """All bytes of a tensor or text, as they are stored."""
        data = bytearray(self.places[name].size)
        self.files.read_into(self.places[name], memoryview(data))
        return data


class _OpenFiles:
    """A few files, those used last, opened when they are first needed and compared with the index then."""

    def __init__(self, index: RowIndex, folder: Path) -> None:
        self._folder, self._url = folder, index.url
        self._sizes = dict(zip(index.files, index.file_sizes, strict=True))
        self._open: OrderedDict[str, int] = OrderedDict()

    def read_into(self, place: Place, target: memoryview) -> None:
        handle, offset = self._handle(place.path), place.offset
        while len(target):
            number = os.preadv(handle, [target], offset)
            if not number:
                raise _cut_off(self._url, place, os.fstat(handle).st_size)
            target, offset = target[number:], offset + number

    def advise(self, place: Place) -> None:
        os.posix_fadvise(self._handle(place.path), place.offset, place.size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _handle(self, path: str) -> int:
        handle = self._open.get(path)
        if handle is None:
            handle = self._open_checked(path)
            while len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = handle
        self._open.move_to_end(path)
        return handle

    def _open_checked(self, path: str) -> int:
        try:
            handle = os.open(self._folder / path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise _missing(self._url, path) from None
        try:
            _check_size(self._url, path, os.fstat(handle).st_size, self._sizes[path])
        except DamagedFile:
            os.close(handle)
            raise
        return handle


@dataclass(frozen=True, slots=True)
class FetchedRow:
    """One row of a bucket, in memory."""

    blobs: Mapping[str, memoryview]

    def read_into(self, name: str, target: memoryview) -> None:
        """Fill memory with the first bytes of a tensor."""
        blob = self.blobs[name]
        target = target[: len(blob)]
        target[:] = blob[: len(target)]

    def read(self, name: str) -> memoryview:
        """All bytes of a tensor or text, as they are stored."""
        return self.blobs[name]


class FetchingReader:
    """Rows of a bucket. Its methods may be called by several threads."""

    def __init__(self, index: RowIndex, store: Store) -> None:
        self._index, self._store = index, store
        self._sizes = dict(zip(index.files, index.file_sizes, strict=True))
        self._lock = threading.Lock()
        self._checked: set[str] = set()

    def fetched_bytes(self, row: int) -> int:
        """Of all that is fetched for a row."""
        return sum(place.size for place, _ in self._requests(row))

    def row(self, row: int) -> FetchedRow:
        """Fetch one row."""
        blobs = {}
        for place, names in self._requests(row):
            data = memoryview(self._fetch(place))
            for name, inner in names.items():
                start = inner.offset - place.offset
                blobs[name] = data[start : start + inner.size]
        return FetchedRow(blobs)

    def _requests(self, row: int) -> list[tuple[Place, dict[str, Place]]]:
        """Stretches of the row's file, and the tensors that lie in each."""
        found: list[tuple[Place, dict[str, Place]]] = []
        for name, place in sorted(places_of(self._index, row).items(), key=lambda item: item[1].offset):
            if found and place.offset <= found[-1][0].offset + found[-1][0].size + _GAP_BYTES:
                before, names = found.pop()
                end = max(before.offset + before.size, place.offset + place.size)
                found.append((Place(place.path, before.offset, end - before.offset), {**names, name: place}))
            else:
                found.append((place, {name: place}))
        return found

    def _fetch(self, place: Place) -> bytes:
        try:
            self._check(place.path)
            return self._store.read_range(place.path, place.offset, place.size)
        except FileNotFoundError:
            raise _missing(self._index.url, place.path) from None
        except EOFError:
            raise _cut_off(self._index.url, place, self._store.size_bytes(place.path)) from None

    def _check(self, path: str) -> None:
        expected = self._sizes[path]
        with self._lock:
            if expected is None or path in self._checked:
                return
        _check_size(self._index.url, path, self._store.size_bytes(path), expected)
        with self._lock:
            self._checked.add(path)


class Reader(Protocol):
    """Rows of one dataset."""

    def row(self, row: int) -> Row:
        """One row."""

    def fetched_bytes(self, row: int) -> int:
        """Of memory that a row takes until its batch is made."""


class OrderedReader(Reader, Protocol):
    """Of a reader that reads when a row is asked for, in this thread."""

    def expect(self, row: int) -> None:
        """A row of the next batch: to be read ahead, if that can be."""


Row = LocalRow | FetchedRow
Located = tuple[int, int]
"""(number of the dataset, row in it)."""
BatchOfRows = Sequence[Located]


def read_rows(
    readers: Sequence[Reader], batches: Iterable[BatchOfRows], *, max_bytes: int
) -> Iterator[tuple[BatchOfRows, Iterator[Row]]]:
    """Each batch with its rows, all of which must be taken before the next batch is asked for.

    Args:
        readers: Of each dataset.
        batches: The rows of each batch; some are taken ahead.
        max_bytes: Most that is fetched ahead from buckets.
    """
    if any(isinstance(reader, FetchingReader) for reader in readers):
        return _fetch(readers, batches, max_bytes)
    return _read(cast("Sequence[OrderedReader]", readers), batches)


def _read(
    readers: Sequence[OrderedReader], batches: Iterable[BatchOfRows]
) -> Iterator[tuple[BatchOfRows, Iterator[Row]]]:
    """While one batch is read, the system gets the next one from the disk."""
    waiting: BatchOfRows | None = None
    for batch in batches:
        for source, row in batch:
            readers[source].expect(row)
        if waiting is not None:
            yield waiting, (readers[source].row(row) for source, row in waiting)
        waiting = batch
    if waiting is not None:
        yield waiting, (readers[source].row(row) for source, row in waiting)


def _fetch(
    readers: Sequence[Reader], batches: Iterable[BatchOfRows], max_bytes: int
) -> Iterator[tuple[BatchOfRows, Iterator[Row]]]:
    taken: deque[BatchOfRows] = deque()  # by the thread that asks for jobs, before any of its rows comes

    def jobs() -> Iterator[Located]:
        for batch in batches:
            taken.append(batch)
            yield from batch

    fetched = fetch_ahead(
        jobs(),
        lambda one: readers[one[0]].row(one[1]),
        size_bytes=lambda one: readers[one[0]].fetched_bytes(one[1]),
        max_bytes=max_bytes,
        num_threads=_REQUESTS_AT_ONCE,
        max_jobs=_MOST_ROWS_AHEAD,
    )
    with closing(fetched):
        rows = (row for _, row in fetched)
        for first in rows:
            batch = taken.popleft()
            yield batch, itertools.chain([first], itertools.islice(rows, len(batch) - 1))


def _missing(url: str, path: str) -> DamagedFile:
    return DamagedFile(f"{url}/{path} is missing, though the index names it: copy the output again, or encode it again")


def _cut_off(url: str, place: Place, found: int) -> DamagedFile:
    return DamagedFile(
        f"{url}/{place.path} has {found} bytes, but a tensor lies at {place.offset} to {place.offset + place.size}: it "
        "is cut off; `streamprep verify` finds all such files"
    )


def _check_size(url: str, path: str, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise DamagedFile(
            f"{url}/{path} has {found} bytes and had {expected} when it was written: it is cut off or another file; "
            "`streamprep verify` finds all such files"
        )
