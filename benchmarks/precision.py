"""What narrower numbers cost: the error of each tensor against float32 on the same device.

  bfloat16            --vae-dtype bfloat16, --text-dtype bfloat16
  float16             --vae-dtype float16; UMT5 in float16 is refused
  TF32                --allow-tf32, on a GPU only
  ..., emulated       what a GPU rounds, done in float32 on this machine: see benchmarks/_rounding.py
  resized in float    for perspective, a shortcut we refuse: pictures resized in float32, cut off at 0 and 255
  padded to 512       likewise: captions padded before UMT5; the caption's own tokens are compared

Errors are relative L2 and the largest absolute one; latents are normalised first, as trainers take them. The tiny model
has all four tensors, the full-size VAE of Wan 2.1 (127 M weights) makes the two latents. All weights are random:
these numbers say what rounding does in networks of this shape, not what it does to a trained model's pictures.

Example: python benchmarks/precision.py
         python benchmarks/precision.py --num-frames 17 --height 256 --width 256 --num-clips 3
         python benchmarks/precision.py --device cuda --num-frames 77 --height 480 --width 832
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _measure import environment, markdown, parser, report, say, work_folder
from _models import load, make_full_size, make_tiny, max_abs, normalised, relative_l2
from _rounding import Stored, Tf32, encode_within
from torch import Tensor
from torch.nn.functional import interpolate

from streamprep.crop import center_crop_box, crop_and_resize
from streamprep.types import ClipBatch

TENSORS = ("vae_latent", "first_frame_latent", "clip_feature", "text_embedding")
OF_THE_VAE = TENSORS[:2]
NO_CUDA = "not measured (no CUDA device)"
TIMED_ROUNDS = 3
SHARED_CLIPS = Path(__file__).parents[2] / "shared" / "clips"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One way to encode other than in float32."""

    name: str
    tensors: tuple[str, ...]
    """Which it can move."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the encoder."""
    emulate: Callable[[Any], AbstractContextManager[None]] = lambda encoder: nullcontext()
    """Entered while it encodes."""
    cuda_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row: the errors of a tensor, or why there are none."""

    model: str
    change: str
    tensor: str
    relative_l2: float | None = None
    max_abs: float | None = None
    seconds_per_clip: float | None = None
    why_not: str = ""


CHANGES = (
    Change(
        name="bfloat16",
        tensors=(*OF_THE_VAE, "text_embedding"),
        options={"vae_dtype": "bfloat16", "text_dtype": "bfloat16"},
    ),
    Change(name="float16", tensors=OF_THE_VAE, options={"vae_dtype": "float16"}),
    Change(
        name="float16, emulated",
        tensors=OF_THE_VAE,
        emulate=lambda encoder: encode_within(encoder._vae, Stored(torch.float16)),
    ),
    Change(name="TF32", tensors=TENSORS, options={"allow_tf32": True}, cuda_only=True),
    Change(name="TF32, emulated", tensors=TENSORS, emulate=lambda encoder: Tf32()),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Clips at their own size, and captions."""

    name: str
    clips: list[Tensor]
    """Each (T, C, H, W) uint8."""
    captions: list[str]


def main() -> None:
    args = _arguments()
    env = environment()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    pictures = _pictures(args)
    results: list[Result] = []
    with work_folder(args.work) as work:
        say("making the models")
        models = {"tiny": make_tiny(work / "tiny")}
        if not args.tiny_only:
            models["full-size VAE"] = make_full_size(work / "full-size", models["tiny"])
        for name, model in models.items():
            results += _measure(name, model, pictures, args)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else "the CPU"
    report(
        args,
        env,
        lines=[
            f"{len(pictures.clips)} clip(s) of {args.num_frames}x{args.height}x{args.width} from {pictures.name}, "
            f"{len(pictures.captions)} captions, against float32 on {where}, {torch.get_num_threads()} threads.",
            "",
            markdown(["model", "change", "tensor", "relative L2", "max abs", "s/clip"], [_row(row) for row in results]),
        ],
        results={"rows": results},
    )


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, num_frames=9, height=128, width=224, num_clips=1)
    made.add_argument("--num-frames", type=int, help="of a clip, 4k+1 (default: 9)")
    made.add_argument("--height", type=int, help="default: 128")
    made.add_argument("--width", type=int, help="default: 224")
    made.add_argument("--num-clips", type=int, help="default: 1")
    made.add_argument(
        "--clips", type=Path, default=SHARED_CLIPS, help="a dataset in the merged layout, else made clips"
    )
    made.add_argument("--tiny-only", action="store_true", help="leave the full-size VAE out")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU, if any")
    made.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    return made.parse_args()


def _pictures(args: argparse.Namespace) -> Pictures:
    listing = args.clips / "videos2caption.json"
    if listing.is_file():
        entries = sorted(json.loads(listing.read_text(encoding="utf-8")), key=lambda entry: str(entry["path"]))
        chosen = entries[: args.num_clips]
        clips = [_read(args.clips / "videos" / entry["path"], args.num_frames) for entry in chosen]
        named = f"{args.clips.name}/ ({', '.join(entry['path'] for entry in chosen)})"
        return Pictures(name=named, clips=clips, captions=[entry["cap"][0] for entry in entries])
    from make_clips import caption, draw, scenes

    made = list(scenes(max(args.num_clips, 5), seed=0, seconds=args.num_frames / 24))
    drawn = [list(itertools.islice(draw(scene), args.num_frames)) for scene in made[: args.num_clips]]
    clips = [torch.stack([torch.from_numpy(frame).permute(2, 0, 1) for frame in frames]) for frames in drawn]
    return Pictures(name="tools/make_clips.py", clips=clips, captions=[caption(scene) for scene in made])


def _read(path: Path, num_frames: int) -> Tensor:
    """The first frames, every one."""
    import av

    with av.open(str(path)) as container:
        frames = [
            torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            for frame in itertools.islice(container.decode(video=0), num_frames)
        ]
    if len(frames) < num_frames:
        raise SystemExit(f"{path} has {len(frames)} frames, --num-frames asks for {num_frames}")
    return torch.stack(frames)


def _measure(name: str, model: Path, pictures: Pictures, args: argparse.Namespace) -> Iterator[Result]:
    """Everything about one model, float32 first."""
    tensors = TENSORS if name == "tiny" else OF_THE_VAE
    clips = [crop_and_resize(clip, height=args.height, width=args.width) for clip in pictures.clips]
    exact = _load(model, args)
    truth = _encode(exact, clips, pictures.captions, tensors, f"{name}: float32")
    seconds = _seconds_per_clip(exact, clips, args)
    yield Result(model=name, change="float32", tensor="all", seconds_per_clip=seconds)
    for change in CHANGES:
        moved = [tensor for tensor in tensors if tensor in change.tensors]
        if why_not := _why_not(change, name, args):
            yield from (Result(model=name, change=change.name, tensor=tensor, why_not=why_not) for tensor in moved)
            continue
        encoder = _load(model, args, **change.options)
        with change.emulate(encoder):
            found = _encode(encoder, clips, pictures.captions, moved, f"{name}: {change.name}")
        seconds = _seconds_per_clip(encoder, clips, args) if change.options else None
        for tensor in moved:
            yield _result(name, change.name, tensor, found, truth, seconds if tensor == "vae_latent" else None)
    exact = _load(model, args)  # for torch's own flags
    found = {"vae_latent": _encode_resized_in_float(exact, pictures, args)}
    yield _result(name, "resized in float", "vae_latent", found, truth)
    if "text_embedding" in tensors:
        found = {"text_embedding": _encode_padded(exact, pictures.captions)}
        yield _result(name, "padded to 512", "text_embedding", found, truth)


def _why_not(change: Change, model: str, args: argparse.Namespace) -> str:
    on_cuda = args.device.startswith("cuda")
    if change.cuda_only and not on_cuda:
        return NO_CUDA
    if change.name == "float16" and model != "tiny" and not on_cuda and not _cpu_has_float16():
        return "not measured (this CPU has no float16 arithmetic)"
    return ""


def _cpu_has_float16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _load(model: Path, args: argparse.Namespace, **options: Any) -> Any:
    return load(model, device=torch.device(args.device), **options)


def _encode(
    encoder: Any, clips: list[Tensor], captions: list[str], tensors: tuple[str, ...] | list[str], what: str
) -> dict[str, Tensor]:
    """Each tensor of all clips, flat, the latents normalised."""
    began = time.perf_counter()
    parts: dict[str, list[Tensor]] = {tensor: [] for tensor in tensors}
    for clip in clips:
        encoded = encoder.encode_batch(ClipBatch(keys=("clip",), frames=clip[None]))[0]
        encoded["vae_latent"] = normalised(encoder, encoded["vae_latent"])
        for tensor in parts.keys() & encoded.keys():
            parts[tensor].append(encoded[tensor])
    if "text_embedding" in parts:
        parts["text_embedding"] = encoder.encode_text(captions)
    say(f"{what}: {time.perf_counter() - began:.1f} s")
    return {tensor: _flat(values) for tensor, values in parts.items()}


def _flat(values: list[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


@torch.inference_mode()
def _encode_resized_in_float(encoder: Any, pictures: Pictures, args: argparse.Namespace) -> Tensor:
    """As many do it, and FastVideo does not."""
    latents = []
    for clip in pictures.clips:
        top, left, height, width = center_crop_box(clip.shape[-2], clip.shape[-1], height=args.height, width=args.width)
        cropped = clip[..., top : top + height, left : left + width].float()
        size = (args.height, args.width)
        frames = interpolate(cropped, size=size, mode="bilinear", align_corners=True, antialias=True).clamp_(0, 255)
        pixels = (frames / 127.5 - 1).permute(1, 0, 2, 3)[None].to(encoder._vae.device)
        latents.append(normalised(encoder, encoder._vae.encode(pixels).latent_dist.mean[0].float().cpu()))
    return _flat(latents)


@torch.inference_mode()
def _encode_padded(encoder: Any, captions: list[str]) -> Tensor:
    """Every caption on 512 tokens, as the pipelines do it, then without what is padding."""
    embeddings = []
    for caption in captions:
        tokens = encoder._text._tokenizer(caption, padding="max_length", max_length=512, return_tensors="pt")
        device = encoder._text._device
        states = encoder._text._encoder(tokens.input_ids.to(device), tokens.attention_mask.to(device)).last_hidden_state
        embeddings.append(states[0, : int(tokens.attention_mask.sum())].float().cpu())
    return _flat(embeddings)


def _seconds_per_clip(encoder: Any, clips: list[Tensor], args: argparse.Namespace) -> float | None:
    """VAE and CLIP of one clip, the result back on the CPU; on a GPU only: a CPU's seconds say nothing about a job."""
    if not args.device.startswith("cuda"):
        return None
    batch, seconds = ClipBatch(keys=("clip",), frames=clips[0][None]), []
    for _ in range(TIMED_ROUNDS + 1):
        began = time.perf_counter()
        encoder.encode_batch(batch)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _result(
    model: str,
    change: str,
    tensor: str,
    found: dict[str, Tensor],
    truth: dict[str, Tensor],
    seconds_per_clip: float | None = None,
) -> Result:
    return Result(
        model=model,
        change=change,
        tensor=tensor,
        relative_l2=relative_l2(found[tensor], truth[tensor]),
        max_abs=max_abs(found[tensor], truth[tensor]),
        seconds_per_clip=seconds_per_clip,
    )


def _row(result: Result) -> list[str]:
    head = [result.model, result.change, result.tensor]
    if result.change == "float32":
        return [
            *head,
            "the reference",
            "",
            NO_CUDA if result.seconds_per_clip is None else f"{result.seconds_per_clip:.2f}",
        ]
    if result.why_not:
        return [*head, result.why_not, "", ""]
    timed = f"{result.seconds_per_clip:.2f}" if result.seconds_per_clip is not None else ""
    return [*head, f"{result.relative_l2:.1e}", f"{result.max_abs:.1e}", timed]


if __name__ == "__main__":
    sys.exit(main())
