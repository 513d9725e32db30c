"""Writing latents, against the disk's limit and FastVideo's own way of writing Parquet.

All write the same distinct rows of 10 MB (a latent of 16x20x60x104 and an embedding of 120x4096, float32) to the same
disk and end with an fsync:

  raw                 the tensors' bytes, one after the other: the least anyone can do
  raw + sha256        the same, hashed on the way: the least for a file named by its digest
  Parquet             streamprep's settings: a row group a row, no codec, no dictionary, no statistics, no copies
  streamprep          the exporter as it is used: the same, hashed and published through `Store`
  FastVideo           `pa.Table.from_pylist` of Python bytes, zstd, one row group: what its ParquetDatasetWriter does

Goals: Parquet in at most 1.5 x the CPU of raw, and FastVideo's way in at least 8 x that of Parquet. The price of the
digest shows in the rows that have one.

Example: python benchmarks/export.py
         python benchmarks/export.py --num-rows 48 --rounds 9
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _latents import fastvideo_record, make_sample
from _measure import environment, goal, markdown, parser, ratios, report, rounds_of, say, spread, work_folder

from exporters.fastvideo import _OpenFile, open_shard, schema
from streamprep.storage import Store, open_store
from streamprep.types import EncodedSample

TENSORS = ("vae_latent", "text_embedding")


def main() -> None:
    args = _arguments()
    env = environment()
    say(f"making {args.num_rows} rows")
    samples = [make_sample(number) for number in range(args.num_rows)]
    size_bytes = sum(array.nbytes for sample in samples for array in _arrays(sample))
    with work_folder(args.work) as work:
        out = work / "out"
        methods = _methods(samples, out)
        taken = rounds_of(methods, num_rounds=args.rounds, before=functools.partial(_empty, out))
        written = {name: _written_bytes(run, out) for name, run in methods.items()}
    walls, cpus = ratios(taken, "raw", "wall_seconds"), ratios(taken, "raw", "cpu_seconds")
    rows = [
        [
            name,
            f"{statistics.median(run.cpu_seconds for run in runs) / (size_bytes / 1e9):.2f}",
            spread(cpus[name]),
            spread(walls[name]),
            f"{written[name] / size_bytes:.3f}",
        ]
        for name, runs in taken.items()
    ]
    report(
        args,
        env,
        lines=[
            f"{args.num_rows} rows, {size_bytes / 1e6:.0f} MB, "
            f"median (lowest-highest) of {args.rounds} interleaved rounds.",
            "",
            markdown(["method", "CPU s/GB", "CPU / raw", "wall / raw", "bytes / raw"], rows),
            "",
            goal("Parquet: CPU / raw", cpus["Parquet"], at_most=1.5),
            goal("FastVideo: CPU / Parquet", ratios(taken, "Parquet", "cpu_seconds")["FastVideo"], at_least=8),
            goal("streamprep: CPU / raw + sha256", _per_hashed(taken), at_most=2),
        ],
        results={"size_bytes": size_bytes, "rounds": taken, "cpu_over_raw": cpus, "wall_over_raw": walls},
    )


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, rounds=5, num_rows=24)
    made.add_argument("--num-rows", type=int, help="of 10 MB, all in memory (default: 24)")
    return made.parse_args()


def _arrays(sample: EncodedSample) -> list[np.ndarray[Any, Any]]:
    return [sample.tensors[name].numpy() for name in TENSORS]


def _empty(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()


def _written_bytes(run: Callable[[], None], out: Path) -> int:
    _empty(out)
    run()
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _methods(samples: Sequence[EncodedSample], out: Path) -> dict[str, Callable[[], None]]:
    return {
        "raw": functools.partial(_write_raw, samples, out / "raw"),
        "raw + sha256": functools.partial(_write_raw, samples, out / "raw", hashed=True),
        "Parquet": functools.partial(_write_parquet, samples, open_store(out)),
        "streamprep": functools.partial(_write_with_streamprep, samples, open_store(out)),
        "FastVideo": functools.partial(_write_as_fastvideo, samples, out / "fastvideo.parquet"),
    }


def _write_raw(samples: Sequence[EncodedSample], path: Path, *, hashed: bool = False) -> None:
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for sample in samples:
            for array in _arrays(sample):
                file.write(array)
                if hashed:
                    digest.update(array)
        os.fsync(file.fileno())


def _write_parquet(samples: Sequence[EncodedSample], store: Store) -> None:
    with store.new_file() as pending:
        file = _OpenFile(pending, schema("t2v"))
        for sample in samples:
            file.write(sample, TENSORS)
        file.finish(TENSORS)
        pending.publish("data.parquet", step="data")


def _write_with_streamprep(samples: Sequence[EncodedSample], store: Store) -> None:
    with open_shard(store, "000000", workload="t2v", samples_per_file=len(samples), contract={}) as writer:
        for sample in samples:
            writer.write(sample)
        writer.close()


def _write_as_fastvideo(samples: Sequence[EncodedSample], path: Path) -> None:
    """What ``fastvideo/dataset/dataloader/parquet_io.py`` does with the records of a file."""
    table = pa.Table.from_pylist([fastvideo_record(sample) for sample in samples], schema=schema("t2v"))
    pq.write_table(table, path, compression="zstd")
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _per_hashed(taken: dict[str, Any]) -> list[float]:
    return ratios(taken, "raw + sha256", "cpu_seconds")["streamprep"]


if __name__ == "__main__":
    sys.exit(main())
