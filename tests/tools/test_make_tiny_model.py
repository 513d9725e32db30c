from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5EncoderModel,
)

from streamprep.testing import tiny_model as tool
from tools import make_clips as clips_tool

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model, subfolder="tokenizer")


@pytest.fixture(scope="module")
def text_encoder(model: Path) -> UMT5EncoderModel:
    return UMT5EncoderModel.from_pretrained(model, subfolder="text_encoder").eval()


@pytest.fixture(scope="module")
def vae(model: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(model, subfolder="vae").eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """(N, 3, 17, 64, 96) in -1..1: the sample clips, small."""
    clips = []
    for scene in clips_tool.scenes(24, seed=0, seconds=2):
        frames = [frame for index, frame in enumerate(clips_tool.draw(scene)) if index % 2 == 0][:17]
        frames_TCHW = torch.stack([torch.from_numpy(frame) for frame in frames]).permute(0, 3, 1, 2).float()
        small = torch.nn.functional.interpolate(frames_TCHW, (64, 96), mode="bilinear", antialias=True)
        clips.append(small.transpose(0, 1) / 127.5 - 1)
    return torch.stack(clips)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def first_frames(num_clips: int) -> list[clips_tool.Frame]:
    return [next(iter(clips_tool.draw(scene))) for scene in clips_tool.scenes(num_clips, seed=0, seconds=2)]


@torch.no_grad()
def latents(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    return torch.cat([vae.encode(clip[None]).latent_dist.mean for clip in pixels])


@torch.no_grad()
def embeddings(text_encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> Tensor:
    embedding_LD: Tensor = text_encoder(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
    return embedding_LD


@pytest.mark.parametrize("variant", tool.VARIANTS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(
    variant: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    made = files(tiny_models(variant))
    torch.manual_seed(1234)  # what the caller drew before does not matter
    state = torch.get_rng_state()
    tool.make_tiny_model(tmp_path / "again", variant=variant)
    assert torch.equal(torch.get_rng_state(), state)
    assert files(tmp_path / "again") == made
    tool.make_tiny_model(tmp_path / "other", variant=variant, seed=1)
    other = files(tmp_path / "other")
    changed = {name for name, content in made.items() if other[name] != content}
    assert changed == {name for name in other if name.endswith(".safetensors")}


def test_without_a_variant_it_is_the_demos(model: Path, tmp_path: Path) -> None:
    tool.make_tiny_model(tmp_path / "out")
    assert files(tmp_path / "out") == files(model)


T2V_FOLDERS = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}


@pytest.mark.parametrize(
    ("variant", "folders"),
    [
        ("2.1-t2v", T2V_FOLDERS),
        ("2.1-i2v", T2V_FOLDERS | {"image_encoder", "image_processor"}),
        ("2.2-t2v-a14b", T2V_FOLDERS | {"transformer_2"}),
        ("2.2-i2v-a14b", T2V_FOLDERS | {"transformer_2"}),
        ("2.2-ti2v-5b", T2V_FOLDERS),
    ],
)
def test_the_folder_is_laid_out_as_wan_is_and_small(
    variant: str, folders: set[str], tiny_models: Callable[[str], Path]
) -> None:
    folder = tiny_models(variant)
    assert {path.name for path in folder.iterdir()} == {"model_index.json"} | folders
    index = read_json(folder / "model_index.json")
    assert {name for name, value in index.items() if isinstance(value, list) and value[0]} == folders
    assert sum(map(len, files(folder).values())) < 5e6


NO_COMPONENT = [None, None]
TRANSFORMER = ["diffusers", "WanTransformer3DModel"]


@pytest.mark.parametrize(
    ("variant", "index", "transformer"),
    [
        (
            "2.1-t2v",
            {"_class_name": "WanPipeline", "transformer_2": NO_COMPONENT, "boundary_ratio": None},
            {"in_channels": 16, "out_channels": 16, "image_dim": None, "added_kv_proj_dim": None},
        ),
        (
            "2.1-i2v",
            {
                "_class_name": "WanImageToVideoPipeline",
                "image_encoder": ["transformers", "CLIPVisionModel"],
                "image_processor": ["transformers", "CLIPImageProcessor"],
                "transformer_2": NO_COMPONENT,
                "boundary_ratio": None,
            },
            {"in_channels": 36, "out_channels": 16, "image_dim": tool.IMAGE_DIM, "added_kv_proj_dim": 64},
        ),
        (
            "2.2-t2v-a14b",
            {"_class_name": "WanPipeline", "transformer_2": TRANSFORMER, "boundary_ratio": 0.875},
            {"in_channels": 16, "out_channels": 16, "image_dim": None, "added_kv_proj_dim": None},
        ),
        (
            "2.2-i2v-a14b",
            {
                "_class_name": "WanImageToVideoPipeline",
                "image_encoder": NO_COMPONENT,
                "image_processor": NO_COMPONENT,
                "transformer_2": TRANSFORMER,
                "boundary_ratio": 0.9,
            },
            {"in_channels": 36, "out_channels": 16, "image_dim": None, "added_kv_proj_dim": None},
        ),
        (
            "2.2-ti2v-5b",
            {
                "_class_name": "WanPipeline",
                "transformer_2": NO_COMPONENT,
                "boundary_ratio": None,
                "expand_timesteps": True,
            },
            {"in_channels": 48, "out_channels": 48, "image_dim": None, "added_kv_proj_dim": None},
        ),
    ],
)
def test_the_configs_tell_the_variants_apart_as_the_hubs_do(
    variant: str, index: dict[str, Any], transformer: dict[str, Any], tiny_models: Callable[[str], Path]
) -> None:
    folder = tiny_models(variant)
    index = {"expand_timesteps": False, "vae": ["diffusers", "AutoencoderKLWan"]} | index
    assert index.items() <= read_json(folder / "model_index.json").items()
    for name in ("transformer", "transformer_2"):
        if (folder / name).exists():
            assert transformer.items() <= read_json(folder / name / "config.json").items()


@pytest.mark.parametrize("variant", tool.VARIANTS)
def test_every_model_loads_with_no_weight_new_or_left_over(variant: str, tiny_models: Callable[[str], Path]) -> None:
    folder = tiny_models(variant)
    index = read_json(folder / "model_index.json")
    loaded = {}
    for name, component in index.items():
        if isinstance(component, list) and (folder / name / "config.json").exists():
            library, class_name = component
            model_class = getattr(importlib.import_module(library), class_name)
            loaded[name], info = model_class.from_pretrained(folder, subfolder=name, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            assert not info["mismatched_keys"]
    drawn = tool.make_pipeline(tool.VARIANTS[variant], seed=0)
    for name, component in loaded.items():
        weights = getattr(drawn, name).state_dict()
        assert all(torch.equal(weight, weights[key]) for key, weight in component.state_dict().items())


@pytest.mark.parametrize("variant", tool.VARIANTS)
def test_the_pipeline_loads_and_makes_a_video(variant: str, tiny_models: Callable[[str], Path]) -> None:
    pipeline = getattr(diffusers, tool.VARIANTS[variant].pipeline).from_pretrained(tiny_models(variant))
    pipeline.set_progress_bar_config(disable=True)
    picture = Image.fromarray(first_frames(1)[0])
    options: dict[str, Any] = {"image": picture} if "i2v" in variant.split("-") else {}
    (video,) = pipeline(
        prompt="A red circle",
        height=64,
        width=96,
        num_frames=5,
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).frames
    assert video.shape == (5, 3, 64, 96)
    assert video.isfinite().all()
    assert video.std() > 0.01


def test_the_two_experts_are_not_the_same(tiny_models: Callable[[str], Path]) -> None:
    made = files(tiny_models("2.2-t2v-a14b"))
    weights = "diffusion_pytorch_model.safetensors"
    assert made[f"transformer/{weights}"] != made[f"transformer_2/{weights}"]


def test_image_tokens_depend_on_the_picture_and_on_the_layer(tiny_models: Callable[[str], Path]) -> None:
    folder = tiny_models("2.1-i2v")
    encoder = CLIPVisionModel.from_pretrained(folder, subfolder="image_encoder").eval()
    processor = CLIPImageProcessor.from_pretrained(folder, subfolder="image_processor")
    with torch.no_grad():
        pictures = torch.cat([processor(images=frame, return_tensors="pt").pixel_values for frame in first_frames(8)])
        layers_BLD = encoder(pictures, output_hidden_states=True).hidden_states
    assert pictures.shape == (8, 3, 224, 224)
    assert len(layers_BLD) == 5  # what goes into the first layer, and what comes out of each
    for before_BLD, after_BLD in pairwise(layers_BLD):
        assert (after_BLD - before_BLD).abs().mean() > 0.1
    for tokens_BLD in layers_BLD[1:]:
        assert tokens_BLD.shape == (8, 257, tool.IMAGE_DIM)
        assert 0.5 < tokens_BLD.std() < 2
        assert tokens_BLD.std(0).mean() > 0.5
        assert torch.pdist(tokens_BLD[:, 0]).min() > 0.1  # the class token: it has seen the patches


def test_pictures_are_prepared_as_the_hubs_processor_does(tiny_models: Callable[[str], Path]) -> None:
    config = read_json(tiny_models("2.1-i2v") / "image_processor" / "preprocessor_config.json")
    assert config == {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "resample": Image.Resampling.BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def test_clips_weights_are_named_as_the_hubs(tiny_models: Callable[[str], Path]) -> None:
    with safe_open(tiny_models("2.1-i2v") / "image_encoder" / "model.safetensors", "pt") as weights:
        assert {name.split(".")[0] for name in weights.keys()} == {"vision_model"}  # noqa: SIM118


def test_the_5b_vae_has_48_channels_and_a_scale_near_one(tiny_models: Callable[[str], Path], pixels: Tensor) -> None:
    vae = AutoencoderKLWan.from_pretrained(tiny_models("2.2-ti2v-5b"), subfolder="vae").eval()
    latents_NCTHW = latents(vae, pixels)
    assert latents_NCTHW.shape == (24, 48, 5, 4, 6)
    assert latents_NCTHW.isfinite().all()
    assert 0.3 < latents_NCTHW.std() < 3
    assert (latents_NCTHW.std((0, 2, 3, 4)) > 0.3).all()  # no channel is constant
    assert (vae.config.scale_factor_spatial, vae.config.scale_factor_temporal) == (16, 4)
    for vector, ends in ((vae.config.latents_mean, [-0.2289, -0.0667]), (vae.config.latents_std, [0.4765, 0.7744])):
        assert len(vector) == 48
        assert [vector[0], vector[-1]] == ends


def test_latents_have_wans_shape_and_a_scale_near_one(vae: AutoencoderKLWan, pixels: Tensor) -> None:
    latents_NCTHW = latents(vae, pixels)
    assert latents_NCTHW.shape == (24, 16, 5, 8, 12)
    assert latents_NCTHW.isfinite().all()
    assert 0.3 < latents_NCTHW.std() < 3
    assert (latents_NCTHW.std((0, 2, 3, 4)) > 0.3).all()  # no channel is constant
    assert vae.config.latents_mean[:2] == [-0.7571, -0.7089]
    assert vae.config.latents_std[:2] == [2.8184, 1.4541]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
@pytest.mark.parametrize("make_vae", [tool.make_vae, tool.make_vae_5b])
def test_latents_depend_on_the_picture_whatever_the_seed(
    make_vae: Callable[..., AutoencoderKLWan], seed: int, pixels: Tensor
) -> None:
    """PyTorch's own initial weights gave 0.05 here: the latents hardly depended on the picture."""
    latents_NCTHW = latents(make_vae(seed=seed), pixels)
    assert latents_NCTHW.std(0).mean() > 0.3


def test_latents_depend_on_the_motion(vae: AutoencoderKLWan, pixels: Tensor) -> None:
    backwards = latents(vae, pixels[:6].flip(2))
    assert (latents(vae, pixels[:6]) - backwards).abs().mean() > 0.1


def test_one_grey_level_changes_little(vae: AutoencoderKLWan) -> None:
    """With biases of 0, the latents of two almost equal greys on both sides of the middle were opposite."""
    grey = torch.ones(1, 3, 5, 64, 96) / 255
    assert (latents(vae, grey) - latents(vae, -grey)).abs().max() < 0.5


def test_the_text_encoder_has_one_table_of_words(text_encoder: UMT5EncoderModel) -> None:
    assert torch.equal(text_encoder.encoder.embed_tokens.weight, text_encoder.shared.weight)


def test_embeddings_depend_on_the_words_and_on_their_order(
    text_encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = ["A red circle moves from left to right.", "A red circle moves from right to left.", "Two dogs", ""]
    made = [embeddings(text_encoder, tokenizer, prompt) for prompt in prompts]
    for embedding_LD in made:
        assert embedding_LD.shape[1] == tool.TEXT_DIM
        assert embedding_LD.isfinite().all()
        assert 0.5 < embedding_LD.std() < 2
    ends = torch.stack([embedding_LD[-1] for embedding_LD in made])  # of </s>, which all of them have
    assert torch.pdist(ends).min() > 0.5
    assert (made[0][:4] - made[1][:4]).abs().max() > 0.1  # the same tokens in another context


def test_a_long_prompt_is_cut_to_512_tokens_that_end_in_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = " ".join(["circle"] * 600)
    assert tokenizer.model_max_length == 512
    ids = tokenizer(prompt, truncation=True).input_ids
    assert len(ids) == 512
    assert ids[-1] == tokenizer.eos_token_id


def test_special_tokens_are_t5s(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    batch = tokenizer(["", "A red circle"], padding="max_length", max_length=8, return_tensors="pt")
    assert batch.input_ids[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert batch.attention_mask.sum(1).tolist() == [1, len(tokenizer("A red circle").input_ids)]


@pytest.mark.parametrize(
    "prompt",
    [
        "A red circle moves from left to right over a blue and white checkerboard.",
        "Prices: 3.50 dollars (or 4,000)? #1 @home ~ 100% & more; [x] {y} <z> \\ | ^ ` _ + = * / \"quoted\" 'single'!",
        "Zo\u00eb at the caf\u00e9: \u4f60\u597d \U0001f3ac \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d",
    ],
)
def test_no_character_is_unknown_and_text_survives_the_round_trip(
    prompt: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(prompt).input_ids
    assert tokenizer.unk_token_id not in ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt


def test_the_command_says_in_one_line_what_it_made(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, repo_root / "tools" / "make_tiny_model.py", tmp_path / "out"]
    flags = ["--seed", "3", "--variant", "2.2-ti2v-5b"]
    line = subprocess.run([*command, *flags], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert line.count("\n") == 1
    assert "2.2-ti2v-5b" in line
    assert "seed 3" in line
    assert read_json(tmp_path / "out" / "vae" / "config.json")["z_dim"] == 48


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        tool.make_tiny_model(tmp_path)


def test_an_unknown_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"variant must be one of 2.1-t2v, .*, got '2.1-v2v'"):
        tool.make_tiny_model(tmp_path / "out", variant="2.1-v2v")
