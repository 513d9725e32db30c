"""Options and contracts, complete but for what a test is about."""

from __future__ import annotations

from typing import Any

import torch

from streamprep.contract import ImageContract, LatentContract, TextContract, VideoContract
from streamprep.encoders import EncodeOptions
from streamprep.plan import SamplingRules


def make_options(**changes: Any) -> EncodeOptions:
    """How tests encode, but for ``changes``: text to video on the CPU in float32."""
    defaults: dict[str, Any] = {
        "workload": "t2v",
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
    return EncodeOptions(**defaults | changes)


def make_rules(**changes: Any) -> SamplingRules:
    """Clips of 17 frames of 64x96 at 16 a second, but for ``changes``."""
    defaults: dict[str, Any] = {
        "max_height": 64,
        "max_width": 96,
        "num_frames": 17,
        "train_fps": 16.0,
        "video_length_tolerance_range": None,
        "speed_factor": 1.0,
        "max_pixels": 10**8,
    }
    return SamplingRules(**defaults | changes)


def make_contract(*, with_video: bool = True, with_image: bool = False, **changes: Any) -> LatentContract:
    """Wan 2.1's, but for ``changes``, which go to whatever part has a field of that name."""
    parts: dict[str, dict[str, Any]] = {
        "video": {
            "vae_class": "AutoencoderKLWan",
            "dtype": "float32",
            "tf32": False,
            "sha256": "0" * 64,
            "posterior": "mean",
            "space": "raw",
            "conditioning_space": "normalised" if with_image else None,
            "latents_mean": (0.0,) * 16,
            "latents_std": (1.0,) * 16,
            "latent_channels": 16,
            "temporal_factor": 4,
            "spatial_factor": 8,
            "spatial_multiple": 16,
            "frame_rule": "4k+1",
            "pixel_range": (-1.0, 1.0),
            "resize_rule": "centre crop",
            "fps_rule": "from the first",
        },
        "text": {
            "encoder_class": "UMT5EncoderModel",
            "dtype": "float32",
            "sha256": "0" * 64,
            "max_length": 512,
            "dim": 32,
            "states": "last_hidden_state",
            "padding": "trimmed",
            "captions_cleaned": True,
        },
        "image": {
            "encoder_class": "CLIPVisionModel",
            "processor_class": "CLIPImageProcessor",
            "dtype": "float32",
            "sha256": "0" * 64,
            "states": "hidden_states[-2]",
            "num_tokens": 257,
            "dim": 64,
        },
        "whole": {
            "family": "wan",
            "variant": "2.1-i2v" if with_image else "2.1-t2v",
            "model": "tiny",
            "revision": None,
            "workload": ("i2v" if with_image else "t2v") if with_video else "text",
            "tensors": {
                name: "what it holds"
                for name, there in (
                    ("vae_latent", with_video),
                    ("text_embedding", True),
                    ("clip_feature", with_image),
                    ("first_frame_latent", with_image),
                )
                if there
            },
        },
    }
    if not with_image:
        del parts["image"]
    for name, value in changes.items():
        (part,) = (part for part in parts.values() if name in part)
        part[name] = value
    return LatentContract(
        **parts["whole"],
        video=VideoContract(**parts["video"]) if with_video else None,
        text=TextContract(**parts["text"]),
        image=ImageContract(**parts["image"]) if with_image else None,
    )
