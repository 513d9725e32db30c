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
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any

from _measure import environment, goal, markdown, parser, report, say, spread, work_folder

# Decoding processes import this file once more, as multiprocessing has it: so nothing heavy up here.
if TYPE_CHECKING:
    from torch import Tensor

    from streamprep.contract import LatentContract
    from streamprep.types import ClipBatch

TRAIN_FPS = 16
LATENT_SHAPE, TEXT_SHAPE = (16, 20, 60, 104), (120, 4096)
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
    import torch

    from streamprep.config import EncodeConfig
    from streamprep.encode import run
    from streamprep.prepare import prepare_job
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
    encoder, device = StandIn(args.seconds_per_clip), torch.device("cpu")
    shards, out = open_store(config.shards), open_store(config.out)
    with redirect_stderr(io.StringIO()) as log:
        current = prepare_job(config, shards, out, encoder.contract, device)
        began = time.perf_counter()
        run(current, config, shards, encoder, device)
        ended = time.perf_counter()
    assert encoder.first_batch is not None
    return {
        "num_shards": len(current.plan.units),
        "job_seconds": ended - began,
        "busy_seconds": encoder.busy_seconds,
        "first_batch_seconds": encoder.first_batch - began,
        "busy_of_job": encoder.busy_seconds / (ended - began),
        "busy_of_running": encoder.busy_seconds / (ended - encoder.first_batch),
        "stages": next(line for line in log.getvalue().splitlines() if line.startswith("busy:")),
    }


class StandIn:
    """An encoder that takes its time and computes nothing: a `streamprep.encoders.Encoder`."""

    def __init__(self, seconds_per_clip: float) -> None:
        import torch

        self.contract = _contract()
        self.busy_seconds = 0.0
        self.first_batch: float | None = None
        """When encoding began."""
        self._seconds_per_clip = seconds_per_clip
        self._latent, self._text = torch.randn(LATENT_SHAPE), torch.randn(TEXT_SHAPE)

    def load(self) -> None:
        """There is nothing to load."""

    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        """The same for every caption, at once."""
        return [self._text] * len(captions)

    def encode_batch(self, batch: ClipBatch) -> list[dict[str, Tensor]]:
        """The same for every clip, after a while."""
        began = time.perf_counter()
        if self.first_batch is None:
            self.first_batch = began
        time.sleep(self._seconds_per_clip * len(batch.keys))
        self.busy_seconds += time.perf_counter() - began
        return [{"vae_latent": self._latent}] * len(batch.keys)


def _contract() -> LatentContract:
    from streamprep.contract import LatentContract

    nothing = "stand-in"
    return LatentContract(
        family=nothing,
        model=nothing,
        revision=None,
        vae_class=nothing,
        vae_dtype="float32",
        vae_sha256=nothing,
        posterior="mean",
        space="raw",
        latents_mean=(0.0,) * 16,
        latents_std=(1.0,) * 16,
        latent_channels=16,
        temporal_factor=4,
        spatial_factor=8,
        spatial_multiple=16,
        frame_rule="4k+1",
        pixel_range=(-1.0, 1.0),
        resize_rule=nothing,
        fps_rule=nothing,
        text_encoder_class=nothing,
        text_dtype="float32",
        text_sha256=nothing,
        text_max_length=512,
        text_states="last_hidden_state",
        text_padding="trimmed",
        captions_cleaned=False,
        tensors={"vae_latent": "constant", "text_embedding": "constant"},
    )


if __name__ == "__main__":
    sys.exit(main())
