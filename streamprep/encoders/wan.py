"""Wan: AutoencoderKLWan latents and UMT5 embeddings, as diffusers' ``WanPipeline`` computes them.

``vae_latent`` is the mean of the VAE's posterior, not normalised: Wan's trainers apply ``(x - mean) / std`` themselves.
``text_embedding`` is UMT5's last hidden state, as long as the caption's tokens: the pipeline puts zeros after them, so
trainers pad with zeros and lose nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamprep import canonical
from streamprep.contract import LatentContract
from streamprep.errors import UserError
from streamprep.models import ModelFolder, component_digest
from streamprep.types import ClipBatch

PIPELINES = ("WanPipeline",)
"""What ``model_index.json`` names; this module is for these."""

TEXT_MAX_LENGTH = 512  # WanPipeline.__call__'s max_sequence_length; encode_prompt's own default of 226 is not used


def load_encoder(
    model: ModelFolder,
    *,
    workload: str,
    device: torch.device,
    clean_captions: bool,
    text_batch_size: int,
    full_digest: bool,
) -> WanEncoder:
    """Describe a Wan model; its weights are loaded by `WanEncoder.load`.

    Args:
        model: A diffusers folder.
        workload: ``t2v``.
        device: Where to encode.
        clean_captions: As the pipeline does (ftfy, HTML entities, white space); False as FastVideo.
        text_batch_size: Captions at once.
        full_digest: Whether the contract's digests are of all bytes of the weights.

    Raises:
        UserError: if the model is not one this module knows.
    """
    vae, text = model.config("vae/config.json"), model.config("text_encoder/config.json")
    if vae.get("_class_name") != "AutoencoderKLWan":
        raise UserError(f"{model.name}: the VAE is a {vae.get('_class_name')}, AutoencoderKLWan is expected")
    contract = _contract(
        model, vae, text, text_dtype=_text_dtype(device), clean_captions=clean_captions, full_digest=full_digest
    )
    return WanEncoder(
        model, contract=contract, device=device, clean_captions=clean_captions, text_batch_size=text_batch_size
    )


class WanEncoder:
    """Encodes clips and captions with one Wan model."""

    def __init__(
        self,
        model: ModelFolder,
        *,
        contract: LatentContract,
        device: torch.device,
        clean_captions: bool,
        text_batch_size: int,
    ) -> None:
        self.contract = contract
        self._model, self._device = model, device
        self._clean_captions, self._text_batch_size = clean_captions, text_batch_size
        self._vae: Any = None
        self._tokenizer: Any = None
        self._text_encoder: Any = None

    def load(self) -> None:
        """Load the weights: VAE in float32, UMT5 in bfloat16 on a GPU (float16 overflows) and float32 on the CPU."""
        from diffusers import AutoencoderKLWan
        from transformers import UMT5EncoderModel
        from transformers.utils import logging

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        self._vae = self._load(AutoencoderKLWan, "vae", torch_dtype=torch.float32)
        self._text_encoder = self._load(UMT5EncoderModel, "text_encoder", dtype=_text_dtype(self._device))
        self._tokenizer = self._tokenizer_class().from_pretrained(self._model.path / "tokenizer")

    def _load(self, kind: Any, component: str, **options: Any) -> Any:
        """One component, ready; for weights that its files lack, the libraries would only warn and draw random ones."""
        module, report = kind.from_pretrained(
            self._model.path, subfolder=component, use_safetensors=True, output_loading_info=True, **options
        )
        if lacking := sorted(report["missing_keys"]):
            raise UserError(
                f"{self._model.path / component} lacks {len(lacking)} weights of a {kind.__name__}, the first is "
                f"{lacking[0]}: get the model again"
            )
        return module.to(self._device).eval().requires_grad_(False)

    @torch.inference_mode()
    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        """Embed captions, each distinct one once, the longest together.

        Padding a batch to its longest instead of to 512 tokens is 9 to 12 times cheaper and gives the same numbers up
        to float error: the mask keeps padding out of the attention, and T5's positions are relative.

        Args:
            captions: As the dataset has them.

        Returns:
            For each ``(L, D)`` float32 on the CPU; L is the number of its tokens, at most 512.
        """
        texts = [self._clean(caption) for caption in captions]
        tokens = {text: self._tokenize(text) for text in dict.fromkeys(texts)}
        by_length = sorted(tokens, key=lambda text: (len(tokens[text]), text))
        embedded: dict[str, Tensor] = {}
        for start in range(0, len(by_length), self._text_batch_size):
            batch = by_length[start : start + self._text_batch_size]
            embedded |= zip(batch, self._embed([tokens[text] for text in batch]), strict=True)
        return [embedded[text] for text in texts]

    @torch.inference_mode()
    def encode_batch(self, batch: ClipBatch) -> list[dict[str, Tensor]]:
        """Encode clips.

        Args:
            batch: Frames (B, T, C, H, W) uint8.

        Returns:
            For each clip ``vae_latent`` (C, T, H, W) float32 on the CPU: the posterior's mean, not normalised.
        """
        frames = batch.frames.to(self._device, non_blocking=True).permute(0, 2, 1, 3, 4).contiguous()
        pixels = frames.float().div_(255.0).mul_(2.0).sub_(1.0)
        latents = self._vae.encode(pixels).latent_dist.mean.float().cpu()
        return [{"vae_latent": latent.clone()} for latent in latents]

    def _tokenizer_class(self) -> Any:
        """The class the pipeline itself loads; ``AutoTokenizer`` may choose one that splits rare words otherwise."""
        import transformers

        _, name = self._model.config("model_index.json").get("tokenizer", (None, None))
        if not isinstance(name, str) or not hasattr(transformers, name):
            raise UserError(f"{self._model.name}: transformers {transformers.__version__} has no tokenizer {name!r}")
        return getattr(transformers, name)

    def _clean(self, caption: str) -> str:
        if not self._clean_captions:
            return caption
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return str(prompt_clean(caption))

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(
            text, max_length=TEXT_MAX_LENGTH, truncation=True, add_special_tokens=True
        ).input_ids
        return ids

    def _embed(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, row_tokens in enumerate(tokens):
            ids[row, : len(row_tokens)] = torch.tensor(row_tokens)
            mask[row, : len(row_tokens)] = 1
        states = self._text_encoder(ids.to(self._device), mask.to(self._device)).last_hidden_state.float().cpu()
        return [states[row, : len(row_tokens)].clone() for row, row_tokens in enumerate(tokens)]


def _text_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _contract(
    model: ModelFolder,
    vae: dict[str, Any],
    text: dict[str, Any],
    *,
    text_dtype: torch.dtype,
    clean_captions: bool,
    full_digest: bool,
) -> LatentContract:
    spatial, temporal = vae.get("scale_factor_spatial") or 8, vae.get("scale_factor_temporal") or 4
    return LatentContract(
        family="wan",
        model=model.name,
        revision=model.revision,
        vae_class="AutoencoderKLWan",
        vae_dtype="float32",
        vae_sha256=component_digest(model.path / "vae", full=full_digest),
        posterior="mean",
        space="raw",
        latents_mean=tuple(vae["latents_mean"]),
        latents_std=tuple(vae["latents_std"]),
        latent_channels=vae["z_dim"],
        temporal_factor=temporal,
        spatial_factor=spatial,
        spatial_multiple=spatial * 2,  # the transformer's patches are 1x2x2 latents
        frame_rule=f"{temporal}k+1",
        pixel_range=(-1.0, 1.0),
        resize_rule="centre crop to the aspect ratio, then bilinear, align_corners, antialias, on uint8",
        fps_rule="frame int(i * source_fps / train_fps), from the first",
        text_encoder_class=(text.get("architectures") or ["UMT5EncoderModel"])[0],
        text_dtype=str(text_dtype).removeprefix("torch."),
        text_sha256=_text_digest(model, full=full_digest),
        text_max_length=TEXT_MAX_LENGTH,
        text_states="last_hidden_state",
        text_padding="trimmed",
        captions_cleaned=clean_captions,
        tensors={
            "vae_latent": "posterior mean of the clip, not normalised, (C, T, H, W)",
            "text_embedding": "last hidden state of the caption's tokens, (L, D)",
        },
    )


def _text_digest(model: ModelFolder, *, full: bool) -> str:
    """Of the text encoder and the tokenizer together."""
    return canonical.digest(
        [component_digest(model.path / folder, full=full) for folder in ("text_encoder", "tokenizer")]
    )
