"""Encoded samples and their latent contract, small, and the same in every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streamprep.contract import ImageContract, LatentContract, TextContract, VideoContract
from streamprep.types import EncodedClip, EncodedSample

NUM_FRAMES, TRAIN_FPS, SOURCE_FPS = 17, 16.0, 30000 / 1001
SIZES = ((64, 96), (96, 64))
"""Height and width in pixels."""
CHANNELS, TEXT_DIM, MAX_TOKENS, IMAGE_TOKENS, IMAGE_DIM = 16, 8, 512, 257, 4

_HOLDS = {
    "vae_latent": "posterior mean of the clip, not normalised, (C, T, H, W)",
    "vae_logvar": "posterior log variance of the clip, not normalised, (C, T, H, W)",
    "text_embedding": "last hidden state of the caption's tokens, (L, D)",
    "clip_feature": "hidden_states[-2] of the image encoder on the first frame, all tokens, (L, D)",
    "first_frame_latent": "posterior mean of the first frame followed by zeros, normalised, no mask, (C, T, H, W)",
}


def tensor_names(workload: str, posterior: str = "mean") -> tuple[str, ...]:
    """Of the tensors that samples have, as Wan 2.1 gives them."""
    names = {"text": (), "t2v": ("vae_latent",), "i2v": ("vae_latent", "clip_feature", "first_frame_latent")}
    logvar = ("vae_logvar",) if posterior == "moments" and workload != "text" else ()
    return (*names[workload], *logvar, "text_embedding")


def make_contract(workload: str = "t2v", posterior: str = "mean", *, family: str = "wan") -> LatentContract:
    """What such samples mean."""
    names = tensor_names(workload, posterior)
    video = VideoContract(
        vae_class="AutoencoderKLWan",
        dtype="float32",
        tf32=False,
        sha256="0a" * 32,
        posterior=posterior,
        space="raw",
        conditioning_space="normalised" if workload == "i2v" else None,
        latents_mean=tuple(0.125 * (channel - 8) for channel in range(CHANNELS)),
        latents_std=tuple(1 + 0.0625 * channel for channel in range(CHANNELS)),
        latent_channels=CHANNELS,
        temporal_factor=4,
        spatial_factor=8,
        spatial_multiple=16,
        frame_rule="4k+1",
        pixel_range=(-1.0, 1.0),
        resize_rule="centre crop, bilinear",
        fps_rule="nearest",
    )
    text = TextContract(
        encoder_class="UMT5EncoderModel",
        dtype="float32",
        sha256="0b" * 32,
        max_length=MAX_TOKENS,
        dim=TEXT_DIM,
        states="last_hidden_state",
        padding="trimmed",
        captions_cleaned=True,
    )
    image = ImageContract(
        encoder_class="CLIPVisionModel",
        processor_class="CLIPImageProcessor",
        dtype="float32",
        sha256="0c" * 32,
        states="hidden_states[-2]",
        num_tokens=IMAGE_TOKENS,
        dim=IMAGE_DIM,
    )
    return LatentContract(
        family=family,
        variant="2.1-i2v" if workload == "i2v" else "2.1-t2v",
        model="Zo\u00eb/\u4f60\u597d",
        revision=None,
        workload=workload,
        video=video if workload != "text" else None,
        text=text,
        image=image if workload == "i2v" else None,
        tensors={name: _HOLDS[name] for name in names},
    )


def make_sample(
    number: int = 0,
    *,
    workload: str = "t2v",
    posterior: str = "mean",
    size: tuple[int, int] = SIZES[0],
    tensors: Mapping[str, Tensor] | None = None,
    **fields: Any,
) -> EncodedSample:
    """One row, another one for every number.

    Args:
        number: Of it; its caption has so many tokens and one more.
        workload: ``t2v``, ``i2v`` or ``text``.
        posterior: ``mean`` or ``moments``.
        size: Height and width of the clip in pixels.
        tensors: To have instead of its own, or further ones.
        **fields: Of `EncodedSample`, to have instead of its own.
    """
    random = torch.Generator().manual_seed(number)
    contract, (height, width) = make_contract(workload, posterior), size
    shapes = contract.tensor_shapes(num_frames=NUM_FRAMES, height=height, width=width)
    shapes["text_embedding"] = (1 + number, TEXT_DIM)
    clip = EncodedClip(width=width, height=height, num_frames=NUM_FRAMES, train_fps=TRAIN_FPS, source_fps=SOURCE_FPS)
    own: dict[str, Any] = {
        "key": f"dir/{number}",
        "id": f"dir/{number}.mp4",
        "file_name": f"dir/{number}.mp4",
        "caption": f"Caption {number}.",
        "clip": clip if workload != "text" else None,
    }
    drawn = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return EncodedSample(tensors={**drawn, **(tensors or {})}, **own | fields)


def make_samples(num_samples: int, **how: Any) -> list[EncodedSample]:
    """Several, of two sizes by turns."""
    return [make_sample(number, size=SIZES[number % len(SIZES)], **how) for number in range(num_samples)]
