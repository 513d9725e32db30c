"""Whether the memory of an encoding rank grows with the number of samples.

Packs many small clips into 20 shards or so, runs `streamprep encode` with a tiny model in a process of its own, and
looks at it ten times a second: resident memory of the rank, of its children (decoding), and how many units are
committed. A rank that kept anything for each sample would rise from a quarter of the job to its end.

  rank, MB       resident: what `top` shows
  private, MB    the part that is not shared: without the ring of decoded frames and the libraries' files
  children, MB   all of them together; pages that they share count several times

Each is the median while between 5 % less and 5 % more of the units are committed. Goal: the rank at the end has at most
1.05 x what it had at a quarter.

Example: python benchmarks/memory.py
         python benchmarks/memory.py --num-clips 2000 --json memory.json
"""

from __future__ import annotations

import argparse
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import psutil
from _measure import environment, goal, markdown, parser, report, say, work_folder
from _videos import make_dataset

from streamprep.config import PackConfig
from streamprep.pack import pack

SHARES = (0.10, 0.25, 0.50, 0.75, 1.00)
WINDOW = 0.05
SECONDS_BETWEEN_LOOKS = 0.1
NUM_SHARDS = 20
NUM_FRAMES, HEIGHT, WIDTH = 17, 128, 224


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one moment."""

    seconds: float
    committed: int
    rank_bytes: int
    private_bytes: int
    children_bytes: int


def main() -> None:
    args = _arguments()
    env = environment()
    with work_folder(args.work) as work:
        num_units = _make_shards(work, args.num_clips)
        looks = _watch(work, num_units)
    at = {share: _median_around(looks, share, num_units) for share in SHARES}
    rows = [
        [f"{share:.0%}", f"{share * args.num_clips:.0f}", *(f"{value / 1e6:.0f}" for value in at[share])]
        for share in SHARES
    ]
    peak = max(look.rank_bytes for look in looks)
    growth = (at[1.00][0] - at[0.25][0]) / 1e6
    report(
        args,
        env,
        lines=[
            f"{args.num_clips} clips of {NUM_FRAMES}x{HEIGHT}x{WIDTH} in {num_units} shards, "
            f"{looks[-1].seconds:.0f} s, the rank's peak {peak / 1e6:.0f} MB.",
            "",
            markdown(["units committed", "samples, about", "rank, MB", "private, MB", "children, MB"], rows),
            "",
            f"- from 25 % to 100 %: {growth:+.1f} MB, {1e3 * growth / (0.75 * args.num_clips):+.1f} kB a sample",
            goal("rank at 100 % / at 25 %", [at[1.00][0] / at[0.25][0]], at_most=1.05),
        ],
        results={"num_units": num_units, "looks": looks},
    )


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, num_clips=400)
    made.add_argument("--num-clips", type=int, help="default: 400")
    return made.parse_args()


def _make_shards(work: Path, num_clips: int) -> int:
    """Write the shards and the model; the number of shards."""
    say(f"making and packing {num_clips} videos, and a tiny model")
    # A shard has at least 1 MiB: with few clips they must be larger to fill as many.
    size_bytes = max(100_000, NUM_SHARDS * 2**20 // num_clips)
    dataset, shards = work / "dataset", work / "shards"
    total_bytes = make_dataset(
        dataset, num_videos=num_clips, size_bytes=(size_bytes, size_bytes), seconds=NUM_FRAMES / 16 + 0.5
    )
    with redirect_stderr(io.StringIO()):
        config = PackConfig(
            dataset=str(dataset), shards=str(shards), shard_size_mb=max(1, total_bytes // NUM_SHARDS // 2**20)
        )
        num_shards = len(pack(config).shards)
    make_model = Path(__file__).parents[1] / "tools" / "make_tiny_model.py"
    subprocess.run([sys.executable, make_model, work / "model"], check=True, stdout=subprocess.DEVNULL)
    return num_shards


def _watch(work: Path, num_units: int) -> list[Look]:
    """Encode, and look at it until it ends."""
    flags = {"model-path": work / "model", "num-frames": NUM_FRAMES, "max-height": HEIGHT, "max-width": WIDTH}
    command = [sys.executable, "-m", "streamprep", "encode", work / "shards", work / "out"]
    command += [part for name, value in flags.items() for part in (f"--{name}", value)]
    looks: list[Look] = []
    began = time.perf_counter()
    with open(work / "log", "w+", encoding="utf-8") as log:
        rank = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
        while rank.poll() is None:
            look = _look(psutil.Process(rank.pid), work / "out" / "_streamprep" / "records", began)
            if look is not None:
                if looks and look.committed > looks[-1].committed:
                    say(f"{look.committed}/{num_units} units: {look.rank_bytes / 1e6:.0f} MB")
                looks.append(look)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        log.seek(0)
        if rank.returncode:
            raise SystemExit(f"streamprep encode exited with {rank.returncode}:\n{log.read()}")
    return looks


def _look(rank: psutil.Process, records: Path, began: float) -> Look | None:
    try:
        memory = rank.memory_info()
        children_bytes = sum(_resident_bytes(child) for child in rank.children(recursive=True))
    except psutil.NoSuchProcess:
        return None
    committed = sum(1 for _ in records.glob("*.json"))
    seconds = time.perf_counter() - began
    return Look(seconds, committed, memory.rss, memory.rss - memory.shared, children_bytes) if memory.rss else None


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _median_around(looks: Sequence[Look], share: float, num_units: int) -> tuple[float, float, float]:
    """Of the rank, its private part, its children."""
    near = [look for look in looks if abs(look.committed / num_units - share) <= WINDOW]
    if not near:
        raise SystemExit(f"nothing was seen near {share:.0%} of the job, it was over too soon: take more --num-clips")
    return (
        statistics.median(look.rank_bytes for look in near),
        statistics.median(look.private_bytes for look in near),
        statistics.median(look.children_bytes for look in near),
    )


if __name__ == "__main__":
    sys.exit(main())
