"""Reading latents back: an epoch of `EncodedDataset` against the disk's limit and other libraries' datasets.

All hold the same distinct rows of 10 MB (a latent of 16x20x60x104 and an embedding of 120x4096, float32), each in its
library's format. Every run is a process of its own, begins with nothing of its files in the page cache, and reads all
rows once, in random order, into batches of tensors padded alike:

  raw                     our Parquet files from first to last byte: the least anyone can do
  streamprep, Parquet     `EncodedDataset` of what the exporter fastvideo writes
  streamprep, WebDataset  of what the exporter webdataset writes, in float32
  litdata                 StreamingDataset and StreamingDataLoader of chunks of 64 MB
  MosaicML                StreamingDataset of shards of 64 MB
  webdataset              WebDataset of .npy in tars, with a shuffle buffer of 16

Then a reader that loads the row group of each row, as FastVideo's own does: on our Parquet, and on FastVideo's layout
(zstd, dictionary, 64 rows in one group). And the time to the first batch, at the start and in the middle of an epoch,
of many rows, whose files are holes.

Goals: `EncodedDataset` at least 0.9 of raw, 1.1 of litdata, 1.8 of MosaicML and webdataset; row groups at least 50 x
faster than in FastVideo's layout; the first batch, also after resuming, within 0.3 s.

Example: python -m pip install litdata mosaicml-streaming && python benchmarks/train_read.py
         python benchmarks/train_read.py --num-rows 400 --num-workers 2
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

# The processes that read import this file once more: so nothing heavy up here.
from _latents import (
    ROW_BYTES,
    ROWS_PER_FILE,
    write_as_fastvideo,
    write_holes,
    write_litdata,
    write_mosaic,
    write_output,
    write_tars,
)
from _measure import environment, goal, markdown, parser, report, say, spread, work_folder
from _readers import Epoch, data_files, drop_from_cache, first_batch, measure, read_row_groups

WRITERS: dict[str, Callable[[Path, int], None]] = {
    "streamprep, Parquet": partial(write_output, exporter="fastvideo", options={"latent_dtype": "float32"}),
    "streamprep, WebDataset": partial(
        write_output,
        exporter="webdataset",
        options={"latent_dtype": "float32", "latent_format": "safetensors", "latent_compression": "none"},
    ),
    "litdata": write_litdata,
    "MosaicML": write_mosaic,
    "webdataset": write_tars,
}
NEEDS = {"litdata": "litdata", "MosaicML": "streaming"}
"""What is to be installed for a method."""
OURS = ("streamprep, Parquet", "streamprep, WebDataset")
GOALS = {"raw": 0.9, "litdata": 1.1, "MosaicML": 1.8, "webdataset": 1.8}
"""Rows a second of `EncodedDataset` over those of each."""
FIRST_BATCH_GOAL, ROW_GROUP_GOAL = 0.3, 50
SMOKE = {"num_rows": 4, "rounds": 1, "index_rows": 1000, "layout_rows": 1}


def main() -> None:
    args = _arguments()
    env = environment()
    missing = [name for name, module in NEEDS.items() if importlib.util.find_spec(module) is None]
    with work_folder(args.work) as work:
        folders = _write_all(work, args.num_rows, [name for name in WRITERS if name not in missing])
        epochs = _read_all(folders, args)
        row_groups = _read_row_groups(work, folders["streamprep, Parquet"], args)
        starts = _start(work, args)
    report(
        args,
        env,
        lines=[
            f"{args.num_rows} rows, {args.num_rows * ROW_BYTES / 1e9:.1f} GB, batches of {args.batch_size}, "
            f"{args.num_workers} workers; median (lowest-highest) of {args.rounds} interleaved rounds.",
            *[f"Not measured: {name} is not installed." for name in missing],
            "",
            *_table(epochs),
            "",
            *_goals(epochs),
            "",
            *_describe_row_groups(row_groups),
            "",
            *_describe_starts(starts, args),
        ],
        results={"epochs": epochs, "row_groups": row_groups, "starts": starts},
    )


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, rounds=3, num_rows=192, batch_size=2, num_workers=0, index_rows=100_000, layout_rows=3)
    made.add_argument("--num-rows", type=int, help="of 10 MB; takes 5 times as much disk (default: 192)")
    made.add_argument("--batch-size", type=int, help="default: 2")
    made.add_argument("--num-workers", type=int, help="of the loader; 0 reads in the process itself (default: 0)")
    made.add_argument("--index-rows", type=int, help="for the time to the first batch (default: 100000)")
    made.add_argument("--layout-rows", type=int, help="to read from FastVideo's layout in a round (default: 3)")
    made.add_argument("--smoke", action="store_true", help="whether it works: a few rows, numbers without meaning")
    args = made.parse_args()
    if args.smoke:
        vars(args).update(SMOKE)
    return args


def _write_all(work: Path, num_rows: int, names: Sequence[str]) -> dict[str, Path]:
    folders = {}
    for number, name in enumerate(names):
        say(f"writing {num_rows} rows: {name}")
        folders[name] = work / f"data-{number}"
        _in_new_process(WRITERS[name], folders[name], num_rows)
    return folders


def _read_all(folders: Mapping[str, Path], args: argparse.Namespace) -> dict[str, list[Epoch]]:
    found: dict[str, list[Epoch]] = {name: [] for name in ("raw", *folders)}
    for number in range(args.rounds):
        for name, epochs in found.items():
            folder = folders.get(name, folders["streamprep, Parquet"])
            drop_from_cache(folder)
            epoch = _in_new_process(measure, name, folder, args.batch_size, args.num_workers)
            if epoch.num_rows < args.num_rows - args.batch_size:
                raise SystemExit(f"{name} read {epoch.num_rows} of {args.num_rows} rows")
            say(f"round {number + 1}: {name}: {epoch.num_rows / epoch.seconds:.1f} rows/s")
            epochs.append(epoch)
    return found


def _read_row_groups(work: Path, ours: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds for a row of each layout, by round."""
    theirs = work / "fastvideo" / "data.parquet"
    theirs.parent.mkdir()
    num_rows = min(ROWS_PER_FILE, args.num_rows)
    say(f"writing {num_rows} rows in FastVideo's layout")
    _in_new_process(write_as_fastvideo, theirs, num_rows)
    found: dict[str, list[float]] = {"ours": [], "FastVideo": []}
    for number in range(args.rounds):
        for name, paths, num_read in (
            ("ours", data_files(ours)[:1], num_rows),
            ("FastVideo", [theirs], args.layout_rows),
        ):
            drop_from_cache(paths[0].parent)
            rows = [(0, row * 7 % num_rows) for row in range(num_read)]
            seconds = _in_new_process(read_row_groups, paths, rows) / num_read
            say(f"round {number + 1}: {name}: {seconds:.3f} s a row")
            found[name].append(seconds)
    return found


def _start(work: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds until the first batch of a large output."""
    out = work / "large"
    say(f"making an index of {args.index_rows} rows")
    _in_new_process(write_holes, out, args.index_rows)
    found: dict[str, list[float]] = {"start": [], "resume": []}
    for _ in range(args.rounds):
        for name, consumed in (("start", 0), ("resume", args.index_rows // args.batch_size // 2)):
            drop_from_cache(out / "_streamprep")
            found[name].append(_in_new_process(_imported_first_batch, out, consumed, args.batch_size))
    return found


def _imported_first_batch(folder: Path, consumed: int, batch_size: int) -> float:
    """`first_batch`, in a process that has imported what it needs and warmed nothing else."""
    import streamprep.dataset  # noqa: F401

    return first_batch(folder, consumed, batch_size)


def _in_new_process(run: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def _table(epochs: Mapping[str, Sequence[Epoch]]) -> list[str]:
    head = ["method", "rows/s", "rows/s / raw", "first batch, s", "CPU ms/row", "peak, MB"]
    rows = [
        [
            name,
            spread([_rate(one) for one in taken], 1),
            spread(_ratios(epochs, name, "raw")),
            spread([one.first_batch_seconds for one in taken]),
            f"{statistics.median(1000 * one.cpu_seconds / one.num_rows for one in taken):.1f}",
            f"{statistics.median(one.peak_mb for one in taken):.0f}",
        ]
        for name, taken in epochs.items()
    ]
    return [markdown(head, rows)]


def _goals(epochs: Mapping[str, Sequence[Epoch]]) -> list[str]:
    return [
        goal(f"{ours}: rows/s over {other}'s", _ratios(epochs, ours, other), at_least=least)
        for ours in OURS
        for other, least in GOALS.items()
        if other in epochs
    ]


def _describe_row_groups(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    faster = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["FastVideo"], strict=True)]
    rows = [[name, spread(taken, 3)] for name, taken in seconds.items()]
    return [
        markdown(["layout", "s/row"], rows),
        "",
        goal("a reader of row groups, faster on our layout", faster, at_least=ROW_GROUP_GOAL),
    ]


def _describe_starts(seconds: Mapping[str, Sequence[float]], args: argparse.Namespace) -> list[str]:
    return [
        goal(f"first batch of {args.index_rows} rows, {name}, s", taken, at_most=FIRST_BATCH_GOAL)
        for name, taken in seconds.items()
    ]


def _rate(epoch: Epoch) -> float:
    return epoch.num_rows / epoch.seconds


def _ratios(epochs: Mapping[str, Sequence[Epoch]], name: str, reference: str) -> list[float]:
    return [_rate(a) / _rate(b) for a, b in zip(epochs[name], epochs[reference], strict=True)]


if __name__ == "__main__":
    main()
