"""Model families, one module for each, found by the pipeline class that ``model_index.json`` names.

A family's module has ``PIPELINES`` and ``load_encoder(model, options) -> Encoder``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from streamprep import plugins
from streamprep.contract import LatentContract
from streamprep.errors import UserError
from streamprep.models import ModelFolder, find_model
from streamprep.out_of_memory import BatchLimits
from streamprep.types import ClipBatch

_GROUP = "streamprep.encoders"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """How a model is to encode."""

    workload: str
    """``t2v``, ``i2v`` or ``text``."""
    device: torch.device
    vae_dtype: str
    text_dtype: str
    allow_tf32: bool
    """Whether this device rounds float32 multiplications to TF32; only a GPU can."""
    posterior: str
    """``mean`` or ``moments``."""
    clean_captions: bool
    """As the pipeline does; False as FastVideo."""
    text_batch_size: int
    """Captions at once."""
    offload_text_encoder: bool
    digest: str
    """Of the weights, in the contract: ``ends`` of every tensor, ``full``, or ``none``: then nothing is downloaded."""


class Encoder(Protocol):
    """One model, ready to encode after `load`."""

    contract: LatentContract
    """What the tensors mean; known before any weight is loaded."""
    limits: BatchLimits
    """How many clips or captions the memory holds at once; `encode_text` and `encode_clips` encode by them."""

    def load(self) -> None:
        """Load the weights."""

    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        """For each caption ``text_embedding``: (L, D) float32 on the CPU."""

    def encode_batch(self, batch: ClipBatch) -> list[dict[str, Tensor]]:
        """For each clip the contract's tensors but ``text_embedding``, float32 on the CPU; called by `encode_clips`."""


def encode_clips(encoder: Encoder, batch: ClipBatch) -> list[dict[str, Tensor]]:
    """`Encoder.encode_batch`, in parts if the memory does not hold the whole batch.

    Raises:
        OutOfMemory: if it does not hold one clip.
    """

    def encode(part: slice) -> list[dict[str, Tensor]]:
        return encoder.encode_batch(ClipBatch(keys=batch.keys[part], frames=batch.frames[part]))

    _, num_frames, _, height, width = batch.frames.shape
    return encoder.limits.encode(f"{num_frames}x{height}x{width}", len(batch.keys), encode)


def open_encoder(model_path: str, options: EncodeOptions) -> Encoder:
    """The encoder for a model, by its pipeline class; no weights are loaded.

    Args:
        model_path: A local folder or a hub id.
        options: How to encode.

    Raises:
        UserError: if no family knows the model.
    """
    model = find_model(model_path)
    return _family(model).load_encoder(model, options)  # type: ignore[no-any-return]


def _family(model: ModelFolder) -> Any:
    pipeline = model.config("model_index.json").get("_class_name")
    known: dict[str, str] = {}
    for name in plugins.names(_GROUP):
        module = plugins.load(_GROUP, name)
        if pipeline in module.PIPELINES:
            return module
        known |= dict.fromkeys(module.PIPELINES, name)
    raise UserError(f"{model.name} is a {pipeline}; known are {', '.join(sorted(known))}")
