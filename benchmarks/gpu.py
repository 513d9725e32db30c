"""The job on a GPU: is it the CPU's result, how fast, how busy, how much memory.

  CPU against GPU   every tensor of the tiny model and of the full-size VAE of Wan 2.1 (127 M random weights), and with
                    TF32. Of the full-size one only the first frames: the VAE is causal, what follows cannot matter.
  full-size VAE     77 frames of 480x832 for image-to-video (two encodings a clip): seconds from uint8 frames on the
                    CPU to latents on the CPU, the share of the time the GPU was busy (as NVML sees it), peak memory
  whole job         `streamprep encode` on both devices with the tiny model, where torchcodec can be loaded

Without a CUDA device it says so and exits 1; `--device cpu` tries the script itself. All but the whole job needs torch,
diffusers, transformers, ftfy, huggingface_hub, pillow and psutil, and no video library.

Example: python benchmarks/gpu.py
         python benchmarks/gpu.py --device cpu --num-frames 5 --height 32 --width 48 --tiny-only
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _measure import environment, markdown, parser, report, say, work_folder
from _models import load, make_full_size, make_tiny, max_abs, normalised, relative_l2
from torch import Tensor

from streamprep.types import ClipBatch

NO_CUDA = "not measured (no CUDA device)"
CAPTIONS = ("A red circle moves from left to right.", "Waves break on a rocky shore at dusk. " * 8, "")
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "TF32": {"allow_tf32": True},
    "bfloat16": {"vae_dtype": "bfloat16", "text_dtype": "bfloat16"},
}
SECONDS_BETWEEN_LOOKS = 0.05
JOB_FLAGS = ("--workload-type", "i2v", "--max-height", "64", "--max-width", "96", "--num-frames", "17")


def main() -> int:
    args = _arguments()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA device: not run")
        return 1
    env = environment()
    with work_folder(args.work) as work:
        say("making the models")
        models = {"tiny": make_tiny(work / "tiny")}
        if not args.tiny_only:
            models["full-size VAE"] = make_full_size(work / "full-size", models["tiny"])
        differences = [row for name, model in models.items() for row in _differences(name, model, args)]
        speeds = [_speed(name, model, precision, args) for name, model in models.items() for precision in PRECISIONS]
        job = _whole_job(models["tiny"], work, args.device)
    where = (
        "the CPU itself: a trial of this script" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    )
    report(
        args,
        env,
        lines=[
            f"The CPU's float32 against {where}; {args.compared_frames}x{args.height}x{args.width}.",
            "",
            markdown(["model", "on the device", "tensor", "relative L2", "max abs"], differences),
            "",
            f"Encoding clips of {args.num_frames}x{args.height}x{args.width} for i2v, median of {args.rounds}.",
            "",
            markdown(["model", "precision", "s/clip", "GPU busy", "peak GB"], speeds),
            "",
            f"Whole job: {job}",
        ],
        results={"differences": differences, "speeds": speeds, "job": job},
    )
    return 0


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, rounds=3, device="cuda", num_frames=77, height=480, width=832, compared_frames=9)
    made.add_argument("--device", help="default: cuda")
    made.add_argument("--num-frames", type=int, help="of a clip (default: 77)")
    made.add_argument("--height", type=int, help="default: 480")
    made.add_argument("--width", type=int, help="default: 832")
    made.add_argument("--compared-frames", type=int, help="that are also encoded on the CPU, 4k+1 (default: 9)")
    made.add_argument("--tiny-only", action="store_true", help="leave the full-size VAE out")
    args = made.parse_args()
    args.compared_frames = min(args.compared_frames, args.num_frames)
    return args


def _clip(args: argparse.Namespace, num_frames: int) -> ClipBatch:
    """Soft patches of colour that move, with fine noise on them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, args.height // 16, args.width // 16, generator=generator) * 220
    picture = torch.nn.functional.interpolate(coarse, size=(args.height, args.width), mode="bicubic")[0]
    picture += torch.rand(picture.shape, generator=generator) * 20
    frames = torch.stack([picture.roll(2 * number, dims=-1) for number in range(num_frames)])
    return ClipBatch(keys=("clip",), frames=frames.clamp(0, 255).to(torch.uint8)[None])


def _load(model: Path, device: str, precision: str) -> Any:
    return load(model, device=torch.device(device), **PRECISIONS[precision])


def _differences(name: str, model: Path, args: argparse.Namespace) -> Iterator[list[str]]:
    """Rows: each tensor, in each precision of the device, against float32 on the CPU."""
    truth = _tensors(_load(model, "cpu", "float32"), name, _clip(args, args.compared_frames))
    for precision, options in PRECISIONS.items():
        if args.device == "cpu" and "allow_tf32" in options:
            yield [name, precision, "all", NO_CUDA, ""]
            continue
        found = _tensors(_load(model, args.device, precision), name, _clip(args, args.compared_frames))
        for tensor, values in found.items():
            errors = relative_l2(values, truth[tensor]), max_abs(values, truth[tensor])
            yield [name, precision, tensor, *(f"{error:.1e}" for error in errors)]


def _tensors(encoder: Any, name: str, clip: ClipBatch) -> dict[str, Tensor]:
    began = time.perf_counter()
    tensors: dict[str, Tensor] = encoder.encode_batch(clip)[0]
    say(f"{name}: {tuple(clip.frames.shape)} in {time.perf_counter() - began:.1f} s")
    tensors["vae_latent"] = normalised(encoder, tensors["vae_latent"])
    if name != "tiny":
        del tensors["clip_feature"]  # the tiny model's
        return tensors
    return tensors | {"text_embedding": torch.cat(encoder.encode_text(CAPTIONS))}


def _speed(name: str, model: Path, precision: str, args: argparse.Namespace) -> list[str]:
    """A row; the first clip is not counted."""
    if args.device == "cpu":
        return [name, precision, NO_CUDA, "", ""]
    encoder, clip = _load(model, args.device, precision), _clip(args, args.num_frames)
    encoder.encode_batch(clip)
    torch.cuda.reset_peak_memory_stats(args.device)
    seconds = []
    with _watching(args.device) as looks:
        for _ in range(args.rounds):
            began = time.perf_counter()
            encoder.encode_batch(clip)
            seconds.append(time.perf_counter() - began)
    busy = f"{statistics.mean(looks) / 100:.2f}" if looks else "not measured (no NVML)"
    peak = torch.cuda.max_memory_allocated(args.device) / 1e9
    say(f"{name}, {precision}: {statistics.median(seconds):.2f} s a clip")
    return [name, precision, f"{statistics.median(seconds):.2f}", busy, f"{peak:.1f}"]


@contextmanager
def _watching(device: str) -> Iterator[list[int]]:
    """Percent of the time that kernels ran, again and again; empty where NVML can't be asked."""
    looks: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            try:
                looks.append(torch.cuda.utilization(device))
            except (ImportError, RuntimeError):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield looks
    finally:
        ended.set()
        thread.join()


def _whole_job(model: Path, work: Path, device: str) -> str:
    """One line: the largest difference of every tensor of the rows that both devices wrote."""
    try:
        import torchcodec.decoders  # noqa: F401
        from make_clips import make_clips
    except (ImportError, OSError, RuntimeError) as error:
        return f"not run ({str(error).splitlines()[0]})"
    from exporters.fastvideo import FOLDER, read_file
    from streamprep.storage import open_store

    make_clips(work / "dataset", num_clips=8)
    _streamprep("pack", work / "dataset", work / "shards")
    rows: list[dict[str, dict[str, Any]]] = []
    for number, where in enumerate(("cpu", device)):
        out = work / f"job-{number}"
        flags = ("--model-path", model, "--text-dtype", "float32", "--device", where, *JOB_FLAGS)
        _streamprep("encode", work / "shards", out, *flags)
        files = sorted((out / FOLDER).iterdir())
        rows.append(dict(row for file in files for row in read_file(open_store(out), f"{FOLDER}/{file.name}")))
    truth, found = rows
    if truth.keys() != found.keys():
        raise SystemExit(f"the devices wrote other rows: {sorted(truth.keys() ^ found.keys())}")
    errors: dict[str, float] = {}
    for key, tensors in truth.items():
        for name, values in tensors.items():
            errors[name] = max(errors.get(name, 0.0), float(abs(found[key][name] - values).max()))
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return f"the same {len(truth)} rows on both; largest difference (raw): {listed}"


def _streamprep(*arguments: object) -> None:
    say("streamprep " + " ".join(map(str, arguments)))
    root = str(Path(__file__).parents[1])
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "streamprep", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr, env=environ)


if __name__ == "__main__":
    sys.exit(main())
