"""How busy an encoder is kept: overlapped stages against one after the other (`--serial`).

The real job on real shards: read, decode in child processes, collate, encode, write FastVideo Parquet, commit. Only the
encoder is a stand-in, which sleeps a fixed time for each clip and returns tensors of the size a real one gives (10 MB a
row). "Busy" is the time inside the encoder; it can be near 1 only where decoding keeps up, so see the "busy:" lines.

  busy / job          from calling `streamprep.encode.run` to its return: with starting the decoding processes
  busy / job, running the same from the first batch on: what a long job comes near to

Each round is a process of its own. Goal: busy / job, running at least 0.95.

Example: python benchmarks/overlap.py
         python benchmarks/overlap.py --seconds-per-clip 0.5 --max-height 480 --max-width 832 --rounds 1
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr
from typing import Any

# Decoding processes import this file once more, as multiprocessing has it: so nothing heavy up here.
from _measure import environment, goal, markdown, parser, report, say, spread, work_folder
from _standin import StandIn

TRAIN_FPS = 16
MODES = ("overlapped", "serial")


def main() -> None:
    args = _arguments()
    if args.one_job is not None:
        print(json.dumps(_one_job(args, args.one_job)))
        return
    env = environment()
    with work_folder(args.work) as args.work:
        _make_shards(args)
        jobs = _jobs(args)
    rows = [
        [
            mode,
            *(
                spread([job[column] for job in jobs[mode]])
                for column in ("busy_of_job", "busy_of_running", "job_seconds", "first_batch_seconds")
            ),
        ]
        for mode in MODES
    ]
    running = [job["busy_of_running"] for job in jobs["overlapped"]]
    report(
        args,
        env,
        lines=[
            f"{args.num_clips} clips of {args.num_frames}x{args.max_height}x{args.max_width} in "
            f"{jobs['serial'][0]['num_shards']} shards, {args.seconds_per_clip:g} s of encoding each, "
            f"{args.num_workers or 'automatic number of'} decoding processes; "
            f"median (lowest-highest) of {args.rounds} interleaved rounds.",
            "",
            markdown(["mode", "busy / job", "busy / job, running", "job s", "s to the first batch"], rows),
            "",
            *(f"- {mode}, last round, {jobs[mode][-1]['stages']}" for mode in MODES),
            goal("overlapped: busy / job, running", running, at_least=0.95),
        ],
        results=jobs,
    )


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, rounds=3, num_clips=40, seconds_per_clip=0.25, num_workers=0, batch_size=2)
    made.add_argument("--num-clips", type=int, help="default: 40")
    made.add_argument("--seconds-per-clip", type=float, help="what encoding one takes (default: 0.25)")
    made.add_argument("--batch-size", type=int, help="clips encoded at once (default: 2)")
    made.add_argument("--num-workers", type=int, help="decoding processes (default: 0, automatic)")
    made.add_argument("--num-frames", type=int, default=77, help="of a clip (default: 77)")
    made.add_argument("--max-height", type=int, default=256, help="default: 256")
    made.add_argument("--max-width", type=int, default=448, help="default: 448")
    made.add_argument("--one-job", choices=MODES, help=argparse.SUPPRESS)
    return made.parse_args()


def _make_shards(args: argparse.Namespace) -> None:
    from _videos import make_dataset

    from streamprep.config import PackConfig
    from streamprep.pack import pack

    say(f"making and packing {args.num_clips} videos")
    dataset, seconds = args.work / "dataset", args.num_frames / TRAIN_FPS + 0.5
    size_bytes = make_dataset(dataset, num_videos=args.num_clips, size_bytes=(300_000, 900_000), seconds=seconds)
    quarter_mb = size_bytes // 4 // 2**20 + 1
    with redirect_stderr(io.StringIO()):
        pack(PackConfig(dataset=str(dataset), shards=str(args.work / "shards"), shard_size_mb=quarter_mb))


def _jobs(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    jobs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for number in range(args.rounds):
        for mode in MODES:
            command = [sys.executable, __file__, *sys.argv[1:], "--work", args.work, "--one-job", mode]
            run = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True)
            jobs[mode].append(json.loads(run.stdout))
            say(f"round {number + 1}: {mode}: {jobs[mode][-1]['job_seconds']:.1f} s")
    return jobs


def _one_job(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Run `streamprep encode`'s own loop once, with the stand-in."""
    from streamprep.config import EncodeConfig
    from streamprep.encode import run
    from streamprep.job import open_job
    from streamprep.manifest import open_shards
    from streamprep.settle import settle
    from streamprep.storage import open_store

    config = EncodeConfig(
        shards=str(args.work / "shards"),
        out=str(args.work / "out"),
        model_path="a stand-in",
        num_frames=args.num_frames,
        max_height=args.max_height,
        max_width=args.max_width,
        train_fps=TRAIN_FPS,
        preprocess_video_batch_size=args.batch_size,
        dataloader_num_workers=args.num_workers,
        serial=mode == "serial",
    )
    shutil.rmtree(args.work / "out", ignore_errors=True)
    encoder = StandIn(args.seconds_per_clip, num_frames=args.num_frames)
    shards, out = open_shards(config.shards), open_store(config.out)
    with redirect_stderr(io.StringIO()) as log:
        began = time.perf_counter()
        run(settle(config, out), shards, out, encoder)
        ended = time.perf_counter()
    assert encoder.first_batch is not None
    return {
        "num_shards": len(open_job(out).plan.units),
        "job_seconds": ended - began,
        "busy_seconds": encoder.busy_seconds,
        "first_batch_seconds": encoder.first_batch - began,
        "busy_of_job": encoder.busy_seconds / (ended - began),
        "busy_of_running": encoder.busy_seconds / (ended - encoder.first_batch),
        "stages": next(line for line in log.getvalue().splitlines() if line.startswith("busy:")),
    }


if __name__ == "__main__":
    sys.exit(main())
