"""How long `streamprep plan` takes, and how much memory, for many samples.

Writes indexes as packing writes them for made-up videos (several rates, sizes and lengths, some unreadable, some
without a caption) beside tars that are only holes, and a tiny model; then runs the command in a process of its own.

  plan             all flags at their defaults
  plan --out       every decision written to a Parquet file too
  buckets, where   --buckets auto --window every --where "..." --caption all

Goals, for 100 000 samples: 10 s and 1 GB.

Example: python benchmarks/plan.py
         python benchmarks/plan.py --num-samples 10000 --rounds 1
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from _measure import environment, goal, markdown, parser, report, say, spread, work_folder

from streamprep import canonical
from streamprep.manifest import MANIFEST, Manifest, ShardInfo
from streamprep.shards import Member, ShardIndex, ShardSample, index_name

SAMPLES_PER_SHARD = 1000
METHODS = {
    "plan": [],
    "plan --out": ["--out", "{work}/plan.parquet"],
    "buckets, where": ["--buckets", "auto", "--window", "every", "--where", "aesthetic > 2", "--caption", "all"],
}


def main() -> None:
    args = _arguments()
    env = environment()
    with work_folder(args.work) as work:
        say(f"writing indexes of {args.num_samples} samples, and a tiny model")
        _write_shards(work / "shards", args.num_samples)
        tool = Path(__file__).parents[1] / "tools" / "make_tiny_model.py"
        subprocess.run([sys.executable, tool, work / "model"], check=True, stdout=subprocess.DEVNULL)
        taken = {
            name: [_run(work, [flag.format(work=work) for flag in flags]) for _ in range(args.rounds)]
            for name, flags in METHODS.items()
        }
    rows = [
        [name, spread([seconds for seconds, _ in runs], 1), f"{statistics.median(peak for _, peak in runs):.0f}"]
        for name, runs in taken.items()
    ]
    report(
        args,
        env,
        lines=[
            f"{args.num_samples} samples in shards of {SAMPLES_PER_SHARD}, {args.rounds} rounds.",
            "",
            markdown(["command", "seconds", "peak, MB"], rows),
            "",
            goal("seconds of `plan`", [seconds for seconds, _ in taken["plan"]], at_most=10),
            goal("MB of `plan`", [peak for _, peak in taken["plan"]], at_most=1000),
        ],
        results=taken,
    )


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, rounds=3, num_samples=100_000)
    made.add_argument("--num-samples", type=int, help="default: 100000")
    return made.parse_args()


def _write_shards(out: Path, num_samples: int) -> None:
    out.mkdir()
    draw = random.Random(0)
    infos = []
    for number, first in enumerate(range(0, num_samples, SAMPLES_PER_SHARD)):
        name, offset, samples = f"{number:06d}.tar", 512, []
        for sample in range(first, min(first + SAMPLES_PER_SHARD, num_samples)):
            metadata, size = _metadata(sample, draw), draw.randrange(100_000, 4_000_000)
            samples.append(
                ShardSample(
                    key=f"folder/video_{sample:06d}",
                    members={"mp4": Member(offset=offset, size=size, sha256=metadata["sha256"])},
                    metadata=metadata,
                )
            )
            offset += size + -size % 512 + 512
        index = ShardIndex(name=name, size_bytes=offset, samples=tuple(samples))
        data = index.to_json()
        (out / index_name(name)).write_bytes(data)
        (out / name).touch()
        os.truncate(out / name, offset)
        digest = canonical.bytes_digest(data)
        infos.append(ShardInfo(name=name, num_samples=len(samples), size_bytes=offset, index_sha256=digest))
    (out / MANIFEST).write_bytes(Manifest(shards=tuple(infos)).to_json())


def _metadata(number: int, draw: random.Random) -> dict[str, object]:
    fps = draw.choice([16.0, 24.0, 25.0, 30000 / 1001, 30.0, 60.0])
    num_frames = draw.randrange(20, 1200)
    height, width = draw.choice([(480, 832), (720, 1280), (1080, 1920), (1920, 1080), (768, 512)])
    known: dict[str, object] = {
        "file_name": f"folder/video_{number:06d}.mp4",
        "captions": [f"The caption of video {number}, about as long as captions are: {'word ' * draw.randrange(40)}"],
        "extension": "mp4",
        "sha256": f"{draw.getrandbits(256):064x}",
        "declared": {},
        "extra": {"aesthetic": round(draw.uniform(0, 10), 2), "url": f"videos/{number}"},
    }
    if number % 97 == 0:
        return known | {"probe_error": "its header cannot be read"}
    if number % 89 == 0:
        known["captions"] = []
    return known | {
        "num_frames": num_frames,
        "fps": fps,
        "width": width,
        "height": height,
        "duration_seconds": num_frames / fps,
        "start_seconds": 0.0,
        "rotation": 0,
        "codec": "h264",
        "variable_frame_rate": number % 50 == 0,
        "media_type": "video",
    }


def _run(work: Path, flags: list[str]) -> tuple[float, float]:
    """(seconds, peak MB) of the command."""
    command = [sys.executable, "-m", "streamprep", "plan", work / "shards", "--model-path", work / "model", *flags]
    began = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    assert os.waitstatus_to_exitcode(status) == 0
    return seconds, usage.ru_maxrss / 1e3


if __name__ == "__main__":
    main()
