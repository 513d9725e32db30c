"""Which of Wan's models a folder holds, told by its configs alone.

``model_index.json`` names the pipeline and says ``boundary_ratio`` (two transformers, one for each part of the noise
schedule: 2.2 A14B) and ``expand_timesteps`` (2.2 TI2V-5B, which keeps the first latent frame clean instead of taking a
conditioning latent). ``transformer/config.json`` says how many channels it takes: 16 noisy ones, or 36 with a
conditioning latent (16) and its mask (4); and with ``image_dim``, that it takes image features too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamprep.errors import UserError
from streamprep.models import ModelFolder

_TRANSFORMER = "WanTransformer3DModel"


@dataclass(frozen=True, slots=True, kw_only=True)
class WanVariant:
    """One of Wan's models: how to know it, and what it is trained on."""

    name: str
    pipelines: tuple[str, ...]
    two_transformers: bool
    expand_timesteps: bool
    in_channels: int
    latent_channels: int
    image_features: bool
    workloads: tuple[str, ...]
    """What it can be trained for."""

    @property
    def conditioning_latent(self) -> bool:
        """Whether image-to-video training feeds it the latent of the first frame and zeros."""
        return self.in_channels > self.latent_channels


VARIANTS = (
    WanVariant(
        name="2.1-t2v",
        pipelines=("WanPipeline",),
        two_transformers=False,
        expand_timesteps=False,
        in_channels=16,
        latent_channels=16,
        image_features=False,
        workloads=("t2v", "text"),
    ),
    WanVariant(
        name="2.1-i2v",
        pipelines=("WanImageToVideoPipeline",),
        two_transformers=False,
        expand_timesteps=False,
        in_channels=36,
        latent_channels=16,
        image_features=True,
        workloads=("i2v", "text"),
    ),
    WanVariant(
        name="2.2-t2v-a14b",
        pipelines=("WanPipeline",),
        two_transformers=True,
        expand_timesteps=False,
        in_channels=16,
        latent_channels=16,
        image_features=False,
        workloads=("t2v", "text"),
    ),
    WanVariant(
        name="2.2-i2v-a14b",
        pipelines=("WanImageToVideoPipeline",),
        two_transformers=True,
        expand_timesteps=False,
        in_channels=36,
        latent_channels=16,
        image_features=False,
        workloads=("i2v", "text"),
    ),
    WanVariant(
        name="2.2-ti2v-5b",
        pipelines=("WanPipeline", "WanImageToVideoPipeline"),
        two_transformers=False,
        expand_timesteps=True,
        in_channels=48,
        latent_channels=48,
        image_features=False,
        workloads=("t2v", "i2v", "text"),
    ),
)


def recognise(model: ModelFolder, workload: str) -> WanVariant:
    """The variant of a model.

    Raises:
        UserError: with what was found, if it is none of them, or not one for this workload.
    """
    found = _describe(model)
    for variant in VARIANTS:
        if found == _expected(variant, found["pipeline"]):
            if workload not in variant.workloads:
                raise UserError(
                    f"{model.name} is a Wan {variant.name} model: use --workload-type "
                    f"{' or '.join(variant.workloads)}, or a model for {workload}"
                )
            return variant
    facts = ", ".join(f"{name} {value}" for name, value in found.items())
    raise UserError(
        f"{model.name} is none of the Wan models known here ({', '.join(variant.name for variant in VARIANTS)}); "
        f"its configs say: {facts}"
    )


def _describe(model: ModelFolder) -> dict[str, Any]:
    """What tells variants apart; where a config is silent, the default of the class that reads it."""
    index, transformer = model.config("model_index.json"), model.config("transformer/config.json")
    return {
        "pipeline": index.get("_class_name"),
        "boundary_ratio": "set" if index.get("boundary_ratio") is not None else "none",
        "expand_timesteps": bool(index.get("expand_timesteps")),
        "transformer": transformer.get("_class_name", _TRANSFORMER),  # VACE's has the same channels
        "transformer's in_channels": transformer.get("in_channels", 16),
        "image_dim": "set" if transformer.get("image_dim") is not None else "none",
        # Of the model that continues from a first to a last frame; it takes the features of both.
        "pos_embed_seq_len": transformer.get("pos_embed_seq_len"),
        "VAE's z_dim": model.config("vae/config.json").get("z_dim", 16),
    }


def _expected(variant: WanVariant, pipeline: str) -> dict[str, Any]:
    return {
        "pipeline": pipeline if pipeline in variant.pipelines else variant.pipelines[0],
        "boundary_ratio": "set" if variant.two_transformers else "none",
        "expand_timesteps": variant.expand_timesteps,
        "transformer": _TRANSFORMER,
        "transformer's in_channels": variant.in_channels,
        "image_dim": "set" if variant.image_features else "none",
        "pos_embed_seq_len": None,
        "VAE's z_dim": variant.latent_channels,
    }
