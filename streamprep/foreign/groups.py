"""Rows out of row groups, which are decompressed whole: a compressed blob has no place of its own.

FastVideo's writer leaves it to pyarrow to put 64 rows' blobs into one dictionary page, so that nothing less than all of
them can be decompressed. With latents of 480x832x77 those are 511 MB, which take pyarrow 3 s, and for that time 2.4 GB.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streamprep.errors import first_line
from streamprep.foreign.columns import column_of
from streamprep.foreign.survey import footer_digest, is_of_parquet
from streamprep.row_index import RowIndex
from streamprep.storage import Store
from streamprep.tensor_reads import DamagedFile, FetchedRow

KEPT_BYTES = 2**30
"""Most of decoded row groups that is kept; one is always."""


class WrongSize(DamagedFile):
    """A tensor's bytes are not as many as its shape needs."""


class RowGroupReader:
    """Rows in any order. Its methods may be called by several threads, which take turns.

    Args:
        index: Of all rows.
        store: Has the files.
        kept_bytes: Most of decoded row groups that is kept for later rows.
    """

    def __init__(self, index: RowIndex, store: Store, *, kept_bytes: int = KEPT_BYTES) -> None:
        assert index.groups is not None
        self._index, self._groups, self._store, self._kept_bytes = index, index.groups, store, kept_bytes
        self._kept: OrderedDict[tuple[int, int], GroupColumns] = OrderedDict()
        self._expected: dict[tuple[int, int], set[int]] = {}
        self._taken: dict[int, FetchedRow] = {}
        self._lock = threading.Lock()
        self.num_decoded = 0
        """Row groups so far."""

    def expect(self, row: int) -> None:
        """Note that it will be asked for soon: it is taken along when its row group is decoded for another."""
        with self._lock:
            place = self._place(row)
            if place in self._kept or row in self._taken:
                return
            self._expected.setdefault(place, set()).add(row)

    def fetched_bytes(self, row: int) -> int:
        """Of what a row is when it is taken out."""
        return sum(int(tensor.size[row]) for tensor in self._index.tensors.values())

    def row(self, row: int) -> FetchedRow:
        """One row.

        Raises:
            DamagedFile: if the file is another by now, or a tensor is of another size than its shape.
        """
        with self._lock:
            taken = self._taken.pop(row, None)
            return taken if taken is not None else self._take(row)

    def _take(self, row: int) -> FetchedRow:
        place = self._place(row)
        columns = self._kept.get(place)
        if columns is None:
            columns = self._decode(place)
            for other in self._expected.pop(place, set()) - {row}:
                self._taken[other] = self._copied(columns, other)
            self._kept[place] = columns
        self._kept.move_to_end(place)
        return self._copied(columns, row)

    def _decode(self, place: tuple[int, int]) -> GroupColumns:
        number, group = place
        name, size = self._index.files[number], self._index.file_sizes[number]
        sizes = [one.nbytes for one in self._kept.values()]
        while self._kept and sum(sizes) + max(sizes) > self._kept_bytes:  # room for one more, before it is made
            self._kept.popitem(last=False)
            del sizes[0]
        self.num_decoded += 1
        return read_group(self._store, name, group, [*self._index.tensors, *self._index.texts], size_bytes=size)

    def _place(self, row: int) -> tuple[int, int]:
        return int(self._index.file[row]), int(self._groups.group[row])

    def _copied(self, columns: GroupColumns, row: int) -> FetchedRow:
        at = int(self._groups.position[row])
        blobs = {}
        for name, tensor in self._index.tensors.items():
            blobs[name] = memoryview(bytes(columns.blob(name, at, size=int(tensor.size[row]))))
        for name in self._index.texts:
            blobs[name] = memoryview(columns.text(name, at).encode())
        return FetchedRow(blobs)


class GroupColumns:
    """Some columns of one row group, decompressed."""

    def __init__(self, url: str, group: int, columns: dict[str, Any]) -> None:
        self._where, self._columns = f"{url}, row group {group}", columns

    @property
    def nbytes(self) -> int:
        """Of all."""
        return sum(column.nbytes for column in self._columns.values())

    def blob(self, tensor: str, position: int, *, size: int) -> memoryview:
        """A tensor's bytes, which are not copied.

        Raises:
            WrongSize: if they are of another size.
        """
        value = self._columns[tensor][position]
        data = memoryview(value.as_buffer() if value.is_valid else b"")
        if len(data) != size:
            raise WrongSize(
                f"{self._where}, row {position} of it, column {tensor}_bytes: {len(data)} bytes, and its shape needs "
                f"{size}; `streamprep convert` leaves such rows out"
            )
        return data

    def text(self, name: str, position: int) -> str:
        """A text; the empty one where there is none."""
        return str(self.value(name, position) or "")

    def value(self, name: str, position: int) -> Any:
        """Of a small column; None where there is none."""
        column = self._columns.get(name)
        return None if column is None else column[position].as_py()


def read_group(
    store: Store,
    path: str,
    group: int,
    names: Iterable[str],
    *,
    size_bytes: int | None,
    footer_sha256: str | None = None,
) -> GroupColumns:
    """Decompress one row group, a column after the other: the memory holds it, and one column's compressed bytes.

    Args:
        store: Has the file.
        path: Of the file.
        group: Number of the row group.
        names: Tensors, and small columns.
        size_bytes: Of the file when it was surveyed.
        footer_sha256: Of its footer then; None compares the size only.

    Raises:
        DamagedFile: if it is another file by now, or cannot be read.
    """
    url = f"{store.url}/{path}"
    try:
        with store.open(path) as opened:
            if size_bytes is not None and (found := opened.seek(0, 2)) != size_bytes:
                raise DamagedFile(f"{url} has {found} bytes and had {size_bytes} when it was opened: it was changed")
            if footer_sha256 is not None and footer_digest(opened, opened.seek(0, 2)) != footer_sha256:
                raise DamagedFile(f"{url} was changed since its rows were counted")
            parquet = pq.ParquetFile(opened, pre_buffer=False)
            columns = dict(_columns(parquet, group, list(names)))
            pa.default_memory_pool().release_unused()  # of 2 GB that pyarrow takes for a moment it would keep 1.5
            return GroupColumns(url, group, columns)
    except FileNotFoundError:
        raise DamagedFile(f"{url} is missing: it was there when the rows were counted") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, DamagedFile) or not is_of_parquet(error):
            raise
        raise DamagedFile(f"{url}, row group {group}: cannot be read: {first_line(error)}") from error


def _columns(parquet: Any, group: int, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    there = parquet.schema_arrow.names
    for name in names:
        column = column_of(name, there)
        if column is not None:
            column = f"{column}_bytes" if f"{column}_bytes" in there else column
            # In this thread: pyarrow's own may still hold the Python file when the process ends, which then aborts.
            yield name, parquet.read_row_group(group, columns=[column], use_threads=False)[column]
