"""Wan: what its models are trained on, as diffusers' ``WanPipeline`` and ``WanImageToVideoPipeline`` compute it.

- ``vae_latent`` is the mean of the VAE's posterior, not normalised: Wan's trainers apply ``(x - mean) / std``
  themselves. With ``posterior="moments"`` there is ``vae_logvar``, its log variance, too.
- ``text_embedding`` is UMT5's last hidden state, as long as the caption's tokens: the pipeline puts zeros after them,
  so trainers pad with zeros and lose nothing.
- ``first_frame_latent`` (image to video) is the mean of the first frame followed by frames of 0.0, mid-grey, and is
  normalised: the pipeline's ``prepare_latents`` without the mask, which trainers make themselves.
- ``clip_feature`` (image to video, Wan 2.1) is the layer before the last of CLIP on the first frame.

Wan 2.2 A14B takes no image features. Wan 2.2 TI2V-5B takes neither of the two: its image-to-video keeps the video's own
first latent frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamprep import canonical
from streamprep.contract import ImageContract, LatentContract, TextContract, VideoContract
from streamprep.encoders import EncodeOptions, _clip_vision, _umt5
from streamprep.encoders._clip_vision import ClipVision
from streamprep.encoders._loading import load_component, transformers_class
from streamprep.encoders._umt5 import Umt5
from streamprep.encoders._wan_variants import VARIANTS, recognise
from streamprep.errors import UserError
from streamprep.models import ModelFolder, component_digest
from streamprep.out_of_memory import BatchLimits
from streamprep.types import ClipBatch

PIPELINES = tuple(sorted({pipeline for variant in VARIANTS for pipeline in variant.pipelines}))
"""What ``model_index.json`` names; this module is for these."""

_TENSORS = {
    "vae_latent": "posterior mean of the clip, not normalised, (C, T, H, W)",
    "vae_logvar": "posterior log variance of the clip, not normalised, (C, T, H, W)",
    "text_embedding": "last hidden state of the caption's tokens, (L, D)",
    "clip_feature": "hidden_states[-2] of the image encoder on the first frame, all tokens, (L, D)",
    "first_frame_latent": "posterior mean of the first frame followed by zeros, normalised, no mask, (C, T, H, W)",
}


def load_encoder(model: ModelFolder, options: EncodeOptions) -> WanEncoder:
    """Describe a Wan model; its weights are loaded by `WanEncoder.load`.

    Raises:
        UserError: if the model is not one this module knows, or not one for the workload.
    """
    variant = recognise(model, options.workload)
    with_image = options.workload == "i2v" and variant.image_features
    components = ["text_encoder", "tokenizer"]
    components += ["vae"] if options.workload != "text" else []
    components += ["image_encoder", "image_processor"] if with_image else []
    if options.digest != "none":
        model.fetch(components)
    names = [
        "vae_latent" if options.workload != "text" else "",
        "vae_logvar" if options.workload != "text" and options.posterior == "moments" else "",
        "text_embedding",
        "clip_feature" if with_image else "",
        "first_frame_latent" if options.workload == "i2v" and variant.conditioning_latent else "",
    ]
    contract = LatentContract(
        family="wan",
        variant=variant.name,
        model=model.name,
        revision=model.revision,
        workload=options.workload,
        video=_video_contract(model, options, has_conditioning=names[-1] != "") if names[0] else None,
        text=_text_contract(model, options),
        image=_image_contract(model, options) if with_image else None,
        tensors={name: _TENSORS[name] for name in names if name},
    )
    return WanEncoder(model, contract=contract, options=options)


class WanEncoder:
    """Encodes clips and captions with one Wan model."""

    def __init__(self, model: ModelFolder, *, contract: LatentContract, options: EncodeOptions) -> None:
        self.contract = contract
        self.limits = BatchLimits()
        self._model, self._device = model, options.device
        self._text = Umt5(
            model,
            device=options.device,
            dtype=getattr(torch, contract.text.dtype),
            clean_captions=options.clean_captions,
            batch_size=options.text_batch_size,
            offload=options.offload_text_encoder,
            limits=self.limits,
        )
        self._image = ClipVision(model, device=options.device) if contract.image else None
        self._vae: Any = None

    def load(self) -> None:
        """Load the weights.

        Raises:
            UserError: if some are missing or wrong.
        """
        if self.contract.video is not None:
            from diffusers import AutoencoderKLWan

            dtype = getattr(torch, self.contract.video.dtype)
            self._vae = load_component(self._model, AutoencoderKLWan, "vae", device=self._device, torch_dtype=dtype)
        if self._image is not None:
            self._image.load()
        self._text.load()

    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        """For each caption ``text_embedding``, (L, D) float32 on the CPU; each distinct one is encoded once."""
        return self._text.encode(captions)

    @torch.inference_mode()
    def encode_batch(self, batch: ClipBatch) -> list[dict[str, Tensor]]:
        """Encode clips.

        Args:
            batch: Frames (B, T, C, H, W) uint8.

        Returns:
            For each clip the contract's tensors but ``text_embedding``, float32 on the CPU.
        """
        tensors: dict[str, Tensor] = {}
        pixels_BCTHW = self._pixels(batch.frames)
        posterior = self._posterior(pixels_BCTHW)
        tensors["vae_latent"] = posterior.mean.float().cpu()
        if "vae_logvar" in self.contract.tensors:
            tensors["vae_logvar"] = posterior.logvar.float().cpu()
        if "first_frame_latent" in self.contract.tensors:
            tensors["first_frame_latent"] = self._encode_condition(pixels_BCTHW)
        if self._image is not None:
            tensors["clip_feature"] = self._image.encode(batch.frames[:, 0])
        return [{name: values[row].clone() for name, values in tensors.items()} for row in range(len(batch.keys))]

    def _pixels(self, frames_BTCHW: Tensor) -> Tensor:
        """uint8 -> (B, C, T, H, W) in -1..1, in the VAE's dtype, on its device."""
        frames = frames_BTCHW.to(self._device, non_blocking=True).permute(0, 2, 1, 3, 4).contiguous()
        pixels: Tensor = frames.float().div_(255.0).mul_(2.0).sub_(1.0)
        return pixels.to(self._vae.dtype)

    def _posterior(self, pixels_BCTHW: Tensor) -> Any:
        try:
            return self._vae.encode(pixels_BCTHW).latent_dist
        finally:
            self._vae.clear_cache()  # which it does at its end only: an error would leave it half the batch's memory

    def _encode_condition(self, pixels_BCTHW: Tensor) -> Tensor:
        """The first frame, then 0.0: ``WanImageToVideoPipeline.prepare_latents``. Overwrites the pixels."""
        pixels_BCTHW[:, :, 1:] = 0.0
        latents: Tensor = self._posterior(pixels_BCTHW).mean.float()
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (self._vae.config.latents_mean, self._vae.config.latents_std)
        )
        return ((latents - mean) * (1.0 / std)).cpu()


def _video_contract(model: ModelFolder, options: EncodeOptions, *, has_conditioning: bool) -> VideoContract:
    vae = model.config("vae/config.json")
    if vae.get("_class_name") != "AutoencoderKLWan":
        raise UserError(f"{model.name}: the VAE is a {vae.get('_class_name')}, AutoencoderKLWan is expected")
    channels = vae.get("z_dim", 16)
    spatial, temporal = vae.get("scale_factor_spatial") or 8, vae.get("scale_factor_temporal") or 4
    return VideoContract(
        vae_class="AutoencoderKLWan",
        dtype=options.vae_dtype,
        tf32=options.allow_tf32,
        sha256=_digest(model, ("vae",), options),
        posterior=options.posterior,
        space="raw",
        conditioning_space="normalised" if has_conditioning else None,
        latents_mean=_numbers(model, "latents_mean", count=channels, above=-math.inf),
        latents_std=_numbers(model, "latents_std", count=channels, above=0.0),
        latent_channels=channels,
        temporal_factor=temporal,
        spatial_factor=spatial,
        spatial_multiple=spatial * 2,  # the transformer's patches are 1x2x2 latents
        frame_rule=f"{temporal}k+1",
        pixel_range=(-1.0, 1.0),
        resize_rule="centre crop to the aspect ratio, then bilinear, align_corners, antialias, on uint8",
        fps_rule="frame int(i * source_fps / train_fps), from the first",
    )


def _text_contract(model: ModelFolder, options: EncodeOptions) -> TextContract:
    config, takes = model.config("text_encoder/config.json"), model.config("transformer/config.json").get("text_dim")
    dim = config.get("d_model")
    if dim != (takes or 4096):
        raise UserError(
            f"{model.name}: the text encoder gives {dim} features, the transformer takes {takes or 4096} (text_dim): "
            "they do not belong together"
        )
    return TextContract(
        encoder_class=(config.get("architectures") or ["UMT5EncoderModel"])[0],
        dtype=options.text_dtype,
        sha256=_digest(model, ("text_encoder", "tokenizer"), options),
        max_length=_umt5.MAX_LENGTH,
        dim=dim,
        states=_umt5.STATES,
        padding="trimmed",
        captions_cleaned=options.clean_captions,
    )


def _image_contract(model: ModelFolder, options: EncodeOptions) -> ImageContract:
    config, takes = model.config("image_encoder/config.json"), model.config("transformer/config.json")["image_dim"]
    dim, size, patch = (int(config.get(name, 0)) for name in ("hidden_size", "image_size", "patch_size"))
    if dim != takes or not patch:
        raise UserError(
            f"{model.name}: the image encoder gives {dim} features, the transformer takes {takes} (image_dim): "
            "they do not belong together"
        )
    crop = model.config("image_processor/preprocessor_config.json").get("crop_size")
    if crop not in (size, {"height": size, "width": size}):
        raise UserError(f"{model.name}: the image processor crops to {crop}, the image encoder takes {size} pixels")
    return ImageContract(
        encoder_class=(config.get("architectures") or ["CLIPVisionModel"])[0],
        processor_class=transformers_class(model, "image_processor").__name__,
        dtype="float32",
        sha256=_digest(model, ("image_encoder", "image_processor"), options),
        states=_clip_vision.STATES,
        num_tokens=(size // patch) ** 2 + 1,
        dim=dim,
    )


def _digest(model: ModelFolder, components: Sequence[str], options: EncodeOptions) -> str:
    """Of several components together."""
    if options.digest == "none":
        return "not taken"
    full = options.digest == "full"
    return canonical.digest([component_digest(model.path / name, full=full) for name in components])


def _numbers(model: ModelFolder, name: str, *, count: int, above: float) -> tuple[float, ...]:
    """One number for each latent channel, of the VAE's config; its class has defaults, but for 16 channels only."""
    values = model.config("vae/config.json").get(name)
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(value, (int, float)) and math.isfinite(value) and value > above for value in values)
    ):
        raise UserError(
            f"{model.path / 'vae/config.json'}: {name} must be {count} numbers{' above 0' if above == 0 else ''}, one "
            f"for each latent channel, got {values}"
        )
    return tuple(values)
