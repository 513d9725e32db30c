"""Ours against diffusers' own `WanPipeline`, on a tiny model with random weights."""

from __future__ import annotations

import html
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from making import make_options
from torch import Tensor

from streamprep.encoders import open_encoder
from streamprep.encoders.wan import WanEncoder
from streamprep.errors import UserError
from streamprep.types import ClipBatch

FLOAT_ERROR = 1e-5
"""Of values of about 1, with another padding or batch size."""
CAPTIONS = {
    "plain": "A red circle moves from left to right.",
    "long": "A red circle moves from left to right over a blue and white checkerboard. " * 60,
    "empty": "",
    "unicode": "Zo\u00eb dreht ein Video \U0001f3ac: \u4f60\u597d, \u043f\u0440\u0438\u0432\u0435\u0442 \uff21\ufb01",
    "entities": "Tom &amp;amp; Jerry &lt;run&gt; &quot;fast&quot;",
    "white space": "  A\tdog \n\n runs\u00a0 home.  ",
    "mojibake": "The Mona Lisa doesn\u00c3\u00a2\u00e2\u201a\u00ac\u00e2\u201e\u00a2t have eyebrows.",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Path:
    return tiny_model


def open_wan(model: Path, **options: Any) -> WanEncoder:
    encoder = open_encoder(str(model), make_options(**options))
    assert isinstance(encoder, WanEncoder)
    return encoder


@pytest.fixture(scope="module")
def encoder(model: Path) -> WanEncoder:
    encoder = open_wan(model)
    encoder.load()
    return encoder


@pytest.fixture(scope="module")
def raw_encoder(model: Path) -> WanEncoder:
    encoder = open_wan(model, clean_captions=False, text_batch_size=1)
    encoder.load()
    return encoder


@pytest.fixture(scope="module")
def pipeline(model: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(model)


def max_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    return (ours - theirs).abs().max().item()


# Text


@torch.no_grad()
def prompt_embeds(pipeline: WanPipeline, caption: str) -> Tensor:
    """(512, D), zeros after the caption's tokens."""
    embeds, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
    return embeds[0]


@torch.no_grad()
def raw_embedding(pipeline: WanPipeline, caption: str) -> Tensor:
    """(L, D): the tokenizer and the encoder, nothing else."""
    tokens = pipeline.tokenizer(caption, max_length=512, truncation=True, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]


@pytest.mark.parametrize("name", CAPTIONS)
def test_cleaned_captions_give_what_the_pipeline_itself_gives(
    name: str, encoder: WanEncoder, pipeline: WanPipeline
) -> None:
    (ours_LD,) = encoder.encode_text([CAPTIONS[name]])
    theirs_LD = prompt_embeds(pipeline, CAPTIONS[name])
    padded_LD = torch.nn.functional.pad(ours_LD, (0, 0, 0, 512 - len(ours_LD)))
    assert max_difference(padded_LD, theirs_LD) < FLOAT_ERROR
    assert len(ours_LD) == int((theirs_LD != 0).any(1).sum())


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_that_are_not_cleaned_give_what_the_encoder_makes_of_the_raw_string(
    name: str, raw_encoder: WanEncoder, pipeline: WanPipeline
) -> None:
    (ours_LD,) = raw_encoder.encode_text([CAPTIONS[name]])
    assert max_difference(ours_LD, raw_embedding(pipeline, CAPTIONS[name])) < FLOAT_ERROR


def test_cleaning_matters_and_only_where_there_is_something_to_clean(
    encoder: WanEncoder, raw_encoder: WanEncoder
) -> None:
    for name, caption in CAPTIONS.items():
        (cleaned,), (raw,) = encoder.encode_text([caption]), raw_encoder.encode_text([caption])
        same = cleaned.shape == raw.shape and max_difference(cleaned, raw) < FLOAT_ERROR
        assert same == (name in ("plain", "long", "empty", "unicode", "white space")), name  # T5 folds white space


def test_an_embedding_is_as_long_as_the_caption_and_at_most_512(encoder: WanEncoder, pipeline: WanPipeline) -> None:
    lengths = {name: len(encoder.encode_text([caption])[0]) for name, caption in CAPTIONS.items()}
    assert lengths["empty"] == 1
    assert lengths["plain"] == len(pipeline.tokenizer(CAPTIONS["plain"]).input_ids)
    assert lengths["long"] == 512 < len(pipeline.tokenizer(CAPTIONS["long"], truncation=False).input_ids)


@pytest.mark.parametrize("text_batch_size", [1, 2, 3, 8])
def test_captions_in_batches_give_what_they_give_one_by_one(
    model: Path, encoder: WanEncoder, text_batch_size: int
) -> None:
    captions = list(CAPTIONS.values())
    batched = open_wan(model, text_batch_size=text_batch_size)
    batched.load()
    for caption, ours in zip(captions, batched.encode_text(captions), strict=True):
        assert max_difference(ours, encoder.encode_text([caption])[0]) < FLOAT_ERROR


def test_each_distinct_caption_is_encoded_once_and_the_longest_together(model: Path) -> None:
    encoder = open_wan(model, text_batch_size=2)
    encoder.load()
    seen: list[tuple[int, ...]] = []
    encoder._text._encoder.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    words = ["a dog", "dog " * 30, "a dog", "cat", " a  dog ", html.escape("a & b"), "dog " * 31, "a dog"]
    embeddings = encoder.encode_text(words)
    assert sum(rows for rows, _ in seen) == 5  # cleaned, "a dog" and " a  dog " are one
    assert [rows for rows, _ in seen] == [2, 2, 1]
    assert sorted(length for _, length in seen) == [length for _, length in seen]
    assert seen[-1][1] > 2 * seen[0][1]
    assert torch.equal(embeddings[0], embeddings[2])
    assert torch.equal(embeddings[0], embeddings[4])


def test_no_captions_give_no_embeddings(encoder: WanEncoder) -> None:
    assert encoder.encode_text([]) == []


# Video


def noise(num_clips: int, *, num_frames: int = 9) -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (num_clips, num_frames, 3, 32, 48), dtype=torch.uint8, generator=generator)
    return ClipBatch(keys=tuple(f"{number}" for number in range(num_clips)), frames=frames)


@torch.no_grad()
@pytest.mark.parametrize("num_clips", [1, 2, 3])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_latents_are_the_posteriors_mean_bit_for_bit(
    num_clips: int, num_frames: int, encoder: WanEncoder, pipeline: WanPipeline
) -> None:
    batch = noise(num_clips, num_frames=num_frames)
    pixels = batch.frames.permute(0, 2, 1, 3, 4).contiguous() / 255 * 2 - 1
    theirs = pipeline.vae.encode(pixels).latent_dist.mean
    ours = encoder.encode_batch(batch)
    assert [list(tensors) for tensors in ours] == [["vae_latent"]] * num_clips
    for our, their in zip(ours, theirs, strict=True):
        assert our["vae_latent"].shape == (16, 1 + (num_frames - 1) // 4, 4, 6)
        assert max_difference(our["vae_latent"], their) == 0


def test_a_clips_latents_do_not_depend_on_the_batch_but_for_float_error(encoder: WanEncoder) -> None:
    whole = noise(3)
    alone = [encoder.encode_batch(ClipBatch(keys=("x",), frames=clip[None]))[0] for clip in whole.frames]
    for size in (2, 3):
        together = encoder.encode_batch(ClipBatch(keys=whole.keys[:size], frames=whole.frames[:size]))
        for one, other in zip(alone, together, strict=False):
            assert max_difference(one["vae_latent"], other["vae_latent"]) < FLOAT_ERROR


def test_tensors_own_their_memory(encoder: WanEncoder) -> None:
    """A view would keep the whole batch alive until its last clip is written."""
    tensors = [clip["vae_latent"] for clip in encoder.encode_batch(noise(2))] + encoder.encode_text(["a", "a b c"])
    for tensor in tensors:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


# The contract


def test_the_contract_says_what_the_loaded_objects_say(encoder: WanEncoder, pipeline: WanPipeline) -> None:
    contract, vae = encoder.contract, pipeline.vae
    video, text = contract.video, contract.text
    assert video is not None
    assert (contract.family, contract.model, contract.revision) == ("wan", "tiny-wan", None)
    assert video.latents_mean == tuple(vae.config.latents_mean)
    assert video.latents_std == tuple(vae.config.latents_std)
    assert video.latent_channels == vae.config.z_dim == len(video.latents_mean)
    assert video.temporal_factor == pipeline.vae_scale_factor_temporal == 2 ** sum(vae.temperal_downsample)
    assert video.spatial_factor == pipeline.vae_scale_factor_spatial == 2 ** len(vae.temperal_downsample)
    assert video.spatial_multiple == video.spatial_factor * pipeline.transformer.config.patch_size[-1]
    assert video.vae_class == type(vae).__name__
    assert text.encoder_class == type(pipeline.text_encoder).__name__
    assert (video.dtype, text.dtype) == ("float32", "float32")
    assert text.max_length == 512
    assert (video.posterior, video.space, text.captions_cleaned) == ("mean", "raw", True)
    assert set(contract.tensors) == {"vae_latent", "text_embedding"}


def test_the_contract_is_known_before_any_weight_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    assert open_wan(model, clean_captions=False).contract.text.captions_cleaned is False


def test_a_latent_has_the_bytes_the_contract_says(encoder: WanEncoder) -> None:
    (tensors,) = encoder.encode_batch(noise(1))
    assert encoder.contract.row_bytes(num_frames=9, height=32, width=48) == tensors["vae_latent"].nbytes


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


@pytest.mark.parametrize(("component", "kind"), [("vae", "AutoencoderKLWan"), ("text_encoder", "UMT5EncoderModel")])
def test_weights_that_are_missing_are_an_error_not_random(
    model: Path, tmp_path: Path, component: str, kind: str
) -> None:
    """The libraries warn, draw random ones, and go on."""
    copy = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("scheduler"))
    (weights,) = (copy / component).glob("*.safetensors")
    tensors = safetensors.torch.load_file(weights)
    gone = sorted(tensors)[0]
    del tensors[gone]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{component} lacks 1 weights of a {kind}, the first is {gone}"):
        open_wan(copy).load()
