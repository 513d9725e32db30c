"""Which model it is, told without loading it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from making import make_options

from streamprep.encoders import open_encoder
from streamprep.errors import UserError
from streamprep.models import component_digest, find_model

COMPONENTS = ("vae", "text_encoder", "tokenizer")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(tiny_model, tmp_path / "copy")


def open_wan(model_path: Path | str) -> object:
    return open_encoder(str(model_path), make_options())


def weights_of(model: Path, component: str) -> Path:
    (path,) = (model / component).glob("*.safetensors")
    return path


# Digests


def write_weights(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_copy_elsewhere_has_the_same_digest(tiny_model: Path, model: Path) -> None:
    for component in COMPONENTS:
        for full in (False, True):
            assert component_digest(model / component, full=full) == component_digest(tiny_model / component, full=full)
    assert len({component_digest(model / component, full=False) for component in COMPONENTS}) == 3


@pytest.mark.parametrize("position", [0, 3, -4, -1])
@pytest.mark.parametrize("tensor", ["a_small", "b_large", "c_last"])
@pytest.mark.parametrize("full", [False, True])
def test_another_value_at_either_end_of_a_tensor_changes_the_digest(
    tmp_path: Path, tensor: str, position: int, full: bool
) -> None:
    tensors = {"a_small": torch.zeros(8), "b_large": torch.zeros(50_000), "c_last": torch.zeros(5000)}
    before = component_digest(write_weights(tmp_path / "vae", **tensors), full=full)
    tensors[tensor][position] = 1.0
    assert component_digest(write_weights(tmp_path / "vae", **tensors), full=full) != before


def test_only_the_full_digest_reads_the_middle_of_large_tensors(tmp_path: Path) -> None:
    tensors = {"large": torch.zeros(50_000)}
    folder = write_weights(tmp_path / "vae", **tensors)
    before = [component_digest(folder, full=full) for full in (False, True)]
    tensors["large"][25_000] = 1.0
    after = [component_digest(write_weights(folder, **tensors), full=full) for full in (False, True)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False]


@pytest.mark.parametrize(
    "rename", [lambda tensors: {"b": tensors["a"]}, lambda tensors: {"a": tensors["a"].view(2, 4)}]
)
def test_another_name_or_shape_changes_the_digest(
    tmp_path: Path, rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    tensors = {"a": torch.zeros(8)}
    before = component_digest(write_weights(tmp_path / "vae", **tensors), full=False)
    assert component_digest(write_weights(tmp_path / "vae", **rename(tensors)), full=False) != before


def test_another_config_or_a_further_file_changes_the_digest(model: Path) -> None:
    digests = [component_digest(model / "tokenizer", full=False)]
    config = model / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    digests.append(component_digest(model / "tokenizer", full=False))
    (model / "tokenizer" / "added_tokens.json").write_text("{}")
    digests.append(component_digest(model / "tokenizer", full=False))
    assert len(set(digests)) == 3


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_the_contract_tells_two_fine_tunes_apart(tiny_model: Path, model: Path, component: str) -> None:
    path = weights_of(model, component)
    tensors = safetensors.torch.load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    part = {"vae": "video", "text_encoder": "text"}[component]
    before, after = open_wan(tiny_model).contract.to_json(), open_wan(model).contract.to_json()  # type: ignore[attr-defined]
    assert {name for name in before if before[name] != after[name]} == {part, "model"}
    assert {name for name in before[part] if before[part][name] != after[part][name]} == {"sha256"}


# Broken weights


def spoil_by_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 507591892\n")


def spoil_by_cutting(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def spoil_by_cutting_the_header(path: Path) -> None:
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    path.write_bytes(path.read_bytes()[: size + 4])


def spoil_by_emptying(path: Path) -> None:
    path.write_bytes(b"")


def spoil_the_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:12] = b"????"
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_by_lfs_pointer, r"is not a safetensors file \(a Git LFS pointer, or cut off\?\)"),
        (spoil_by_cutting, "is cut off: its header promises more bytes than it has"),
        (spoil_by_cutting_the_header, r"is not a safetensors file \(a Git LFS pointer, or cut off\?\)"),
        (spoil_by_emptying, r"is not a safetensors file \(a Git LFS pointer, or cut off\?\)"),
        (spoil_the_header, "is not a safetensors file: its header cannot be read"),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_broken_weights_are_refused_before_they_are_loaded(
    model: Path, spoil: Callable[[Path], None], message: str, full: bool
) -> None:
    spoil(weights_of(model, "vae"))
    with pytest.raises(UserError, match=f"{weights_of(model, 'vae')} {message}"):
        component_digest(model / "vae", full=full)


# Finding


def test_a_local_folder_is_taken_as_it_is(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_model(str(tiny_model))
    assert (found.path, found.name, found.revision) == (tiny_model, "tiny-wan", None)
    monkeypatch.chdir(tiny_model)
    assert find_model(".").name == "tiny-wan"


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "~/model", "model", "a/b/c", "../model"])
def test_a_folder_that_is_missing_is_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"--model-path {path}: there is no such folder, and a hub id has the form org"
    ):
        find_model(path)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, as HF_HUB_CACHE and HF_HUB_OFFLINE=1 set it when the library is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_model_without_a_network_is_the_users_to_solve(offline_hub: Path) -> None:
    with pytest.raises(UserError, match="--model-path nobody/nothing: not a local folder, and the hub says"):
        find_model("nobody/nothing")


def test_a_hub_model_is_known_by_its_commit(offline_hub: Path, tiny_model: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline_hub / "models--someone--tiny-wan"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    found = find_model("someone/tiny-wan")
    assert (found.name, found.revision) == ("someone/tiny-wan", commit)
    assert found.config("vae/config.json")["_class_name"] == "AutoencoderKLWan"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model_index.json", "has no model_index.json: a diffusers model folder is needed"),
        ("vae", "has no vae/config.json: a diffusers model folder is needed"),
        ("text_encoder", "has no text_encoder/config.json: a diffusers model folder is needed"),
        ("tokenizer", "tokenizer is missing or empty: the model needs it"),
    ],
)
def test_a_model_without_a_component_is_refused(model: Path, missing: str, message: str) -> None:
    if (model / missing).is_dir():
        shutil.rmtree(model / missing)
    else:
        (model / missing).unlink()
    with pytest.raises(UserError, match=message):
        open_wan(model)


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[1]", "must hold an object")])
def test_a_config_that_cannot_be_read_is_named(model: Path, content: str, message: str) -> None:
    (model / "vae" / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"{model / 'vae' / 'config.json'} {message}"):
        open_wan(model)


@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        (
            "model_index.json",
            "StableDiffusionPipeline",
            "copy is a StableDiffusionPipeline; known are WanImageToVideoPipeline, WanPipeline",
        ),
        ("vae/config.json", "AutoencoderKL", "the VAE is a AutoencoderKL, AutoencoderKLWan is expected"),
    ],
)
def test_a_model_of_another_class_is_refused_with_what_was_found(
    model: Path, file: str, name: str, message: str
) -> None:
    config = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(config | {"_class_name": name}))
    with pytest.raises(UserError, match=message):
        open_wan(model)
