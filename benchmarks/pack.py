"""Packing videos into tar shards, against the disk's limit, webdataset and tar.

All read the same videos from a warm page cache, write to the same disk and end with an fsync of what they wrote:

  cat                      all videos into one file: the least anyone can do
  streamprep, 1 process    `streamprep.pack.pack`: probe, sha256 of every video, index, manifest; the tars, the indexes
                           and their folders are fsynced
  streamprep, N processes  the same, a shard to each core, with starting the processes
  webdataset               `ShardWriter` with the same members: it probes and hashes nothing
  GNU tar                  one archive of the dataset's folder

Goals: streamprep in at most 2.5 x the time of cat, and faster than webdataset.

Example: python benchmarks/pack.py
         python benchmarks/pack.py --dataset my_dataset --rounds 9 --json pack.json
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path

from _measure import environment, goal, markdown, parser, ratios, report, rounds_of, say, spread, work_folder
from _videos import make_dataset


def main() -> None:
    args = _arguments()
    env = environment()
    with work_folder(args.work) as work:
        if args.dataset is None:
            args.dataset = work / "dataset"
            say(f"making {args.num_videos} videos")
            make_dataset(args.dataset, num_videos=args.num_videos, size_bytes=(300_000, 900_000), seconds=5.0)
        videos = _videos_of(args.dataset)
        size_bytes = sum(video.stat().st_size for video in videos)
        out = work / "out"
        taken = rounds_of(
            _methods(args.dataset, videos, out, args.shard_size_mb),
            num_rounds=args.rounds,
            before=functools.partial(_prepare, videos, out),
        )
    walls, cpus = ratios(taken, "cat", "wall_seconds"), ratios(taken, "cat", "cpu_seconds")
    rows = [
        [
            name,
            f"{size_bytes / 1e6 / statistics.median(run.wall_seconds for run in runs):.0f}",
            f"{statistics.median(run.cpu_seconds for run in runs):.2f}",
            spread(walls[name]),
            spread(cpus[name]),
        ]
        for name, runs in taken.items()
    ]
    default = next(name for name in taken if name.startswith("streamprep") and name != "streamprep, 1 process")
    against_webdataset = ratios(taken, "webdataset", "wall_seconds")[default]
    report(
        args,
        env,
        lines=[
            f"{len(videos)} videos, {size_bytes / 1e6:.0f} MB, shards of {args.shard_size_mb} MiB, "
            f"median (lowest-highest) of {args.rounds} interleaved rounds.",
            "",
            markdown(["method", "MB/s", "CPU s", "wall / cat", "CPU / cat"], rows),
            "",
            goal(f"{default}: wall / cat", walls[default], at_most=2.5),
            goal(f"{default}: wall / webdataset", against_webdataset, at_most=1.0),
        ],
        results={"size_bytes": size_bytes, "rounds": taken, "wall_over_cat": walls, "cpu_over_cat": cpus},
    )


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, rounds=5, num_videos=2000, shard_size_mb=256)
    made.add_argument("--dataset", type=Path, help="any folder `streamprep pack` takes; default: one is made")
    made.add_argument("--num-videos", type=int, help="how many to make, of about 0.6 MB (default: 2000)")
    made.add_argument("--shard-size-mb", type=int, help="default: 256, as streamprep's own")
    return made.parse_args()


def _videos_of(dataset: Path) -> list[Path]:
    from streamprep.sources import list_dataset

    return [dataset / sample.path for sample in list_dataset(dataset, "auto").samples]


def _prepare(videos: Sequence[Path], out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for video in videos:
        video.read_bytes()


def _methods(dataset: Path, videos: Sequence[Path], out: Path, shard_size_mb: int) -> dict[str, Callable[[], None]]:
    cores = len(os.sched_getaffinity(0))
    ours = functools.partial(_pack_with_streamprep, dataset, out, shard_size_mb)
    return {
        "cat": functools.partial(_cat, videos, out / "all"),
        "streamprep, 1 process": functools.partial(ours, 1),
        f"streamprep, {cores} processes": functools.partial(ours, cores),
        "webdataset": functools.partial(_pack_with_webdataset, dataset, out, shard_size_mb),
        "GNU tar": functools.partial(_tar, dataset, out / "all.tar"),
    }


def _cat(videos: Sequence[Path], target: Path) -> None:
    names = b"\0".join(os.fsencode(video) for video in videos)
    with open(target, "wb") as file:
        subprocess.run(["xargs", "-0", "cat", "--"], input=names, stdout=file, check=True)
        os.fsync(file.fileno())


def _tar(dataset: Path, target: Path) -> None:
    subprocess.run(["tar", "-c", "-f", target, "-C", dataset, "."], check=True)
    _fsync(target)


def _pack_with_streamprep(dataset: Path, out: Path, shard_size_mb: int, num_workers: int) -> None:
    from streamprep.config import PackConfig
    from streamprep.pack import pack

    config = PackConfig(
        dataset=str(dataset), shards=str(out / "shards"), shard_size_mb=shard_size_mb, num_workers=num_workers
    )
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        pack(config)


def _pack_with_webdataset(dataset: Path, out: Path, shard_size_mb: int) -> None:
    import webdataset

    from streamprep.sources import list_dataset

    pattern = str(out / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=shard_size_mb * 2**20, verbose=0, post=_fsync) as writer:
        for sample in list_dataset(dataset, "auto").samples:
            writer.write(
                {
                    "__key__": sample.key,
                    "mp4": (dataset / sample.path).read_bytes(),
                    "json": {"file_name": sample.file_name, "captions": sample.captions},
                    "txt": sample.captions[0] if sample.captions else "",
                }
            )


def _fsync(path: str | Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main())
