"""A model that is not what it says is refused before anything is written; each here is broken in one way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from making import make_options
from torch import Tensor

from streamprep import cli
from streamprep.encoders import Encoder, open_encoder
from streamprep.encoders.wan import WanEncoder
from streamprep.errors import UserError
from streamprep.selfcheck import check_encoder
from streamprep.types import ClipBatch

TinyModels = Callable[[str], Path]
Spoil = Callable[[Path], object]

pytestmark = pytest.mark.usefixtures("one_thread")

WORKLOADS = {
    "2.1-t2v": ("t2v", "text"),
    "2.1-i2v": ("i2v", "text"),
    "2.2-t2v-a14b": ("t2v", "text"),
    "2.2-i2v-a14b": ("i2v", "text"),
    "2.2-ti2v-5b": ("t2v", "i2v", "text"),
}
CHECK = "model broken fails its self-check, nothing has been encoded: "


@pytest.fixture(scope="module")
def shards(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    make_video(root / "a.mp4", fps=1, num_frames=5)
    (root / "a.txt").write_text("A caption.")
    assert cli.main(["pack", str(root), str(root / "shards"), "--num-workers", "1"]) == 0
    return root / "shards"


def encode(shards: Path, out: Path, model: Path, **flags: object) -> int:
    flags = {"workload_type": "i2v", "max_height": 32, "max_width": 48, "num_frames": 5, "train_fps": 1, **flags}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return cli.main(
        ["encode", str(shards), str(out), "--model-path", str(model), "--serial", "--encode-threads=1", *given]
    )


# Ways to break a model


def change_config(file: str, **values: Any) -> Spoil:
    """Set values of a config; None takes one away."""

    def spoil(model: Path) -> None:
        config = json.loads((model / file).read_text()) | values
        (model / file).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return spoil


def change_weights(component: str, change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """Change the tensors of a component, in place or by what is returned."""

    def spoil(model: Path) -> None:
        (file,) = (model / component).glob("*.safetensors")
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}
        change(tensors)
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})

    return spoil


def drop_weight(component: str, name: str) -> Spoil:
    return change_weights(component, lambda tensors: tensors.pop(name))


def fill_weights(component: str, part: str, value: float) -> Spoil:
    """Set all tensors whose name contains the part."""

    def fill(tensors: dict[str, Tensor]) -> None:
        chosen = [name for name in tensors if part in name]
        assert chosen, sorted(tensors)
        for name in chosen:
            tensors[name].fill_(value)

    return change_weights(component, fill)


def untie(tensors: dict[str, Tensor]) -> None:
    """As some versions of transformers left it: both are there, and only one is what was trained."""
    tensors["encoder.embed_tokens.weight"] = torch.randn_like(tensors["shared.weight"])


def change_tokenizer(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(model: Path) -> None:
        path = model / "tokenizer/tokenizer.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return spoil


def lose_special_token(name: str) -> Spoil:
    def spoil(model: Path) -> None:
        change_config("tokenizer/tokenizer_config.json", **{name: None})(model)
        if (model / "tokenizer/special_tokens_map.json").exists():
            change_config("tokenizer/special_tokens_map.json", **{name: None})(model)

    return spoil


def enlarge_vocabulary(value: dict[str, Any]) -> None:
    vocabulary = value["model"]["vocab"]
    for number in range(len(vocabulary), len(vocabulary) + 10):
        vocabulary[f"new{number}"] = number


def forget_vocabulary(value: dict[str, Any]) -> None:
    """Every character is unknown."""
    value["model"] |= {"byte_fallback": False, "merges": [], "vocab": {"<pad>": 0, "</s>": 1, "<unk>": 2}}


def lose_post_processor(value: dict[str, Any]) -> None:
    value["post_processor"] = None


def truncate(file: str) -> Spoil:
    return lambda model: (model / file).write_text("{")


def delete(file: str) -> Spoil:
    return lambda model: (model / file).unlink()


# What the configs give away

BROKEN_CONFIGS: dict[str, tuple[Spoil, str]] = {
    "no latents_mean": (
        change_config("vae/config.json", latents_mean=None),
        "broken/vae/config.json: latents_mean must be 16 numbers, one for each latent channel, got None",
    ),
    "no latents_std": (
        change_config("vae/config.json", latents_std=None),
        "broken/vae/config.json: latents_std must be 16 numbers above 0, one for each latent channel, got None",
    ),
    "a latents_mean too few": (
        change_config("vae/config.json", latents_mean=[0.5] * 15),
        "broken/vae/config.json: latents_mean must be 16 numbers, one for each latent channel, got [0.5, ",
    ),
    "a latents_mean that is none": (
        change_config("vae/config.json", latents_mean=[0.5] * 15 + ["0.5"]),
        "latents_mean must be 16 numbers",
    ),
    "a latents_mean of NaN": (
        change_config("vae/config.json", latents_mean=[float("nan")] * 16),
        "latents_mean must be 16 numbers",
    ),
    "a latents_std of zero": (
        change_config("vae/config.json", latents_std=[1.0] * 15 + [0.0]),
        "broken/vae/config.json: latents_std must be 16 numbers above 0, one for each latent channel, got [1.0, ",
    ),
    "another text encoder": (
        change_config("text_encoder/config.json", d_model=64),
        "broken: the text encoder gives 64 features, the transformer takes 32 (text_dim): they do not belong together",
    ),
    "a transformer for another text encoder": (
        change_config("transformer/config.json", text_dim=None),
        "broken: the text encoder gives 32 features, the transformer takes 4096 (text_dim)",
    ),
    "another image encoder": (
        change_config("image_encoder/config.json", hidden_size=128),
        "broken: the image encoder gives 128 features, the transformer takes 64 (image_dim): they do not belong",
    ),
    "an image processor of another size": (
        change_config("image_processor/preprocessor_config.json", crop_size={"height": 336, "width": 336}),
        "broken: the image processor crops to {'height': 336, 'width': 336}, the image encoder takes 224 pixels",
    ),
    "an image processor that does not crop": (
        change_config("image_processor/preprocessor_config.json", crop_size=None),
        "broken: the image processor crops to None, the image encoder takes 224 pixels",
    ),
    "no image processor": (
        lambda model: shutil.rmtree(model / "image_processor"),
        "broken has no image_processor/preprocessor_config.json",
    ),
    "an image processor nobody has": (
        change_config("model_index.json", image_processor=["transformers", "NoSuchProcessor"]),
        "has no image_processor 'NoSuchProcessor'",
    ),
}

BROKEN_FILES: dict[str, tuple[Spoil, str]] = {
    "a lost weight of the VAE": (
        drop_weight("vae", "encoder.conv_in.weight"),
        "broken/vae lacks 1 weights of a AutoencoderKLWan, the first is encoder.conv_in.weight: get the model again",
    ),
    "a lost weight of the text encoder": (
        drop_weight("text_encoder", "encoder.final_layer_norm.weight"),
        "broken/text_encoder lacks 1 weights of a UMT5EncoderModel, the first is encoder.final_layer_norm.weight",
    ),
    "a lost weight of the image encoder": (
        drop_weight("image_encoder", "vision_model.encoder.layers.0.mlp.fc1.weight"),
        "broken/image_encoder lacks 1 weights of a CLIPVisionModel, the first is ",
    ),
    "all weights of the image encoder under other names": (
        change_weights("image_encoder", lambda tensors: rename(tensors, "vision_model.", "visual.")),
        "broken/image_encoder lacks ",
    ),
    "a VAE of another width": (
        change_config("vae/config.json", base_dim=8),
        "broken/vae cannot be loaded as a AutoencoderKLWan: ",
    ),
    "a text encoder of another width": (
        change_config("text_encoder/config.json", d_ff=128),
        "broken/text_encoder cannot be loaded as a UMT5EncoderModel: ",
    ),
    "an image encoder of another width": (
        change_config("image_encoder/config.json", intermediate_size=128),
        "broken/image_encoder cannot be loaded as a CLIPVisionModel: ",
    ),
    "embeddings that are not tied": (
        change_weights("text_encoder", untie),
        "broken/text_encoder: as transformers ",
    ),
    "a tokenizer of a larger model": (
        change_tokenizer(enlarge_vocabulary),
        "tokens, the text encoder knows ",
    ),
    "a tokenizer without an end": (
        lose_special_token("eos_token"),
        "broken/tokenizer has no padding or no end-of-sequence token: it is not UMT5's",
    ),
    "a tokenizer without padding": (
        lose_special_token("pad_token"),
        "broken/tokenizer has no padding or no end-of-sequence token: it is not UMT5's",
    ),
    "a tokenizer that does not end captions": (
        change_tokenizer(lose_post_processor),
        "the end-of-sequence token 1 as the last: it is not UMT5's",
    ),
    "a tokenizer that knows no word": (
        change_tokenizer(forget_vocabulary),
        "broken/tokenizer turns 'A dog runs.' into [2, ",
    ),
    "a tokenizer cut off": (truncate("tokenizer/tokenizer.json"), "broken/tokenizer cannot be loaded"),
    "a tokenizer of nothing": (
        lambda model: (model / "tokenizer/tokenizer.json").write_text("{}"),
        "broken/tokenizer cannot be loaded as a ",
    ),
    "a tokenizer of another kind": (
        change_tokenizer(lambda value: value["model"].update(type="NoSuchModel")),
        "broken/tokenizer cannot be loaded as a ",
    ),
    "a tokenizer without its vocabulary": (
        delete("tokenizer/tokenizer.json"),
        "broken/tokenizer cannot be loaded as a ",
    ),
    "an image processor that is no JSON": (
        truncate("image_processor/preprocessor_config.json"),
        "broken/image_processor/preprocessor_config.json is not JSON",
    ),
}

BROKEN_NUMBERS: dict[str, tuple[Spoil, str]] = {
    "text that is all zeros": (
        fill_weights("text_encoder", "encoder.final_layer_norm", 0.0),
        f"{CHECK}text_embedding is all zeros",
    ),
    "text that is NaN": (
        fill_weights("text_encoder", "encoder.final_layer_norm", float("nan")),
        f"{CHECK}text_embedding holds NaN or infinity (an overflow? a damaged file?), finite numbers is expected",
    ),
    "text that is the same for every prompt": (
        fill_weights("text_encoder", "shared", 0.5),
        f"{CHECK}text_embedding is the same for two prompts, one that depends on the prompt is expected",
    ),
    "a VAE that overflows": (
        fill_weights("vae", "encoder.conv_out.weight", 1e38),
        f"{CHECK}vae_latent holds NaN or infinity (an overflow? a damaged file?)",
    ),
    "a VAE that overflows inside": (
        fill_weights("vae", "encoder.conv_in.weight", 1e38),
        f"{CHECK}vae_latent holds NaN or infinity (an overflow? a damaged file?)",
    ),
    "a VAE that gives zeros": (
        fill_weights("vae", "quant_conv", 0.0),
        f"{CHECK}vae_latent is all zeros, anything else is expected",
    ),
    "a VAE that sees nothing": (
        fill_weights("vae", "encoder.conv_in.weight", 0.0),
        f"{CHECK}vae_latent is the same for two clips, one that depends on the picture is expected",
    ),
    "image features that are zeros": (
        fill_weights("image_encoder", "", 0.0),
        f"{CHECK}clip_feature is all zeros",
    ),
    "image features that are NaN": (
        fill_weights("image_encoder", "layers.0.mlp.fc1.bias", float("nan")),
        f"{CHECK}clip_feature holds NaN or infinity",
    ),
    "image features that see nothing": (
        fill_weights("image_encoder", "patch_embedding", 0.0),
        f"{CHECK}clip_feature is the same for two clips",
    ),
}

BROKEN = BROKEN_CONFIGS | BROKEN_FILES | BROKEN_NUMBERS


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


@pytest.mark.parametrize("way", BROKEN)
def test_a_model_that_is_broken_is_refused_and_nothing_written(
    way: str, tiny_models: TinyModels, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = BROKEN[way]
    model = shutil.copytree(tiny_models("2.1-i2v"), tmp_path / "broken")
    spoil(model)
    assert encode(shards, tmp_path / "out", model) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("broken", [BROKEN_CONFIGS, BROKEN_FILES, BROKEN_NUMBERS])
def test_once_the_model_is_mended_the_same_output_can_be_used(
    broken: dict[str, tuple[Spoil, str]], tiny_models: TinyModels, shards: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_models("2.1-i2v"), tmp_path / "broken")
    next(iter(broken.values()))[0](model)
    assert encode(shards, tmp_path / "out", model) == 2
    shutil.rmtree(model)
    shutil.copytree(tiny_models("2.1-i2v"), model)
    assert encode(shards, tmp_path / "out", model) == 0
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("variant", "workload"), [(v, w) for v, workloads in WORKLOADS.items() for w in workloads])
def test_healthy_models_pass(variant: str, workload: str, dtype: str, tiny_models: TinyModels) -> None:
    check_encoder(load(tiny_models(variant), workload=workload, vae_dtype=dtype, text_dtype=dtype))


@pytest.mark.parametrize("posterior", ["mean", "moments"])
def test_a_healthy_models_variances_pass(posterior: str, tiny_models: TinyModels) -> None:
    encoder = load(tiny_models("2.1-t2v"), posterior=posterior)
    assert ("vae_logvar" in encoder.contract.tensors) == (posterior == "moments")
    check_encoder(encoder)


# What no folder can do, and an encoder can


def load(model: Path, **options: Any) -> Encoder:
    encoder = open_encoder(str(model), make_options(**options))
    encoder.load()
    return encoder


class Spoiled:
    """The tiny model with something done to what it gives."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self.contract, self.limits = encoder, encoder.contract, encoder.limits

    def load(self) -> None:
        """It is."""

    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        return self._encoder.encode_text(captions)

    def encode_batch(self, batch: ClipBatch) -> list[dict[str, Tensor]]:
        return self._encoder.encode_batch(batch)


class IgnoresTheMask(Spoiled):
    """Padding leaks into every caption but the longest, as without an attention mask."""

    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        encoder = self._encoder
        assert isinstance(encoder, WanEncoder)
        module = encoder._text._encoder
        masks = module.register_forward_pre_hook(lambda _, inputs: (inputs[0], torch.ones_like(inputs[1])))
        try:
            return encoder.encode_text(captions)
        finally:
            masks.remove()


class PadsToTheLongest(Spoiled):
    """Embeddings are not trimmed."""

    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        embeddings = super().encode_text(captions)
        longest = max(map(len, embeddings))
        return [torch.nn.functional.pad(e, (0, 0, 0, longest - len(e))) for e in embeddings]


class PoolsText(Spoiled):
    """One vector for a caption."""

    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        return [embedding.mean(0) for embedding in super().encode_text(captions)]


class HalfText(Spoiled):
    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        return [embedding.half() for embedding in super().encode_text(captions)]


class NotANumberAlone(Spoiled):
    """A kernel that fails for a batch of one."""

    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        return [e * (float("nan") if len(captions) == 1 else 1.0) for e in super().encode_text(captions)]


class ChangesClips(Spoiled):
    def __init__(self, encoder: Encoder, name: str, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(encoder)
        self._name, self._change = name, change

    def encode_batch(self, batch: ClipBatch) -> list[dict[str, Tensor]]:
        return [clip | {self._name: self._change(clip[self._name])} for clip in super().encode_batch(batch)]


@pytest.fixture(scope="module")
def healthy(tiny_models: TinyModels) -> Encoder:
    return load(tiny_models("2.1-i2v"), workload="i2v")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (IgnoresTheMask, "text_embedding changes with the other prompts of its batch, one that does not is expected"),
        (PadsToTheLongest, "text_embedding changes with the other prompts of its batch"),
        (PoolsText, r"text_embedding is of shape \(32,\), \(L, 32\) is expected"),
        (HalfText, r"text_embedding is torch\.float16, float32 is expected"),
        (NotANumberAlone, "text_embedding changes with the other prompts of its batch"),
    ],
)
def test_text_that_is_not_as_promised_is_refused(
    kind: Callable[[Encoder], Encoder], message: str, healthy: Encoder
) -> None:
    check_encoder(healthy)
    with pytest.raises(UserError, match=f"model tiny-wan fails its self-check, nothing has been encoded: {message}"):
        check_encoder(kind(healthy))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vae_latent", lambda x: x[:, :1], r"vae_latent is of shape \(16, 1, 4, 4\), \(16, 2, 4, 4\) is expected"),
        ("vae_latent", torch.zeros_like, "vae_latent is all zeros"),
        ("vae_latent", lambda x: x.double(), "vae_latent is torch.float64, float32 is expected"),
        ("clip_feature", lambda x: x[1:], r"clip_feature is of shape \(256, 64\), \(257, 64\) is expected"),
        ("first_frame_latent", torch.ones_like, "first_frame_latent is the same for two clips"),
    ],
)
def test_tensors_that_are_not_as_promised_are_refused(
    name: str, change: Callable[[Tensor], Tensor], message: str, healthy: Encoder
) -> None:
    with pytest.raises(UserError, match=message):
        check_encoder(ChangesClips(healthy, name, change))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("first_frame_latent", lambda x: x * 1.01),
        ("first_frame_latent", lambda x: x.flip(1)),
        ("vae_latent", lambda x: x + 0.1),
    ],
)
def test_a_conditioning_latent_that_is_of_another_frame_is_refused(
    name: str, change: Callable[[Tensor], Tensor], healthy: Encoder
) -> None:
    message = "model tiny-wan fails its self-check: the conditioning latent of 'made clip 0' begins with another frame"
    with pytest.raises(UserError, match=message):
        check_encoder(ChangesClips(healthy, name, change))
