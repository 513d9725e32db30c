"""Rows out of row groups, which are decompressed whole: a compressed blob has no place of its own.

FastVideo's writer leaves it to pyarrow to put 64 rows' blobs into one dictionary page, so that nothing less than all of
them can be decompressed. With latents of 480x832x77 those are 511 MB, which take pyarrow 3 s, and for that time 2.4 GB.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from streamprep.foreign.parquet import GroupColumns, read_group
from streamprep.row_index import RowIndex
from streamprep.storage import Store
from streamprep.tensor_reads import FetchedRow

KEPT_BYTES = 2**30
"""Most of decoded row groups that is kept; one is always."""


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
