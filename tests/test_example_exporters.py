"""The exporters in ``examples/exporters``, installed by pip and used by name, and read as their trainers read.

The readers here are written after finetrainers f476c37 (``data/precomputation.py``, ``data/sampler.py``,
``models/wan/base_specification.py``) and musubi-tuner 30c658c (``dataset/image_video_dataset.py``,
``dataset/bucket.py``, ``wan_train_network.py``).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks, Process
from object_stores import NewBucket
from quick_cases import mostly_slow
from safetensors import safe_open
from safetensors.torch import load_file
from servers import Server
from torch import Tensor

from exporters import webdataset
from streamprep import cli, job
from streamprep.config import EncodeConfig
from streamprep.dataset import EncodedDataset
from streamprep.storage import open_store

pytest_plugins = ["jobs", "object_stores"]

PACKAGES = ("finetrainers", "musubi")
SIZES = ((64, 48), (48, 64))
NUM_VIDEOS = 5
BFLOAT16 = {"rtol": 2.0**-8, "atol": 2.0**-8}
FLAGS = ("--num-frames", 5, "--train-fps", 1, "--encode-threads", 1, "--device", "cpu", "--serial")
FLAGS += ("--buckets", "32x48,48x32", "--caption", "all", "--samples-per-file", 3)


@pytest.fixture(scope="module")
def site(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both packages, as pip installs them without asking anybody else for anything."""
    root = tmp_path_factory.mktemp("installed")
    shutil.copytree(repo_root / "examples/exporters", root / "sources")  # building leaves files beside the sources
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    sources = [root / "sources" / package for package in PACKAGES]
    subprocess.run([*install, "--target", root / "site", *sources], check=True, timeout=300)
    return root / "site"


@dataclass(frozen=True)
class Commands:
    """Where both packages are installed."""

    forks: Forks
    site: Path
    repo_root: Path

    def streamprep(self, *arguments: object, **how: Any) -> Process:
        return self.forks.run(*arguments, source=self.site, **how)

    def lay_out(self, package: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, self.site / "bin" / f"streamprep-{package}", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": f"{self.site}{os.pathsep}{self.repo_root}"},
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture(scope="module")
def commands(forks: Forks, site: Path, repo_root: Path) -> Commands:
    return Commands(forks, site, repo_root)


@pytest.fixture(scope="module")
def shards(forks: Forks, make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of two sizes, one of which has two captions."""
    root = tmp_path_factory.mktemp("shards")
    rows = []
    for number in range(NUM_VIDEOS):
        name = f"part {number % 2}/a_long_name_with_low_bars_{'_' * 20}v1.{number}.mp4"
        make_video(root / "dataset/videos" / name, fps=1, seed=number, size=SIZES[number % 2])
        rows.append({"path": name, "cap": [f"Video {number} of Zo\u00eb.", "Again."][: 2 if number == 0 else 1]})
    (root / "dataset/videos2caption.json").write_text(json.dumps(rows))
    packed = forks.run("pack", root / "dataset", root / "shards", "--num-workers", 1)
    assert packed.code == 0, packed.output
    return root / "shards"


@dataclass(frozen=True)
class Expected:
    """What the same command writes in float32 with an exporter of ours."""

    rows: Mapping[str, Mapping[str, Tensor]]
    """By key: tensors by name."""
    contract: Mapping[str, Any]

    def normalised(self, key: str) -> Tensor:
        """A latent as the transformer takes it."""
        video = self.contract["video"]
        mean, std = (torch.tensor(video[name]).reshape(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (self.rows[key]["vae_latent"] - mean) / std


Encode = Callable[..., tuple[Path, Expected]]


@pytest.fixture(scope="module")
def encode(
    commands: Commands, shards: Path, tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Encode:
    """``encode(exporter, variant, *flags)``: an output that is verified, and what is to be in it."""

    def run(exporter: str, variant: str, *flags: object) -> tuple[Path, Expected]:
        root = tmp_path_factory.mktemp("outputs")
        common = (shards, "--model-path", tiny_models(variant), *FLAGS, *flags)
        theirs = ("encode", *common[:1], root / "out", *common[1:], "--exporter", exporter)
        ours = (
            "encode",
            *common[:1],
            root / "ours",
            *common[1:],
            "--exporter",
            "webdataset",
            "--latent-dtype",
            "float32",
        )
        for command in (theirs, ours, ("verify", root / "out")):
            done = commands.streamprep(*command)
            assert done.code == 0, done.output
        return root / "out", read_expected(root / "ours")

    return run


def read_expected(out: Path) -> Expected:
    store, rows = open_store(out), {}
    current = job.open_job(store)
    for record in current.records():
        for file in record.files:
            for row, (_, tensors) in zip(file.rows, webdataset.read_file(store, file.name), strict=True):
                rows[row.key] = tensors
    return Expected(rows, current.plan.contract)


@pytest.fixture(scope="module")
def finetrainers(encode: Encode) -> tuple[Path, Expected]:
    return encode("finetrainers", "2.1-t2v", "--posterior", "moments")


@pytest.fixture(scope="module")
def musubi(encode: Encode) -> tuple[Path, Expected]:
    return encode("musubi", "2.1-t2v")


# --- their own tests, and what is written about them


@pytest.mark.parametrize("package", mostly_slow(PACKAGES, quick=["finetrainers"]))
def test_the_package_passes_the_contract(package: str, site: Path, repo_root: Path) -> None:
    """Its command is run here, below."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not command", "."],
        cwd=repo_root / "examples/exporters" / package,
        env=os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{repo_root}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    (number,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(number) > 30 and "skipped" not in done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_the_commands_of_the_readme_are_those_there_are(package: str, repo_root: Path) -> None:
    folder = repo_root / "examples/exporters" / package
    (block,) = re.findall(r"```console\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    install, encode, lay_out = (line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines())
    assert install == f"pip install examples/exporters/{package}"
    _, verb, *arguments = shlex.split(encode)
    config = cli.parse(verb, arguments)
    assert isinstance(config, EncodeConfig)
    assert config.exporter == package
    program, out, _ = shlex.split(lay_out)
    assert out == config.out
    assert f'{program} = "streamprep_{package}:main"' in (folder / "pyproject.toml").read_text()


# --- finetrainers


def read_as_finetrainers(
    precomputation_dir: Path, data_type: str, *, rank: int, world_size: int
) -> list[dict[str, Any]]:
    """What a rank gets in one epoch of ``PrecomputedOnceDataIterable``."""
    folder = precomputation_dir / "finetrainers-precomputed-data"
    num_items = max(1, len(list(folder.glob(f"{data_type}-*.pt"))) // world_size)
    paths = [folder / f"{data_type}-{rank * num_items + number}.pt" for number in range(num_items)]
    return [torch.load(path.as_posix(), map_location=torch.device("cpu"), weights_only=True) for path in paths]


def batches_as_finetrainers(
    conditions: list[dict[str, Any]], latents: list[dict[str, Any]], *, batch_size: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Its ``ResolutionSampler`` and collation: all tensors but statistics are joined along their first dimension."""
    waiting = defaultdict(list)
    for pair in zip(conditions, latents, strict=True):
        waiting[pair[1]["latents"].shape[2:]].append(pair)
        for shape in [shape for shape, pairs in waiting.items() if len(pairs) == batch_size]:
            one, other = zip(*waiting.pop(shape), strict=True)
            yield collate_as_finetrainers(one), collate_as_finetrainers(other)


def collate_as_finetrainers(items: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    first = items[0]
    return {
        name: first[name] if name in ("latents_mean", "latents_std") else torch.cat([item[name] for item in items])
        for name in first
    }


def normalise_as_finetrainers(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (latents.float() - mean.view(1, -1, 1, 1, 1)) * std.view(1, -1, 1, 1, 1)


def test_finetrainers_reads_the_moments_and_the_padded_captions(
    finetrainers: tuple[Path, Expected], commands: Commands, tmp_path: Path
) -> None:
    out, expected = finetrainers
    done = commands.lay_out("finetrainers", out, tmp_path / "precomputed")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"6 samples in {tmp_path}/precomputed/finetrainers-precomputed-data\n"
    seen = set()
    for rank in range(2):
        both = [
            read_as_finetrainers(tmp_path / "precomputed", data_type, rank=rank, world_size=2)
            for data_type in ("condition", "latent")
        ]
        for conditions, latents in batches_as_finetrainers(*both, batch_size=1):
            assert set(conditions) == {"encoder_hidden_states"}
            assert set(latents) == {"latents", "latents_mean", "latents_std"}
            mean, logvar = latents["latents"].chunk(2, dim=1)
            mean = normalise_as_finetrainers(mean, latents["latents_mean"], latents["latents_std"])
            (key,) = [
                key
                for key, row in expected.rows.items()
                if key not in seen
                and mean[0].shape == row["vae_latent"].shape
                and torch.allclose(mean[0], expected.normalised(key), rtol=2**-7, atol=2**-7)
                and torch.allclose(logvar[0].float(), row["vae_logvar"], **BFLOAT16)
                and matches_padded(conditions["encoder_hidden_states"], row["text_embedding"])
            ]
            seen.add(key)
    assert seen == set(expected.rows)


def matches_padded(padded_1LD: Tensor, text_LD: Tensor) -> bool:
    assert padded_1LD.shape == (1, 512, text_LD.shape[1])
    length = len(text_LD)
    return torch.allclose(padded_1LD[0, :length].float(), text_LD, **BFLOAT16) and not padded_1LD[0, length:].any()


def test_finetrainers_puts_samples_of_one_size_into_a_batch(
    finetrainers: tuple[Path, Expected], commands: Commands, tmp_path: Path
) -> None:
    assert commands.lay_out("finetrainers", finetrainers[0], tmp_path).returncode == 0
    both = [read_as_finetrainers(tmp_path, what, rank=0, world_size=1) for what in ("condition", "latent")]
    shapes = [
        (conditions["encoder_hidden_states"].shape, latents["latents"].shape)
        for conditions, latents in batches_as_finetrainers(*both, batch_size=2)
    ]
    assert set(shapes) == {((2, 512, 32), (2, 32, 2, 4, 6)), ((2, 512, 32), (2, 32, 2, 6, 4))}


def test_the_job_for_finetrainers_is_read_by_our_reader_too(finetrainers: tuple[Path, Expected]) -> None:
    """Its tensors are our own, in another wrapping."""
    out, expected = finetrainers
    batches = list(EncodedDataset(out, batch_size=1, posterior="mean", text_padding="longest"))
    assert len(batches) == len(expected.rows)
    for batch in batches:
        row = expected.rows[batch["keys"][0]]
        for name in ("vae_latent", "text_embedding"):
            torch.testing.assert_close(batch[name][0].float(), row[name], **BFLOAT16)


# --- musubi-tuner


@dataclass(frozen=True)
class MusubiItem:
    """What it makes of a file's name."""

    latents: Path
    text: Path
    bucket: tuple[int, int, int]
    """Width, height, frames."""


def items_as_musubi(cache_dir: Path, *, resolution: tuple[int, int]) -> list[MusubiItem]:
    """``VideoDataset.prepare_for_training`` with ``enable_bucket`` and ``bucket_no_upscale``."""
    items = []
    for path in sorted(cache_dir.glob("*_wan.safetensors")):
        tokens = path.name.split("_")
        width, height = map(int, tokens[-2].split("x"))
        _, num_frames = map(int, tokens[-3].split("-")[:2])
        text = cache_dir / f"{'_'.join(tokens[:-3])}_wan_te.safetensors"
        assert text.exists(), "it would leave the item out"
        assert width * height <= resolution[0] * resolution[1], "it would look for a bucket of like aspect"
        items.append(MusubiItem(path, text, (width - width % 16, height - height % 16, num_frames)))
    return items


def batch_as_musubi(items: list[MusubiItem]) -> dict[str, Any]:
    """``BucketBatchManager.__getitem__``: contents by name without size and dtype; what is varlen is not stacked."""
    found, is_varlen = defaultdict(list), set()
    for item in items:
        for key, tensor in (load_file(item.latents) | load_file(item.text)).items():
            name = key.replace("varlen_", "")
            name = re.sub("_(float32|float16|bfloat16)$", "", name)
            if name.startswith("latents_"):
                name = name.rsplit("_", 1)[0]
            if key.startswith("varlen_"):
                is_varlen.add(name)
            found[name].append(tensor)
    return {name: tensors if name in is_varlen else torch.stack(tensors) for name, tensors in found.items()}


def keys_of(cache_dir: Path) -> dict[str, str]:
    """Item -> key."""
    return {
        path.name.removesuffix("_wan.json"): json.loads(path.read_bytes())["keys"][0]
        for path in cache_dir.glob("*.json")
    }


def item_name(item: MusubiItem) -> str:
    return item.text.name.removesuffix("_wan_te.safetensors")


def test_musubi_reads_normalised_latents_and_captions_without_padding(
    musubi: tuple[Path, Expected], commands: Commands, tmp_path: Path
) -> None:
    out, expected = musubi
    done = commands.lay_out("musubi", out, tmp_path / "cache")
    assert (done.returncode, done.stdout) == (0, f"6 items in {tmp_path}/cache\n"), done.stderr
    items, keys = items_as_musubi(tmp_path / "cache", resolution=(48, 32)), keys_of(tmp_path / "cache")
    assert sorted(keys[item_name(item)] for item in items) == sorted(expected.rows)
    for item in items:
        batch, key = batch_as_musubi([item]), keys[item_name(item)]
        assert set(batch) == {"latents", "t5"}
        assert batch["latents"].dtype == batch["t5"][0].dtype == torch.bfloat16
        torch.testing.assert_close(batch["latents"][0].float(), expected.normalised(key), **BFLOAT16)
        torch.testing.assert_close(batch["t5"][0].float(), expected.rows[key]["text_embedding"], **BFLOAT16)


def test_musubi_makes_batches_of_one_bucket(musubi: tuple[Path, Expected], commands: Commands, tmp_path: Path) -> None:
    assert commands.lay_out("musubi", musubi[0], tmp_path / "cache").returncode == 0
    by_bucket = defaultdict(list)
    for item in items_as_musubi(tmp_path / "cache", resolution=(48, 32)):
        by_bucket[item.bucket].append(item)
    shapes = {bucket: batch_as_musubi(items)["latents"].shape for bucket, items in by_bucket.items()}
    assert shapes == {(48, 32, 5): (4, 16, 2, 4, 6), (32, 48, 5): (2, 16, 2, 6, 4)}


def test_musubi_finds_in_a_file_what_its_own_caches_say_of_themselves(
    musubi: tuple[Path, Expected], commands: Commands, tmp_path: Path
) -> None:
    assert commands.lay_out("musubi", musubi[0], tmp_path / "cache").returncode == 0
    item = items_as_musubi(tmp_path / "cache", resolution=(48, 32))[0]
    width, height, num_frames = item.bucket
    with safe_open(item.latents, "pt") as file:
        assert list(file.keys()) == [f"latents_2x{height // 8}x{width // 8}_bfloat16"]
        assert file.metadata() == {
            "architecture": "wan",
            "format_version": "1.0.1",
            "width": str(width),
            "height": str(height),
            "frame_count": str(num_frames),
        }
    with safe_open(item.text, "pt") as file:
        assert list(file.keys()) == ["varlen_t5_bfloat16"]
        assert file.metadata()["architecture"] == "wan"
        assert re.fullmatch("Video . of Zo\u00eb.|Again.", file.metadata()["caption1"])


def test_musubi_reads_the_first_frame_behind_its_mask(encode: Encode, commands: Commands, tmp_path: Path) -> None:
    out, expected = encode("musubi", "2.1-i2v", "--workload-type", "i2v")
    assert commands.lay_out("musubi", out, tmp_path / "cache").returncode == 0
    keys = keys_of(tmp_path / "cache")
    for item in items_as_musubi(tmp_path / "cache", resolution=(48, 32)):
        batch, row = batch_as_musubi([item]), expected.rows[keys[item_name(item)]]
        assert set(batch) == {"latents", "latents_image", "clip", "t5"}
        mask, image = batch["latents_image"][0, :4], batch["latents_image"][0, 4:]
        assert torch.equal(mask[:, :1], torch.ones_like(mask[:, :1])) and not mask[:, 1:].any()
        torch.testing.assert_close(image.float(), row["first_frame_latent"], **BFLOAT16)
        torch.testing.assert_close(batch["clip"][0].float(), row["clip_feature"], **BFLOAT16)
        assert batch["clip"].shape == (1, 257, 64)


def test_the_job_for_musubi_does_not_call_normalised_latents_raw(musubi: tuple[Path, Expected]) -> None:
    """Its contract says that ``vae_latent`` is raw."""
    with pytest.raises(ValueError, match=r"has no vae_latent: its tensors are text_embedding, vae_latent_normalised"):
        EncodedDataset(musubi[0], batch_size=1, tensors=("vae_latent", "text_embedding"))


def test_a_job_of_ours_becomes_musubis_without_encoding_again(
    musubi: tuple[Path, Expected],
    commands: Commands,
    shards: Path,
    tiny_model: Path,
    moto_server: Server,
    new_bucket: NewBucket,
    tmp_path: Path,
) -> None:
    """By way of float32, into a bucket, and out of it: the same files as from the encoder."""
    bucket = f"{new_bucket(moto_server)}/caches"
    flags = ("--model-path", tiny_model, *FLAGS, "--exporter", "webdataset", "--latent-dtype", "float32")
    for command in (
        ("encode", shards, tmp_path / "ours", *flags),
        ("convert", tmp_path / "ours", bucket, "--exporter", "musubi"),
    ):
        done = commands.streamprep(*command, environment=bucket_environment())
        assert done.code == 0, done.output
    for source, target in ((musubi[0], tmp_path / "one"), (bucket, tmp_path / "other")):
        laid_out = commands.lay_out("musubi", source, target)
        assert laid_out.returncode == 0, laid_out.stderr
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "other"))
    assert one == other and len(one) == 3 * 6


def bucket_environment() -> dict[str, str]:
    """What `new_bucket` set, which the server of forks does not know."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


# --- what is refused


@pytest.mark.parametrize(
    ("exporter", "variant", "flags", "message"),
    [
        ("musubi", "2.2-ti2v-5b", (), r"musubi cannot hold these: they are wan 2.2-ti2v-5b's with 48 channels"),
        ("musubi", "2.1-t2v", ("--posterior", "moments"), r"the exporter musubi holds only mean"),
        ("musubi", "2.1-t2v", ("--workload-type", "text"), r"the exporter musubi holds only t2v, i2v"),
        ("musubi", "2.1-t2v", ("--latent-dtype", "float16"), r"the exporter musubi takes only bfloat16, float32"),
        ("finetrainers", "2.1-t2v", (), r"--posterior mean: the exporter finetrainers holds only moments"),
        ("finetrainers", "2.1-i2v", ("--workload-type", "i2v"), r"the exporter finetrainers holds only t2v"),
    ],
)
def test_what_its_trainer_would_misread_is_refused_before_work(
    exporter: str,
    variant: str,
    flags: tuple[str, ...],
    message: str,
    commands: Commands,
    shards: Path,
    tiny_models: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    how = ("--num-frames", 5, "--max-height", 64, "--max-width", 64, "--train-fps", 1, "--device", "cpu", "--serial")
    refused = commands.streamprep(
        "encode", shards, tmp_path / "out", "--model-path", tiny_models(variant), "--exporter", exporter, *how, *flags
    )
    assert refused.code == 2
    assert re.search(message, refused.output), refused.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (None, {"family": "hunyuan"}, "hunyuan"),
        ("video", {"space": "normalised"}, "latents are normalised"),
        ("text", {"padding": "padded"}, "text embeddings are padded"),
    ],
)
def test_contracts_of_other_latents_are_refused(
    package: str,
    part: str | None,
    change: Mapping[str, Any],
    message: str,
    musubi: tuple[Path, Expected],
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(repo_root / "examples/exporters" / package)
    module = __import__(f"streamprep_{package}")
    contract = dict(musubi[1].contract)
    assert module.contract_problem(contract) is None
    contract = {**contract, part: {**contract[part], **change}} if part else {**contract, **change}
    assert message in module.contract_problem(contract)


@pytest.mark.parametrize("package", mostly_slow(PACKAGES, quick=("musubi",)))
def test_only_what_is_whole_is_laid_out_and_all_at_once(
    package: str, request: pytest.FixtureRequest, commands: Commands, tmp_path: Path
) -> None:
    source, _ = request.getfixturevalue(package)
    other, _ = request.getfixturevalue(*(one for one in PACKAGES if one != package))
    out, target = shutil.copytree(source, tmp_path / "out"), tmp_path / "target"
    visible = target / "finetrainers-precomputed-data" if package == "finetrainers" else target
    wrong = commands.lay_out(package, other, target)
    assert wrong.returncode == 2 and "not by this one" in wrong.stderr

    (out / job.SUCCESS).rename(out / "elsewhere")
    unfinished = commands.lay_out(package, out, target)
    assert unfinished.returncode == 2 and "is not finished" in unfinished.stderr
    (out / "elsewhere").rename(out / job.SUCCESS)

    damaged = sorted((out / job.open_job(open_store(out)).plan.data_folder).iterdir())[-1]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + b"x")
    failed = commands.lay_out(package, out, target)
    assert failed.returncode == 1 and "is damaged" in failed.stderr
    assert not visible.exists()
    damaged.write_bytes(content)

    assert commands.lay_out(package, out, target).returncode == 0
    first = {path.name for path in visible.iterdir()}
    again = commands.lay_out(package, out, target)
    assert again.returncode == 2 and "is there already" in again.stderr
    assert {path.name for path in visible.iterdir()} == first
    assert not list(tmp_path.rglob("*.partial"))
