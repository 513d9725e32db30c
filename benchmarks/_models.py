"""Models and pictures to measure latents with; importing it, or using it, needs neither torchcodec nor FFmpeg.

Full-size is the VAE only: its 127 million weights make the latents. They are random, drawn as
`streamprep.testing.tiny_model` draws them, so that latents depend on the picture and have a standard deviation near 1.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprep.encoders import EncodeOptions, open_encoder

sys.path.append(str(Path(__file__).parents[1] / "tools"))  # make_clips


def make_tiny(folder: Path) -> Path:
    """A tiny Wan 2.1 for image-to-video, which has all four tensors."""
    from transformers.utils import logging

    from streamprep.testing.tiny_model import make_tiny_model

    logging.disable_progress_bar()
    make_tiny_model(folder, variant="2.1-i2v")
    return folder


def make_full_size(folder: Path, tiny: Path) -> Path:
    """The same with Wan 2.1's VAE at its real size: 127 M weights, 0.5 GB."""
    from streamprep.testing.tiny_model import draw_vae

    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for component in ("text_encoder", "image_encoder"):
        shutil.copytree(tiny / component, folder / component, dirs_exist_ok=True)
    draw_vae(0).save_pretrained(folder / "vae")
    return folder


def load(model: Path, **changes: Any) -> Any:
    """The encoder as `streamprep encode --workload-type i2v` has it, on the CPU in float32 but for ``changes``."""
    options: dict[str, Any] = {
        "workload": "i2v",
        "device": torch.device("cpu"),
        "vae_dtype": "float32",
        "text_dtype": "float32",
        "allow_tf32": False,
        "posterior": "mean",
        "clean_captions": True,
        "text_batch_size": 8,
        "offload_text_encoder": False,
        "digest": "ends",
    }
    options |= changes
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = options["allow_tf32"]
    encoder = open_encoder(str(model), EncodeOptions(**options))
    encoder.load()
    return encoder


def normalised(encoder: Any, latent_CTHW: Tensor) -> Tensor:
    """As a trainer takes it: ``(x - mean) / std`` of each channel."""
    mean, std = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in (encoder.contract.video.latents_mean, encoder.contract.video.latents_std)
    )
    return (latent_CTHW - mean) / std


def relative_l2(value: Tensor, reference: Tensor) -> float:
    """The length of the error over the length of the truth, in float64."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def max_abs(value: Tensor, reference: Tensor) -> float:
    """The largest error."""
    return float((value - reference).abs().max())
