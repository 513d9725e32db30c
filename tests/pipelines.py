"""What a model's own pipelines in diffusers compute, for tests to compare with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor

from streamprep.types import ClipBatch

VARIANTS = {
    "2.1-t2v": ("t2v",),
    "2.1-i2v": ("i2v",),
    "2.2-t2v-a14b": ("t2v",),
    "2.2-i2v-a14b": ("i2v",),
    "2.2-ti2v-5b": ("t2v", "i2v"),
}
"""Every Wan and what it can be trained for."""
JOBS = [(variant, workload) for variant, workloads in VARIANTS.items() for workload in workloads]


@functools.cache
def open_pipeline(model: Path, workload: str, *, vae_dtype: torch.dtype = torch.float32) -> Any:
    """``WanPipeline`` or ``WanImageToVideoPipeline``; the 5B model belongs to both."""
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=vae_dtype)
    return (WanImageToVideoPipeline if workload == "i2v" else WanPipeline).from_pretrained(model, vae=vae)


@torch.no_grad()
def encode_prompt(pipeline: Any, caption: str) -> Tensor:
    """(512, D): zeros after the caption's tokens."""
    embeds, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
    return embeds[0]


@torch.no_grad()
def encode_image(pipeline: Any, frame_CHW: Tensor) -> Tensor:
    """(L, D)."""
    return pipeline.encode_image(_picture(frame_CHW), device="cpu")[0]


@torch.no_grad()
def prepare_condition(pipeline: Any, frames_TCHW: Tensor) -> Tensor:
    """What ``prepare_latents`` makes of a clip's first frame, as ``__call__`` does, but for the mask: (C, T, H, W)."""
    num_frames, _, height, width = frames_TCHW.shape
    image = pipeline.video_processor.preprocess(_picture(frames_TCHW[0]), height=height, width=width)
    channels = pipeline.vae.config.z_dim
    outputs = pipeline.prepare_latents(
        image.to(torch.float32), 1, channels, height, width, num_frames, torch.float32, torch.device("cpu")
    )
    if pipeline.config.expand_timesteps:
        _, condition, _ = outputs
        return condition[0]
    _, mask_and_condition = outputs
    assert mask_and_condition.shape[1] == 4 + channels
    return mask_and_condition[0, 4:]


def normalise(pipeline: Any, latent_CTHW: Tensor) -> Tensor:
    """As the trainers do."""
    mean, std = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    return (latent_CTHW - mean) / std


def make_noise(num_clips: int, *, num_frames: int = 9, height: int = 32, width: int = 64) -> ClipBatch:
    """Clips that compress badly."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (num_clips, num_frames, 3, height, width), dtype=torch.uint8, generator=generator)
    return ClipBatch(keys=tuple(f"{number}" for number in range(num_clips)), frames=frames)


def max_difference(ours: Tensor, theirs: Tensor) -> float:
    """Of two float32 tensors of one shape."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    return (ours - theirs).abs().max().item()


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def _picture(frame_CHW: Tensor) -> Image.Image:
    return Image.fromarray(frame_CHW.permute(1, 2, 0).contiguous().numpy())
