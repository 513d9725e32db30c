"""Is what a loaded model computes what its contract says? Asked before the first sample, and again of every sample.

Wrong latents look like right ones: a text encoder whose weights were not found, a VAE that overflows, a tokenizer of
another model all give tensors of the right shape, and a week of training is lost. What can be seen at once, is:

1. Two prompts and two made clips go through the encoder: shapes as promised, finite, not all zero, not independent of
   what went in, and a prompt's embedding the same beside a longer one.
2. For image-to-video, the conditioning latent's first frame must be the video latent's first frame, normalised: the
   VAE is causal, so the frames that follow cannot matter. It costs no further encoding, so every sample is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamprep.contract import LatentContract, VideoContract
from streamprep.encoders import Encoder, encode_clips
from streamprep.errors import LatentMismatch, UserError
from streamprep.types import ClipBatch

_PROMPTS = (
    "A red circle moves from left to right.",
    "An aerial view of the sea at dusk, with waves, clouds and mountains in the distance, while the camera turns.",
)
_SAME, _OTHER = 0.05, 1e-4
"""Relative L2 distances: less than the first is the same but for rounding in bfloat16 (0.3 to 1 % measured with padding
and without), more than the second is another."""

FIRST_FRAME_TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "float16": 5e-2, "bfloat16": 0.1}
"""Of normalised latents, which have a standard deviation near 1. On a CPU 1e-7 was measured in every dtype: the first
frame is a chunk of its own for the VAE, so that both are the same computation. A GPU may choose another kernel for each
of the two; then they differ as their rounding does (0.04 between bfloat16 and float32)."""


def check_encoder(encoder: Encoder) -> None:
    """Encode a little of everything and look at it.

    Args:
        encoder: With its weights loaded.

    Raises:
        UserError: saying what is wrong with what the model computed.
    """
    contract = encoder.contract
    _check_text(encoder, contract)
    if contract.video is not None:
        _check_clips(encoder, contract, contract.video)


def check_first_frame(video: VideoContract, tensors: Mapping[str, Tensor], key: str) -> None:
    """Compare the first frames of a clip's conditioning latent and of its latent, once normalised.

    Args:
        video: The contract.
        tensors: Of one clip; nothing is done if it has no ``first_frame_latent``, or if it has NaN, which others see.
        key: Of the clip.

    Raises:
        LatentMismatch: if they differ.
    """
    if "first_frame_latent" not in tensors:
        return
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (video.latents_mean, video.latents_std))
    expected = (tensors["vae_latent"][:, 0] - mean) / std
    difference = (tensors["first_frame_latent"][:, 0] - expected).abs().max().item()
    tolerance = FIRST_FRAME_TOLERANCE["tf32" if video.tf32 and video.dtype == "float32" else video.dtype]
    if difference > tolerance * max(1.0, expected.abs().max().item()):
        raise LatentMismatch(
            f"the conditioning latent of {key!r} begins with another frame than its video latent: they differ by "
            f"{difference:.3g} after normalisation, {tolerance:g} is allowed in {video.dtype}; the VAE is not causal, "
            "or this machine computes wrongly"
        )


def _check_text(encoder: Encoder, contract: LatentContract) -> None:
    short, long = encoder.encode_text(_PROMPTS)
    (alone,) = encoder.encode_text(_PROMPTS[:1])
    refuse = _Refusal(contract, "text_embedding")
    for embedding in (short, long):
        if embedding.ndim != 2 or embedding.shape[1] != contract.text.dim or len(embedding) < 2:
            raise refuse(f"is of shape {tuple(embedding.shape)}", f"(L, {contract.text.dim})")
    _check_values(refuse, [short, long])
    if not _distance(short.mean(0), long.mean(0)) >= _OTHER:
        raise refuse("is the same for two prompts", "one that depends on the prompt")
    if short.shape != alone.shape or not _distance(short, alone) <= _SAME:  # NaN is not
        raise refuse("changes with the other prompts of its batch", "one that does not")


def _check_clips(encoder: Encoder, contract: LatentContract, video: VideoContract) -> None:
    side, num_frames = 2 * video.spatial_multiple, 1 + video.temporal_factor
    clips = encode_clips(encoder, _made_clips(num_frames=num_frames, side=side))
    for name, shape in contract.tensor_shapes(num_frames=num_frames, height=side, width=side).items():
        refuse = _Refusal(contract, name)
        tensors = [clip[name] for clip in clips]
        for tensor in tensors:
            if tuple(tensor.shape) != shape:
                raise refuse(f"is of shape {tuple(tensor.shape)}", f"{shape}")
        _check_values(refuse, tensors)
        if not _distance(*tensors) >= _OTHER:
            raise refuse("is the same for two clips", "one that depends on the picture")
    for number, clip in enumerate(clips):
        try:
            check_first_frame(video, clip, f"made clip {number}")
        except LatentMismatch as error:
            raise UserError(f"model {contract.model} fails its self-check: {error}") from error


@dataclass(frozen=True)
class _Refusal:
    """Makes the errors about one tensor."""

    contract: LatentContract
    name: str

    def __call__(self, found: str, expected: str) -> UserError:
        return UserError(
            f"model {self.contract.model} fails its self-check, nothing has been encoded: {self.name} {found}, "
            f"{expected} is expected"
        )


def _check_values(refuse: _Refusal, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            raise refuse(f"is {tensor.dtype}", "float32")
        if not tensor.isfinite().all():
            raise refuse("holds NaN or infinity (an overflow? a damaged file?)", "finite numbers")
        if not tensor.any():
            raise refuse("is all zeros", "anything else")


def _distance(one: Tensor, other: Tensor) -> float:
    """Relative L2."""
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def _made_clips(*, num_frames: int, side: int) -> ClipBatch:
    """A gradient that brightens, and still noise: (2, T, 3, side, side)."""
    ramp = torch.linspace(0, 200, side)
    gradient = torch.stack([ramp.expand(side, side), ramp.expand(side, side).T, ramp.flip(0).expand(side, side)])
    moving = torch.stack([gradient + 10.0 * number for number in range(num_frames)])
    noise = torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(0))
    frames = torch.stack([moving, noise.expand(num_frames, -1, -1, -1)]).clamp(0, 255).to(torch.uint8)
    return ClipBatch(keys=("gradient", "noise"), frames=frames)
