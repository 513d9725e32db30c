"""Our latents and features against those of diffusers' own pipelines, with every tiny Wan."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKLWan
from making import make_options
from pipelines import (
    JOBS,
    encode_image,
    make_noise,
    max_difference,
    normalise,
    open_pipeline,
    prepare_condition,
    relative_difference,
)
from torch import Tensor

from streamprep.encoders import open_encoder
from streamprep.encoders.wan import WanEncoder
from streamprep.errors import UserError
from streamprep.types import ClipBatch

FLOAT_ERROR = 1e-5
"""Of values of about 1, with another batch size."""
ROUNDING = {"bfloat16": 0.03, "float16": 0.005}
"""Relative L2 of latents computed in it, with 8 and 11 bits; measured 0.009 to 0.012, and 0.0011 to 0.0016."""
LATENT_SHAPES = {"2.2-ti2v-5b": (48, 2, 4)}
TENSORS = {
    ("2.1-t2v", "t2v"): ["vae_latent"],
    ("2.1-i2v", "i2v"): ["vae_latent", "first_frame_latent", "clip_feature"],
    ("2.2-t2v-a14b", "t2v"): ["vae_latent"],
    ("2.2-i2v-a14b", "i2v"): ["vae_latent", "first_frame_latent"],
    ("2.2-ti2v-5b", "t2v"): ["vae_latent"],
    ("2.2-ti2v-5b", "i2v"): ["vae_latent"],
}
CONDITIONED = [job for job, names in TENSORS.items() if "first_frame_latent" in names]

pytestmark = pytest.mark.usefixtures("one_thread")
each_job = pytest.mark.parametrize(("variant", "workload"), JOBS)


def open_wan(model: Path, **options: Any) -> WanEncoder:
    encoder = open_encoder(str(model), make_options(**options))
    assert isinstance(encoder, WanEncoder)
    return encoder


@pytest.fixture(scope="module")
def encoders(tiny_models: Callable[[str], Path]) -> Callable[..., WanEncoder]:
    """``encoders(variant, workload, **options)``: ready to encode."""

    @functools.cache
    def load(variant: str, workload: str, **options: Any) -> WanEncoder:
        encoder = open_wan(tiny_models(variant), workload=workload, **options)
        encoder.load()
        return encoder

    return load


@pytest.fixture(scope="module")
def pipelines(tiny_models: Callable[[str], Path]) -> Callable[..., Any]:
    """``pipelines(variant, workload)``: diffusers' own."""
    return lambda variant, workload, **dtype: open_pipeline(tiny_models(variant), workload, **dtype)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Path:
    return tiny_model


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, frames_BTCHW: Tensor) -> Tensor:
    """The posterior's mean, (B, C, T, H, W), of uint8 frames."""
    pixels = frames_BTCHW.permute(0, 2, 1, 3, 4).contiguous() / 255 * 2 - 1
    return vae.encode(pixels.to(vae.dtype)).latent_dist.mean.float()


# Latents of videos


@each_job
@pytest.mark.parametrize("num_clips", [1, 2, 3])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_latents_are_the_posteriors_mean_bit_for_bit(
    variant: str,
    workload: str,
    num_clips: int,
    num_frames: int,
    encoders: Callable[..., WanEncoder],
    pipelines: Callable[..., Any],
) -> None:
    batch = make_noise(num_clips, num_frames=num_frames)
    theirs = encode_video(pipelines(variant, workload).vae, batch.frames)
    ours = encoders(variant, workload).encode_batch(batch)
    channels, height, width = LATENT_SHAPES.get(variant, (16, 4, 8))
    for our, their in zip(ours, theirs, strict=True):
        assert list(our) == TENSORS[variant, workload]
        assert our["vae_latent"].shape == (channels, 1 + (num_frames - 1) // 4, height, width)
        assert max_difference(our["vae_latent"], their) == 0


def test_moments_are_the_posteriors_mean_and_log_variance(
    encoders: Callable[..., WanEncoder], pipelines: Callable[..., Any]
) -> None:
    batch = make_noise(2)
    pixels = batch.frames.permute(0, 2, 1, 3, 4).contiguous() / 255 * 2 - 1
    with torch.no_grad():
        posterior = pipelines("2.1-t2v", "t2v").vae.encode(pixels).latent_dist
    for row, ours in enumerate(encoders("2.1-t2v", "t2v", posterior="moments").encode_batch(batch)):
        assert list(ours) == ["vae_latent", "vae_logvar"]
        assert max_difference(ours["vae_latent"], posterior.mean[row]) == 0
        assert max_difference(ours["vae_logvar"], posterior.logvar[row]) == 0


# Image to video


@pytest.mark.parametrize(("variant", "workload"), CONDITIONED)
@pytest.mark.parametrize("num_frames", [1, 9])
def test_conditioning_latents_are_those_of_prepare_latents_bit_for_bit(
    variant: str, workload: str, num_frames: int, encoders: Callable[..., WanEncoder], pipelines: Callable[..., Any]
) -> None:
    batch = make_noise(1, num_frames=num_frames)
    (ours,) = encoders(variant, workload).encode_batch(batch)
    theirs = prepare_condition(pipelines(variant, workload), batch.frames[0])
    assert ours["first_frame_latent"].shape == (16, 1 + (num_frames - 1) // 4, 4, 8)
    assert max_difference(ours["first_frame_latent"], theirs) == 0


@pytest.mark.parametrize(("variant", "workload"), CONDITIONED)
def test_in_bfloat16_too_they_are_those_of_prepare_latents(
    variant: str, workload: str, encoders: Callable[..., WanEncoder], pipelines: Callable[..., Any]
) -> None:
    batch = make_noise(1)
    (ours,) = encoders(variant, workload, vae_dtype="bfloat16").encode_batch(batch)
    theirs = prepare_condition(pipelines(variant, workload, vae_dtype=torch.bfloat16), batch.frames[0])
    assert max_difference(ours["first_frame_latent"], theirs) == 0


@pytest.mark.parametrize(("variant", "workload"), [*CONDITIONED, ("2.2-ti2v-5b", "i2v")])
def test_a_videos_first_latent_frame_is_what_the_pipeline_conditions_on_once_normalised(
    variant: str, workload: str, encoders: Callable[..., WanEncoder], pipelines: Callable[..., Any]
) -> None:
    """The 5B model is given nothing else: its pipeline keeps the first latent frame clean (``expand_timesteps``)."""
    batch, pipeline = make_noise(1), pipelines(variant, workload)
    (ours,) = encoders(variant, workload).encode_batch(batch)
    theirs = prepare_condition(pipeline, batch.frames[0])
    assert theirs.shape[1] == (1 if variant == "2.2-ti2v-5b" else 3)
    assert max_difference(normalise(pipeline, ours["vae_latent"])[:, :1], theirs[:, :1]) < FLOAT_ERROR


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (240, 256)], ids=str)
def test_clip_features_are_those_of_encode_image_bit_for_bit(
    size: tuple[int, int], encoders: Callable[..., WanEncoder], pipelines: Callable[..., Any]
) -> None:
    """Wide, high, and larger than the 224 pixels that CLIP takes."""
    batch = make_noise(1, num_frames=1, height=size[0], width=size[1])
    (ours,) = encoders("2.1-i2v", "i2v").encode_batch(batch)
    theirs = encode_image(pipelines("2.1-i2v", "i2v"), batch.frames[0, 0])
    assert theirs.shape == (257, 64)
    assert max_difference(ours["clip_feature"], theirs) == 0


def test_clip_features_are_of_the_first_frame_alone(encoders: Callable[..., WanEncoder]) -> None:
    batch = make_noise(1)
    changed = ClipBatch(keys=batch.keys, frames=torch.cat([batch.frames[:, :1], 255 - batch.frames[:, 1:]], dim=1))
    (one,), (other,) = (encoders("2.1-i2v", "i2v").encode_batch(clips) for clips in (batch, changed))
    assert torch.equal(one["clip_feature"], other["clip_feature"])
    assert torch.equal(one["first_frame_latent"], other["first_frame_latent"])
    assert not torch.equal(one["vae_latent"], other["vae_latent"])


def test_the_frames_that_were_given_are_left_as_they_are(encoders: Callable[..., WanEncoder]) -> None:
    """The conditioning overwrites pixels, which must be its own."""
    batch = make_noise(2)
    before = batch.frames.clone()
    encoders("2.1-i2v", "i2v").encode_batch(batch)
    assert torch.equal(batch.frames, before)


# Every tensor


@each_job
def test_a_clips_tensors_do_not_depend_on_the_batch_but_for_float_error(
    variant: str, workload: str, encoders: Callable[..., WanEncoder]
) -> None:
    encoder, whole = encoders(variant, workload), make_noise(3)
    alone = [encoder.encode_batch(ClipBatch(keys=("x",), frames=clip[None]))[0] for clip in whole.frames]
    for size in (2, 3):
        together = encoder.encode_batch(ClipBatch(keys=whole.keys[:size], frames=whole.frames[:size]))
        for one, other in zip(alone, together, strict=False):
            assert list(one) == list(other) == TENSORS[variant, workload]
            for name in one:
                assert max_difference(one[name], other[name]) < FLOAT_ERROR, name


@each_job
def test_tensors_own_their_memory(variant: str, workload: str, encoders: Callable[..., WanEncoder]) -> None:
    """A view would keep the whole batch alive until its last clip is written."""
    clips = encoders(variant, workload).encode_batch(make_noise(2))
    for tensor in (tensor for clip in clips for tensor in clip.values()):
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@each_job
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_vae_in_half_precision_moves_its_latents_but_not_far_and_nothing_else(
    variant: str, workload: str, dtype: str, encoders: Callable[..., WanEncoder]
) -> None:
    batch = make_noise(2)
    rounded = encoders(variant, workload, vae_dtype=dtype).encode_batch(batch)
    for ours, exact in zip(rounded, encoders(variant, workload).encode_batch(batch), strict=True):
        for name in TENSORS[variant, workload]:
            assert ours[name].dtype == torch.float32  # what is stored
            if name == "clip_feature":
                assert torch.equal(ours[name], exact[name])
            else:
                assert 0 < relative_difference(ours[name], exact[name]) < ROUNDING[dtype], name


# The contract


@each_job
def test_the_contract_says_what_the_loaded_objects_say(
    variant: str, workload: str, encoders: Callable[..., WanEncoder], pipelines: Callable[..., Any]
) -> None:
    contract, pipeline = encoders(variant, workload).contract, pipelines(variant, workload)
    video, text, vae = contract.video, contract.text, pipeline.vae
    assert video is not None
    assert (contract.family, contract.model, contract.revision) == ("wan", "tiny-wan", None)
    assert (contract.variant, contract.workload) == (variant, workload)
    assert video.latents_mean == tuple(vae.config.latents_mean)
    assert video.latents_std == tuple(vae.config.latents_std)
    assert video.latent_channels == vae.config.z_dim == len(video.latents_mean)
    assert video.temporal_factor == pipeline.vae_scale_factor_temporal == 2 ** sum(vae.temperal_downsample)
    patch = vae.config.patch_size or 1
    assert video.spatial_factor == pipeline.vae_scale_factor_spatial == patch * 2 ** len(vae.temperal_downsample)
    assert video.spatial_multiple == video.spatial_factor * pipeline.transformer.config.patch_size[-1]
    assert video.vae_class == type(vae).__name__
    assert text.encoder_class == type(pipeline.text_encoder).__name__
    assert (video.dtype, text.dtype) == ("float32", "float32")
    assert (text.max_length, text.dim) == (512, pipeline.transformer.config.text_dim)
    assert (video.posterior, video.space, text.captions_cleaned) == ("mean", "raw", True)
    is_conditioned = (variant, workload) in CONDITIONED
    assert video.conditioning_space == ("normalised" if is_conditioned else None)
    assert set(contract.tensors) == {"text_embedding", *TENSORS[variant, workload]}


def test_the_contract_says_of_the_image_encoder_what_the_loaded_objects_say(
    encoders: Callable[..., WanEncoder], pipelines: Callable[..., Any]
) -> None:
    image, pipeline = encoders("2.1-i2v", "i2v").contract.image, pipelines("2.1-i2v", "i2v")
    assert image is not None
    assert image.encoder_class == type(pipeline.image_encoder).__name__
    assert image.processor_class == type(pipeline.image_processor).__name__
    assert image.dim == pipeline.transformer.config.image_dim
    assert (image.num_tokens, image.states, image.dtype) == (257, "hidden_states[-2]", "float32")


def test_the_contract_is_known_before_any_weight_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    assert open_wan(model, clean_captions=False).contract.text.captions_cleaned is False


@each_job
def test_tensors_have_the_shapes_and_bytes_that_the_contract_says(
    variant: str, workload: str, encoders: Callable[..., WanEncoder]
) -> None:
    encoder = encoders(variant, workload)
    (tensors,) = encoder.encode_batch(make_noise(1))
    shapes = encoder.contract.tensor_shapes(num_frames=9, height=32, width=64)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert encoder.contract.row_bytes(num_frames=9, height=32, width=64) == num_bytes


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"num_frames": 16}, r"--num-frames 16 breaks the 4k\+1 rule of wan.*: use 13 or 17$"),
        ({"num_frames": 163}, r"--num-frames 163 breaks the 4k\+1 rule of wan.*: use 161 or 165$"),
        ({"height": 40}, "--max-height 40 is no multiple of wan's 16: use 32 or 48$"),
        ({"width": 100}, "--max-width 100 is no multiple of wan's 16: use 96 or 112$"),
    ],
)
def test_sizes_wan_cannot_encode_whole_are_refused(model: Path, size: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_wan(model).contract.check_geometry(**{"height": 64, "width": 96, "num_frames": 17} | size)


# Loading


@pytest.mark.parametrize(
    ("component", "kind"),
    [("vae", "AutoencoderKLWan"), ("text_encoder", "UMT5EncoderModel"), ("image_encoder", "CLIPVisionModel")],
)
def test_weights_that_are_missing_are_an_error_not_random(
    tiny_models: Callable[[str], Path], tmp_path: Path, component: str, kind: str
) -> None:
    """The libraries warn, draw random ones, and go on."""
    copy = shutil.copytree(tiny_models("2.1-i2v"), tmp_path / "model", ignore=shutil.ignore_patterns("scheduler"))
    (weights,) = (copy / component).glob("*.safetensors")
    tensors = safetensors.torch.load_file(weights)
    gone = sorted(tensors)[0]
    del tensors[gone]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{component} lacks 1 weights of a {kind}, the first is .*{gone[-20:]}"):
        open_wan(copy, workload="i2v").load()
