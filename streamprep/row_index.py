"""Where the rows of a finished output are: its ``index.parquet`` as columns, a few numbers a row and no objects.

A hundred thousand rows are read in a tenth of a second, and take some megabytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from streamprep import canonical, job
from streamprep.errors import UserError, first_line
from streamprep.storage import Store

TEXT = "text_embedding"
"""The one tensor whose length differs within a bucket."""
RAW = ""
"""The codec of bytes that are stored as they are."""
TEXTS = ("id", "caption")
"""What is text of a row."""

_OF_ALL = ("key", "file", "bucket")
_UNKNOWN = 2**62
"""Larger than any file."""


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
class TextColumns:
    """The id or the caption of each row."""

    offset: NDArray[np.int64]
    """Of its bytes in the file."""
    size: NDArray[np.int64]
    forms: tuple[str, ...]
    form: NDArray[np.int32]
    """Number in ``forms``: see `streamprep.types.TextLocation`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroups:
    """Where rows are whose bytes lie at no offset: in row groups of Parquet, which are read whole."""

    group: NDArray[np.int32]
    """Of each row, the number of its row group in its file."""
    position: NDArray[np.int32]
    """Of each row, its number in its row group."""


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
    texts: Mapping[str, TextColumns] = field(default_factory=dict)
    """Those of `TEXTS` that were asked for."""
    groups: RowGroups | None = None
    """None where everything lies at its offset; else offsets and sizes mean nothing."""

    @property
    def num_rows(self) -> int:
        """In all files."""
        return len(self.file)

    def keys_of(self, rows: NDArray[np.int64]) -> list[str]:
        """The keys of some rows."""
        return [self.keys[row].as_py() for row in rows.tolist()]

    def clips(self) -> NDArray[np.int32]:
        """A number for each row, the same for all captions of a clip: ``KEY``, ``KEY@01``, ..."""
        clips = pc.replace_substring_regex(self.keys, r"@\d+$", "").dictionary_encode()
        return _numbers(clips.indices).astype(np.int32)


def load_row_index(
    store: Store, tensors: Sequence[str] | None, *, also: Sequence[str] = (), with_texts: bool = False
) -> RowIndex:
    """The rows of a finished output.

    Args:
        store: The output.
        tensors: Of these only; None for all that are stored.
        also: Of these too, if they are stored.
        with_texts: Whether ids and captions are to be read.

    Raises:
        UserError: if it is no finished output, or lacks what is asked for, or its index is damaged.
    """
    data = _read_index(store)
    try:
        return _row_index(store, data, tensors, also, with_texts)
    except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:  # KeyError: a column is missing
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the store, not of pyarrow
        raise _damaged(store, first_line(error)) from error


def _row_index(
    store: Store, data: bytes, tensors: Sequence[str] | None, also: Sequence[str], with_texts: bool
) -> RowIndex:
    schema = pq.read_schema(io.BytesIO(data))
    stored = [name.removesuffix("_offset") for name in schema.names if name.endswith("_offset")]
    if missing := [name for name in tensors or () if name not in stored]:
        raise UserError(f"{store.url} has no {', '.join(missing)}: its tensors are {', '.join(stored)}")
    wanted = [name for name in stored if tensors is None or name in (*tensors, *also)]
    texts = TEXTS if with_texts else ()
    if missing := [name for name in texts if f"{name}_text_at" not in schema.names]:
        raise UserError(
            f"{store.url}/{job.INDEX} does not say where {' and '.join(missing)} lie: the output is of an earlier "
            "version, or of an exporter that does not note it; `streamprep convert` writes one that does"
        )
    table = _read_table(data, schema, wanted, texts)
    if not len(table):
        raise UserError(f"{store.url} has no rows")
    files, file = _dictionary(table["file"])
    buckets, bucket = _dictionary(table["bucket"])
    index = RowIndex(
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
        texts={name: _text(table, name) for name in texts},
    )
    for problem in _misplaced(index):
        raise _damaged(store, problem)
    return index


def _damaged(store: Store, what: str) -> UserError:
    return UserError(f"{store.url}/{job.INDEX} is damaged: {what}; `streamprep finalize` writes it again")


def _misplaced(index: RowIndex) -> Iterator[str]:
    """Bytes that lie outside of their file, or are another number than their shape needs."""
    sizes = np.array([_UNKNOWN if size is None else size for size in index.file_sizes])[index.file]
    columns: dict[str, TensorColumns | TextColumns] = {**index.tensors, **index.texts}
    for name, where in columns.items():
        wrong = (where.offset < 0) | (where.size < 0) | (where.offset + where.size > sizes)
        if wrong.any():
            row = int(wrong.argmax())
            begin, end = int(where.offset[row]), int(where.offset[row] + where.size[row])
            yield f"{_name_of(index, row)}: {name} lies at {begin} to {end}, the file has {sizes[row]} bytes"
    for name, tensor in index.tensors.items():
        widths = np.array([getattr(torch, dtype).itemsize for dtype in tensor.dtypes])[tensor.dtype]
        raw = np.array([codec == RAW for codec in tensor.codecs])[tensor.codec]
        wrong = raw & (tensor.shape.prod(axis=1) * widths != tensor.size)
        if wrong.any():
            row = int(wrong.argmax())
            shape, dtype = tensor.shape[row].tolist(), tensor.dtypes[tensor.dtype[row]]
            yield f"{_name_of(index, row)}: {name} of {shape} {dtype} has {tensor.size[row]} bytes"


def _name_of(index: RowIndex, row: int) -> str:
    return f"row {row} ({index.keys_of(np.array([row]))[0]} in {index.files[index.file[row]]})"


def _read_index(store: Store) -> bytes:
    try:
        data = store.read(job.INDEX)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        if store.exists(job.PLAN):
            raise UserError(
                f"{store.url} is not finished, it has no {job.INDEX}: run the same `streamprep encode` again, or "
                "`streamprep finalize` if nothing is left to encode"
            ) from None
        raise UserError(
            f"{store.url} is not the output of `streamprep encode`: it has no {job.INDEX}; if FastVideo's scripts "
            "wrote it, say what it is: contract=declare_contract(...)"
        ) from None
    return data


def _read_table(data: bytes, schema: Any, tensors: Sequence[str], texts: Sequence[str]) -> Any:
    names = [*_OF_ALL, "file_size"]
    names += [f"{text}_text_{what}" for text in texts for what in ("at", "size", "form")]
    names += [f"{tensor}_{what}" for tensor in tensors for what in ("offset", "size", "dtype", "shape", "codec")]
    names = [name for name in names if name in schema.names]
    few_values = [name for name in names if name in ("file", "bucket") or name.endswith(("_dtype", "_codec", "_form"))]
    # In this thread: pyarrow's own may still be at work when a loader's worker ends, which then aborts. And not by
    # `pq.read_table`, which imports pandas.
    return pq.ParquetFile(pa.BufferReader(data), read_dictionary=few_values).read(names, use_threads=False)


def _dictionary(column: Any) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """The different values of a column, and the number of each row's; null is the empty text."""
    column = column.unify_dictionaries().combine_chunks()
    if column.null_count:
        column = pc.fill_null(column.cast(pa.string()), "").dictionary_encode()
    return tuple(column.dictionary.to_pylist()), _numbers(column.indices).astype(np.int32)


def _numbers(column: Any) -> NDArray[Any]:
    """A column of numbers; not by its ``to_numpy``, which imports pandas where that is installed: half a second."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return np.from_dlpack(column)


def _file_sizes(table: Any, file: NDArray[np.int32], num_files: int) -> tuple[int | None, ...]:
    if "file_size" not in table.column_names:
        return (None,) * num_files
    sizes = np.zeros(num_files, np.int64)
    sizes[file] = _numbers(table["file_size"])
    return tuple(sizes.tolist())


def _text(table: Any, name: str) -> TextColumns:
    forms, form = _dictionary(table[f"{name}_text_form"])
    offset, size = (_whole(table, f"{name}_text_{what}") for what in ("at", "size"))
    return TextColumns(offset=offset, size=size, forms=forms, form=form)


def _whole(table: Any, name: str) -> NDArray[np.int64]:
    column = table[name]
    if column.null_count:
        raise pa.ArrowInvalid(f"{column.null_count} of {len(table)} rows have no {name}")
    return _numbers(column).astype(np.int64, copy=False)


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
        offset=_whole(table, f"{name}_offset"),
        size=_whole(table, f"{name}_size"),
        shape=_shapes(table[f"{name}_shape"].combine_chunks(), f"{store.url}: {name}"),
        dtypes=dtypes,
        dtype=dtype,
        codecs=tuple(RAW if codec == "raw" else codec for codec in codecs),
        codec=codec,
    )


def _shapes(column: Any, what: str) -> NDArray[np.int64]:
    if column.null_count:
        raise pa.ArrowInvalid(f"{what} has no shape in {column.null_count} of {len(column)} rows")
    flat = _numbers(column.flatten())
    lengths = np.diff(_numbers(column.offsets))
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
