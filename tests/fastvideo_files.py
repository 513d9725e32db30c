"""Parquet as FastVideo's own scripts write it (``fastvideo/dataset/dataloader/parquet_io.py``), of our rows.

``worker_N/data_chunk_M.parquet``, each written by ``pq.write_table(chunk, path, compression="zstd")``: with pyarrow's
defaults all rows of a file are one row group, dictionary-encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fastvideo_schemas import SCHEMAS

from streamprep import job
from streamprep.storage import open_store

Row = dict[str, Any]


def rows_of(out: Path) -> list[Row]:
    """All rows of an output of ours in FastVideo's schema, in the order of its index."""
    names = [file.name for record in job.open_job(open_store(out)).records() for file in record.files]
    return [row for name in names for row in pq.read_table(out / name, partitioning=None).to_pylist()]


def write(
    root: Path,
    rows: Sequence[Row],
    *,
    workload: str = "t2v",
    samples_per_file: int = 8,
    schema: pa.Schema | None = None,
    compression: str = "zstd",
) -> Path:
    """Write rows as its scripts do, and give the folder back."""
    schema = schema or SCHEMAS[workload]
    for number, start in enumerate(range(0, len(rows), samples_per_file)):
        folder = root / "combined_parquet_dataset" / f"worker_{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        records = [{name: row[name] for name in schema.names} for row in rows[start : start + samples_per_file]]
        path = folder / f"data_chunk_{number // 2}.parquet"
        pq.write_table(pa.Table.from_pylist(records, schema=schema), path, compression=compression)
    (root / "combined_parquet_dataset/map_style_cache").mkdir(exist_ok=True)
    (root / "combined_parquet_dataset/map_style_cache/file_info.pkl").write_bytes(b"its reader's cache")
    return root


def with_its_metadata(row: Row) -> Row:
    """The columns that FastVideo's scripts get wrong, wrong: width and height swapped, seconds by the source's rate."""
    seconds = 5 / row["fps"] if row["fps"] else 0.0
    return {**row, "width": row["height"], "height": row["width"], "duration_sec": seconds}


def changed(rows: Sequence[Row], number: int, change: Callable[[Row], Mapping[str, Any]]) -> list[Row]:
    """All rows, one of them otherwise."""
    return [{**row, **change(row)} if n == number else row for n, row in enumerate(rows)]
