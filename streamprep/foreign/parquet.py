"""A row group of a Parquet file, decompressed; what its footer says; what is wrong with a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streamprep.errors import first_line
from streamprep.foreign.columns import column_of
from streamprep.storage import Store, StoreError
from streamprep.tensor_reads import DamagedFile

LATENT = "vae_latent"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignFile:
    """One Parquet file."""

    path: str
    size_bytes: int
    footer_sha256: str
    """Of its footer, which knows all offsets and sizes but not the values."""
    group_rows: tuple[int, ...]
    """Of each row group."""
    group_bytes: tuple[int, ...]
    """Of each row group, uncompressed."""
    unused: tuple[str, ...]
    """Columns that nothing here is about."""


class WrongSize(DamagedFile):
    """A tensor's bytes are not as many as its shape needs."""


class UnreadableGroup(DamagedFile):
    """The file is the same as ever, and a row group of it cannot be decompressed."""


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
        data = self.stored(tensor, position)
        if len(data) != size:
            raise WrongSize(
                f"{self._where}, row {position} of it, column {tensor}_bytes: {len(data)} bytes, and its shape needs "
                f"{size}; `streamprep convert` leaves such rows out"
            )
        return data

    def stored(self, tensor: str, position: int) -> memoryview:
        """A tensor's bytes, however many; they are not copied."""
        value = self._columns[tensor][position]
        return memoryview(value.as_buffer() if value.is_valid else b"")

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
    """Decompress one row group, a column after the other. pyarrow takes up to five times what they come to in the end.

    Args:
        store: Has the file.
        path: Of the file.
        group: Number of the row group.
        names: Tensors, and small columns.
        size_bytes: Of the file when it was surveyed.
        footer_sha256: Of its footer then; None compares the size only.

    Raises:
        DamagedFile: if it is another file by now.
        UnreadableGroup: if it is the same, and its bytes are damaged.
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
        raise UnreadableGroup(f"{url}, row group {group}: cannot be read: {first_line(error)}") from error


def _columns(parquet: Any, group: int, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    there = parquet.schema_arrow.names
    for name in names:
        column = column_of(name, there)
        if column is not None:
            column = f"{column}_bytes" if f"{column}_bytes" in there else column
            # In this thread: pyarrow's own may still hold the Python file when the process ends, which then aborts.
            yield name, parquet.read_row_group(group, columns=[column], use_threads=False)[column]


def is_of_parquet(error: Exception) -> bool:
    """Whether pyarrow cannot make sense of what it reads, as opposed to the store's trouble."""
    return isinstance(error, pa.ArrowException) or (not isinstance(error, StoreError) and error.args[1:] == ())


def footer_digest(opened: Any, size_bytes: int) -> str:
    """Of an open file's footer, which knows all offsets and sizes but not the values."""
    opened.seek(size_bytes - 8)
    length = int.from_bytes(opened.read(4), "little")
    opened.seek(size_bytes - 8 - length)
    return hashlib.sha256(opened.read(length)).hexdigest()
