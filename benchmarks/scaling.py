"""How well ranks share their work: units taken as they come, against shares that are fixed beforehand.

The real job as several processes on one output: `streamprep.encode.run` with the board, marks, decoding processes and
commits of a real one. Only the encoder is a stand-in, which sleeps a fixed time for each clip, so that ranks do not
fight for this machine's cores. Shards are of about one size in bytes and of very different numbers of clips.

  shared  as `streamprep encode --nproc N`: the largest unit that is left, for whoever is ready
  static  rank r takes shards r, r + N, r + 2N, ..., as many scripts do; the same loop in all else

Efficiency is all encoding time / N ranks / the time it took: 1 is N ranks that all work until the end. Each rank waits
with its first batch until all have one, so importing torch and starting decoding processes, which take 5 to 15 s here
and are the same for both, are left out. The time ends with the last commit. `from the first claim` leaves nothing out
but imports. Goal: shared at least 0.95 with the most ranks, where static gives less than 0.8.

Example: python benchmarks/scaling.py
         python benchmarks/scaling.py --ranks 1 2 4 8 --num-shards 80
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

# Decoding processes import this file once more, as multiprocessing has it: so nothing heavy up here.
from _measure import environment, goal, markdown, parser, report, say, spread, work_folder
from _standin import StandIn

MODES = ("shared", "static")
NUM_FRAMES = 9
SHARD_BYTES = 2**20


def main() -> None:
    args = _arguments()
    if args.one_rank is not None:
        print(json.dumps(_one_rank(args, args.one_rank)))
        return
    env = environment()
    sizes = shard_sizes(args.num_shards, args.smallest, args.largest)
    with work_folder(args.work) as args.work:
        _make_shards(args.work, sizes)
        jobs = _jobs(args)
    say(f"clips of the shards, in their order: {sizes}")
    most = max(args.ranks)
    rows = [
        [
            str(number),
            mode,
            *(
                spread([job[column] for job in jobs[f"{number} {mode}"]], digits)
                for column, digits in (("efficiency", 3), ("efficiency_from_claim", 3), ("seconds", 1), ("begin", 1))
            ),
        ]
        for number in args.ranks
        for mode in _modes(number)
    ]
    report(
        args,
        env,
        lines=[
            f"{sum(sizes)} clips in {len(sizes)} shards of {min(sizes)} to {max(sizes)} (median "
            f"{statistics.median(sizes):g}), {args.seconds_per_clip:g} s of encoding each; "
            f"median (lowest-highest) of {args.rounds} interleaved rounds.",
            "",
            markdown(
                ["ranks", "split", "efficiency", "from the first claim", "s", "s from first claim to first batch"], rows
            ),
            "",
            goal(f"{most} ranks, shared", _efficiencies(jobs, most, "shared"), at_least=0.95),
            goal(f"{most} ranks, static", _efficiencies(jobs, most, "static"), at_most=0.8),
        ],
        results=jobs,
    )


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, rounds=3, num_shards=36, seconds_per_clip=0.3)
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="how many processes (default: 1 2 4)")
    made.add_argument("--num-shards", type=int, help="default: 36")
    made.add_argument("--smallest", type=int, default=3, help="clips in the smallest shard (default: 3)")
    made.add_argument("--largest", type=int, default=30, help="clips in the largest shard (default: 30)")
    made.add_argument("--seconds-per-clip", type=float, help="what encoding one takes (default: 0.3)")
    made.add_argument("--one-rank", choices=MODES, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.num_shards < 4 * max(args.ranks):
        made.error(f"--num-shards {args.num_shards}: every rank must find some, so at least {4 * max(args.ranks)}")
    return args


def shard_sizes(number: int, smallest: int, largest: int) -> list[int]:
    """Clips of each shard: many small ones and a few large ones (logarithms evenly spread), in a random order."""
    steps = [place / max(1, number - 1) for place in range(number)]
    sizes = [round(smallest * math.exp(step * math.log(largest / smallest))) for step in steps]
    random.Random(0).shuffle(sizes)
    return sizes


def _make_shards(work: Path, sizes: Sequence[int]) -> None:
    """Shards are cut by bytes: so videos of a shard of many clips are small files, and all are the same to encode."""
    from _videos import make_dataset_of

    from streamprep.config import PackConfig
    from streamprep.manifest import load_manifest
    from streamprep.pack import pack
    from streamprep.storage import open_store

    say(f"making and packing {sum(sizes)} videos")
    files = [SHARD_BYTES // size for size in sizes for _ in range(size)]
    make_dataset_of(work / "dataset", files, seconds=NUM_FRAMES / 16 + 0.2)
    pack(PackConfig(dataset=str(work / "dataset"), shards=str(work / "shards"), shard_size_mb=SHARD_BYTES // 2**20))
    packed = [shard.num_samples for shard in load_manifest(open_store(work / "shards")).shards]
    assert packed == list(sizes), packed


def _modes(number: int) -> Sequence[str]:
    return MODES if number > 1 else MODES[:1]


def _jobs(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    jobs: dict[str, list[dict[str, Any]]] = {}
    for turn in range(args.rounds):
        for number in args.ranks:
            for mode in _modes(number):
                result = _one_job(args, mode, number)
                jobs.setdefault(f"{number} {mode}", []).append(result)
                say(
                    f"round {turn + 1}: {number} ranks, {mode}: {result['seconds']:.1f} s, efficiency "
                    f"{result['efficiency']:.3f}"
                )
    return jobs


def _one_job(args: argparse.Namespace, mode: str, number: int) -> dict[str, Any]:
    """Start the ranks as our own launcher does, wait for them, and read in their logs when what happened."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    shutil.rmtree(args.work / "out", ignore_errors=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    command = [sys.executable, __file__, *sys.argv[1:], "--work", str(args.work), "--one-rank", mode]
    processes = [
        subprocess.Popen(
            command, env=_environment(rank, number, store.port), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(number)
    ]
    ranks = []
    for process in processes:
        printed, said = process.communicate()
        if process.returncode:
            raise RuntimeError(said.decode())
        ranks.append(json.loads(printed))
    return measured(ranks, _events(args.work / "out"))


def _environment(rank: int, number: int, port: int) -> dict[str, str]:
    from streamprep.ranks import Rank

    one = Rank(number=rank, world_size=number, local_number=rank, local_world_size=number)
    return os.environ | one.environment("127.0.0.1", port) | {"OMP_NUM_THREADS": "1"}


def _events(out: Path) -> dict[str, list[float]]:
    """When units were claimed and committed, of all ranks, in seconds since 1970; not the finalizing."""
    times: dict[str, list[float]] = {"claimed": [], "committed": []}
    for log in (out / "_streamprep" / "logs").iterdir():
        for event in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
            if event["event"] in times and event["unit"] != "finalize":
                times[event["event"]].append(datetime.fromisoformat(event["time"]).timestamp())
    return times


def measured(ranks: Sequence[dict[str, float]], events: dict[str, list[float]]) -> dict[str, Any]:
    """How near the ranks came to all of them working until the end."""
    ideal = sum(rank["busy_seconds"] for rank in ranks) / len(ranks)
    claimed, begun, ended = (
        min(events["claimed"]),
        min(rank["first_batch"] for rank in ranks),
        max(events["committed"]),
    )
    return {
        "efficiency": ideal / (ended - begun),
        "efficiency_from_claim": ideal / (ended - claimed),
        "seconds": ended - begun,
        "begin": begun - claimed,
        "num_clips": [rank["num_clips"] for rank in ranks],
        "busy_seconds": [rank["busy_seconds"] for rank in ranks],
        "commits": len(events["committed"]),
    }


def _efficiencies(jobs: dict[str, list[dict[str, Any]]], number: int, mode: str) -> list[float]:
    return [job["efficiency"] for job in jobs[f"{number} {mode}"]]


def _one_rank(args: argparse.Namespace, mode: str) -> dict[str, float]:
    """Run `streamprep encode`'s own loop in this process, as one of several ranks, with the stand-in."""
    from streamprep.board import open_board
    from streamprep.config import EncodeConfig
    from streamprep.encode import run
    from streamprep.manifest import open_shards
    from streamprep.ranks import this_rank
    from streamprep.settle import settle
    from streamprep.storage import open_store

    rank = this_rank()
    board = open_board(rank)

    def wait_for_all() -> None:
        board.add("scaling.begun", 1)
        while board.add("scaling.begun", 0) < rank.world_size:
            time.sleep(0.005)

    if mode == "static":
        _share_beforehand(rank.number, rank.world_size)
    config = EncodeConfig(
        shards=str(args.work / "shards"),
        out=str(args.work / "out"),
        model_path="a stand-in",
        num_frames=NUM_FRAMES,
        max_height=32,
        max_width=48,
        train_fps=16,
        preprocess_video_batch_size=1,
        dataloader_num_workers=1,
        encode_threads=1,
    )
    encoder = StandIn(args.seconds_per_clip, num_frames=NUM_FRAMES, text_shape=(8, 64), begin=wait_for_all)
    shards, out = open_shards(config.shards), open_store(config.out)
    apart = time.time() - time.perf_counter()  # logs tell the time of day
    run(settle(config, out), shards, out, encoder, board)
    return {
        "first_batch": encoder.first_batch + apart if encoder.first_batch is not None else math.inf,
        "busy_seconds": encoder.busy_seconds,
        "num_clips": encoder.num_clips,
    }


def _share_beforehand(rank: int, world_size: int) -> None:
    """Put a fixed share of the units in the place of the count, and nothing in the place of the sweep."""
    from streamprep.attempts import Attempt
    from streamprep.claims import Claims

    class Share(Claims):
        def _next_in_order(self) -> str | None:
            if self._name != "encode":
                return super()._next_in_order()
            mine = sorted(self._units)[rank::world_size]  # in the order of the shards
            self._place += 1
            return mine[self._place - 1] if self._place <= len(mine) else None

        def _is_free(self, attempts: Sequence[Attempt], unit: str) -> bool:
            return self._name != "encode" and super()._is_free(attempts, unit)

    setattr(importlib.import_module("streamprep.session"), "Claims", Share)  # noqa: B010


if __name__ == "__main__":
    main()
