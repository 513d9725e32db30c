"""The latent contract: what the numbers in the output mean.

The commonest disaster of people who precompute latents is to train on latents in another normalisation, of another
layer or another padding than the model expects. So what was computed is written down, in the plan and in every output
file, and readers refuse what does not match.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streamprep.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoContract:
    """What a trainer must know of the video latents."""

    vae_class: str
    dtype: str
    """The VAE ran in: ``float32``, ``bfloat16`` or ``float16``."""
    tf32: bool
    """Whether float32 multiplications on the GPU were rounded to TF32 (10 bits of mantissa)."""
    sha256: str
    """Of the VAE's weights and config."""
    posterior: str
    """Which part of the VAE's posterior is stored: ``mean``, or ``moments``: mean and log variance."""
    space: str
    """``raw``: as the VAE gives it; the trainer normalises by ``(latent - latents_mean) / latents_std``."""
    conditioning_space: str | None
    """Of ``first_frame_latent``: ``normalised``, as the transformer takes it; None where there is none."""
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

    def latent_shape(self, *, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latent of a clip of that many pixel frames and pixels."""
        latent_frames = 1 + (num_frames - 1) // self.temporal_factor
        return (self.latent_channels, latent_frames, height // self.spatial_factor, width // self.spatial_factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextContract:
    """What a trainer must know of ``text_embedding`` (L, D)."""

    encoder_class: str
    dtype: str
    sha256: str
    """Of the text encoder's and the tokenizer's files together."""
    max_length: int
    """Tokens, the end-of-sequence token included; longer captions are cut."""
    dim: int
    """Features of a token: D."""
    states: str
    """``last_hidden_state``."""
    padding: str
    """``trimmed``: as long as the caption's tokens; trainers pad with zeros."""
    captions_cleaned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageContract:
    """What a trainer must know of ``clip_feature`` (L, D)."""

    encoder_class: str
    processor_class: str
    dtype: str
    sha256: str
    """Of the image encoder's and the image processor's files together."""
    states: str
    """``hidden_states[-2]``: the layer before the last, all tokens."""
    num_tokens: int
    """L: the class token and one for each patch."""
    dim: int
    """D."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentContract:
    """Everything a trainer must know to use the tensors."""

    family: str
    """``wan``, ..."""
    variant: str
    """Which of the family's models: ``2.1-i2v``, ..."""
    model: str
    """Hub id, or the local folder's name."""
    revision: str | None
    """The hub's commit."""
    workload: str
    """What the tensors are to train: ``t2v``, ``i2v``, ``text``."""
    video: VideoContract | None
    """None where only captions are encoded."""
    text: TextContract
    image: ImageContract | None
    """None where the model takes no image features."""
    tensors: Mapping[str, str]
    """What each stored tensor holds."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    def tensor_shapes(self, *, num_frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """The shapes of one clip's tensors; not of ``text_embedding``, which is as long as its caption."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.tensors:
            if name == "clip_feature":
                assert self.image is not None
                shapes[name] = (self.image.num_tokens, self.image.dim)
            elif name != "text_embedding":
                assert self.video is not None
                shapes[name] = self.video.latent_shape(num_frames=num_frames, height=height, width=width)
        return shapes

    def row_bytes(self, *, num_frames: int, height: int, width: int, value_bytes: int = 4) -> int:
        """Size of one row's tensors without the text embedding, of which only the greatest length is known."""
        shapes = self.tensor_shapes(num_frames=num_frames, height=height, width=width)
        return value_bytes * sum(map(math.prod, shapes.values()))

    def check_geometry(self, *, height: int, width: int, num_frames: int, bucket: str | None = None) -> None:
        """Refuse a size the model cannot encode without cutting something off.

        Args:
            height: Pixels.
            width: Pixels.
            num_frames: Of a clip.
            bucket: Where the size was given, if not by the flags of these names.

        Raises:
            UserError: with the nearest sizes that work.
        """
        video = self.video
        if video is None:
            return
        if (num_frames - 1) % video.temporal_factor:
            below = num_frames - (num_frames - 1) % video.temporal_factor
            raise UserError(
                f"{_flag('num_frames', bucket)} {num_frames} breaks the {video.frame_rule} rule of {self.family}, "
                f"whose VAE would ignore the last {num_frames - below}: use {below} or {below + video.temporal_factor}"
            )
        for flag, value in ((_flag("max_height", bucket), height), (_flag("max_width", bucket), width)):
            if value % video.spatial_multiple:
                below = value - value % video.spatial_multiple
                nearest = " or ".join(str(n) for n in (below, below + video.spatial_multiple) if n)
                raise UserError(
                    f"{flag} {value} is no multiple of {self.family}'s {video.spatial_multiple}: use {nearest}"
                )


def _flag(name: str, bucket: str | None) -> str:
    words = name.removeprefix("max_").replace("_", " ")
    return f"--{name.replace('_', '-')}" if bucket is None else f"--buckets {bucket}: {words}"


def describe(contract: Mapping[str, Any]) -> Iterator[str]:
    """A contract as lines for a person.

    Args:
        contract: As `LatentContract.to_json` gives it, or as it is found in a plan or in an output file.
    """
    for name, value in contract.items():
        if isinstance(value, Mapping):
            yield name
            for inner, inner_value in value.items():
                yield from _lines(f"  {inner}", inner_value)
        else:
            yield from _lines(name, value)


def _lines(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool) or value is None:
        value = {True: "yes", False: "no", None: "none"}[value]
    elif isinstance(value, (list, tuple)):
        value = " ".join(f"{number:g}" for number in value)
    indent = " " * 22
    yield from textwrap.wrap(f"{name:22}{value}", 110, subsequent_indent=indent, break_long_words=False)
