"""FastVideo's combined Parquet schema, readable by its unchanged trainers, laid out so that they read it fast.

Columns, types and order are those of ``fastvideo/dataset/dataloader/schema.py``. Every tensor ``X`` is three columns:
``X_bytes``, ``X_shape``, ``X_dtype``; its reader takes all bytes for float32 whatever ``X_dtype`` says, so all are.

Its reader loads a whole row group for every row, and its writer puts 64 rows into one. Here a row group is one row,
uncompressed, without dictionary, and without statistics on the blobs: the reader becomes about 70 times faster, and
writing costs about as much as writing the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from streamprep import canonical
from streamprep.storage import PendingFile, Store
from streamprep.tensor_members import decode_bytes
from streamprep.types import EncodedClip, EncodedSample, TensorLocation, TextLocation, WrittenFile, WrittenRow
from streamprep.unit_files import UnitFiles

FOLDER = "combined_parquet_dataset"
MAX_FILE_BYTES = 512 * 10**6
TENSORS = {
    "t2v": ("vae_latent", "text_embedding"),
    "i2v": ("vae_latent", "text_embedding", "clip_feature", "first_frame_latent", "pil_image"),
    "text": ("text_embedding",),
}
"""The tensors of each workload, in the schema's order."""
WORKLOADS = tuple(TENSORS)
POSTERIORS = ("mean",)
OPTIONS = {"latent_dtype": ("float32",)}
"""What can be chosen, the default first."""
_ARROW = {
    "bool": pa.bool_(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
    "json": pa.string(),
}
"""What further columns can be, and what they are here."""
_OF_TENSORS = ("_bytes", "_shape", "_dtype")
_MAY_BE_EMPTY = ("clip_feature", "first_frame_latent", "pil_image")
"""What not every image-to-video model takes, and a picture that no trainer reads as it should (FastVideo's own reader
takes its uint8 for float32): their columns are there, with no bytes, as FastVideo writes them."""


def schema(workload: str) -> pa.Schema:
    """FastVideo's schema for a workload: its ``pyarrow_schema_t2v``, ``_i2v`` or ``_text_only``."""
    triplets = [
        field
        for name in TENSORS[workload]
        for field in (
            pa.field(f"{name}_bytes", pa.binary()),
            pa.field(f"{name}_shape", pa.list_(pa.int64())),
            pa.field(f"{name}_dtype", pa.string()),
        )
    ]
    if workload == "text":
        return pa.schema([pa.field("id", pa.string()), *triplets, pa.field("caption", pa.string())])
    metadata = [
        pa.field("file_name", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("media_type", pa.string()),
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("num_frames", pa.int64()),
        pa.field("duration_sec", pa.float64()),
        pa.field("fps", pa.float64()),
    ]
    return pa.schema([pa.field("id", pa.string()), *triplets, *metadata])


def column_problem(name: str, *, workload: str) -> str | None:
    """Why a further column cannot be called so, None if it can.

    FastVideo's readers take tensors and metadata by the names of their own schema and pass over other columns.
    """
    if name in schema(workload).names:
        return "is a column of FastVideo's own"
    if name.endswith(_OF_TENSORS):
        return f"ends as the columns of tensors do ({', '.join(_OF_TENSORS)})"
    return None


def open_shard(
    store: Store,
    name: str,
    *,
    workload: str,
    samples_per_file: int,
    contract: Mapping[str, Any],
    options: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> FastVideoWriter:
    """A writer of one unit.

    Args:
        store: The output.
        name: The unit; files are ``combined_parquet_dataset/NAME-NNNNN-SHA256.parquet``.
        workload: Which schema.
        samples_per_file: Most rows in a file; a file also ends at 512 MB.
        contract: Goes into every file's metadata.
        options: Each of `OPTIONS`, which leave no choice.
        columns: Further columns, after the schema's own, and their types.
    """
    further = [pa.field(name, _ARROW[kind]) for name, kind in (columns or {}).items()]
    whole = pa.schema([*schema(workload), *further], {"streamprep.contract": canonical.to_json(contract)})
    return FastVideoWriter(store, name, TENSORS[workload], whole, samples_per_file=samples_per_file)


class FastVideoWriter:
    """Writes samples as rows, a file at a time; nothing is visible before `close`."""

    def __init__(
        self, store: Store, name: str, tensor_names: tuple[str, ...], file_schema: pa.Schema, *, samples_per_file: int
    ) -> None:
        self._files = UnitFiles(store, folder=FOLDER, unit=name, extension="parquet")
        self._tensor_names, self._schema, self._samples_per_file = tensor_names, file_schema, samples_per_file
        self._open: _OpenFile | None = None

    def write(self, sample: EncodedSample) -> None:
        """Add one row."""
        if self._open is None:
            self._open = _OpenFile(self._files.new(), self._schema)
        self._open.write(sample, self._tensor_names)
        if len(self._open.samples) >= self._samples_per_file or self._open.size_bytes >= MAX_FILE_BYTES:
            self._finish_file()

    def close(self) -> list[WrittenFile]:
        """Publish the files."""
        if self._open is not None:
            self._finish_file()
        return self._files.publish()

    def __enter__(self) -> FastVideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._files:
            if self._open is not None:
                self._open.abandon()

    def _finish_file(self) -> None:
        assert self._open is not None
        self._files.finish(self._open.file, self._open.finish(self._tensor_names))
        self._open = None


class _OpenFile:
    """A Parquet file being written."""

    def __init__(self, file: PendingFile, file_schema: pa.Schema) -> None:
        self.file = file
        self.samples: list[tuple[str, str]] = []  # key, bucket
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.texts: list[dict[str, int]] = []  # their sizes
        self.size_bytes = 0
        self._schema = file_schema
        self._metadata: list[Any] = []
        small = [field.name for field in file_schema if not _is_tensor_column(field.name)]
        self._writer = pq.ParquetWriter(
            file.path,
            file_schema,
            compression="none",
            use_dictionary=False,
            write_statistics=small,
            metadata_collector=self._metadata,
        )

    def write(self, sample: EncodedSample, tensor_names: tuple[str, ...]) -> None:
        arrays = {
            name: np.ascontiguousarray(sample.tensors[name].float().numpy())
            for name in tensor_names
            if name in sample.tensors or name not in _MAY_BE_EMPTY
        }
        self._writer.write_table(_row(sample, arrays, self._schema), row_group_size=1)
        self.samples.append((sample.key, sample.bucket))
        self.shapes.append({name: array.shape for name, array in arrays.items()})
        self.texts.append({"id": len(sample.id.encode()), "caption": len(sample.caption.encode())})
        self.size_bytes += sum(array.nbytes for array in arrays.values())

    def finish(self, tensor_names: tuple[str, ...]) -> tuple[WrittenRow, ...]:
        """End the file and say where every tensor lies."""
        self._writer.close()
        (metadata,) = self._metadata
        columns = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
        return tuple(
            WrittenRow(
                key=key,
                bucket=bucket,
                row_group=number,
                tensors={
                    name: _location(metadata.row_group(number).column(columns[f"{name}_bytes"]), shapes[name])
                    for name in tensor_names
                    if name in shapes
                },
                texts={
                    name: TextLocation(
                        offset=_end(metadata.row_group(number).column(columns[name])) - size, size=size, form="utf8"
                    )
                    for name, size in texts.items()
                },
            )
            for number, ((key, bucket), shapes, texts) in enumerate(
                zip(self.samples, self.shapes, self.texts, strict=True)
            )
        )

    def abandon(self) -> None:
        """Let go of a file that nobody will see; on a full disk not even its footer can be written."""
        with suppress(OSError, RuntimeError):  # pyarrow says the second where the first came before
            self._writer.close()


def _row(sample: EncodedSample, arrays: Mapping[str, np.ndarray[Any, Any]], row_schema: pa.Schema) -> pa.Table:
    columns: dict[str, Any] = {name: [value] for name, value in sample.columns.items()}
    columns |= {"id": [sample.id], "file_name": [sample.file_name], "caption": [sample.caption]}
    if (clip := sample.clip) is not None:
        columns |= {
            "media_type": [clip.media_type],
            "width": [clip.width],
            "height": [clip.height],
            "num_frames": [arrays["vae_latent"].shape[1]],  # latent frames: what FastVideo's own writers put here
            "duration_sec": [clip.num_frames / clip.train_fps],
            "fps": [clip.source_fps],
        }
    for name in (column.removesuffix("_bytes") for column in row_schema.names if _is_tensor_column(column)):
        array = arrays.get(name)
        columns[f"{name}_bytes"] = [b""] if array is None else _binary(array)
        columns[f"{name}_shape"] = [[] if array is None else list(array.shape)]
        columns[f"{name}_dtype"] = ["" if array is None else str(array.dtype)]
    return pa.table(
        [
            pa.array(columns[f.name], f.type) if isinstance(columns[f.name], list) else columns[f.name]
            for f in row_schema
        ],
        schema=row_schema,
    )


def _binary(array: np.ndarray[Any, Any]) -> pa.Array:
    """One binary value over the array's own memory; Python ``bytes`` would cost a copy."""
    offsets = np.array([0, array.nbytes], dtype=np.int32)
    return pa.BinaryArray.from_buffers(pa.binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(array)])


def _location(chunk: Any, shape: tuple[int, ...]) -> TensorLocation:
    """A blob in a one-row, uncompressed, plainly encoded chunk: the chunk's last bytes."""
    size = 4 * int(np.prod(shape))
    return TensorLocation(offset=_end(chunk) - size, size=size, dtype="float32", shape=tuple(shape))


def _end(chunk: Any) -> int:
    return int(chunk.data_page_offset + chunk.total_compressed_size)


def _is_tensor_column(name: str) -> bool:
    return name.endswith("_bytes")


def contract_problem(contract: Mapping[str, Any]) -> str | None:
    """Why latents of a contract cannot be held, None if they can.

    FastVideo's trainers normalise raw latents and pad trimmed embeddings themselves, and look at no contract.
    """
    video, text = contract["video"], contract["text"]
    if video is not None and video["space"] != "raw":
        return f"latents are {video['space']}, its trainers take them raw and normalise them once more"
    if text["padding"] != "trimmed":
        return f"text embeddings are {text['padding']}, its trainers would take padding for words"
    return None


def read_file(store: Store, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The rows of a file as a stranger's Parquet reader sees them: (id, tensors by name), a row at a time."""
    yield from ((row["id"], _tensors(row)) for row in _read_rows(store, name))


def read_samples(
    store: Store, file: WrittenFile, *, workload: str, train_fps: float, columns: Mapping[str, str]
) -> Iterator[EncodedSample]:
    """The rows of a file as they were written.

    Args:
        store: Of the output.
        file: As its record has it.
        workload: Which schema.
        train_fps: Rate that the frames were sampled at, which no column says exactly.
        columns: The further columns, in their order.
    """
    with_clips = workload != "text"
    for written, row in zip(file.rows, _read_rows(store, file.name), strict=True):
        clip = None
        if with_clips:
            clip = EncodedClip(
                width=row["width"],
                height=row["height"],
                num_frames=int(written.bucket.partition("x")[0]),
                train_fps=train_fps,
                source_fps=row["fps"],
                media_type=row["media_type"],
            )
        yield EncodedSample(
            key=written.key,
            id=row["id"],
            tensors=_tensors(row),
            file_name=row["file_name"] if with_clips else _file_name(row["id"], written.key),
            caption=row["caption"],
            clip=clip,
            columns={name: row[name] for name in columns},
        )


def _read_rows(store: Store, name: str) -> Iterator[dict[str, Any]]:
    with store.open(name) as file:
        # In this thread: pyarrow's own may still hold the Python file when the process ends, which then aborts.
        parquet = pq.ParquetFile(file, pre_buffer=False)
        for number in range(parquet.num_row_groups):
            yield from parquet.read_row_group(number, use_threads=False).to_pylist()


def _tensors(row: Mapping[str, Any]) -> dict[str, Tensor]:
    names = [column.removesuffix("_bytes") for column in row if _is_tensor_column(column)]
    return {
        name: decode_bytes(row[f"{name}_bytes"], dtype=row[f"{name}_dtype"], shape=row[f"{name}_shape"])
        for name in names
        if row[f"{name}_dtype"]
    }


def _file_name(id: str, key: str) -> str:
    """What an id was before it got its key's suffix: ``#NN`` of a window, ``@NN`` of a caption."""
    suffix = re.search(r"[#@].*|$", key)
    assert suffix is not None
    return id.removesuffix(suffix[0])
