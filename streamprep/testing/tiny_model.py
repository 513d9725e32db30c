"""Make a tiny Wan model with random weights, for tests, demos and smoke runs without a download.

The folder has the layout of the hub's of the same variant (`VARIANTS`) and loads with the same pipeline of diffusers.
The shapes that a dataset depends on are Wan's: 16 latent channels and 4x8x8 compression (48 and 4x16x16 in the 5B
model), 512 text tokens, 257 image tokens. The layers are a few kB wide.

1. ``make_tokenizer`` trains a small vocabulary that behaves like T5's and knows every character.
2. ``make_text_encoder``, ``make_image_encoder``, ``make_vae`` and ``make_transformer`` draw seeded weights that do not
   ignore their input.
3. ``save_pretrained`` of the pipeline writes them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanTransformer3DModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from streamprep.testing.tiny_tokenizer import make_tokenizer

TEXT_DIM = 32
"""Features of a text embedding; 4096 in the real model."""
IMAGE_DIM = 64
"""Features of an image token; 1280 in the real model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What sets one Wan apart from the others."""

    like: str
    """The model on the hub whose layout and configs the tiny one has."""
    pipeline: str = "WanPipeline"
    """The class in diffusers. A name: touching the image-to-video one warns of torchvision, which is not needed."""
    image_encoder: bool = False
    """Whether the transformer also attends to CLIP's view of the first frame."""
    boundary_ratio: float | None = None
    """Where in the noise schedule a second transformer takes over; None: there is only one."""
    expand_timesteps: bool = False
    """Whether each token has its own timestep: so the 5B model is given a clean first frame."""
    latent_channels: int = 16
    flow_shift: float = 3.0

    @property
    def in_channels(self) -> int:
        """Of a transformer: noise, and for image-to-video also the first frame's latent and a mask of 4 channels."""
        condition = self.latent_channels + 4 if self.pipeline == "WanImageToVideoPipeline" else 0
        return self.latent_channels + condition


VARIANTS = {
    "2.1-t2v": Variant(like="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "2.1-i2v": Variant(
        like="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", pipeline="WanImageToVideoPipeline", image_encoder=True
    ),
    "2.2-t2v-a14b": Variant(like="Wan-AI/Wan2.2-T2V-A14B-Diffusers", boundary_ratio=0.875),
    "2.2-i2v-a14b": Variant(
        like="Wan-AI/Wan2.2-I2V-A14B-Diffusers", pipeline="WanImageToVideoPipeline", boundary_ratio=0.9
    ),
    "2.2-ti2v-5b": Variant(
        like="Wan-AI/Wan2.2-TI2V-5B-Diffusers", expand_timesteps=True, latent_channels=48, flow_shift=5.0
    ),
}
DEFAULT = "2.1-t2v"


def make_tiny_model(out: Path, *, seed: int = 0, variant: str = DEFAULT) -> str:
    """Write the model folder; return one line that says what was made."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: delete it, or name another")
    pipeline = make_pipeline(VARIANTS[variant], seed=seed)
    pipeline.save_pretrained(out, safe_serialization=True)
    if VARIANTS[variant].image_encoder:
        _name_weights_as_the_hub(pipeline.image_encoder, out / "image_encoder")
    size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    facts = f"{size_bytes / 1e6:.1f} MB, {len(pipeline.tokenizer)} tokens, seed {seed}"
    return f"made a tiny Wan {variant} model ({facts}) in {out}"


def make_pipeline(variant: Variant, *, seed: int) -> DiffusionPipeline:
    """Draw every component of a variant, and put them together as the hub's ``model_index.json`` does."""
    tokenizer = make_tokenizer()
    components = {
        "tokenizer": tokenizer,
        "text_encoder": make_text_encoder(vocab_size=len(tokenizer), seed=seed),
        "vae": make_vae_5b(seed=seed) if variant.latent_channels == 48 else make_vae(seed=seed),
        "transformer": make_transformer(variant, seed=seed),
        # As the real model's: flow matching, with the shift for small pictures.
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=variant.flow_shift
        ),
    }
    if variant.boundary_ratio is not None:
        components["transformer_2"] = make_transformer(variant, seed=seed + 1)  # another expert, other weights
    if variant.image_encoder:
        components["image_encoder"] = make_image_encoder(seed=seed)
        components["image_processor"] = transformers.CLIPImageProcessor()
    pipeline = getattr(diffusers, variant.pipeline)(
        **components, boundary_ratio=variant.boundary_ratio, expand_timesteps=variant.expand_timesteps
    )
    if variant.image_encoder:
        # As the hub says it; without torchvision the class is CLIPImageProcessorPil, which older versions don't have.
        pipeline.register_to_config(image_processor=("transformers", "CLIPImageProcessor"))
    return pipeline


def make_text_encoder(*, vocab_size: int, seed: int) -> UMT5EncoderModel:
    """Draw a UMT5 encoder; with ``initializer_factor`` 1 its embeddings have a root mean square of 1."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        initializer_factor=1.0,
        is_encoder_decoder=False,
    )
    with _seeded(seed):
        return UMT5EncoderModel(config).eval()


def make_image_encoder(*, seed: int) -> CLIPVisionModel:
    """Draw CLIP's vision tower: as many tokens as ViT-H (16 x 16 patches and one for all), but 4 layers instead of 32.

    Its own initial weights will do: nearly all of a token's spread comes from the picture, and each layer changes it.
    """
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=4 * IMAGE_DIM,
        projection_dim=IMAGE_DIM,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )
    with _seeded(seed):
        return CLIPVisionModel(config).eval()


def make_vae(*, seed: int) -> AutoencoderKLWan:
    """Draw the VAE of all but the 5B model: 16 latent channels, 4x8x8 compression."""
    return draw_vae(seed, base_dim=4, num_res_blocks=1, z_dim=16, dim_mult=[1, 2, 4, 4])


def make_vae_5b(*, seed: int) -> AutoencoderKLWan:
    """Draw the 5B model's VAE: 48 latent channels, 4x16x16 compression, its pixels taken in blocks of 2x2."""
    return draw_vae(
        seed,
        base_dim=4,
        decoder_base_dim=8,
        num_res_blocks=1,
        z_dim=48,
        dim_mult=[1, 2, 4, 4],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=LATENTS_MEAN_5B,
        latents_std=LATENTS_STD_5B,
    )


def draw_vae(seed: int, **config: Any) -> AutoencoderKLWan:
    """Draw a VAE whose latents depend on the picture and have a standard deviation near 1.

    Both need more than PyTorch's own initial weights, which give latents of 0.2 of which a quarter comes from the
    picture and the rest from the frame's number and the edges. He's weights keep the scale through the layers. Biases
    of 0 would be worse than small ones: at mid-grey, the middle of the range, one grey level would change everything.
    """
    with _seeded(seed):
        vae = AutoencoderKLWan(**config)
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.normal_(module.bias, std=0.1)
    return vae.eval()


def make_transformer(variant: Variant, *, seed: int) -> WanTransformer3DModel:
    """Draw a denoiser; encoding does not need it, the pipeline and a trainer do."""
    num_heads, head_dim = 2, 32
    with _seeded(seed):
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=num_heads,
            attention_head_dim=head_dim,
            in_channels=variant.in_channels,
            out_channels=variant.latent_channels,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=128,
            num_layers=2,
            image_dim=IMAGE_DIM if variant.image_encoder else None,
            added_kv_proj_dim=num_heads * head_dim if variant.image_encoder else None,
        ).eval()


def _name_weights_as_the_hub(encoder: CLIPVisionModel, folder: Path) -> None:
    """Save CLIP's weights again as ``vision_model.*``, which transformers 5 reads but no longer writes of its own.

    So the tiny model takes the way through the loader that the real one does, and other readers find its weights.
    """
    prefix = "vision_model."
    weights = {prefix + name.removeprefix(prefix): weight for name, weight in encoder.state_dict().items()}
    encoder.save_pretrained(folder, state_dict=weights)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw the same numbers whatever was drawn before, and leave the caller's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# fmt: off
LATENTS_MEAN_5B = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
"""Of each latent channel; the real model's, as are those in diffusers' defaults for the other VAE."""
LATENTS_STD_5B = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on
