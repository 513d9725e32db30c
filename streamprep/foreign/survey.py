"""Which rows there are, by footers and small columns; no latent is read.

FastVideo's columns are judged by how its scripts fill them: shapes are believed, ``num_frames``, ``duration_sec`` and
``fps`` are not, and ``width`` and ``height`` may be swapped.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from streamprep import canonical
from streamprep.ahead import fetch_ahead
from streamprep.errors import UserError, first_line
from streamprep.foreign.columns import SMALL, columns_to_read, unused_columns
from streamprep.foreign.parquet import LATENT, ForeignFile, footer_digest, is_of_parquet
from streamprep.foreign.repetitions import Repetitions
from streamprep.keys import key_of
from streamprep.progress import count, size
from streamprep.row_index import RAW, TEXT, TEXTS, RowGroups, RowIndex, TensorColumns, TextColumns
from streamprep.storage import FileEntry, Store

FIRST_FRAME, CLIP_FEATURE = "first_frame_latent", "clip_feature"
_SPLITS = ("combined_parquet_dataset", "training_dataset", "validation_dataset")
_RANKS = {"vae_latent": 4, "first_frame_latent": 4, "text_embedding": 2, "clip_feature": 2}
_NO_TENSOR = ("", "unknown", None)
_FLOAT32 = ("float32", "torch.float32")
_SUFFIX = re.compile(r"(#\d+)?(@\d+)?$")
_AT_ONCE, _FOOTER_BYTES, _AHEAD_BYTES = 12, 2**20, 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedRow:
    """A row that is left out."""

    file: str
    row: int
    """Its number in the file."""
    key: str
    reason: str
    """``empty_tensor`` or ``repeated_row``."""
    message: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All rows that can be used."""

    url: str
    files: tuple[ForeignFile, ...]
    file: NDArray[np.int32]
    """Of each row, the number of its file."""
    groups: RowGroups
    keys: Any
    """An array of Arrow's, of strings."""
    shapes: Mapping[str, NDArray[np.int64]]
    """(rows, dimensions), of each tensor of the contract."""
    dropped: tuple[DroppedRow, ...]
    doubts: tuple[str, ...]
    """What looks odd, and is no reason to refuse."""
    unused: tuple[str, ...]
    """Columns that are none of the contract's tensors and none of `SMALL`."""
    contract: Mapping[str, Any]

    @property
    def num_rows(self) -> int:
        """That can be used."""
        return len(self.file)

    @property
    def sha256(self) -> str:
        """Of the files, as far as their footers tell them from others."""
        return canonical.digest([[file.path, file.size_bytes, file.footer_sha256] for file in self.files])

    def buckets_of(self, rows: NDArray[np.int64]) -> list[str]:
        """Of some rows: ``TxHxW`` of the pixels that a latent stands for, or ``text``."""
        if LATENT not in self.shapes:
            return ["text"] * len(rows)
        return [bucket_of(self.contract["video"], shape) for shape in self.shapes[LATENT][rows].tolist()]

    def keys_of(self, rows: NDArray[np.int64]) -> list[str]:
        """Of some rows."""
        return self.keys.take(pa.array(rows)).to_pylist()  # type: ignore[no-any-return]

    def row_index(self, tensors: Sequence[str] | None, *, with_texts: bool = False) -> RowIndex:
        """All rows, for `EncodedDataset`.

        Args:
            tensors: Of these only; None for all of the contract.
            with_texts: Whether ids and captions are to be read.

        Raises:
            UserError: if one of them is not in the contract.
        """
        if missing := [name for name in tensors or () if name not in self.shapes]:
            raise UserError(
                f"{self.url} has no {', '.join(missing)}: the declared tensors are {', '.join(self.shapes)}"
            )
        buckets, bucket = np.unique(self.buckets_of(np.arange(self.num_rows)), return_inverse=True)
        return RowIndex(
            url=self.url,
            files=tuple(file.path for file in self.files),
            file_sizes=tuple(file.size_bytes for file in self.files),
            file=self.file,
            keys=self.keys,
            buckets=tuple(buckets.tolist()),
            bucket=bucket.astype(np.int32),
            tensors={
                name: _columns(shape) for name, shape in self.shapes.items() if tensors is None or name in tensors
            },
            contract=self.contract,
            sha256=canonical.digest([self.sha256, self.contract]),
            texts={name: _text_columns(self.num_rows) for name in (TEXTS if with_texts else ())},
            groups=self.groups,
        )

    def describe(self) -> Iterator[str]:
        """What is left out or looks odd, for a person."""
        if self.dropped:
            reasons = Counter(row.reason for row in self.dropped)
            yield f"{count(len(self.dropped), 'row')} left out: " + ", ".join(
                f"{number} {reason} (the first: {next(row for row in self.dropped if row.reason == reason)})"
                for reason, number in reasons.most_common()
            )
        yield from self.doubts

    def describe_cost(self) -> Iterator[str]:
        """What it costs to read rows in another order than the files', if it costs anything."""
        num_rows = max((number for file in self.files for number in file.group_rows), default=0)
        num_bytes = max((number for file in self.files for number in file.group_bytes), default=0)
        if num_rows > 1:
            yield (
                f"{self.url}: its row groups hold up to {num_rows} rows, {size(num_bytes)}, and are decompressed "
                "whole, again for nearly every row: what `streamprep convert` makes of it is read tens of times faster"
            )


def bucket_of(video: Mapping[str, Any], shape: Sequence[int]) -> str:
    """``TxHxW`` of the pixels that a latent (C, T, H, W) stands for."""
    num_frames, height, width = pixels_of(video, shape)
    return f"{num_frames}x{height}x{width}"


def pixels_of(video: Mapping[str, Any], shape: Sequence[int]) -> tuple[int, int, int]:
    """(frames, height, width) that a latent (C, T, H, W) stands for; a VAE ignores frames that do not fill one."""
    factor = int(video["spatial_factor"])
    return 1 + (shape[1] - 1) * int(video["temporal_factor"]), shape[2] * factor, shape[3] * factor


def survey(store: Store, contract: Mapping[str, Any]) -> Survey:
    """Look at all rows.

    Args:
        store: A folder of FastVideo's files, in folders of any depth.
        contract: As declared.

    Raises:
        UserError: if the rows cannot be what is declared, naming one.
    """
    entries = _parquet_files(store)
    rows = _Rows(store.url, contract)
    files: list[ForeignFile] = []
    for _, (file, table) in _read_all(store, entries, contract):
        rows.add(len(files), file, table)
        files.append(file)
    return rows.finish(tuple(files), store)


def _parquet_files(store: Store) -> list[FileEntry]:
    entries = sorted(
        (entry for entry in store.walk() if entry.path.endswith(".parquet") and not _is_hidden(entry.path)),
        key=lambda entry: entry.path,
    )
    if not entries:
        raise UserError(f"{store.url} has no .parquet files")
    splits = {split for split in _SPLITS for entry in entries if split in entry.path.split("/")[:-1]}
    if len(splits) > 1:
        raise UserError(f"{store.url} has {' and '.join(sorted(splits))}: give the one of them that is meant")
    return entries


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _read_all(
    store: Store, entries: Sequence[FileEntry], contract: Mapping[str, Any]
) -> Iterator[tuple[FileEntry, tuple[ForeignFile, Any]]]:
    if store.local_path() is not None:
        return ((entry, _read_small(store, entry, contract)) for entry in entries)
    return fetch_ahead(
        entries,
        lambda entry: _read_small(store, entry, contract),
        size_bytes=lambda _: _FOOTER_BYTES,
        max_bytes=_AHEAD_BYTES,
        num_threads=_AT_ONCE,
    )


def _read_small(store: Store, entry: FileEntry, contract: Mapping[str, Any]) -> tuple[ForeignFile, Any]:
    """A file's footer, and its columns without those of bytes."""
    with store.open(entry.path) as opened:
        try:
            parquet = pq.ParquetFile(opened, pre_buffer=False)
            metadata, schema = parquet.metadata, parquet.schema_arrow
            there = columns_to_read(schema, contract["tensors"], f"{store.url}/{entry.path}")
            table = parquet.read(columns=list(there.values()), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            if not is_of_parquet(error):
                raise
            raise UserError(f"{store.url}/{entry.path} cannot be read as Parquet: {first_line(error)}") from error
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        file = ForeignFile(
            path=entry.path,
            size_bytes=entry.size_bytes,
            footer_sha256=footer_digest(opened, entry.size_bytes),
            group_rows=tuple(group.num_rows for group in groups),
            group_bytes=tuple(group.total_byte_size for group in groups),
            unused=tuple(unused_columns(schema.names, there.values())),
        )
    return file, pa.table({name: table[column] for name, column in there.items()})


class _Rows:
    """Takes the rows of one file after the other, and decides about each."""

    def __init__(self, url: str, contract: Mapping[str, Any]) -> None:
        self._url, self._contract = url, contract
        self._tensors = tuple(contract["tensors"])
        self._file: list[int] = []
        self._group: list[int] = []
        self._position: list[int] = []
        self._row: list[int] = []
        self._ids: list[str] = []
        self._digests: list[bytes] = []
        """Of all small columns and shapes."""
        self._shapes: dict[str, list[list[int]]] = {name: [] for name in self._tensors}
        self._dropped: list[DroppedRow] = []
        self._doubts: Counter[str] = Counter()
        self._first_doubt: dict[str, str] = {}

    def add(self, number: int, file: ForeignFile, table: Any) -> None:
        """Decide about the rows of a file."""
        places = ((group, at) for group, num_rows in enumerate(file.group_rows) for at in range(num_rows))
        for row, ((group, at), values) in enumerate(zip(places, table.to_pylist(), strict=True)):
            self._add_row(number, file, row, group, at, values)

    def _add_row(self, number: int, file: ForeignFile, row: int, group: int, at: int, values: dict[str, Any]) -> None:
        id = values.get("id") or f"{file.path.removesuffix('.parquet')}/row_{row}"
        where = f"{self._url}/{file.path}, row {row} ({id})"
        key = _key_of(id)
        if empty := [name for name in self._tensors if _is_empty(values, name)]:
            self._drop(
                file, row, key, "empty_tensor", f"{', '.join(empty)}: no values, as FastVideo writes what failed"
            )
            return
        shapes = {name: self._shape(values, name, where) for name in self._tensors}
        self._check_pixels(values, shapes, where)
        digest = hashlib.sha256(repr([[values.get(name) for name in SMALL], shapes]).encode()).digest()
        self._digests.append(digest)
        self._ids.append(id)
        self._row.append(row)
        self._file.append(number)
        self._group.append(group)
        self._position.append(at)
        for name, shape in shapes.items():
            self._shapes[name].append(shape)

    def _settle_keys(self, files: Sequence[ForeignFile], store: Store) -> list[str | None]:
        """Of each row; None of one that is there a second time, and dropped."""
        places = list(zip(self._file, self._group, self._position, strict=True))
        named = list(zip(self._ids, self._digests, strict=True))
        often = Counter(named)
        alike = [number for number, name in enumerate(named) if often[name] > 1]
        repetitions = Repetitions(store, files, self._contract)
        latents = {places[number]: self._shapes[LATENT][number] for number in alike} if LATENT in self._shapes else {}
        repetitions.read([places[number] for number in alike], latents)
        settled: list[str | None] = []
        seen: dict[str, int] = {}
        for number, (id, digest) in enumerate(named):
            file, row, key = files[self._file[number]], self._row[number], _key_of(id)
            if repetitions.is_one(places[number], (id, digest)):
                self._drop(
                    file,
                    row,
                    key,
                    "repeated_row",
                    "a row before has the same id, caption and shapes and, but for rounding, the same latent",
                )
                settled.append(None)
                continue
            seen[key] = seen.get(key, 0) + 1
            if seen[key] > 1:
                key = _numbered(key, seen[key])
                where = f"{self._url}/{file.path}, row {row} ({id})"
                self._doubt(f"has the id of another row, its key is {key}", where)
            settled.append(key)
        return settled

    def _drop(self, file: ForeignFile, row: int, key: str, reason: str, message: str) -> None:
        self._dropped.append(DroppedRow(file=file.path, row=row, key=key, reason=reason, message=message))

    def _doubt(self, what: str, where: str) -> None:
        kind = re.sub(r"\S*\d\S*", "_", what)
        self._doubts[kind] += 1
        self._first_doubt.setdefault(kind, f"{where} {what}")

    def _shape(self, values: Mapping[str, Any], name: str, where: str) -> list[int]:
        """As it should be, without a batch of one that older files have in front."""
        found, dtype = list(values[f"{name}_shape"]), values[f"{name}_dtype"]
        shape = list(found)
        while len(shape) > _RANKS[name] and shape[0] == 1:
            del shape[0]
        where = f"{where}, column {name}_shape"
        if dtype not in _FLOAT32:
            raise UserError(f"{where.removesuffix('_shape')}_dtype: {dtype}, float32 is what FastVideo's readers take")
        expected = _expected(self._contract, name, shape)
        if min(shape) < 0:
            raise UserError(f"{where}: {found}, no tensor has such a shape")
        if len(shape) != len(expected) or any(b is not None and a != b for a, b in zip(shape, expected, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            raise UserError(
                f"{where}: {found}, the declared model ({self._contract['family']} {self._contract['variant']}) has "
                f"[{wanted}]: declare the model that encoded them"
            )
        if name == TEXT and shape[0] > self._contract["text"]["max_length"]:
            raise UserError(
                f"{where}: {shape[0]} tokens, the declared model takes {self._contract['text']['max_length']} at most"
            )
        return shape

    def _check_pixels(self, values: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], where: str) -> None:
        """Columns of sizes against the latent; FastVideo swaps width and height in one of its two ways of writing."""
        latent = shapes.get(LATENT)
        if latent is None:
            return
        if FIRST_FRAME in shapes and shapes[FIRST_FRAME] != latent:
            raise UserError(
                f"{where}: {FIRST_FRAME} is {shapes[FIRST_FRAME]} and {LATENT} {latent}; they must be alike"
            )
        num_frames, height, width = pixels_of(self._contract["video"], latent)
        factor = self._contract["video"]["spatial_factor"]
        said = (_pixels(values.get("width")), _pixels(values.get("height")))
        if all(said) and sorted(said) != sorted((width, height)):
            other = _factor(said, latent)
            if other is not None:
                raise UserError(
                    f"{where}, columns width and height: {said[0]} and {said[1]} with a latent of {latent[3]} by "
                    f"{latent[2]} are a VAE's of factor {other}, the declared model's is {factor}: declare the model "
                    "that encoded them"
                )
            self._doubt(f"says {said[0]}x{said[1]} pixels, its latent is of {width}x{height}", where)
        frames = values.get("num_frames")
        if frames and frames not in (latent[1], num_frames):
            self._doubt(f"says num_frames {frames}, its latent is of {num_frames} ({latent[1]} of its own)", where)
        fps = values.get("fps")
        if fps is not None and rate_of(fps) is None:
            self._doubt(f"says fps {fps}, which is no rate: it is unknown", where)

    def finish(self, files: tuple[ForeignFile, ...], store: Store) -> Survey:
        """When all files have been seen; rows that may be there twice are read and compared."""
        if not self._ids:
            why = f": {self._dropped[0]}" if self._dropped else ""
            raise UserError(f"{self._url}: none of {len(self._dropped)} rows can be used{why}")
        keys = self._settle_keys(files, store)
        kept = np.array([key is not None for key in keys])
        shapes = {name: np.array(values, np.int64)[kept] for name, values in self._shapes.items()}
        if (doubt := _odd_lengths(self._url, shapes[TEXT][:, 0], self._contract["text"])) is not None:
            self._doubts[doubt] += 1
            self._first_doubt[doubt] = doubt
        return Survey(
            url=self._url,
            files=files,
            file=np.array(self._file, np.int32)[kept],
            groups=RowGroups(
                group=np.array(self._group, np.int32)[kept], position=np.array(self._position, np.int32)[kept]
            ),
            keys=pa.array([key for key in keys if key is not None]),
            shapes=shapes,
            dropped=tuple(self._dropped),
            unused=tuple(sorted({name for file in files for name in file.unused})),
            doubts=tuple(
                f"{self._first_doubt[kind]}" + (f"; so do {number - 1} more" if number > 1 else "")
                for kind, number in self._doubts.items()
            ),
            contract=self._contract,
        )


def rate_of(fps: float | None) -> float | None:
    """Frames per second as a column has them; None if that cannot be."""
    return float(fps) if fps is not None and 0 <= fps < math.inf else None


def _pixels(said: float | None) -> int:
    """As a column has them; 0 if that cannot be."""
    return int(said) if said is not None and 0 < said < math.inf else 0


def _numbered(key: str, number: int) -> str:
    """The key of another row of the same id; its captions stay those of one clip."""
    clip, at, caption = key.partition("@")
    return f"{clip}~{number:02d}{at}{caption}"


def _key_of(id: str) -> str:
    suffix = _SUFFIX.search(id)
    assert suffix is not None
    return key_of(id.removesuffix(suffix[0]) or "_") + suffix[0]


def _is_empty(values: Mapping[str, Any], name: str) -> bool:
    shape = values[f"{name}_shape"]
    return not shape or None in shape or not math.prod(shape) or values[f"{name}_dtype"] in _NO_TENSOR


def _expected(contract: Mapping[str, Any], name: str, shape: Sequence[int]) -> list[int | None]:
    """What is known of a shape; None for what may be anything."""
    if name == TEXT:
        return [None, contract["text"]["dim"]]
    if name == CLIP_FEATURE:
        return [contract["image"]["num_tokens"], contract["image"]["dim"]]
    return [contract["video"]["latent_channels"], None, None, None]


def _factor(pixels: Sequence[int], latent: Sequence[int]) -> int | None:
    """Pixels per latent, if they are the same number in both directions."""
    for width, height in (pixels, pixels[::-1]):
        if width % latent[3] == 0 and height % latent[2] == 0 and width // latent[3] == height // latent[2]:
            return width // latent[3]
    return None


def _odd_lengths(url: str, lengths: NDArray[np.int64], text: Mapping[str, Any]) -> str | None:
    """Whether embeddings are as long as trimmed or padded ones are; what looks odd, and need not be wrong.

    Raises:
        UserError: if they cannot be what is declared.
    """
    longest = int(text["max_length"])
    if text["padding"] == "padded" and (lengths != lengths[0]).any():
        raise UserError(
            f"{url}, column {TEXT}_shape: rows have {lengths.min()} to {lengths.max()} tokens, padded ones would all "
            "have the same: declare text = 'trimmed'"
        )
    if text["padding"] == "trimmed" and len(lengths) > 1 and (lengths == longest).all():
        return (
            f"{url}, column {TEXT}_shape: all {len(lengths)} rows have {longest} tokens, the most there can be, and "
            "are declared trimmed: are all captions that long? What pads them otherwise is no zeros, and would be read "
            "as words"
        )
    return None


def _text_columns(num_rows: int) -> TextColumns:
    none = np.zeros(num_rows, np.int32)
    return TextColumns(offset=none.astype(np.int64), size=none.astype(np.int64), forms=("utf8",), form=none)


def _columns(shape: NDArray[np.int64]) -> TensorColumns:
    none = np.zeros(len(shape), np.int32)
    return TensorColumns(
        offset=none.astype(np.int64),
        size=4 * shape.prod(axis=1),
        shape=shape,
        dtypes=("float32",),
        dtype=none,
        codecs=(RAW,),
        codec=none,
    )
