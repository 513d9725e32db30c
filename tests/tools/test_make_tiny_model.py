from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5EncoderModel

from tools import make_clips as clips_tool
from tools import make_tiny_model as tool

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    tool.make_tiny_model(out)
    return out


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


@torch.no_grad()
def latents(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    return torch.cat([vae.encode(clip[None]).latent_dist.mean for clip in pixels])


@torch.no_grad()
def embeddings(text_encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> Tensor:
    embedding_LD: Tensor = text_encoder(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
    return embedding_LD


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(1234)  # what the caller drew before does not matter
    state = torch.get_rng_state()
    tool.make_tiny_model(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert files(tmp_path / "again") == files(model)
    tool.make_tiny_model(tmp_path / "other", seed=1)
    other = files(tmp_path / "other")
    changed = {name for name, content in files(model).items() if other[name] != content}
    assert changed == {name for name in other if name.endswith(".safetensors")}


def test_the_folder_is_laid_out_as_wan_is_and_small(model: Path) -> None:
    assert sorted(path.name for path in model.iterdir()) == [
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    ]
    assert json.loads((model / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    assert sum(map(len, files(model).values())) < 5e6


def test_the_pipeline_loads_and_makes_a_video(model: Path) -> None:
    pipeline = WanPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    (video,) = pipeline(
        "A red circle", height=32, width=48, num_frames=5, num_inference_steps=2, output_type="pt"
    ).frames
    assert video.shape == (5, 3, 32, 48)
    assert video.isfinite().all()
    assert video.std() > 0.01


def test_latents_have_wans_shape_and_a_scale_near_one(vae: AutoencoderKLWan, pixels: Tensor) -> None:
    latents_NCTHW = latents(vae, pixels)
    assert latents_NCTHW.shape == (24, 16, 5, 8, 12)
    assert latents_NCTHW.isfinite().all()
    assert 0.3 < latents_NCTHW.std() < 3
    assert (latents_NCTHW.std((0, 2, 3, 4)) > 0.3).all()  # no channel is constant
    assert vae.config.latents_mean[:2] == [-0.7571, -0.7089]
    assert vae.config.latents_std[:2] == [2.8184, 1.4541]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_latents_depend_on_the_picture_whatever_the_seed(seed: int, pixels: Tensor) -> None:
    """PyTorch's own initial weights gave 0.05 here: the latents hardly depended on the picture."""
    latents_NCTHW = latents(tool.make_vae(seed=seed), pixels)
    assert latents_NCTHW.std(0).mean() > 0.3


def test_latents_depend_on_the_motion(vae: AutoencoderKLWan, pixels: Tensor) -> None:
    backwards = latents(vae, pixels[:6].flip(2))
    assert (latents(vae, pixels[:6]) - backwards).abs().mean() > 0.1


def test_one_grey_level_changes_little(vae: AutoencoderKLWan) -> None:
    """With biases of 0, the latents of two almost equal greys on both sides of the middle were opposite."""
    grey = torch.ones(1, 3, 5, 64, 96) / 255
    assert (latents(vae, grey) - latents(vae, -grey)).abs().max() < 0.5


def test_loading_the_text_encoder_leaves_no_weight_new(model: Path) -> None:
    encoder, info = UMT5EncoderModel.from_pretrained(model, subfolder="text_encoder", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(encoder.encoder.embed_tokens.weight, encoder.shared.weight)
    made = tool.make_text_encoder(vocab_size=encoder.config.vocab_size, seed=0)
    assert torch.equal(encoder.shared.weight, made.shared.weight)


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


def test_the_command_says_in_one_line_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_tiny_model.py", str(tmp_path / "out"), "--seed", "3"])
    tool.main()
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "seed 3" in line


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        tool.make_tiny_model(tmp_path)


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task must be one of t2v, got 'v2v'"):
        tool.make_tiny_model(tmp_path / "out", task="v2v")
