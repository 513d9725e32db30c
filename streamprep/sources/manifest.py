"""A table of videos and captions in one file: JSONL, JSON (a list of objects), CSV, TSV or Parquet.

The dataset is the file, or a folder with one that is called ``metadata``, ``manifest`` or ``dataset``.
Columns go by convention (`VIDEO_COLUMNS`, `CAPTION_COLUMNS`) or by ``--video-column`` and ``--caption-column``. Paths
are relative to the file's folder. An empty caption cell is no caption. In Parquet the video column may hold the encoded
bytes themselves, or ``datasets``' pairs of bytes and path; then keys are row numbers. ``fps`` and ``num_frames`` are
checked against the video; all other columns but those of bytes are kept.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from streamprep.errors import UserError
from streamprep.sources._bytes import OpenParquetRow, add_bytes, open_parquet
from streamprep.sources._files import (
    CAPTION_COLUMNS,
    VIDEO_COLUMNS,
    Listing,
    SourceOptions,
    choose_column,
    parse_json,
    read_json,
    read_text,
    split_columns,
)
from streamprep.sources._tree import Tree

OPTIONS = ("video_column", "caption_column")
TAKES_FILES = True

_STEMS = ("metadata", "manifest", "dataset")
_EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

Row = tuple[str, dict[str, Any]]
"""Where it is (file and line), and its cells."""


def matches(tree: Tree) -> bool:
    """Whether this is a table, or a folder with one."""
    if tree.file is not None:
        return tree.is_file(tree.file) and _extension(tree.file) in _EXTENSIONS
    return bool(_candidates(tree))


def read_samples(tree: Tree, options: SourceOptions) -> Listing:
    """List the dataset's videos.

    Raises:
        UserError: naming file and line, if the table is not as described.
    """
    file = tree.file or _only_candidate(tree)
    listing = Listing(tree)
    rows = _read_rows(tree, file)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{tree.where(file)} lists no videos: it has no rows")
    columns = _choose_columns(tree.where(file), first[1], options)
    if not isinstance(first[1][columns[0]], str):
        listing.open_video = OpenParquetRow(tree, columns[0])
        listing.in_order = True
    version = tree.version_of(file)
    for number, (where, row) in enumerate(_chain(first, rows)):
        _add(listing, file, version, number, row, columns, where=where)
    return listing


def _add(
    listing: Listing, file: str, version: str, number: int, row: dict[str, Any], columns: tuple[str, str], *, where: str
) -> None:
    video_column, caption_column = columns
    for column in columns:
        if column not in row:
            raise UserError(f"{where}: there is no {column!r}, which the first row has; it has {', '.join(row)}"[:500])
    row = {**row, caption_column: [] if row[caption_column] is None else row[caption_column]}
    captions, declared, extra = split_columns(
        row, where=where, video_column=video_column, caption_column=caption_column
    )
    video = row[video_column]
    assert captions is not None
    if isinstance(video, str) and not listing.in_order:
        listing.add(video, file_name=video, captions=captions, declared=declared, extra=extra, where=where)
    elif listing.in_order and (isinstance(video, (bytes, Mapping)) or video is None):
        add_bytes(
            listing,
            video,
            path=file,
            position=number,
            number=number,
            version=version,
            captions=captions,
            declared=declared,
            extra=extra,
            where=where,
        )
    else:
        raise UserError(
            f"{where}: the column {video_column!r} must hold paths (or, in Parquet, the encoded bytes in all rows), "
            f"got {video!r:.100}"
        )


def _choose_columns(where: str, row: dict[str, Any], options: SourceOptions) -> tuple[str, str]:
    video = choose_column(row, wanted=options.video_column, among=VIDEO_COLUMNS, flag="--video-column", where=where)
    others = [column for column in row if column != video]
    caption = choose_column(
        others, wanted=options.caption_column, among=CAPTION_COLUMNS, flag="--caption-column", where=where
    )
    return video, caption


def _candidates(tree: Tree) -> list[str]:
    names = (f"{stem}{extension}" for stem in _STEMS for extension in _EXTENSIONS)
    return [name for name in names if tree.is_file(name)]


def _only_candidate(tree: Tree) -> str:
    found = _candidates(tree)
    if len(found) != 1:
        names = ", ".join(found) if found else f"{', '.join(_STEMS)} with {', '.join(_EXTENSIONS)}"
        problem = "several manifests" if found else "no manifest"
        raise UserError(
            f"{tree.where()} has {problem} ({names}): the manifest is missing or in doubt, give the file itself"
        )
    return found[0]


def _extension(file: str) -> str:
    return PurePosixPath(file).suffix.lower()


# --- rows


def _read_rows(tree: Tree, name: str) -> Iterator[Row]:
    file, extension = tree.where(name), _extension(name)
    if extension in (".jsonl", ".ndjson"):
        return _json_lines(read_text(tree, name), file)
    if extension == ".json":
        return _json_list(read_json(tree, name), file)
    if extension in (".csv", ".tsv"):
        return _separated(read_text(tree, name), "\t" if extension == ".tsv" else ",", file)
    if extension == ".parquet":
        return _parquet(tree, name)
    raise UserError(f"{file}: a manifest is one of {', '.join(_EXTENSIONS)}")


def _chain(first: Row, rows: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rows


def _json_lines(text: str, file: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, _object(parse_json(line, where=where), where=where)


def _json_list(value: Any, file: str) -> Iterator[Row]:
    if isinstance(value, dict) and str(value.get("format", "")).startswith("streamprep-"):
        raise UserError(f"{file} is of packed shards: they are input of `streamprep encode`, not of `pack`")
    if not isinstance(value, list):
        raise UserError(f"{file} must hold a list of objects, one for each video, got a {type(value).__name__}")
    for number, row in enumerate(value):
        where = f"{file}, entry {number}"
        yield where, _object(row, where=where)


def _object(value: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: an object with a video and a caption is needed, got {value!r:.200}")
    return value


def _separated(text: str, delimiter: str, file: str) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(lines, [])
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise UserError(f"{file}, line 1: two columns are called {twice[0]!r}: rename one")
        for cells in lines:
            if not cells:
                continue
            where = f"{file}, line {lines.line_num}"
            if len(cells) != len(header):
                raise UserError(
                    f"{where}: {len(cells)} cells where the first line has {len(header)}: is a caption with "
                    f"{delimiter!r} or a line break not in double quotes?"
                )
            yield where, {name: _number(name, cell, where=where) for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise UserError(f"{file}, line {lines.line_num}: {error}") from error


def _number(name: str, cell: str, *, where: str) -> Any:
    """Cells are text but for what is compared with the video."""
    if name not in ("fps", "num_frames", "duration"):
        return cell
    if not cell.strip():
        return None
    try:
        return float(cell) if name != "num_frames" else int(float(cell))
    except (ValueError, OverflowError):
        raise UserError(f"{where}: {name} must be a positive number, got {cell!r:.200}") from None


def _parquet(tree: Tree, name: str) -> Iterator[Row]:
    import pyarrow as pa

    file, number = tree.where(name), 0
    try:
        with open_parquet(tree, name) as table:
            holds_bytes = any(_holds_bytes(field.type) for field in table.schema_arrow)
            for batch in table.iter_batches(batch_size=4 if holds_bytes else 1024, use_threads=False):
                for row in batch.to_pylist():
                    yield f"{file}, row {number}", row
                    number += 1
    except (pa.ArrowException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read as Parquet, after row {number}: {error}") from error


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
