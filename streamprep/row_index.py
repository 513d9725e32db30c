"""Where the rows of a finished output are: its ``index.parquet`` as columns, a few numbers a row and no objects.

A hundred thousand rows are read in a tenth of a second, and take some megabytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from streamprep import canonical, job
from streamprep.errors import UserError
from streamprep.storage import Store

TEXT = "text_embedding"
"""The one tensor whose length differs within a bucket."""
RAW = ""
"""The codec of bytes that are stored as they are."""

_OF_ALL = ("key", "file", "bucket")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorColumns:
    """One tensor of each row."""

    offset: NDArray[np.int64]
    """Of its bytes in the file."""
    size: NDArray[np.int64]
    """Of its bytes, as they are stored."""
    shape: NDArray[np.int64]
    """(rows, dimensions)."""
    dtypes: tuple[str, ...]
    dtype: NDArray[np.int32]
    """Number in ``dtypes``."""
    codecs: tuple[str, ...]
    codec: NDArray[np.int32]
    """Number in ``codecs``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowIndex:
    """All rows of one output."""

    url: str
    files: tuple[str, ...]
    """Relative to the output."""
    file_sizes: tuple[int | None, ...]
    """Of each file in bytes; None where the index does not say."""
    file: NDArray[np.int32]
    """Of each row, the number of its file."""
    keys: Any
    """An array of Arrow's, of strings."""
    buckets: tuple[str, ...]
    bucket: NDArray[np.int32]
    """Of each row, the number of its bucket."""
    tensors: Mapping[str, TensorColumns]
    contract: Mapping[str, Any] | None
    """As the plan has it; None where nobody wrote one down."""
    sha256: str
    """Of what the index says: another one is another set of rows."""

    @property
    def num_rows(self) -> int:
        """In all files."""
        return len(self.file)

    def keys_of(self, rows: NDArray[np.int64]) -> list[str]:
        """The keys of some rows."""
        return self.keys.take(pa.array(rows)).to_pylist()  # type: ignore[no-any-return]

    def clips(self) -> NDArray[np.int32]:
        """A number for each row, the same for all captions of a clip: ``KEY``, ``KEY@01``, ..."""
        clips = pc.replace_substring_regex(self.keys, r"@\d+$", "").dictionary_encode()
        return np.asarray(clips.indices, dtype=np.int32)


def load_row_index(store: Store, tensors: Sequence[str] | None) -> RowIndex:
    """The rows of a finished output.

    Args:
        store: The output.
        tensors: Of these only; None for all that are stored.

    Raises:
        UserError: if it is no finished output, or lacks one of the tensors.
    """
    data = _read_index(store)
    schema = pq.read_schema(io.BytesIO(data))
    stored = [name.removesuffix("_offset") for name in schema.names if name.endswith("_offset")]
    if missing := [name for name in tensors or () if name not in stored]:
        raise UserError(f"{store.url} has no {', '.join(missing)}: its tensors are {', '.join(stored)}")
    wanted = [name for name in stored if tensors is None or name in tensors]
    table = _read_table(data, schema, wanted)
    files, file = _dictionary(table["file"])
    buckets, bucket = _dictionary(table["bucket"])
    return RowIndex(
        url=store.url,
        files=files,
        file_sizes=_file_sizes(table, file, len(files)),
        file=file,
        keys=table["key"].combine_chunks(),
        buckets=buckets,
        bucket=bucket,
        tensors={name: columns for name in wanted if (columns := _tensor(table, name, store, tensors)) is not None},
        contract=job.open_job(store).plan.contract,
        sha256=canonical.bytes_digest(data),
    )


def _read_index(store: Store) -> bytes:
    try:
        data = store.read(job.INDEX)
    except (FileNotFoundError, NotADirectoryError):
        if store.exists(job.PLAN):
            raise UserError(
                f"{store.url} is not finished, it has no {job.INDEX}: run the same `streamprep encode` again, or "
                "`streamprep finalize` if nothing is left to encode"
            ) from None
        raise UserError(f"{store.url} is not the output of `streamprep encode`: it has no {job.INDEX}") from None
    if not pq.read_metadata(io.BytesIO(data)).num_rows:
        raise UserError(f"{store.url} has no rows")
    return data


def _read_table(data: bytes, schema: Any, tensors: Sequence[str]) -> Any:
    names = [*_OF_ALL, "file_size"]
    names += [f"{tensor}_{what}" for tensor in tensors for what in ("offset", "size", "dtype", "shape", "codec")]
    names = [name for name in names if name in schema.names]
    few_values = [name for name in names if name in ("file", "bucket") or name.endswith(("_dtype", "_codec"))]
    return pq.read_table(pa.BufferReader(data), columns=names, read_dictionary=few_values)


def _dictionary(column: Any) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """The different values of a column, and the number of each row's; null is the empty text."""
    column = column.unify_dictionaries().combine_chunks()
    if column.null_count:
        column = pc.fill_null(column.cast(pa.string()), "").dictionary_encode()
    return tuple(column.dictionary.to_pylist()), np.asarray(column.indices, dtype=np.int32)


def _file_sizes(table: Any, file: NDArray[np.int32], num_files: int) -> tuple[int | None, ...]:
    if "file_size" not in table.column_names:
        return (None,) * num_files
    sizes = np.zeros(num_files, np.int64)
    sizes[file] = table["file_size"].to_numpy()
    return tuple(sizes.tolist())


def _tensor(table: Any, name: str, store: Store, asked_for: Sequence[str] | None) -> TensorColumns | None:
    """The columns of a tensor; None where some rows do not have it and nobody asked for it."""
    missing = table[f"{name}_offset"].null_count
    if missing:
        if asked_for is None:
            raise UserError(
                f"{store.url}: {missing} of {len(table)} rows have no {name}: say tensors=(...), the ones to be read"
            )
        raise UserError(f"{store.url}: {missing} of {len(table)} rows have no {name}")
    dtypes, dtype = _dictionary(table[f"{name}_dtype"])
    codecs, codec = (
        _dictionary(table[f"{name}_codec"])
        if f"{name}_codec" in table.column_names
        else ((RAW,), np.zeros(len(table), np.int32))
    )
    return TensorColumns(
        offset=table[f"{name}_offset"].to_numpy(),
        size=table[f"{name}_size"].to_numpy(),
        shape=_shapes(table[f"{name}_shape"].combine_chunks(), f"{store.url}: {name}"),
        dtypes=dtypes,
        dtype=dtype,
        codecs=tuple(RAW if codec == "raw" else codec for codec in codecs),
        codec=codec,
    )


def _shapes(column: Any, what: str) -> NDArray[np.int64]:
    flat = column.flatten().to_numpy()
    lengths = np.diff(column.offsets.to_numpy())
    if len(lengths) and (lengths != lengths[0]).any():
        raise UserError(f"{what} has {lengths.min()} to {lengths.max()} dimensions in one output")
    return np.asarray(flat, dtype=np.int64).reshape(len(lengths), -1)


def odd_shapes(index: RowIndex) -> Iterator[str]:
    """Where rows of one bucket cannot be stacked."""
    _, first = np.unique(index.bucket, return_index=True)
    of_bucket = np.zeros(len(index.buckets), np.int64)
    of_bucket[index.bucket[first]] = first
    for name, tensor in index.tensors.items():
        fixed = tensor.shape[:, 1:] if name == TEXT else tensor.shape
        expected = fixed[of_bucket[index.bucket]]
        odd = np.flatnonzero((fixed != expected).any(axis=1))
        if len(odd):
            row, bucket = int(odd[0]), index.bucket[odd[0]]
            yield (
                f"{index.url}: {index.keys_of(odd[:1])[0]} has a {name} of shape {tensor.shape[row].tolist()}, others "
                f"of its bucket {index.buckets[bucket]} have {tensor.shape[of_bucket[bucket]].tolist()}"
            )
