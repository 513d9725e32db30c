"""Which Wan a folder holds, what it may be trained for, which of its files are needed, and what its rows hold."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, downloaded, serve
from fastvideo_schemas import SCHEMAS
from making import make_options

from streamprep import cli
from streamprep.encoders import open_encoder
from streamprep.encoders._wan_variants import VARIANTS
from streamprep.errors import UserError
from streamprep.testing.tiny_model import VARIANTS as TINY_VARIANTS

TinyModels = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = {
    "2.1-t2v": {"t2v": {"vae_latent", "text_embedding"}, "text": {"text_embedding"}},
    "2.1-i2v": {
        "i2v": {"vae_latent", "text_embedding", "clip_feature", "first_frame_latent"},
        "text": {"text_embedding"},
    },
    "2.2-t2v-a14b": {"t2v": {"vae_latent", "text_embedding"}, "text": {"text_embedding"}},
    "2.2-i2v-a14b": {"i2v": {"vae_latent", "text_embedding", "first_frame_latent"}, "text": {"text_embedding"}},
    "2.2-ti2v-5b": {
        "t2v": {"vae_latent", "text_embedding"},
        "i2v": {"vae_latent", "text_embedding"},
        "text": {"text_embedding"},
    },
}
"""What each variant is trained for, and on what."""
WORKLOADS = ("t2v", "i2v", "text")
POSSIBLE = [(variant, workload) for variant, workloads in FEATURES.items() for workload in workloads]
IMPOSSIBLE = [
    (variant, workload) for variant in FEATURES for workload in WORKLOADS if workload not in FEATURES[variant]
]


def open_wan(model: Path | str, workload: str) -> Any:
    return open_encoder(str(model), make_options(workload=workload))


# Recognising


def test_every_tiny_model_there_is_is_tested_here() -> None:
    assert set(FEATURES) == set(TINY_VARIANTS) == {variant.name for variant in VARIANTS}
    assert {variant.name: set(variant.workloads) for variant in VARIANTS} == {
        name: set(workloads) for name, workloads in FEATURES.items()
    }


@pytest.mark.parametrize(("variant", "workload"), POSSIBLE)
def test_a_variant_is_told_by_its_configs_alone(
    variant: str, workload: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """No weights are there."""
    model = shutil.copytree(
        tiny_models(variant),
        tmp_path / "model",
        ignore=lambda _, names: [n for n in names if n.endswith("safetensors")],
    )
    contract = open_wan(model, workload).contract
    assert (contract.family, contract.variant, contract.workload) == ("wan", variant, workload)
    assert set(contract.tensors) == FEATURES[variant][workload]
    assert (contract.video is None) == (workload == "text")
    assert (contract.image is None) == ("clip_feature" not in contract.tensors)
    if contract.video is not None:
        is_5b = variant == "2.2-ti2v-5b"
        assert contract.video.spatial_multiple == (32 if is_5b else 16)
        assert contract.video.latent_channels == len(contract.video.latents_mean) == (48 if is_5b else 16)
        normalised = "first_frame_latent" in contract.tensors
        assert contract.video.conditioning_space == ("normalised" if normalised else None)


@pytest.mark.parametrize("pipeline", ["WanPipeline", "WanImageToVideoPipeline"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_5b_model_may_be_saved_as_either_pipeline(
    pipeline: str, workload: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_models("2.2-ti2v-5b"), tmp_path / "model")
    change(model, "model_index.json", _class_name=pipeline)
    assert open_wan(model, workload).contract.variant == "2.2-ti2v-5b"


@pytest.mark.parametrize(("variant", "workload"), IMPOSSIBLE)
def test_a_workload_that_the_variant_is_not_for_is_refused_with_those_it_is_for(
    variant: str, workload: str, tiny_models: TinyModels
) -> None:
    able = " or ".join(FEATURES[variant])
    message = f"tiny-wan is a Wan {variant} model: use --workload-type {able}, or a model for {workload}$"
    with pytest.raises(UserError, match=message):
        open_wan(tiny_models(variant), workload)


def test_the_5b_model_takes_multiples_of_32(tiny_models: TinyModels) -> None:
    with pytest.raises(UserError, match="--max-height 48 is no multiple of wan's 32: use 32 or 64"):
        open_wan(tiny_models("2.2-ti2v-5b"), "i2v").contract.check_geometry(height=48, width=64, num_frames=5)


# What is not recognised


def change(model: Path, file: str, **values: Any) -> None:
    """Set values of a config; None takes one away."""
    config = json.loads((model / file).read_text()) | values
    (model / file).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


STRANGERS: dict[str, tuple[str, dict[str, dict[str, Any]], str]] = {
    "first and last frame": (
        "2.1-i2v",
        {"transformer/config.json": {"pos_embed_seq_len": 514}},
        "pipeline WanImageToVideoPipeline, .*in_channels 36, image_dim set, pos_embed_seq_len 514, VAE's z_dim 16",
    ),
    "Fun-Control": (
        "2.1-i2v",
        {"transformer/config.json": {"in_channels": 48}},
        "transformer's in_channels 48, image_dim set",
    ),
    "Fun-Control of 2.2": (
        "2.2-i2v-a14b",
        {"transformer/config.json": {"in_channels": 52}},
        "boundary_ratio set, .*in_channels 52, image_dim none",
    ),
    "image features with two transformers": (
        "2.1-i2v",
        {"model_index.json": {"boundary_ratio": 0.9}},
        "boundary_ratio set, .*image_dim set",
    ),
    "5B with two transformers": (
        "2.2-ti2v-5b",
        {"model_index.json": {"boundary_ratio": 0.9}},
        "boundary_ratio set, expand_timesteps True, .*in_channels 48, .*z_dim 48",
    ),
    "5B without expand_timesteps": (
        "2.2-ti2v-5b",
        {"model_index.json": {"expand_timesteps": False}},
        "expand_timesteps False, .*in_channels 48, .*z_dim 48",
    ),
    "a VAE of another": (
        "2.1-t2v",
        {"vae/config.json": {"z_dim": 48}},
        "in_channels 16, image_dim none, pos_embed_seq_len None, VAE's z_dim 48",
    ),
    "a transformer of another": (
        "2.1-t2v",
        {"transformer/config.json": {"in_channels": 36}},
        "pipeline WanPipeline, .*in_channels 36, image_dim none",
    ),
    "a VACE transformer": (
        "2.1-t2v",
        {"transformer/config.json": {"_class_name": "WanVACETransformer3DModel"}},
        "transformer WanVACETransformer3DModel",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_model_that_is_none_of_ours_is_refused_with_what_was_found(
    name: str, workload: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    variant, changes, found = STRANGERS[name]
    model = shutil.copytree(tiny_models(variant), tmp_path / "stranger")
    for file, values in changes.items():
        change(model, file, **values)
    known = r"stranger is none of the Wan models known here \(2.1-t2v, 2.1-i2v, .*\); its configs say: .*"
    with pytest.raises(UserError, match=known + found):
        open_wan(model, workload)


def test_a_vace_model_is_refused_by_its_pipeline(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_models("2.1-t2v"), tmp_path / "vace")
    change(model, "model_index.json", _class_name="WanVACEPipeline")
    with pytest.raises(UserError, match="vace is a WanVACEPipeline; known are WanImageToVideoPipeline, WanPipeline"):
        open_wan(model, "t2v")


@pytest.mark.parametrize("workload", ["t2v", "text"])
def test_a_model_without_its_transformers_config_is_refused(
    workload: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_models("2.1-t2v"), tmp_path / "model")
    shutil.rmtree(model / "transformer")
    with pytest.raises(UserError, match=r"has no transformer/config.json: a diffusers model folder is needed"):
        open_wan(model, workload)


# What is fetched

WEIGHTS = {
    ("2.1-t2v", "t2v"): {"vae", "text_encoder"},
    ("2.1-t2v", "text"): {"text_encoder"},
    ("2.1-i2v", "i2v"): {"vae", "text_encoder", "image_encoder"},
    ("2.2-i2v-a14b", "i2v"): {"vae", "text_encoder"},
    ("2.2-ti2v-5b", "i2v"): {"vae", "text_encoder"},
}


@pytest.mark.parametrize(("variant", "workload"), WEIGHTS)
def test_only_what_is_needed_is_fetched_from_the_hub(
    variant: str, workload: str, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    log: list[str] = []
    with serve({"someone/tiny": tiny_models(variant)}, log) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
        encoder = open_wan("someone/tiny", workload)
    assert (encoder.contract.model, encoder.contract.revision) == ("someone/tiny", COMMIT)
    assert {Path(name).parent.name for name in downloaded(log) if name.endswith(".safetensors")} == WEIGHTS[
        variant, workload
    ]
    folders = WEIGHTS[variant, workload] | {"tokenizer"}
    folders |= {"image_processor"} if "image_encoder" in folders else set()
    others = {name for name in downloaded(log) if Path(name).parent.name not in folders}
    assert all(name.endswith(("config.json", "model_index.json")) for name in others)
    assert encoder.contract.to_json() == open_wan(tiny_models(variant), workload).contract.to_json() | {
        "model": "someone/tiny",
        "revision": COMMIT,
    }
    encoder.load()
    assert encoder.encode_text(["A dog."])[0].shape[1] == 32


# What is written

TENSORS = ("vae_latent", "text_embedding", "clip_feature", "first_frame_latent", "pil_image")


@pytest.fixture(scope="module")
def dataset(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    for number in range(3):
        make_video(root / f"{number}.mp4", fps=4, num_frames=9, seed=number)
        (root / f"{number}.txt").write_text(f"Caption {number}.")
    return root


@pytest.mark.parametrize("variant", [variant for variant in FEATURES if "i2v" in FEATURES[variant]])
def test_an_image_to_video_row_has_fastvideos_columns_and_is_empty_where_the_model_takes_nothing(
    variant: str, dataset: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    run = ["run", dataset, tmp_path / "out", "--model-path", tiny_models(variant), "--workload-type", "i2v"]
    size = ["--max-height", 64, "--max-width", 96, "--num-frames", 9, "--train-fps", 4]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert cli.main([str(value) for value in (*run, *size, "--serial", "--encode-threads", 1)]) == 0
        assert cli.main(["verify", str(tmp_path / "out")]) == 0, output.getvalue()
    (file,) = (tmp_path / "out/combined_parquet_dataset").iterdir()
    assert pq.read_schema(file).remove_metadata().equals(SCHEMAS["i2v"])
    latent_shape = [48, 3, 4, 6] if variant == "2.2-ti2v-5b" else [16, 3, 8, 12]
    shapes = {"vae_latent": latent_shape, "clip_feature": [257, 64], "first_frame_latent": latent_shape}
    rows = pq.read_table(file).to_pylist()
    assert [row["id"] for row in rows] == ["0.mp4", "1.mp4", "2.mp4"]
    for row in rows:
        for name in TENSORS:
            content = row[f"{name}_bytes"], row[f"{name}_shape"], row[f"{name}_dtype"]
            if name not in FEATURES[variant]["i2v"]:
                assert content == (b"", [], ""), name
                continue
            array = np.frombuffer(content[0], np.float32).reshape(content[1])
            assert content[2] == "float32"
            assert list(array.shape) == shapes.get(name, [len(array), 32])
            assert np.isfinite(array).all() and array.any()
        assert (row["width"], row["height"], row["num_frames"], row["media_type"]) == (96, 64, 3, "video")
    index = pq.read_table(tmp_path / "out/_streamprep/index.parquet").column_names
    assert {name.removesuffix("_offset") for name in index if name.endswith("_offset")} == FEATURES[variant]["i2v"]
