"""First frames -> CLIP features, as diffusers' ``WanImageToVideoPipeline.encode_image`` computes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamprep.encoders._loading import load_component, load_preprocessor, transformers_class
from streamprep.models import ModelFolder

STATES = "hidden_states[-2]"  # the layer before the last, not normalised, all tokens


class ClipVision:
    """An image encoder with its image processor, in float32.

    Args:
        model: A diffusers folder.
        device: Where to encode.
    """

    def __init__(self, model: ModelFolder, *, device: torch.device) -> None:
        self._model, self._device = model, device
        self._processor: Any = None
        self._encoder: Any = None

    def load(self) -> None:
        """Load processor and weights."""
        self._processor = load_preprocessor(self._model, "image_processor")
        encoder = transformers_class(self._model, "image_encoder")
        self._encoder = load_component(self._model, encoder, "image_encoder", device=self._device, dtype=torch.float32)

    @torch.inference_mode()
    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            frames_BCHW: ``(B, 3, H, W)`` uint8 RGB on the CPU, as cropped and resized for the VAE.

        Returns:
            ``(B, L, D)`` float32 on the CPU: the class token and every patch.
        """
        from PIL import Image

        images = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in frames_BCHW]
        pixels = self._processor(images=images, return_tensors="pt").pixel_values.to(self._device)
        states: Tensor = self._encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        return states.float().cpu()
