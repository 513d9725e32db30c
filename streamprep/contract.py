"""The latent contract: what the numbers in the output mean.

The commonest disaster of people who precompute latents is to train on latents in another normalisation, of another
layer or another padding than the model expects. So what was computed is written down, in the plan and in every output
file, and readers refuse what does not match.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamprep.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentContract:
    """Everything a trainer must know to use the tensors."""

    family: str
    """``wan``, ..."""
    model: str
    """Hub id, or the local folder's name."""
    revision: str | None
    """The hub's commit."""
    vae_class: str
    vae_dtype: str
    vae_sha256: str
    posterior: str
    """Which part of the VAE's posterior is stored: ``mean``."""
    space: str
    """``raw``: as the VAE gives it; the trainer normalises by ``(latent - latents_mean) / latents_std``."""
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    latent_channels: int
    temporal_factor: int
    """Pixel frames per latent frame, after the first."""
    spatial_factor: int
    """Pixels per latent column or row."""
    spatial_multiple: int
    """Height and width in pixels must be multiples of this (VAE factor x patch size)."""
    frame_rule: str
    """``4k+1``."""
    pixel_range: tuple[float, float]
    """What 0 and 255 become for the VAE."""
    resize_rule: str
    fps_rule: str
    text_encoder_class: str
    text_dtype: str
    text_sha256: str
    text_max_length: int
    """Tokens, the end-of-sequence token included; longer captions are cut."""
    text_states: str
    """``last_hidden_state``."""
    text_padding: str
    """``trimmed``: as long as the caption's tokens; trainers pad with zeros."""
    captions_cleaned: bool
    tensors: Mapping[str, str]
    """What each stored tensor holds."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    def latent_bytes(self, *, num_frames: int, height: int, width: int) -> int:
        """Size of one clip's float32 latent."""
        latent_frames = 1 + (num_frames - 1) // self.temporal_factor
        area = (height // self.spatial_factor) * (width // self.spatial_factor)
        return 4 * self.latent_channels * latent_frames * area

    def check_geometry(self, *, height: int, width: int, num_frames: int) -> None:
        """Refuse a size the model cannot encode without cutting something off.

        Raises:
            UserError: with the nearest sizes that work.
        """
        if (num_frames - 1) % self.temporal_factor:
            below = num_frames - (num_frames - 1) % self.temporal_factor
            raise UserError(
                f"--num-frames {num_frames} breaks the {self.frame_rule} rule of {self.family}, whose VAE would ignore "
                f"the last {num_frames - below}: use {below} or {below + self.temporal_factor}"
            )
        for flag, value in (("--max-height", height), ("--max-width", width)):
            if value % self.spatial_multiple:
                below = value - value % self.spatial_multiple
                nearest = " or ".join(str(n) for n in (below, below + self.spatial_multiple) if n)
                raise UserError(
                    f"{flag} {value} is no multiple of {self.family}'s {self.spatial_multiple}: use {nearest}"
                )
